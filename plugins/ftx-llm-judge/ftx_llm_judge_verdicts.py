"""What a judge's text says: ratings on a scale, or a choice. The last verdict binds; one that is off the menu is
unreadable, and never passed over for an earlier mention."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ftx_llm_judge_asking import Unreadable
from ftx_llm_judge_guard import visible
from ftx_llm_judge_rubric import SCALE

_NUMBER = re.compile(r"(?:score|rating)?\s*[:=]?\s*([0-9]+(?:\.[0-9]+)?)(?:\s*(?:/|out\s+of|of)\s*([0-9]+))?", re.I)
_CHOICE = re.compile(r"(?:(?:answer|assistant|response)\s+)?(a|b|tie)", re.I)
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Rating:
    scores: dict[str, int]
    reasoning: str


@dataclass(frozen=True)
class Choice:
    """`verdict`: A, B or tie."""

    verdict: str
    reasoning: str


def rating_parser(criteria: Sequence[str]) -> Callable[[str], Rating]:
    """A parser that wants a whole number from 1 to 5 for each of the criteria."""

    def parse(text: str) -> Rating:
        found = verdict_fields(text, criteria)
        missing = [name for name in criteria if name not in found]
        if missing:
            raise Unreadable(f"it gives no {missing[0]}")
        return Rating({name: _named(name, on_scale, found[name]) for name in criteria}, str(found.get("reasoning", "")))

    return parse


def parse_choice(text: str) -> Choice:
    found = verdict_fields(text, ["verdict"])
    return Choice(_named("verdict", on_menu, found["verdict"]), str(found.get("reasoning", "")))


def on_scale(value: Any) -> int:
    """A whole number from 1 to 5: 4, 4.0, "4", "4/5", "5 out of 5"; Unreadable for all else. A bool is no number, and no
    number is picked out of words ("perfect 10")."""
    number: Any = value
    if isinstance(value, str):
        match = _NUMBER.fullmatch(_bare(value))
        if not match or (match[2] and int(match[2]) != SCALE[-1]):
            raise Unreadable(f"{_short(value)} is no whole number from {SCALE[0]} to {SCALE[-1]}")
        number = float(match[1])
    if isinstance(number, bool) or not isinstance(number, int | float) or number not in SCALE:  # 2.5, 6, NaN and infinity are not in it
        raise Unreadable(f"{_short(value)} is no whole number from {SCALE[0]} to {SCALE[-1]}")
    return int(number)


def on_menu(value: Any) -> str:
    """A, B or tie, in any case, also as "Answer A" or "[[A]]"; Unreadable for all else."""
    match = _CHOICE.fullmatch(_bare(value)) if isinstance(value, str) else None
    if not match:
        raise Unreadable(f"{_short(value)} is not A, B or tie")
    return "tie" if match[1].lower() == "tie" else match[1].upper()


def verdict_fields(text: str, names: Sequence[str]) -> dict[str, Any]:
    """The last JSON object that has one of the names, also out of prose, code fences or with trailing commas; without any
    brace, the last `name: value` line of each. Unreadable where a name stands behind the last readable object: what was
    said last could not be read, and what was said before does not count."""
    text = visible(text)
    if "{" not in text:
        return _lines(text, names)
    # a comma before a closing bracket is what most often spoils a judge's JSON; inside a text its loss does no harm
    found, end = _last_object(text, names) or _last_object(text := re.sub(r",(\s*[}\]])", r"\1", text), names) or ({}, 0)
    if any(f'"{name}"' in text[end:] for name in names):
        raise Unreadable("its last JSON object is broken or incomplete")
    if not found:
        raise Unreadable(f"it holds no JSON object with {' or '.join(names)}")
    return found


def _last_object(text: str, names: Sequence[str]) -> tuple[dict[str, Any], int] | None:
    """The last outermost object with one of the names and where it ends, or None if there is none."""
    last, at = None, text.find("{")
    while at >= 0:
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            value, end = None, at + 1
        if isinstance(value, dict) and any(name in value for name in names):
            last, at = (value, end), text.find("{", end)
        else:
            at = text.find("{", at + 1)  # the names may stand in an object inside this one
    return last


def _lines(text: str, names: Sequence[str]) -> dict[str, Any]:
    wanted = re.compile(rf"^[\s\"'*_#-]*({'|'.join(map(re.escape, names))})[\s\"'*_]*[:=](.*)$", re.I | re.M)
    known = {name.lower(): name for name in names}
    found: dict[str, Any] = {known[match[1].lower()]: match[2] for match in wanted.finditer(text)}
    if not found:
        raise Unreadable(f"it holds neither a JSON object nor a line with {' or '.join(names)}")
    return found


def _named(name: str, read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return read(value)
    except Unreadable as error:
        raise Unreadable(f"{name}: {error}") from None


def _bare(value: str) -> str:
    """Without the white space, quotes, emphasis, brackets and full stop around it."""
    return value.strip(" \t\n\"'`*_[]().,")


def _short(value: Any) -> str:
    return json.dumps(value, default=str)[:60]
