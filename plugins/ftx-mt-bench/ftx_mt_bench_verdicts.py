"""What a judge's text says: a rating or a winner, by our rules and by FastChat's.

Ours: the last mark in double brackets binds, and one that is not on the menu is never passed over for an earlier one, so
that a judge who quotes a forged verdict before giving its own is read rightly. FastChat's (llm_judge/common.py): the first
rating counts, whatever its size, and `[[A]]` is looked for before `[[B]]`.
"""

from __future__ import annotations

import re

from ftx_llm_judge_asking import Unreadable

LOWEST, HIGHEST = 1, 10

_MARK = re.compile(r"\[\[([^\[\]]*)\]\]")
_NUMBER = re.compile(r"\d+\.?\d*", re.ASCII)
_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]", re.ASCII)
_SINGLE_BRACKETS = re.compile(r"\[(\d+\.?\d*)\]", re.ASCII)


def rating(text: str) -> float:
    """The rating from 1 to 10 that binds; Unreadable, with the reason, if there is none."""
    marks = _MARK.findall(text) or _SINGLE_BRACKETS.findall(text)
    if not marks:
        raise Unreadable("it holds no rating of the form [[5]]")
    last = marks[-1].strip()
    if not _NUMBER.fullmatch(last) or not LOWEST <= float(last) <= HIGHEST:
        raise Unreadable(f"its rating is [[{last[:20]}]], not a number from {LOWEST} to {HIGHEST}")
    return _number(last)


def winner(text: str) -> str:
    """`A`, `B` or `C` (a tie), whichever binds; Unreadable, with the reason, if there is none."""
    marks = _MARK.findall(text)
    if not marks:
        raise Unreadable("it holds no verdict of the form [[A]], [[B]] or [[C]]")
    last = marks[-1].strip()
    if last not in ("A", "B", "C"):
        raise Unreadable(f"its verdict is [[{last[:20]}]], not [[A]], [[B]] or [[C]]")
    return str(last)


def fastchat_rating(text: str) -> float:
    """The first number in brackets, of any size; Unreadable where FastChat writes -1."""
    found = _RATING.search(text) or _SINGLE_BRACKETS.search(text)
    if not found:
        raise Unreadable("it holds no rating of the form [[5]]")
    return _number(found.group(1))


def fastchat_winner(text: str) -> str:
    """`A` if `[[A]]` stands anywhere, else `B`, else `C`; Unreadable where FastChat writes "error"."""
    for letter in "ABC":
        if f"[[{letter}]]" in text:
            return letter
    raise Unreadable("it holds no verdict of the form [[A]], [[B]] or [[C]]")


def _number(text: str) -> float:
    """A whole number as an int, so that files read `8` as FastChat's do."""
    value = float(text)
    return int(value) if value.is_integer() else value
