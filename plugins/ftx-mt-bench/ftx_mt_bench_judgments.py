"""Rows of FastChat's model_judgment files, read from disk or made in a run -> what counts of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftx.errors import DataError
from ftx_llm_judge_asking import Unreadable
from ftx_mt_bench_files import category_of, rows_of
from ftx_mt_bench_numbers import Match, Rating
from ftx_mt_bench_verdicts import HIGHEST, LOWEST, fastchat_rating, fastchat_winner, rating, winner

#: Game -> what each letter stands for: the first model is A in the first game and B in the second.
GAMES = {"g1": {"A": "model_1", "B": "model_2", "C": "tie"}, "g2": {"A": "model_2", "B": "model_1", "C": "tie"}}
#: What FastChat records for a judgment that holds no verdict.
NO_RATING, NO_WINNER = -1, "error"


@dataclass(frozen=True)
class Judgments:
    """What files of judgments hold. `superseded` rows were set aside for a later one of the same; `reread` ones count
    otherwise than they are recorded, because their text says so."""

    ratings: list[Rating]
    matches: list[Match]
    superseded: int
    reread: int


def read_judgments(references: Sequence[str], strict: bool = False, categories: Mapping[Any, str | None] | None = None) -> Judgments:
    """model_judgment files, single and pairwise, in one reading.

    Of several rows of one question, model (or pair), turn and judge the last counts. `strict` keeps them all, and every
    verdict as it is recorded, as FastChat's show_result.py does.
    """
    found: dict[Any, dict[str, Any]] = {}
    read = 0
    for reference in references:
        for place, row in rows_of(reference):
            read += 1
            models = [row.get(name) for name in ("model", "model_1", "model_2")]
            if row.get("question_id") is None or type(row.get("turn")) is not int or not (models[0] or all(models[1:])):
                raise DataError(
                    f"{place}: not a judgment: it needs question_id, turn and model, or model_1 and model_2.", "Give files as in FastChat's model_judgment."
                )
            found[read if strict else json.dumps([row["question_id"], models, row["turn"], row.get("judge")])] = row
    rows = list(found.values())
    ratings = [rating_of(row, strict, categories) for row in rows if row.get("model")]
    matches = [match_of(row, strict, categories) for row in rows if not row.get("model")]
    reread = 0 if strict else sum(_counted(row, strict=False) != _counted(row, strict=True) for row in rows)
    return Judgments(ratings, matches, read - len(rows), reread)


def rating_of(row: Mapping[str, Any], strict: bool = False, categories: Mapping[Any, str | None] | None = None) -> Rating:
    """What counts of a row of a single-answer file."""
    (value,) = _counted(row, strict)
    return Rating(model=str(row.get("model") or ""), **_common(row, categories), value=value, reason=_reason(row, value is None))


def match_of(row: Mapping[str, Any], strict: bool = False, categories: Mapping[Any, str | None] | None = None) -> Match:
    """What counts of a row of a pairwise file; both games must have been decided."""
    first, second = _counted(row, strict)
    winners = (first, second) if first is not None and second is not None else None
    return Match(
        model_1=str(row.get("model_1") or ""),
        model_2=str(row.get("model_2") or ""),
        **_common(row, categories),
        winners=winners,
        reason=_reason(row, winners is None),
    )


def _counted(row: Mapping[str, Any], strict: bool) -> list[Any]:
    """The rating of a single-answer row, or the winners of both games; None for what is unscored."""
    if row.get("model_2"):
        return [_winner(row, game, sides, strict) for game, sides in GAMES.items()]
    value = _verdict(_number(row.get("score")), row.get("judgment"), fastchat_rating, rating, strict)
    return [value if strict or value is None or LOWEST <= value <= HIGHEST else None]


def _winner(row: Mapping[str, Any], game: str, sides: Mapping[str, str], strict: bool) -> Any:
    recorded = row.get(f"{game}_winner")
    usable = recorded if recorded in sides.values() else None
    return _verdict(usable, row.get(f"{game}_judgment"), lambda text: sides[fastchat_winner(text)], lambda text: sides[winner(text)], strict)


def _verdict(recorded: Any, text: Any, fastchat: Callable[[str], Any], ours: Callable[[str], Any], strict: bool) -> Any:
    """Read again by our rule where the record was read from the text by FastChat's; a record that comes from elsewhere stays."""
    if strict or not isinstance(text, str) or _read(fastchat, text) != recorded:
        return recorded
    return _read(ours, text)


def _number(score: Any) -> float | None:
    usable = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score) and score != NO_RATING
    return score if usable else None


def _read(read: Callable[[str], Any], text: str) -> Any:
    try:
        return read(text)
    except Unreadable:
        return None


def _common(row: Mapping[str, Any], categories: Mapping[Any, str | None] | None) -> dict[str, Any]:
    judge = row.get("judge")
    name = " ".join(map(str, judge)) if isinstance(judge, list) else str(judge or "")
    return {
        "question": row["question_id"],
        "category": (categories or {}).get(row["question_id"]) or category_of(row["question_id"]),
        "turn": row["turn"],
        "judge": name,
    }


def _reason(row: Mapping[str, Any], unscored: bool) -> str:
    """Why a row is unscored: rows that were made here say so, FastChat's do not."""
    return str(row.get("reason") or "no verdict is recorded") if unscored else ""
