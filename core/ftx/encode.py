"""Rows -> token ids and labels. Masks come from the chat template by prefix difference, never from token equality."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ftx.errors import ModelError, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Encoded:
    """Token ids, and labels of the same length (IGNORE where the loss does not count); `cut` supervised tokens are lost.

    `crossed` answers have a token that reaches over their beginning or end: who is asked the question alone never sees it.
    """

    input_ids: list[int]
    labels: list[int]
    cut: int = 0
    crossed: int = 0

    def truncated(self, max_length: int | None) -> Encoded:
        """The first `max_length` tokens, as TRL keeps them, with the count of supervised tokens that this loses."""
        if max_length is None or len(self.input_ids) <= max_length:
            return self
        lost = sum(label != IGNORE for label in self.labels[max_length:])
        return replace(self, input_ids=self.input_ids[:max_length], labels=self.labels[:max_length], cut=self.cut + lost)


@dataclass(frozen=True)
class Rendered:
    """A row as text, and its supervised spans [start, end) in characters. `plain`: the tokenizer's own special tokens are
    added, and the end token behind it counts."""

    text: str
    spans: list[tuple[int, int]]
    plain: bool = False


def encode_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """One row of type prompt-completion, conversation or text.

    Message lists are rendered by the tokenizer's chat template; strings are tokenised as they stand, with the end token
    behind them. Raises RowError for a row that the template cannot render, ModelError if there is no template.
    """
    return tokenised([render_row(row, tokenizer)], tokenizer)[0]


def encode_rows(rows: Iterable[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[Encoded | RowError]:
    """What `encode_row` makes of each row, or its RowError; the tokenizer gets all of them at once."""
    rendered: list[Rendered | RowError] = []
    for row in rows:
        try:
            rendered.append(render_row(row, tokenizer))
        except RowError as error:
            rendered.append(error)
    encoded = iter(tokenised([one for one in rendered if isinstance(one, Rendered)], tokenizer))
    return [next(encoded) if isinstance(one, Rendered) else one for one in rendered]


def render_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The first half of `encode_row`: everything but the tokens."""
    tools = row.get("tools") or None
    if row.get("messages") is not None:
        return render_messages(row["messages"], tokenizer, tools=tools)
    if row.get("text") is not None:
        return render_text("", row["text"], tokenizer)
    if isinstance(row["prompt"], str) and isinstance(row["completion"], str):
        return render_text(row["prompt"], row["completion"], tokenizer)
    prompt, completion = as_messages(row["prompt"], "user"), as_messages(row["completion"], "assistant")
    return render_messages(prompt + completion, tokenizer, first=len(prompt), tools=tools)


def as_messages(part: str | Messages, role: str) -> Messages:
    """A string is one message of `role`."""
    return [{"role": role, "content": part}] if isinstance(part, str) else list(part)


def render_messages(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, first: int = 0, tools: Any = None) -> Rendered:
    """A conversation with every assistant turn from index `first` on supervised, its end-of-turn token included.

    What the template renders between the generation prompt and the end of the turn counts, the newline behind the end
    token too (as in TRL, so that losses are equal). The template must be prefix-stable: rendering fewer messages must
    give the beginning of rendering more; a RowError says where it is not.
    """
    given = len(messages)
    messages, tools = _for_template(messages, tools, tokenizer)
    first += len(messages) - given  # a system message that carries the tools may have come in front
    whole = render(messages, tokenizer, tools=tools)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first:
            continue
        until = whole if index == len(messages) - 1 else render(messages[: index + 1], tokenizer, tools=tools)
        before = render(messages[:index], tokenizer, tools=tools, generation_prompt=True) if index else _opening(until, tokenizer)
        if not until.startswith(before) or not whole.startswith(until):
            raise RowError(f"the chat template renders message {index + 1} differently when more follows, so its answer cannot be found in the text")
        spans.append((len(before), len(until)))
    return Rendered(whole, spans)


def _opening(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What stands in front of an answer that begins a conversation: all up to the end of the generation prompt."""
    question = [{"role": "user", "content": "a"}]
    asking = render(question, tokenizer, generation_prompt=True).removeprefix(render(question, tokenizer))
    if asking not in text:
        raise RowError("the conversation begins with an answer, and the chat template does not show where it starts")
    return text[: text.index(asking) + len(asking)]


def render_text(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Plain text: the completion and the end token behind it are supervised."""
    if tokenizer.eos_token is None:
        raise ModelError("the tokenizer has no end-of-sequence token.", "Use a model whose tokenizer has one, or a chat formatter.")
    return Rendered(prompt + completion, [(len(prompt), len(prompt) + len(completion))], plain=True)


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, tools: Any = None, generation_prompt: bool = False) -> str:
    """Messages as the model reads them."""
    if not messages:
        return ""
    if not tokenizer.chat_template:
        raise ModelError(
            "the model's tokenizer has no chat template, so messages cannot be rendered.",
            "Use an instruction-tuned model, or a formatter that gives plain text: --formatter alpaca -o formatter.style=instruction",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt))
    except Exception as error:  # jinja2's errors have no common base that a template's raise_exception keeps
        raise RowError(f"the chat template refuses the row ({str(error).splitlines()[0] if str(error) else type(error).__name__})") from error


def prompt_text(prompt: str | Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the model is asked to continue: a string as it is, messages by the template with the generation prompt and the tools that
    the first of them carries."""
    prompt, tools = tools_apart(prompt)
    if isinstance(prompt, str):
        return prompt
    messages, tools = _for_template(prompt, tools, tokenizer)
    return render(messages, tokenizer, tools=tools, generation_prompt=True)


def tools_apart(prompt: str | Messages) -> tuple[str | Messages, Any]:
    """A question of `question_and_reference` without the tools that its first message carries, and the tools (None where there are none)."""
    if isinstance(prompt, str) or not prompt or not prompt[0].get("tools"):
        return prompt, None
    return [{key: value for key, value in prompt[0].items() if key != "tools"}, *prompt[1:]], prompt[0]["tools"]


def tools_onto(prompt: str | Messages, tools: Any) -> str | Messages:
    """The way back from `tools_apart`: its first message carries the tools, if there are any; a string has no place for them."""
    return [{**prompt[0], "tools": tools}, *prompt[1:]] if tools and prompt and not isinstance(prompt, str) else prompt


def end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end an answer: the end-of-sequence token and what the template writes behind an assistant's turn."""
    ends = {tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template:
        try:
            tail = render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "@@"}], tokenizer).rpartition("@@")[2]
        except RowError:
            return ends
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        ends |= {i for i in tokenizer(tail, add_special_tokens=False)["input_ids"][:1] if i in special}
    return ends


def own_ends(model: Any) -> set[int]:
    """The tokens at which a model of transformers stops by itself: what its generation config says."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set(own if isinstance(own, list) else [own] if own is not None else [])


def question_and_reference(row: dict[str, Any]) -> tuple[str | Messages, str]:
    """What to ask for an evaluation row, and the answer that it holds (the last assistant turn of a conversation).

    The first message of the question carries the row's tools under `tools`: `prompt_text` asks with them, as it was trained.
    """
    prompt, reference = _question_and_reference(row)
    return tools_onto(prompt, row.get("tools")), reference


def _question_and_reference(row: dict[str, Any]) -> tuple[str | Messages, str]:
    if row.get("messages") is not None:
        messages = list(row["messages"])
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if not messages:
            raise RowError("the conversation has no assistant turn to compare with")
        return messages[:-1], _content(messages[-1])
    if "completion" in row:
        completion = row["completion"]
        if isinstance(completion, str):
            return row["prompt"], completion
        return as_messages(row["prompt"], "user") + list(completion[:-1]), _content(completion[-1])
    if "chosen" in row:
        chosen = row["chosen"]
        if isinstance(chosen, str):
            return row.get("prompt") or "", chosen
        prompt = as_messages(row.get("prompt") or [], "user")
        return prompt + list(chosen[:-1]), _content(chosen[-1])
    raise RowError("a row of plain text holds no question")


def _content(message: dict[str, Any]) -> str:
    calls = message.get("tool_calls")
    return str(message.get("content") or "") + ("".join(_call_text(call) for call in calls) if calls else "")


def tokenised(rendered: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Texts and spans -> token ids and labels, each text tokenised once, those of a kind together."""
    done: dict[int, Encoded] = {}
    for plain in (False, True):
        numbers = [number for number, one in enumerate(rendered) if one.plain is plain]
        if not numbers:
            continue
        tokens = tokenizer([rendered[number].text for number in numbers], add_special_tokens=plain, return_offsets_mapping=True)
        for number, ids, offsets in zip(numbers, tokens["input_ids"], tokens["offset_mapping"], strict=True):
            one = rendered[number]
            encoded = Encoded(ids, _labels(ids, offsets, one.spans), crossed=_crossed(offsets, one.spans))
            done[number] = _ended(encoded, one, tokenizer) if plain else encoded
    return [done[number] for number in range(len(rendered))]


def _labels(ids: list[int], offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """A token is supervised when it reaches into a span (a token across a border belongs to the answer)."""
    labels = [IGNORE] * len(ids)
    for start, end in spans:
        for position, (token_start, token_end) in enumerate(offsets):
            if token_end > start and token_start < end and token_end > token_start:
                labels[position] = ids[position]
    return labels


def _crossed(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> int:
    """How many spans have a border inside a token."""
    inside = {border for start, end in offsets for border in range(start + 1, end)}
    return sum(bool(inside.intersection(span)) for span in spans)


def _ended(encoded: Encoded, rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Plain text with its end token."""
    start, end = rendered.spans[0]
    if end > start and encoded.input_ids and encoded.input_ids[-1] == tokenizer.eos_token_id:
        return replace(encoded, labels=[*encoded.labels[:-1], tokenizer.eos_token_id])  # the tokenizer's own has no place in the text
    return replace(encoded, input_ids=[*encoded.input_ids, tokenizer.eos_token_id], labels=[*encoded.labels, tokenizer.eos_token_id])


def _for_template(messages: Messages, tools: Any, tokenizer: PreTrainedTokenizerBase) -> tuple[Messages, Any]:
    """Write tool calls and tools as text where the template knows neither: else they would vanish without a word."""
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else json.dumps(tokenizer.chat_template or "")
    messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
    for message in messages:
        message.setdefault("content", "")
    if "tool_calls" not in template:
        messages = [_folded(message) for message in messages]
    if tools and "tools" not in template:
        text = "Tools:\n" + json.dumps(tools, ensure_ascii=False)
        if messages and messages[0]["role"] == "system":
            messages[0] = {**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}
        else:
            messages = [{"role": "system", "content": text}, *messages]
        tools = None
    return messages, tools


def _folded(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not calls:
        return message
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": message["content"] + "".join(_call_text(call) for call in calls)}


def _call_text(call: dict[str, Any]) -> str:
    return f"<tool_call>{json.dumps(call.get('function', call), ensure_ascii=False)}</tool_call>"
