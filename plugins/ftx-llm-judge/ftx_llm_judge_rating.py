"""Answers rated by a rubric: each judge gives each criterion a whole number from 1 to 5."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ftx import Score
from ftx_llm_judge_asking import Ask, Judge
from ftx_llm_judge_jury import How, agreement, together
from ftx_llm_judge_numbers import mean, rank_correlation
from ftx_llm_judge_prompts import question_text, rubric_request, rubric_schema
from ftx_llm_judge_rubric import SCALE, Criterion
from ftx_llm_judge_verdicts import rating_parser


def rating_ask(criteria: Sequence[Criterion], question: str, answer: str, reference: str, seed: int) -> Ask:
    """The request that has one answer rated; `reference` may be empty."""
    system, user = rubric_request(criteria, question, answer, reference, seed)
    return Ask(system=system, user=user, schema=rubric_schema(criteria), schema_name="rating", what="rating")


def rate_items(items: Sequence[dict[str, Any]], criteria: Sequence[Criterion], judges: Sequence[Judge], how: How, seed: int, *, references: bool) -> None:
    """Fill in `verdict` (criterion -> score), `rating` (the mean of the criteria) and `judges` (what each one said).

    An item is scored by the judges who gave a verdict; if none did it is `unscored`, with the first one's reason. The judges
    see the item's reference, if it has one, unless `references` is False.
    """
    names = [criterion.name for criterion in criteria]
    asks = [rating_ask(criteria, question_text(item["prompt"]), item["answer"], item["reference"] if references else "", seed) for item in items]
    for item in items:
        item["judges"] = []
    for judge in judges:
        for item, verdict in zip(items, judge.verdicts(asks, rating_parser(names)), strict=True):
            said = {"verdict": "unscored", "reason": verdict.reason}
            if verdict.value is not None:
                said = {"verdict": verdict.value.scores, "reasoning": verdict.value.reasoning}
            item["judges"].append({"judge": judge.name, **said})
    for item in items:
        given = [said["verdict"] for said in item["judges"] if said["verdict"] != "unscored"]
        if given:
            item["verdict"] = {name: together([scores[name] for scores in given], how) for name in names}
            item["rating"] = fmean(item["verdict"].values())
        else:
            item |= {"verdict": "unscored", "reason": item["judges"][0]["reason"]}


def rating_scores(items: Sequence[dict[str, Any]], criteria: Sequence[Criterion], seed: int) -> list[Score]:
    """`rating` first, then each criterion, how ratings go with length, and how far the judges agree; of at least one rated item."""
    rated = [item for item in items if item["verdict"] != "unscored"]
    counts = {"n": len(rated), "unscored": len(items) - len(rated)}
    columns = {"rating": [item["rating"] for item in rated]} | {one.name: [item["verdict"][one.name] for item in rated] for one in criteria}
    scores = [_score(name, values, seed, **counts) for name, values in columns.items()]
    correlation = rank_correlation(columns["rating"], [len(item["answer"]) for item in rated])
    if correlation is not None:
        scores.append(Score(metric="rating_length_correlation", value=correlation, **counts))
    return [*scores, *agreement(_by_judge(rated, criteria), SCALE, ordinal=True, **counts)]


def _by_judge(rated: Sequence[dict[str, Any]], criteria: Sequence[Criterion]) -> list[list[int | None]]:
    """One row a judge, one column a criterion of an item."""
    rows = zip(*(item["judges"] for item in rated), strict=True)
    return [[None if said["verdict"] == "unscored" else said["verdict"][one.name] for said in row for one in criteria] for row in rows]


def rating_changes(base_items: Sequence[dict[str, Any]], tuned_items: Sequence[dict[str, Any]], seed: int) -> list[Score]:
    """`rating_change` and `NAME_change`, tuned minus base, over the items that are rated in both; none if there are none."""
    both = [(base, tuned) for base, tuned in zip(base_items, tuned_items, strict=True) if "rating" in base and "rating" in tuned]
    if not both:
        return []
    counts = {"n": len(both), "unscored": len(base_items) - len(both)}
    columns = {"rating": [tuned["rating"] - base["rating"] for base, tuned in both]}
    columns |= {name: [tuned["verdict"][name] - base["verdict"][name] for base, tuned in both] for name in both[0][0]["verdict"]}
    return [_score(f"{name}_change", values, seed, **counts) for name, values in columns.items()]


def _score(metric: str, values: Sequence[float], seed: int, *, n: int, unscored: int) -> Score:
    value, low, high = mean(values, seed)
    return Score(metric=metric, value=value, ci_low=low, ci_high=high, n=n, unscored=unscored)
