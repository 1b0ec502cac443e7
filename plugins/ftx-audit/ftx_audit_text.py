"""What a formatted row says: its messages as texts, and the forms in which texts are compared."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

WORD = re.compile(r"\w+")
#: Where the instruction stands in Stanford Alpaca's text.
CLASSIC = "### Instruction:\n"


@dataclass(frozen=True)
class Said:
    """One row: (role, text) of what is asked, the answer, and the other answer of a pair.

    `label`: of an answer that is called good or bad. `calls`: the answer is a tool call. `tools`: those at hand, as JSON.
    """

    asked: tuple[tuple[str, str], ...]
    answer: str
    other: str | None = None
    label: bool | None = None
    calls: bool = False
    tools: str = ""

    @cached_property
    def question(self) -> str:
        """All that stands before the answer; of plain text, the text."""
        return "\n".join(text for _, text in self.asked) or self.answer

    @cached_property
    def whole(self) -> str:
        """Everything that the row says."""
        return "\n".join([*(text for _, text in self.asked), self.answer, *([self.other] if self.other is not None else [])])

    @property
    def system(self) -> str:
        """The text of the system turn, or ""."""
        return next((text for role, text in self.asked if role == "system"), "")

    @property
    def instruction(self) -> str:
        """What the last user turn asks for: Alpaca's instruction, or its first line, which formatters put before the input."""
        text = next((text for role, text in reversed(self.asked) if role == "user"), "")
        if CLASSIC in text:
            text = text.rpartition(CLASSIC)[2].partition("\n\n")[0]
        return text.strip().partition("\n")[0].strip()


def said(row: dict[str, Any]) -> Said:
    """A formatted row of any row type."""
    found = _said(row)
    return replace(found, tools=json.dumps(row["tools"], sort_keys=True)) if row.get("tools") else found


def _said(row: dict[str, Any]) -> Said:
    if row.get("text") is not None and "prompt" not in row and "messages" not in row:
        return Said((), str(row["text"]))
    if row.get("messages") is not None:
        turns = _turns(row["messages"], "user")
        last = max((i for i, (role, _) in enumerate(turns) if role == "assistant"), default=len(turns))
        answer = turns[last][1] if last < len(turns) else ""
        return Said(tuple(turns[:last] + turns[last + 1 :]), answer, calls=last < len(turns) and bool(row["messages"][last].get("tool_calls")))
    asked = tuple(_turns(row.get("prompt") or "", "user")) if row.get("prompt") else ()
    if "chosen" in row:
        return Said(asked, _text(row["chosen"]), _text(row["rejected"]))
    completion = row.get("completion")
    label = row.get("label") if isinstance(row.get("label"), bool) else None
    calls = isinstance(completion, list) and any(turn.get("tool_calls") for turn in completion)
    return Said(asked, _text(completion), label=label, calls=calls)


def all_said(rows: Dataset) -> Iterator[Said]:
    """Every row of a dataset, a thousand of them in memory."""
    from ftx.columns import chunks

    for some in chunks(rows):
        for row in some:
            yield said(row)


def words(text: str) -> list[str]:
    """Lower-case words; what stands between them does not count."""
    return WORD.findall(text.casefold())


def folded(text: str) -> str:
    """Case and white space folded."""
    return " ".join(text.casefold().split())


def shingles(text: str, size: int = 3) -> frozenset[str]:
    """The word n-grams of a text; of a text of fewer words, the text. Empty only where there is no word."""
    found = words(text)
    if len(found) < size:
        return frozenset([" ".join(found)] if found else [])
    return frozenset(" ".join(found[at : at + size]) for at in range(len(found) - size + 1))


def _turns(part: Any, role: str) -> list[tuple[str, str]]:
    if isinstance(part, str):
        return [(role, part)]
    return [(str(turn.get("role", role)), _message(turn)) for turn in part]


def _text(part: Any) -> str:
    return part if isinstance(part, str) else "\n".join(_message(turn) for turn in part or [])


def _message(turn: dict[str, Any]) -> str:
    content = turn.get("content") or ""
    calls = [json.dumps(call.get("function", call), ensure_ascii=False) for call in turn.get("tool_calls") or []]
    return "\n".join([content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), *calls]).strip("\n") if calls else str(content)
