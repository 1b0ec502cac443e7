"""A judge judged: how far it agrees with the labels of a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ftx import Score
from ftx_llm_judge_asking import Judge
from ftx_llm_judge_labels import LabelledPair, LabelledScore
from ftx_llm_judge_numbers import kappa, rate
from ftx_llm_judge_pairs import of_both_orders, pair_asks
from ftx_llm_judge_rating import rating_ask
from ftx_llm_judge_rubric import SCALE
from ftx_llm_judge_verdicts import parse_choice, rating_parser

_CHOICES = ("A", "B", "tie")


def check_pairs(pairs: Sequence[LabelledPair], judge: Judge, seed: int) -> tuple[list[Score], list[dict[str, Any]]]:
    """Scores of one judge, and an item a pair.

    `accuracy`: share of pairs in which the better answer is preferred in both orders (a tie is a miss). `kappa`: Cohen's, over
    the single requests, where the better answer is A in one half and B in the other, so that a judge who always says A has 0.
    `position_consistency`: share of pairs with one verdict in both orders.
    """
    asks = [pair_asks(one.question, one.chosen, one.rejected, "", seed, one.criterion) for one in pairs]
    verdicts = judge.verdicts([ask for both in asks for ask in both], parse_choice)
    said = [of_both_orders(straight, swapped) for straight, swapped in zip(verdicts[::2], verdicts[1::2], strict=True)]
    items = [
        {"prompt": pair.question, "answer": pair.chosen, "reference": pair.rejected, "judge": judge.name, **one} for pair, one in zip(pairs, said, strict=True)
    ]
    scored = [one for one in said if one["verdict"] != "unscored"]
    values = {"accuracy": [float(one["preference"] == 1) for one in scored], "position_consistency": [float(one["consistent"]) for one in scored]}
    choices = [_CHOICES.index(choice) for one in scored for choice in one["choices"]]
    return _scores(values, kappa([0, 1] * len(scored), choices, (0, 1, 2), ordinal=False), len(scored), len(said), judge.name), items


def check_scores(labelled: Sequence[LabelledScore], judge: Judge, seed: int) -> tuple[list[Score], list[dict[str, Any]]]:
    """Scores of one judge, and an item an answer. `accuracy`: share of ratings equal to the label; `kappa`: quadratically
    weighted, so that a miss by one counts little."""
    asks = [rating_ask([one.criterion], one.question, one.answer, one.reference, seed) for one in labelled]
    items: list[dict[str, Any]] = []
    for one, verdict in zip(labelled, judge.verdicts(asks, rating_parser(["score"])), strict=True):
        said = {"verdict": "unscored", "reason": verdict.reason}
        if verdict.value is not None:
            said = {"verdict": verdict.value.scores["score"], "reasoning": verdict.value.reasoning}
        items.append({"prompt": one.question, "answer": one.answer, "reference": one.reference, "label": one.score, "judge": judge.name, **said})
    scored = [(item["label"], item["verdict"]) for item in items if item["verdict"] != "unscored"]
    weighted = kappa([label for label, _ in scored], [given for _, given in scored], SCALE, ordinal=True)
    return _scores({"accuracy": [float(label == given) for label, given in scored]}, weighted, len(scored), len(items), judge.name), items


def _scores(shares: dict[str, list[float]], agreed: float | None, n: int, of: int, judge: str) -> list[Score]:
    """Intervals are Wilson's. `unscored_share` is there even if nothing is scored."""
    scores = []
    for metric, values in shares.items():
        if values:
            value, low, high = rate(values)
            scores.append(Score(metric=metric, value=value, ci_low=low, ci_high=high, n=n, unscored=of - n, model=judge))
    if agreed is not None:
        scores.insert(1, Score(metric="kappa", value=agreed, n=n, unscored=of - n, model=judge))
    value, low, high = rate([0.0] * n + [1.0] * (of - n))
    return [*scores, Score(metric="unscored_share", value=value, ci_low=low, ci_high=high, n=of, model=judge)]
