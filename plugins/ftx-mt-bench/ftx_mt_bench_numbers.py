"""Judgments -> scores: means by turn and category, wins and losses, and their uncertainty over questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ftx import Score
from ftx_mt_bench_files import CATEGORIES

RESAMPLES = 2000

#: Metric of a pairwise judgment -> what a result counts in it (FastChat's show_result.py).
WORTH: dict[str, dict[str | None, float]] = {
    "win_rate_adjusted": {"win": 1.0, "tie": 0.5, "loss": 0.0},
    "win_rate": {"win": 1.0, "tie": 0.0, "loss": 0.0},
    "loss_rate": {"win": 0.0, "tie": 0.0, "loss": 1.0},
    "tie_rate": {"win": 0.0, "tie": 1.0, "loss": 0.0},
}


@dataclass(frozen=True, kw_only=True)
class Rating:
    """One judge's rating of one model's answer to one turn; `value` is None where it is unscored, for the `reason`."""

    model: str
    question: Any
    category: str | None
    turn: int
    judge: str
    value: float | None
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Match:
    """Two models' answers to one turn, judged in both orders: who won each (`model_1`, `model_2`, `tie`), or None."""

    model_1: str
    model_2: str
    question: Any
    category: str | None
    turn: int
    judge: str
    winners: tuple[str, str] | None
    reason: str = ""

    def result(self, model: str) -> str | None:
        """`win`, `loss` or `tie` for one of the two; a winner that changes with the order makes a tie, as in FastChat."""
        if self.winners is None:
            return None
        first, second = self.winners
        if first == "tie" or first != second:
            return "tie"
        return "win" if getattr(self, first) == model else "loss"


def rating_scores(ratings: Sequence[Rating], seed: int, whole: str = "average") -> list[Score]:
    """Each model's `average` (by the name `whole`) over all its rated turns (not the mean of the turns' means), `turn1`, `turn2`, `category:NAME`.

    `n` counts ratings; a part that has none is left out. Intervals: bootstrap over questions.
    """
    models = dict.fromkeys(rating.model for rating in ratings)
    return [
        score for model in models for name, part in parts([one for one in ratings if one.model == model], whole).items() for score in _score(name, part, seed)
    ]


def match_scores(matches: Sequence[Match], seed: int, *, baseline: str | None = None) -> list[Score]:
    """Each model's `win_rate_adjusted` (a tie is half a win), `win_rate`, `loss_rate`, `tie_rate`, the adjusted rate by turn and
    category, and `consistency`, the share of pairs with one winner in both orders. The `baseline` gets no scores."""
    scores: list[Score] = []
    for model in dict.fromkeys(model for match in matches for model in (match.model_1, match.model_2) if model != baseline):
        for metric in WORTH:
            scores += _score(metric, as_ratings(matches, model, metric), seed)
        for name, part in list(parts(as_ratings(matches, model)).items())[1:]:
            scores += _score(name, part, seed)
        same = [(match, float(match.winners[0] == match.winners[1]) if match.winners else None) for match in matches if model in (match.model_1, match.model_2)]
        scores += _score("consistency", [_rating(match, model, value) for match, value in same], seed)
    return scores


def as_ratings(matches: Sequence[Match], model: str, metric: str = "win_rate_adjusted") -> list[Rating]:
    """What each match of a model counts in a metric of WORTH."""
    return [_rating(match, model, WORTH[metric].get(match.result(model))) for match in matches if model in (match.model_1, match.model_2)]


def _rating(match: Match, model: str, value: float | None) -> Rating:
    return Rating(model=model, question=match.question, category=match.category, turn=match.turn, judge=match.judge, value=value, reason=match.reason)


def changes(base: Sequence[Rating], tuned: Sequence[Rating], seed: int, whole: str = "average") -> list[Score]:
    """What the ratings of the same questions gained, tuned minus base: `average_change` and so on, by the names of `parts`.

    Paired: only turns that the same judge rated both times count, and both turns of a question are resampled together.
    """
    before = {(one.question, one.turn, one.judge): one.value for one in base}
    gained = []
    for one in tuned:
        old = before.get((one.question, one.turn, one.judge))
        value = one.value - old if one.value is not None and old is not None else None
        gained.append(Rating(model="", question=one.question, category=one.category, turn=one.turn, judge=one.judge, value=value))
    return [score for name, part in parts(gained, whole).items() for score in _score(f"{name}_change", part, seed)]


def parts(ratings: Sequence[Rating], whole: str = "average") -> dict[str, list[Rating]]:
    """All ratings under the name `whole`, then those of `turn1`, `turn2` and of each `category:NAME`, MT-Bench's own in its order."""
    found: dict[str, list[Rating]] = {whole: list(ratings)}
    for turn in sorted({one.turn for one in ratings}):
        found[f"turn{turn}"] = [one for one in ratings if one.turn == turn]
    present = dict.fromkeys(one.category for one in ratings if one.category is not None)
    for category in sorted(present, key=lambda name: CATEGORIES.index(name) if name in CATEGORIES else len(CATEGORIES)):
        found[f"category:{category}"] = [one for one in ratings if one.category == category]
    return found


def table(ratings: Sequence[Rating]) -> list[str]:
    """Lines with the mean by category and turn, for the person at the terminal."""
    turns = sorted({one.turn for one in ratings})
    rows = {name.removeprefix("category:"): part for name, part in parts(ratings).items() if name.startswith("category:")} | {"all": list(ratings)}
    lines = [f"{'category':<12}" + "".join(f"{name:>8}" for name in (*(f"turn {turn}" for turn in turns), "both"))]
    for name, part in rows.items():
        lines.append(f"{name:<12}" + "".join(f"{_mean(one):>8}" for one in (*([r for r in part if r.turn == turn] for turn in turns), part)))
    return lines


def _mean(ratings: Sequence[Rating]) -> str:
    values = [one.value for one in ratings if one.value is not None]
    return f"{math.fsum(values) / len(values):.2f}" if values else "-"


def _score(metric: str, ratings: Sequence[Rating], seed: int) -> list[Score]:
    """The mean rating of one model as a score, or no score where nothing is rated."""
    rated = [(one.value, one.question) for one in ratings if one.value is not None]
    if not rated:
        return []
    value, low, high = clustered_mean([value for value, _ in rated], [question for _, question in rated], seed)
    model = ratings[0].model or None
    return [Score(metric=metric, value=value, ci_low=low, ci_high=high, n=len(rated), unscored=len(ratings) - len(rated), model=model)]


def clustered_mean(values: Sequence[float], clusters: Sequence[Any], seed: int) -> tuple[float, float | None, float | None]:
    """The mean of at least one value and its 95 % percentile bootstrap interval; clusters are resampled whole.

    The two turns of a question are no two independent draws, so the question is the cluster (Miller, 2024, arXiv
    2411.00640). No interval for a single cluster.
    """
    import numpy

    value = math.fsum(values) / len(values)
    number = {cluster: at for at, cluster in enumerate(dict.fromkeys(clusters))}
    if len(number) < 2:
        return value, None, None
    which = [number[cluster] for cluster in clusters]
    sums, counts = numpy.bincount(which, weights=numpy.asarray(values, dtype=numpy.float64)), numpy.bincount(which)
    picks = numpy.random.default_rng(seed).integers(len(number), size=(RESAMPLES, len(number)))
    low, high = numpy.quantile(sums[picks].sum(axis=1) / counts[picks].sum(axis=1), [0.025, 0.975])
    # sums in another order differ in the last digit, which shows where all values are equal
    return value, min(value, float(low)), max(value, float(high))
