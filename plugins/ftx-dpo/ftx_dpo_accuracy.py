"""The evaluator `reward-accuracy`: does the model prefer what was chosen, and does training make it prefer it more?"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ftx import Evaluation, Score, hookimpl, option, plugin
from ftx.errors import RunError

if TYPE_CHECKING:
    from datasets import Dataset

    from ftx import Run
    from ftx.generate import Generate

NEEDS_PAIRS = "evaluator 'reward-accuracy' needs pairs of a chosen and a rejected answer: give --eval-data FILE."
SIDES = ("chosen", "rejected")


@plugin
class RewardAccuracy:
    """Share of held-out pairs whose chosen answer the model makes likelier, and DPO's reward accuracy and margin over the starting model."""

    beta: float | None = option(None, "Scale of the margin; none: the trainer's beta, or 0.1 where it has none.")
    max_tokens: int = option(4096, "Most tokens, padding included, in one batch; a pair with a longer side is unscored.")

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens must be at least 2, not {self.max_tokens}")
        if self.beta is not None and not 0 < self.beta < float("inf"):
            raise ValueError(f"beta must be greater than 0, got {self.beta}")

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        return [NEEDS_PAIRS] if run.recipe.eval_data is None else []

    @hookimpl
    def evaluate_model(self, generate: Generate, dataset: Dataset | None, run: Run) -> Evaluation:
        """`preference_accuracy`: share of pairs in which the whole chosen answer has the higher log-probability, and
        `preference_accuracy_per_token` by the mean of its tokens (no gain from being short); both with Wilson intervals."""
        from ftx_dpo_logps import pair_logps

        rows = list(dataset or [])
        scored = pair_logps(rows, generate.model, generate.tokenizer, self.max_tokens)
        items = [_item(row, found) for row, found in zip(rows, scored, strict=True)]
        right = [item for item in items if item["verdict"] != "unscored"]
        unscored = len(items) - len(right)
        if not right:
            raise RunError(f"evaluator 'reward-accuracy' can score none of the {len(items)} rows of the evaluation data.", NEEDS_PAIRS)
        if unscored:
            run.say(f"warning: reward-accuracy cannot score {unscored} of {len(items)} rows; the items say why.")
        whole = [item["logps"]["chosen"] > item["logps"]["rejected"] for item in right]
        per_token = [item["logps"]["chosen"] / item["tokens"]["chosen"] > item["logps"]["rejected"] / item["tokens"]["rejected"] for item in right]
        return Evaluation([_share("preference_accuracy", whole, unscored), _share("preference_accuracy_per_token", per_token, unscored)], items)

    @hookimpl
    def compare_answers(self, base_items: list[dict[str, Any]], tuned_items: list[dict[str, Any]], run: Run) -> list[Score]:
        """`reward_accuracy` (Wilson) and `reward_margin` (mean and bootstrap, in nats times beta): reward = beta (log p tuned - log p base)."""
        pairs = list(zip(base_items, tuned_items, strict=True))
        if any((base["prompt"], base["reference"]) != (tuned["prompt"], tuned["reference"]) for base, tuned in pairs):
            raise RunError("reward-accuracy: the base and the tuned model were asked about different pairs.", "Evaluate both on the same data: ftx eval RUN")
        trainer = run.recipe.trainer.options if run.recipe.trainer else {}
        beta = self.beta or float(trainer.get("beta", 0.1))
        both = [(base, tuned) for base, tuned in pairs if "unscored" not in (base["verdict"], tuned["verdict"])]
        unscored = len(pairs) - len(both)
        if not both:
            return []
        margins = []
        for base, tuned in both:
            chosen, rejected = (beta * (tuned["logps"][side] - base["logps"][side]) for side in SIDES)
            margins.append(chosen - rejected)
        return [_share("reward_accuracy", [margin > 0 for margin in margins], unscored), _mean("reward_margin", margins, unscored, run.seed)]


def _item(row: dict[str, Any], found: dict[str, Any] | str) -> dict[str, Any]:
    """One pair as an item; `answer` is the side that the model makes likelier."""
    texts = {side: row[side] if isinstance(row.get(side), str) else _last(row.get(side)) for side in SIDES}
    item = {"prompt": row.get("prompt"), "answer": "", "reference": texts["chosen"], "rejected": texts["rejected"]}
    if isinstance(found, str):
        return {**item, "verdict": "unscored", "reason": found}
    right = found["logps"]["chosen"] > found["logps"]["rejected"]
    return {**item, "answer": texts["chosen" if right else "rejected"], "verdict": "correct" if right else "wrong", **found}


def _last(messages: list[dict[str, Any]] | None) -> str:
    return str(messages[-1].get("content") or "") if messages else ""


def _share(metric: str, right: list[bool], unscored: int) -> Score:
    from scipy.stats import binomtest

    interval = binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    return Score(metric=metric, value=sum(right) / len(right), n=len(right), ci_low=interval.low, ci_high=interval.high, unscored=unscored)


def _mean(metric: str, values: list[float], unscored: int, seed: int) -> Score:
    import numpy
    from scipy.stats import bootstrap

    value = math.fsum(values) / len(values)
    low = high = None
    if len(values) > 1:
        interval = bootstrap((values,), numpy.mean, n_resamples=2000, method="percentile", rng=numpy.random.default_rng(seed)).confidence_interval
        low, high = min(value, float(interval.low)), max(value, float(interval.high))
    return Score(metric=metric, value=value, n=len(values), ci_low=low, ci_high=high, unscored=unscored)
