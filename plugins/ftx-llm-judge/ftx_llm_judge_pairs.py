"""Two answers to one question compared, each pair in both orders: a verdict that turns with the order is a tie."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from ftx import Score
from ftx_llm_judge_asking import Ask, Judge, Verdict
from ftx_llm_judge_jury import How, agreement, together
from ftx_llm_judge_numbers import length_controlled, rate
from ftx_llm_judge_prompts import pair_request, pair_schema, question_text
from ftx_llm_judge_verdicts import Choice, parse_choice

#: What the choices are worth to the answer that is called A.
_WORTH = {"A": 1.0, "B": 0.0, "tie": 0.5}


def pair_asks(question: str, one: str, other: str, reference: str, seed: int, criterion: str = "") -> list[Ask]:
    """Both orders: `one` as A, then `other` as A."""
    requests = [pair_request(question, first, second, reference, seed, criterion) for first, second in ((one, other), (other, one))]
    return [Ask(system=system, user=user, schema=pair_schema(), schema_name="choice", what="pair") for system, user in requests]


def of_both_orders(straight: Verdict, swapped: Verdict) -> dict[str, Any]:
    """What one judge says of a pair: `preference` for the answer that came first in `straight` (1, 0.5 or 0), whether it was
    `consistent`, and the choices and reasonings of both orders; or `verdict` "unscored" with the reason."""
    choices: list[Choice] = [verdict.value for verdict in (straight, swapped) if verdict.value is not None]
    if len(choices) < 2:
        return {"verdict": "unscored", "reason": straight.reason or swapped.reason}
    preferences = [_WORTH[choices[0].verdict], 1 - _WORTH[choices[1].verdict]]
    consistent = preferences[0] == preferences[1]
    preference = preferences[0] if consistent else 0.5
    said = {"choices": [choice.verdict for choice in choices], "reasoning": [choice.reasoning for choice in choices]}
    return {"verdict": outcome(preference), "preference": preference, "consistent": consistent, **said}


def outcome(preference: float) -> str:
    return "win" if preference > 0.5 else "loss" if preference < 0.5 else "tie"


def compare_items(
    before: Sequence[str | None], tuned_items: Sequence[dict[str, Any]], judges: Sequence[Judge], how: How, seed: int, *, references: bool
) -> list[dict[str, Any]]:
    """One item a pair: the answer of the tuned model against the one `before` (None: there is none, so it is unscored).

    `verdict` is the tuned model's win, loss or tie, `preference` the same in 0..1, `judges` what each one said. Equal
    answers are a tie for which nobody is asked.
    """
    items = [_item(base, tuned) for base, tuned in zip(before, tuned_items, strict=True)]
    open_items = [item for item in items if not item["verdict"]]
    orders = [pair_asks(question_text(one["prompt"]), one["answer"], one["base_answer"], one["reference"] if references else "", seed) for one in open_items]
    for judge in judges:
        verdicts = judge.verdicts([ask for both in orders for ask in both], parse_choice)
        for item, straight, swapped in zip(open_items, verdicts[::2], verdicts[1::2], strict=True):
            item["judges"].append({"judge": judge.name, **of_both_orders(straight, swapped)})
    for item in open_items:
        given = [said["preference"] for said in item["judges"] if said["verdict"] != "unscored"]
        if given:
            preference = together(given, how)
            item |= {"verdict": outcome(preference), "preference": preference}
        else:
            item |= {"verdict": "unscored", "reason": item["judges"][0]["reason"]}
    return items


def _item(base: str | None, tuned: dict[str, Any]) -> dict[str, Any]:
    item = {"prompt": tuned["prompt"], "answer": tuned["answer"], "base_answer": base, "reference": tuned["reference"], "verdict": "", "judges": []}
    if not tuned["prompt"]:
        return item | {"verdict": "unscored", "reason": tuned["reason"]}
    if base is None:
        return item | {"verdict": "unscored", "reason": "there is no answer to compare with"}
    if base == tuned["answer"]:
        return item | {"verdict": "tie", "preference": 0.5}
    return item


def pair_scores(items: Sequence[dict[str, Any]], seed: int) -> list[Score]:
    """`win_rate` of the tuned model (a tie is half a win) first; then the counts, how often both orders agreed, lengths in
    characters, the length-controlled rate if there are enough pairs, and how far the judges agree. Of at least one scored pair."""
    scored = [item for item in items if item["verdict"] != "unscored"]
    counts = {"n": len(scored), "unscored": len(items) - len(scored)}
    preferences = [item["preference"] for item in scored]
    lengths = {name: [len(item[name]) for item in scored] for name in ("base_answer", "answer")}
    scores = [_rate("win_rate", preferences, counts["unscored"])]
    controlled = length_controlled(preferences, [new - old for old, new in zip(*lengths.values(), strict=True)], seed)
    if controlled:
        value, low, high = controlled
        scores.append(Score(metric="length_controlled_win_rate", value=value, ci_low=low, ci_high=high, **counts))
    verdicts = [item["verdict"] for item in scored]
    values: dict[str, float] = {"wins": verdicts.count("win"), "ties": verdicts.count("tie"), "losses": verdicts.count("loss")}
    values |= {"base_length": fmean(lengths["base_answer"]), "tuned_length": fmean(lengths["answer"])}
    scores += [Score(metric=metric, value=float(value), **counts) for metric, value in values.items()]
    asked = [[float(said["consistent"]) for said in item["judges"] if said["verdict"] != "unscored"] for item in scored if item["judges"]]
    if asked:  # not so if all answers are equal
        scores.append(_rate("consistency", [fmean(flags) for flags in asked], counts["unscored"]))
    return [*scores, *agreement(_by_judge(scored), (0, 1, 2), ordinal=False, **counts)]


def _by_judge(scored: Sequence[dict[str, Any]]) -> list[list[int | None]]:
    """One row a judge, one column a pair that was asked about: 0 a loss, 1 a tie, 2 a win."""
    rows = zip(*(item["judges"] for item in scored if item["judges"]), strict=True)
    return [[None if said["verdict"] == "unscored" else int(2 * said["preference"]) for said in row] for row in rows]


def _rate(metric: str, shares: Sequence[float], unscored: int) -> Score:
    value, low, high = rate(shares)
    return Score(metric=metric, value=value, ci_low=low, ci_high=high, n=len(shares), unscored=unscored)
