"""What the scores say of the training, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Below this probability a change is not taken for chance.
ALPHA = 0.05


@dataclass(frozen=True)
class Verdict:
    """`tone`: `better`, `worse`, `same` (nothing that the items can show) or `open` (nothing to compare)."""

    sentence: str
    tone: str


def verdict(scores: Sequence[Mapping[str, Any]], metrics: Sequence[Mapping[str, Any]]) -> Verdict:
    """Of the first evaluator that scored base and tuned: its headline metric, and whether chance would explain the change.

    Evidence, the strongest that there is: items fixed and broken with their p (McNemar), the paired interval of the change, else whether
    the intervals of both phases meet.
    """
    heads = headlines(scores)
    for evaluator, base, tuned in heads:
        if base is not None:
            changes = {score["metric"]: score for score in scores if score.get("evaluator") == evaluator and score.get("phase") == "change"}
            return _compared(base, tuned, changes)
    if heads:
        evaluator, _, tuned = heads[0]
        return Verdict(f"{tuned['metric']} is {_value(tuned)} of {_items(tuned)}; the base was not evaluated, so nothing says what training changed.", "open")
    base_only = next((score for score in scores if score.get("phase") == "base" and score.get("value") is not None), None)
    if base_only is not None:
        return Verdict(f"{base_only['metric']} of the base is {_value(base_only)} of {_items(base_only)}; the tuned model has not been scored.", "open")
    losses = [line["loss"] for line in metrics if isinstance(line.get("loss"), int | float)]
    said = f"the loss, {losses[0]:.4g} at first and {losses[-1]:.4g} at the end, is all there is to go by" if losses else "nothing was trained yet"
    return Verdict(f"No evaluator has scored it: {said}.", "open")


def headlines(scores: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any] | None, Mapping[str, Any]]]:
    """(evaluator, base's score or None, tuned's score) of each evaluator's first metric."""
    found: dict[str, tuple[str, Mapping[str, Any] | None, Mapping[str, Any]]] = {}
    for score in scores:
        evaluator = str(score.get("evaluator", ""))
        if score.get("phase") == "tuned" and score.get("value") is not None and evaluator not in found:
            same = (one for one in scores if one.get("phase") == "base" and one.get("evaluator") == evaluator and one["metric"] == score["metric"])
            base = next((one for one in same if one.get("value") is not None), None)
            found[evaluator] = (evaluator, base, score)
    return list(found.values())


def _compared(base: Mapping[str, Any], tuned: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]]) -> Verdict:
    moved = tuned["value"] - base["value"]
    sure, said = _evidence(base, tuned, changes)
    of = f"on {_items(tuned)} ({said})"
    if not sure or moved == 0:
        return Verdict(
            f"No change that {_items(tuned)} can show: {tuned['metric']} is {_value(base)} before training and {_value(tuned)} after ({said}).", "same"
        )
    verb = "raised" if moved > 0 else "lowered"
    return Verdict(f"Training {verb} {tuned['metric']} from {_value(base)} to {_value(tuned)} {of}.", "better" if moved > 0 else "worse")


def _evidence(base: Mapping[str, Any], tuned: Mapping[str, Any], changes: Mapping[str, Mapping[str, Any]]) -> tuple[bool, str]:
    """Whether it is more than chance, and why."""
    values = {name: score.get("value") for name, score in changes.items()}
    if None not in (p := values.get("p_value"), fixed := values.get("fixed"), broken := values.get("broken")):
        return p < ALPHA, f"{fixed:.0f} fixed, {broken:.0f} broken, p = {p:.2g}"  # type: ignore[operator]
    change = changes.get(f"{tuned['metric']}_change", {})
    if change.get("ci_low") is not None:
        return change["ci_low"] > 0 or change["ci_high"] < 0, f"change {change['value']:+.3f} [{change['ci_low']:+.3f}, {change['ci_high']:+.3f}]"
    if base.get("ci_low") is None or tuned.get("ci_low") is None:
        return False, "there are no intervals"
    apart = base["ci_high"] < tuned["ci_low"] or tuned["ci_high"] < base["ci_low"]
    return apart, "their 95 % intervals are apart" if apart else "their 95 % intervals meet"


def _items(score: Mapping[str, Any]) -> str:
    return f"{score.get('n', 0):,} item{'s' * (score.get('n') != 1)}"


def _value(score: Mapping[str, Any]) -> str:
    return f"{score['value']:.3f}"
