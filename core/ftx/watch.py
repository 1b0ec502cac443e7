"""Rules that watch a training: what can only get worse stops it before a checkpoint is spoiled, what looks wrong warns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

from transformers import TrainerCallback

from ftx.checkpoints import step_of, whole_checkpoints
from ftx.errors import RunError
from ftx.run import Run, read_lines

#: Logged steps without any gradient that stop a run.
NO_GRADIENT = 3
#: A loss explodes when it is this many times the usual one (the median of up to ten before), this often in a row, and
#: this many times the first one: worse than the model that the training began with.
EXPLODED, IN_A_ROW, THAN_FIRST = 3.0, 3, 1.5
#: A learning rate of more than this many times the recipe's is no schedule.
RATE = 10.0
#: Logged losses that are looked at before they are said not to move, and the relative change that counts as moving.
STILL, MOVES = 20, 1e-4
#: Logged losses after which the last ten should be below the first ten.
LEARNS = 30


class Watch(TrainerCallback):  # type: ignore[misc]
    """Looks at each logged line. A stop is a RunError: raised before the checkpoint of that step is written, so that the
    newest checkpoint is a good one. Every checkpoint is logged first (see Metrics), so none is written unseen."""

    def __init__(self, run: Run) -> None:
        assert run.directory is not None
        self.run, self.warned = run, set[str]()
        self.lines = [line for line in read_lines(run.directory.metrics) if "loss" in line]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        self.lines.append({"step": state.global_step, **logs})
        scaled = str(self.run.dtype) == "torch.float16"  # its scaler meets infinite gradients on purpose, and skips those steps
        options = self.run.recipe.trainer.options if self.run.recipe.trainer else {}
        rate = options.get("learning_rate")
        problem = stops(self.lines, rate, scaled)
        if problem:
            raise self._stop(problem, state.global_step, rate)
        for warning in warnings(self.lines):
            if warning not in self.warned:
                self.warned.add(warning)
                self.run.say(f"warning: step {state.global_step}: {warning}")

    def _stop(self, problem: str, step: int, rate: float | None) -> RunError:
        assert self.run.directory is not None
        whole = whole_checkpoints(self.run.directory)
        kept = f"The last good checkpoint is of step {step_of(whole[-1])}." if whole else "There is no checkpoint from before."
        lower = f" -o trainer.learning_rate={rate / 5:.2g}" if rate else ""
        return RunError(
            f"step {step}: {problem}",
            f"{kept} Going on would come to the same place.\n{TRY[problem.split(' ')[1]]}\n"
            f"For example: ftx run {self.run.directory.recipe}{lower} --output NEW",
        )


#: The second word of a problem -> what to try.
TRY = {
    "loss": "Try a lower learning rate, more warm-up steps, a lower max_grad_norm, --dtype float32; look for damaged rows.",
    "gradient": "Try another adapter or other target_modules, --dtype float32, and see that the answers are supervised: audit.json.",
    "learning": "Give a plain schedule (-o trainer.lr_scheduler_type=cosine) and no trainer.args that change the rate.",
}


def stops(lines: Sequence[dict[str, Any]], rate: float | None = None, scaled: bool = False) -> str | None:
    """Why the training must stop at the last of the logged `lines`, or None. `rate`: the recipe's learning rate; `scaled`:
    float16 with loss scaling."""
    last = lines[-1]
    loss, gradient, now = last["loss"], last.get("grad_norm"), last.get("learning_rate")
    if not math.isfinite(loss):
        return f"the loss is {loss}."
    if gradient is not None and not math.isfinite(gradient):
        row = lines[-NO_GRADIENT:]
        if not scaled or (len(row) == NO_GRADIENT and not any(math.isfinite(line.get("grad_norm", 0)) for line in row)):
            return f"the gradient is {gradient}."
    if now is not None and (not math.isfinite(now) or (rate and now > RATE * rate)):
        return f"the learning rate is {now:.3g}, the recipe's is {rate}."
    dead = [line for line in lines[-NO_GRADIENT:] if line.get("grad_norm") == 0]
    if len(dead) == NO_GRADIENT and min(line["loss"] for line in dead) > 1e-4:  # below that there is nothing left to learn
        return f"the gradient is zero for the {NO_GRADIENT}rd logged step in a row, so nothing is learned."
    usual = [line["loss"] for line in lines[:-IN_A_ROW]][-10:]
    if len(usual) >= IN_A_ROW:
        bound = max(EXPLODED * median(usual), THAN_FIRST * lines[0]["loss"])
        high = [line["loss"] for line in lines[-IN_A_ROW:]]
        if lines[0]["loss"] > 0 and min(high) > bound:
            return f"the loss explodes: {', '.join(f'{one:.4g}' for one in high)} after about {median(usual):.4g}, and {lines[0]['loss']:.4g} at first."
    return None


def warnings(lines: Sequence[dict[str, Any]]) -> list[str]:
    """What looks wrong at the last of the logged `lines`, each with what to try."""
    found = []
    losses = [line["loss"] for line in lines]
    lately = losses[-STILL:]
    if len(lately) == STILL and max(lately) - min(lately) <= MOVES * abs(median(lately)) and median(lately) > 1e-4:
        found.append(f"the loss has not moved for {STILL} logged steps. Try a higher learning rate, and see that the adapter trains what it should.")
    elif len(losses) >= LEARNS and median(losses[-10:]) >= median(losses[:10]) > 1e-4:
        found.append(
            "the loss is no lower than at first. Try a higher learning rate, or a lower one if it jumps; see that questions and answers belong together."
        )
    if lines[-1].get("grad_norm") == 0:
        found.append("the gradient is zero.")
    return found
