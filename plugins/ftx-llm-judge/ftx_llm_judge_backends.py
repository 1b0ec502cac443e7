"""Where judges answer: OpenAI-compatible servers, Anthropic's, and a model in this process. One request, one answer."""

from __future__ import annotations

import datetime
import email.utils
import importlib
import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from ftx.errors import RunError
from ftx_llm_judge_options import Judging, split

if TYPE_CHECKING:
    from ftx import Run

#: UTF-8 bytes in a token, roughly.
TOKEN_BYTES = 4
#: The longest that a server's Retry-After is obeyed, in seconds.
LONGEST_WAIT = 60.0
#: Besides 5xx, what passes by itself: timeout, conflict, too early, too many requests.
PASSING = (408, 409, 425, 429)
#: What no other request could change: a wrong key, no money, no such model or address.
FOR_ALL = (401, 402, 404)
#: Error codes of a 429 that does not pass: the account has nothing left.
QUOTA = ("insufficient_quota", "billing_hard_limit_reached")


@dataclass(frozen=True, eq=False)
class Request:
    """One conversation to go on: `turns` are the user's and the judge's texts in turn, the user's first and last."""

    system: str
    turns: tuple[str, ...]
    schema: dict[str, Any] | None
    schema_name: str
    temperature: float
    max_tokens: int
    sample: int = 0

    @property
    def text(self) -> str:
        return "\n".join((self.system, *self.turns))

    def messages(self) -> list[dict[str, str]]:
        """The turns as messages, without the system text."""
        return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(self.turns)]

    def after(self, answer: str, more: str) -> Request:
        """The conversation with the judge's answer and a new turn of the user. An empty answer is refused by some servers."""
        return replace(self, turns=(*self.turns, answer.strip() or "(nothing)", more))


@dataclass(frozen=True)
class Answer:
    """`cut`: it ended at max_tokens. Tokens are the server's count, or an estimate where it gives none."""

    text: str
    input_tokens: int
    output_tokens: int
    cut: bool


class Failure(Exception):
    """No answer; the text is the reason, in one line."""


class Passing(Failure):
    """A failure that may pass: ask again, after at least `wait` seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Final(Failure):
    """A failure that asking again does not change; `for_all`, that no other request could either."""

    def __init__(self, reason: str, *, for_all: bool = False) -> None:
        super().__init__(reason)
        self.for_all = for_all


class Backend(Protocol):
    """`answer` is called in several threads; `prepare` before, with at most `batch` requests (None: with all of them)."""

    batch: int | None

    def prepare(self, requests: Sequence[Request]) -> None: ...

    def answer(self, request: Request) -> Answer: ...

    def close(self) -> None: ...


def connect(options: Judging, model: str, run: Run) -> Backend:
    """The back end of a judge. RunError for a missing client, ModelError for a local model that cannot be loaded."""
    backend, name = split(model)
    if backend == "local":
        return LocalModel(name, run)
    try:
        sdk = importlib.import_module(backend)
    except ImportError as error:
        raise RunError(f"the judge {model} needs the {backend} client.", f"pip install 'ftx-llm-judge[{backend}]'") from error
    for logger in (backend, "httpx", "httpx2", "httpcore", "httpcore2"):  # a line a request, also where the client's own variable asks for more
        logging.getLogger(logger).setLevel(logging.WARNING)
    made: dict[str, Any] = {
        "api_key": options.key(model) or "none",  # without one the clients refuse to start; servers on loopback ignore it
        "base_url": options.address(model),
        "timeout": options.timeout,
        "max_retries": 0,  # retries are counted and capped by the caller
    }
    if backend == "anthropic":
        return Server(sdk, sdk.Anthropic(**made), "messages", name, _anthropic_arguments, _anthropic_answer, run.say)
    return Server(sdk, sdk.OpenAI(**made), "chat.completions", name, _openai_arguments, _openai_answer, run.say)


class Server:
    """A chat server behind one of the two clients, whose errors have the same names and fields.

    A parameter that the server refuses (the JSON schema, the temperature, the old name of max_tokens) is left out from
    then on.
    """

    batch: int | None = None

    def __init__(
        self,
        sdk: Any,
        client: Any,
        resource: str,
        name: str,
        arguments: Callable[[Request, str, set[str]], dict[str, Any]],
        read: Callable[[Any, Request], Answer],
        say: Callable[[str], None],
    ) -> None:
        self._sdk, self._client, self._name, self._arguments, self._read, self._say = sdk, client, name, arguments, read, say
        self._refused: set[str] = set()
        for part in resource.split("."):
            client = getattr(client, part)
        self._create = client.with_raw_response.create

    def prepare(self, requests: Sequence[Request]) -> None:
        """Nothing: a server is asked one by one."""

    def answer(self, request: Request) -> Answer:
        while True:
            arguments = self._arguments(request, self._name, self._refused)
            try:
                # raw, because the client takes any JSON, and even a page of HTML, for an answer
                text = self._create(**arguments).http_response.text
                break
            except self._sdk.APIStatusError as error:
                refused = _refused(error, arguments)
                if refused is None:
                    raise _status_failure(error) from None
                if refused not in self._refused:
                    self._refused.add(refused)
                    if refused not in ("max_tokens", "json_schema"):  # which have another form there
                        self._say(f"warning: the judge {self._name} does not take {refused}, and is asked without it from now on.")
            except self._sdk.APITimeoutError:
                raise Passing("the server said nothing in time") from None
            except self._sdk.APIConnectionError as error:
                raise Passing(f"the connection failed ({_line(str(error.__cause__ or error))})") from None
            except Exception as error:  # whatever else a client thinks of costs one item, not the evaluation
                raise Final(f"{type(error).__name__}: {_line(str(error))}") from None
        try:
            return self._read(json.loads(text), request)
        except (ValueError, LookupError, TypeError, AttributeError):
            raise Passing(f"the server's answer is not in the form of an answer: {_line(text) or 'nothing'}") from None

    def close(self) -> None:
        self._client.close()


def _openai_arguments(request: Request, name: str, refused: set[str]) -> dict[str, Any]:
    system = [{"role": "system", "content": request.system}] if request.system else []
    arguments: dict[str, Any] = {"model": name, "messages": [*system, *request.messages()]}
    arguments["max_completion_tokens" if "max_tokens" in refused else "max_tokens"] = request.max_tokens
    if "temperature" not in refused:
        arguments["temperature"] = request.temperature
    if request.schema and "response_format" not in refused:
        schema = {"name": request.schema_name, "schema": request.schema, "strict": True}
        openai, llama_cpp = {"type": "json_schema", "json_schema": schema}, {"type": "json_object", "schema": request.schema}
        arguments["response_format"] = llama_cpp if "json_schema" in refused else openai
    return arguments


def _openai_answer(body: Any, request: Request) -> Answer:
    choice, usage = body["choices"][0], body.get("usage") or {}
    text = choice["message"]["content"]
    if text is None:  # a refusal, or all tokens spent on thinking
        text = choice["message"].get("refusal") or ""
    cut = choice.get("finish_reason") == "length"
    return Answer(_text(text), _count(usage, "prompt_tokens", request.text), _count(usage, "completion_tokens", text), cut)


def _anthropic_arguments(request: Request, name: str, refused: set[str]) -> dict[str, Any]:
    """Without a temperature: since version 2026-10-21 the API refuses any, and the client has no such argument."""
    from anthropic import transform_schema

    arguments: dict[str, Any] = {"model": name, "messages": request.messages(), "max_tokens": request.max_tokens}
    if request.system:
        arguments["system"] = request.system
    if request.schema and "output_config" not in refused:
        arguments["output_config"] = {"format": {"type": "json_schema", "schema": transform_schema(request.schema)}}
    return arguments


def _anthropic_answer(body: Any, request: Request) -> Answer:
    text, usage = "".join(block["text"] for block in body["content"] if block["type"] == "text"), body.get("usage") or {}
    cut = body.get("stop_reason") == "max_tokens"
    return Answer(text, _count(usage, "input_tokens", request.text), _count(usage, "output_tokens", text), cut)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("the content of an answer is a text")
    return value


def _count(usage: Any, name: str, text: str) -> int:
    count = usage.get(name)
    return count if isinstance(count, int) else tokens(text)


def tokens(text: str) -> int:
    """About how many tokens a text has, where nobody has counted them."""
    return -(-len(text.encode("utf-8", "replace")) // TOKEN_BYTES)


def _refused(error: Any, arguments: dict[str, Any]) -> str | None:
    """The parameter among those sent that the server complains of, if it can be left out or has another form."""
    said, named = str(error.message).lower(), getattr(error, "param", None)
    invalid = error.status_code == 500 and "validation error" in said  # llama-cpp-python's server
    if error.status_code not in (400, 422) and not invalid:
        return None
    if "max_tokens" in arguments and named == "max_tokens" and "max_completion_tokens" in said:
        return "max_tokens"
    for parameter, words in (("response_format", ("response_format", "json_schema")), ("output_config", ("output_config", "output_format"))):
        if parameter in arguments and any(word in said for word in words):
            return "json_schema" if arguments[parameter].get("type") == "json_schema" else parameter
    return "temperature" if "temperature" in arguments and (named == "temperature" or "`temperature`" in said) else None


def _status_failure(error: Any) -> Failure:
    """A status of 400 and above as the failure that it is."""
    status, said = error.status_code, f"HTTP {error.status_code}: {_said(error)}"
    if status == 429 and {getattr(error, "code", None), getattr(error, "type", None)} & set(QUOTA):
        return Final(f"the quota is used up ({said})", for_all=True)
    if status in PASSING or status >= 500:
        return Passing(said, wait=retry_after(error.response.headers))
    return Final(said, for_all=status in FOR_ALL)


def _said(error: Any) -> str:
    """What a server says of an error: its message, or the beginning of its page."""
    body = error.body
    inner = body.get("error", body) if isinstance(body, dict) else body
    message = inner.get("message") if isinstance(inner, dict) else inner
    return _line(str(message or error.message))


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:200]} ..."


def retry_after(headers: Any) -> float:
    """Seconds that a server asks to wait, as a number or a date, at most LONGEST_WAIT; 0 where it asks for none."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(value)
        except (ValueError, TypeError):
            return 0.0
        now = datetime.datetime.now(datetime.UTC)
        seconds = (date.replace(tzinfo=date.tzinfo or datetime.UTC) - now).total_seconds()
    return min(max(0.0, seconds), LONGEST_WAIT)


class LocalModel:
    """A model in this process. Whole batches are generated by `prepare`; `answer` gives them out."""

    batch: int | None = 32

    def __init__(self, name: str, run: Run) -> None:
        from ftx import models
        from ftx.device import best_dtype
        from ftx.generate import Generate

        path = models.resolve(name, run.say)
        self._tokenizer = models.load_tokenizer(path)
        self._generate: Any = Generate(models.load_model(path, dtype=best_dtype(run.device), device=run.device), self._tokenizer)
        self._ready: dict[Request, Answer] = {}
        self._lock = threading.Lock()

    def prepare(self, requests: Sequence[Request]) -> None:
        kinds: dict[tuple[int, float, int], list[Request]] = {}
        for request in requests:
            kinds.setdefault((request.max_tokens, request.temperature, request.sample), []).append(request)
        for (max_tokens, temperature, sample), alike in kinds.items():
            prompts = [self._messages(request) for request in alike]
            texts = self._generate(prompts, max_new_tokens=max_tokens, temperature=temperature, seed=sample)
            for request, text in zip(alike, texts, strict=True):
                made = self._count(text)
                self._ready[request] = Answer(text, self._count(request.text), made, made >= max_tokens)

    def answer(self, request: Request) -> Answer:
        with self._lock:
            if request not in self._ready:
                self.prepare([request])
            return self._ready.pop(request)

    def close(self) -> None:
        """Let go of the model, and of the memory that it holds on the device."""
        import torch

        self._generate = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _messages(self, request: Request) -> list[dict[str, str]]:
        """With the system text, or with it before the first question where the template knows no system."""
        from ftx.encode import prompt_text
        from ftx.errors import RowError

        messages = request.messages()
        if not request.system:
            return messages
        whole = [{"role": "system", "content": request.system}, *messages]
        try:
            prompt_text(whole, self._tokenizer)
        except RowError:
            first = {"role": "user", "content": f"{request.system}\n\n{messages[0]['content']}"}
            return [first, *messages[1:]]
        return whole

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])
