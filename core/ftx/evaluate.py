"""Phases, items, and what changed between base and tuned."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ftx.errors import FtxError, first_line
from ftx.generate import Generate
from ftx.run import Evaluation, Score

if TYPE_CHECKING:
    from datasets import Dataset

    from ftx.hooks import Hooks
    from ftx.run import Run

log = logging.getLogger("ftx")


def evaluate_phase(
    phase: str, hooks: Hooks, generate: Generate, dataset: Dataset | None, run: Run, *, hold: bool = False
) -> tuple[list[Score], dict[str, str]]:
    """Ask every evaluator about the model in hand, and give the stamped scores; the items of those that gave scores are written.

    With `hold` none are: all items stay in `run.unwritten` for the caller, who writes them with `write_items`. Also gives
    evaluator -> error for those that raised: each costs only its own scores.
    """
    generate.around = lambda: around(hooks, generate.model, run)
    scores: list[Score] = []
    failed: dict[str, str] = {}
    for key in hooks.implementers("evaluate_model"):
        name = key.partition(":")[2]
        try:
            evaluation = hooks.ask(key, "evaluate_model", generate=generate, dataset=dataset, run=run)
            if not isinstance(evaluation, Evaluation):
                raise FtxError(f"evaluator '{name}' returned {type(evaluation).__name__}, not an Evaluation.")
        except Exception as error:
            log.exception("evaluator %s failed on the %s model", name, phase)
            failed[name] = first_line(error)
            run.say(f"error: evaluator '{name}' failed on the {phase} model: {failed[name]}")
            continue
        stamped = [score.stamped(name, phase) for score in evaluation.scores]
        scores += stamped
        run.unwritten[name, phase] = evaluation.items
        if stamped and not hold:
            write_items(name, run)
        if stamped:
            run.say(f"{phase}: {name} {describe(stamped[0])}")
    return scores, failed


def write_items(evaluator: str, run: Run) -> None:
    """Write what an evaluator's items in hand are, over those of an earlier evaluation."""
    assert run.directory is not None
    for name, phase in [key for key in run.unwritten if key[0] == evaluator]:
        run.directory.write_items(name, phase, run.unwritten.pop((name, phase)))


@contextlib.contextmanager
def around(hooks: Hooks, model: Any, run: Run) -> Iterator[None]:
    """Inside what every plugin puts around generation."""
    with contextlib.ExitStack() as stack:
        for _, manager in hooks.each("around_generation", model=model, run=run):
            if manager is not None:
                stack.enter_context(manager)
        yield


def compare_phases(hooks: Hooks, evaluators: list[str], run: Run, *, hold: bool = False) -> tuple[list[Score], dict[str, str]]:
    """What every evaluator says of the change, from its own items of both phases; only those with both are asked.

    The items are those in hand (held, or of an evaluator that gave no scores: a dry run counts here what comparing would
    take), else for `evaluators` those on disk. `hold` and what is given: as in `evaluate_phase`.
    """
    assert run.directory is not None
    changes: list[Score] = []
    failed: dict[str, str] = {}
    for key in hooks.implementers("compare_answers"):
        name = key.partition(":")[2]
        base, tuned = (_as_read(run.unwritten.get((name, phase), [])) for phase in ("base", "tuned"))
        if name in evaluators:
            base, tuned = (run.directory.read_items(name, phase) for phase in ("base", "tuned"))
        if not base or not tuned:
            continue
        try:
            result = hooks.ask(key, "compare_answers", base_items=base, tuned_items=tuned, run=run)
        except Exception as error:
            log.exception("evaluator %s failed on the comparison", name)
            failed[name] = first_line(error)
            continue
        if isinstance(result, Evaluation):
            run.unwritten[name, "change"] = result.items
            result = result.scores
        stamped = [score.stamped(name, "change") for score in result or []]
        changes += stamped
        if (stamped or name in evaluators) and not hold:
            write_items(name, run)
    return changes, failed


def _as_read(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as they would come back from the disk; the ones given stay as they are, whatever is done to these."""
    read: list[dict[str, Any]] = json.loads(json.dumps(items, default=str))
    return read


def describe(score: Score) -> str:
    """`exact_match 0.970 [0.915, 0.990] of 100`."""
    interval = f" [{score.ci_low:.3f}, {score.ci_high:.3f}]" if score.ci_low is not None and score.ci_high is not None else ""
    unscored = f", {score.unscored} unscored" if score.unscored else ""
    return f"{score.metric} {score.value:.3f}{interval} of {score.n}{unscored}"
