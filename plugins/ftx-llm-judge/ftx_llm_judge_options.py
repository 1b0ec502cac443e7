"""The options that every judging evaluator has, and what must be right before a judge is asked."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from ftx import option, plugin

if TYPE_CHECKING:
    from ftx import Run

#: Back end -> the variable that holds its key, unless key_env names another.
KEYS = {"openai": "OPENAI_API_KEY", "anthropic": "ANTHROPIC_API_KEY", "local": ""}
#: Back end -> the variable that holds its address, unless base_url gives one.
ADDRESSES = {"openai": "OPENAI_BASE_URL", "anthropic": "ANTHROPIC_BASE_URL", "local": ""}
#: Names that tell a family; "ollama" is a server.
FAMILIES = re.compile(
    r"smollm|(?<!o)llama|qwen|gpt|claude|mistral|mixtral|ministral|magistral|gemma|gemini|(?<![a-z])phi(?![a-z])|deepseek|falcon|granite|olmo"
)


@plugin
class Judging:
    """What LLMJudge and MTBench share. A subclass has @plugin itself and, in `called`, its name in `-o NAME.option`."""

    called = "llm-judge"

    model: list[str] | str = option("", "The judge: gpt-4o (any OpenAI-compatible server), anthropic:MODEL or local:MODEL; a list is a jury.")
    base_url: str | None = option(None, "Address of the server, such as http://127.0.0.1:8000/v1 (default: $OPENAI_BASE_URL, else OpenAI's).")
    key_env: str | None = option(None, "Name of the environment variable that holds the key (default: OPENAI_API_KEY or ANTHROPIC_API_KEY).")
    concurrency: int = option(4, "Requests under way at a time.")
    timeout: float = option(120.0, "Seconds to wait for a server that says nothing.")
    retries: int = option(6, "How often a request is made again after a passing failure.")
    max_tokens: int = option(1024, "Longest verdict, in tokens.")
    temperature: float = option(0.0, "Temperature of the judge; Anthropic's models take none.")
    cache: str = option("", "File of the answers that need not be asked again (default: judge.sqlite in ftx's cache); 'none': keep none.")
    prices: dict[str, Any] = option({}, "Model -> [USD per million input tokens, USD per million output tokens].")
    dry_run: bool = option(False, "Ask nothing; say how many calls and tokens it would be, and with prices what they cost.")
    max_cost: float | None = option(None, "Ask no more before this many USD are exceeded; needs prices.")
    max_calls: int | None = option(None, "Ask no more after this many requests, repeated ones included.")
    structured: Literal["auto", "off"] = option("auto", "Have the server hold the judge to a JSON schema where it can.")
    allow_self: bool = option(False, "Let a model judge itself.")

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("retries", 0), ("max_tokens", 1), ("max_calls", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        for name in ("timeout", "max_cost"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must lie in 0..2, not {self.temperature}")
        if self.key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.key_env):
            raise ValueError("key_env must be the name of an environment variable, not the key itself")
        if self.base_url is not None:
            _check_address(self.base_url)
        for model in self.prices:
            self.price(model)

    @property
    def models(self) -> tuple[str, ...]:
        """The judges as they were named; ValueError where none is."""
        named = [self.model] if isinstance(self.model, str) else self.model
        if not named or not all(name.strip() for name in named):
            raise ValueError(f"no judge is named: -o {self.called}.model=MODEL")
        if len(set(named)) < len(named):
            raise ValueError(f"a judge is named twice: {', '.join(named)}")
        return tuple(named)

    def price(self, model: str) -> tuple[float, float] | None:
        """USD per million input and output tokens; None for a model without a price, ValueError for one that is none."""
        price = self.prices.get(model, self.prices.get(split(model)[1]))
        if price is None:
            return None
        try:
            given, made = json.loads(price) if isinstance(price, str) else price  # `-o NAME.prices.MODEL=[1, 2]` comes as text
            pair = float(given), float(made)
        except (ValueError, TypeError):
            pair = (-1.0, -1.0)
        if not all(0 <= one < float("inf") for one in pair):
            raise ValueError(f"prices.{model} must be [USD per million input tokens, USD per million output tokens], not {price!r}")
        return pair

    def address(self, model: str) -> str | None:
        """The server that a judge is asked at, without a closing slash; None for the client's own."""
        backend = split(model)[0]
        given = self.base_url if self._given_for(backend) else None
        return (given or os.environ.get(ADDRESSES[backend]) or "").rstrip("/") or None

    def key_name(self, model: str) -> str:
        """The environment variable that holds a judge's key; "" where no key is used."""
        backend = split(model)[0]
        return (self.key_env if self._given_for(backend) else None) or KEYS[backend]

    def key(self, model: str) -> str:
        """A judge's key, from the environment; "" where there is none. Never write it anywhere."""
        return os.environ.get(self.key_name(model), "").strip()

    def preflight_reasons(self, run: Run, judged: Sequence[str] | None = None) -> list[str]:
        """Why these judges cannot be asked. Warns, by run.say, of a judge that is of the judged model's family.

        `judged` are the references of the judged models (default: the run's model). No reason holds a key.
        """
        try:
            models = self.models
        except ValueError as error:
            return [f"{error} (gpt-4o, anthropic:MODEL, local:MODEL, or what your server at {self.called}.base_url calls its model)"]
        judged = [run.model] if judged is None else judged
        reasons = [reason for model in models for reason in (*self._needs(model), *self._itself(model, judged, run))]
        for model in models:
            for other in judged:
                if shared := families(model) & families(other):
                    run.say(f"warning: the judge {model} and the judged {other} are of one family ({', '.join(sorted(shared))}); judges favour their own kind.")
        return reasons

    def _needs(self, model: str) -> list[str]:
        """What is missing to ask one judge: a price, and unless nothing is asked its client and its key."""
        backend, name = split(model)
        reasons = []
        if self.max_cost is not None and self.price(model) is None and backend != "local":
            reasons.append(f"{self.called}.max_cost needs the judge's price: -o '{self.called}.prices.{name}=[USD per million input tokens, output tokens]'")
        if self.dry_run or backend == "local":
            return reasons
        if importlib.util.find_spec(backend) is None:
            reasons.append(f"the judge {model} needs the {backend} client: pip install 'ftx-llm-judge[{backend}]'")
        if not self.key(model) and not is_loopback(self.address(model)):
            reasons.append(
                f"the judge {model} needs a key: put it into the environment variable {self.key_name(model)},"
                f" or name the variable that holds it with -o {self.called}.key_env=NAME"
            )
        return reasons

    def _itself(self, model: str, judged: Sequence[str], run: Run) -> list[str]:
        backend, name = split(model)
        same = name.lower() in (one.lower() for one in judged) or (backend == "local" and run.model in judged and _directory(name) == run.model_path.resolve())
        if same and not self.allow_self:
            return [f"the judge {model} is the judged model itself: name another judge, or allow it with -o {self.called}.allow_self=true"]
        return []

    def _given_for(self, backend: str) -> bool:
        """base_url and key_env are those of the OpenAI-compatible judges; Anthropic's only where there are no others."""
        return backend == "openai" or (backend == "anthropic" and all(split(model)[0] != "openai" for model in self.models))


def split(model: str) -> tuple[str, str]:
    """A judge's back end and its name there: "local:smollm2" -> ("local", "smollm2"), "qwen2.5:7b" -> ("openai", ...)."""
    backend, colon, name = model.partition(":")
    return (backend, name) if colon and backend in KEYS else ("openai", model)


def families(model: str) -> set[str]:
    """The model families that a name speaks of, by the last two parts of a path or hub id."""
    name = "/".join(split(model)[1].lower().rstrip("/").split("/")[-2:])
    return {"mistral" if word.endswith("tral") else word for word in FAMILIES.findall(name)}


def is_loopback(address: str | None) -> bool:
    """True for a server on this machine."""
    host = urlsplit(address or "").hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _check_address(address: str) -> None:
    """ValueError for what is no http address, or holds a password: it would stand in the recipe."""
    parts = urlsplit(address)
    if parts.password or parts.username:
        raise ValueError("base_url must not hold a user or a password; keys come from the environment (key_env)")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url must start with http:// or https://, not '{address}'")


def _directory(name: str) -> Path | None:
    """The directory that a model's name means, or None."""
    from ftx.errors import ModelError
    from ftx.models import resolve

    try:
        directory: Path = resolve(name)
    except ModelError:
        return None
    return directory.resolve()
