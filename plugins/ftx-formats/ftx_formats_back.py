"""Formatted rows back into the rows of a file: what each format can hold of the turns of another."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ftx import RowError
from ftx_formats_messages import MessageList, check_conversation

#: What a turn has in formats that know texts only.
PLAIN = {"role", "content"}


@dataclass(frozen=True)
class Turns:
    """A conversation, the index from which on its answers count in the loss, and its tools."""

    messages: MessageList
    first: int
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def untrained(self) -> int:
        """Answers that are context only."""
        return sum(message["role"] == "assistant" for message in self.messages[: self.first])


def turns_of(row: dict[str, Any], formatter: str) -> Turns:
    """A row of type conversation or prompt-completion as turns. RowError for every other, and for plain texts."""
    tools = row.get("tools") or []
    if row.get("messages") is not None:
        messages = row["messages"]
        return Turns(messages, next((i for i, one in enumerate(messages) if one["role"] == "assistant"), len(messages)), tools)
    refuse_pairs(row, formatter)
    if row.get("text") is not None:
        raise RowError(f"{formatter} holds questions and answers, this row is plain text")
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise RowError(f"{formatter} holds turns, and this row is plain text to continue (read with style=chat it is turns)")
    return Turns([*prompt, *completion], len(prompt), tools)


def refuse_pairs(row: dict[str, Any], formatter: str) -> None:
    """RowError for a row of a preference type: one of its answers, or its label, would be lost."""
    if "chosen" in row:
        raise RowError(f"{formatter} holds one answer, this row has a chosen and a rejected one")
    if "label" in row:
        raise RowError(f"{formatter} has no place for a label that calls an answer good or bad")


def conversation_of(row: dict[str, Any], formatter: str) -> Turns:
    """The turns of a row for a format in which every answer counts: RowError where an earlier one is context only."""
    turns = turns_of(row, formatter)
    if turns.untrained:
        raise RowError(f"{formatter} trains on every answer, and {turns.untrained} of this row are context only")
    check_conversation(turns.messages, "the conversation")
    return turns


def plain(message: dict[str, Any], formatter: str) -> str:
    """The text of a turn that has nothing else; RowError where it has."""
    more = sorted(key for key, value in message.items() if key not in PLAIN and value is not None)
    if more:
        raise RowError(f"{formatter} has no place for {', '.join(more)} of a turn")
    if not isinstance(message.get("content"), str) or not message["content"].strip():
        raise RowError(f"{formatter} cannot hold an empty turn")
    return str(message["content"])


def sharegpt_turn(message: dict[str, Any], tags: dict[str, str]) -> tuple[str, str]:
    """(tag, text) of a message; `tags`: role -> tag, `function` for calls. RowError for what such a turn cannot hold."""
    calls = message.get("tool_calls")
    if calls:
        if message.get("content") or any(set(call) != {"type", "function"} for call in calls):
            raise RowError("sharegpt holds the calls of a turn without text and without ids")
        plain({**message, "tool_calls": None, "content": "-"}, "sharegpt")
        inner = [call["function"] for call in calls]
        return tags["function"], json.dumps(inner[0] if len(inner) == 1 else inner, ensure_ascii=False)
    text = message.get("content") or ""
    plain({**message, "content": text or "-"} if message["role"] in ("system", "tool") else message, "sharegpt")
    return tags[message["role"]], text


def same(written: dict[str, Any], read: Callable[[dict[str, Any]], Any], row: dict[str, Any], formatter: str) -> dict[str, Any]:
    """`written`, if reading it gives just `row` again; else RowError: what cannot go there and back is not written."""
    again = read(written)
    if isinstance(again, list):
        again = again[0] if len(again) == 1 else None
    if again is None or trained(again) != trained(row):
        raise RowError(f"{formatter} would read another row from what it would write")
    return written


def trained(row: dict[str, Any]) -> Any:
    """What a row says and which of it counts, whatever its row type: two rows that train alike are equal in it."""
    if isinstance(row.get("messages"), list):
        messages, first = row["messages"], 0
    elif isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list) and "label" not in row:
        messages, first = [*row["prompt"], *row["completion"]], len(row["prompt"])
    else:
        return {key: value for key, value in row.items() if value not in (None, []) and not key.startswith("_")}
    counted = [at >= first and message["role"] == "assistant" for at, message in enumerate(messages)]
    cleaned = [{key: value for key, value in message.items() if value is not None} for message in messages]
    return [cleaned, counted, row.get("tools") or []]
