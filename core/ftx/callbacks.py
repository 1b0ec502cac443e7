"""The core's own callbacks on a transformers trainer: metrics.jsonl, progress, whole checkpoints, Ctrl-C."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ftx.checkpoints import mark, prune, sync
from ftx.measure import resident
from ftx.run import Run, read_lines

if TYPE_CHECKING:
    from ftx.console import Console

COUNTS = ("tokens", "supervised_tokens")


class Metrics(TrainerCallback):  # type: ignore[misc]
    """One line a logged step into metrics.jsonl, the first and the last step always, and the progress bar.

    `tokens` and `supervised_tokens` come from the trainer as counts since the process began and are written as counts
    since the run began.
    """

    def __init__(self, run: Run, console: Console) -> None:
        assert run.directory is not None
        self.file, self.console = run.directory.metrics, console
        self.planned = (run.directory.read_json("plan.json", {}).get("predicted") or {}).get("peak_memory")
        self.resident = run.device == "cpu"
        last = (read_lines(self.file) or [{}])[-1]
        self.before = {name: last.get(name, 0) for name in COUNTS}
        self.last_tokens, self.last_time = 0, time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last_time = time.monotonic()
        self.progress = self.console.watch("step", state.max_steps, done=state.global_step, planned=self.planned, resident=self.resident)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.resumed_at = getattr(self, "resumed_at", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1 or state.global_step >= state.max_steps or control.should_save:
            control.should_log = True
        if not control.should_log:  # on_log prints the step with its figures
            self.progress.update(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log = control.should_log or control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = {key: value for key, value in (logs or {}).items() if key != "epoch"}
        if "train_runtime" in logs:
            return  # the trainer's own summary at the end
        line: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0, 4), **logs}
        if "loss" in logs:
            now, tokens = time.monotonic(), logs.get("tokens", 0)
            line["tokens_per_second"] = round((tokens - self.last_tokens) / max(1e-9, now - self.last_time), 1)
            self.last_tokens, self.last_time = tokens, now
            line |= {name: self.before[name] + logs[name] for name in COUNTS if name in logs}
            line["peak_memory"] = peak_memory()
        with open(self.file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        if "loss" in logs:
            figures = f"loss {logs['loss']:.4f}  lr {logs.get('learning_rate', 0):.2e}  {line['tokens_per_second']:.0f} tokens/s"
            self.progress.update(state.global_step, figures, always=True, **line)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last_time = time.monotonic()  # evaluation is not training time

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.last_time = time.monotonic()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.end()


class Checkpoints(TrainerCallback):  # type: ignore[misc]
    """Marks each checkpoint as whole once all its bytes are on disk, and prunes older ones only then."""

    def __init__(self, run: Run) -> None:
        assert run.directory is not None and run.recipe.trainer is not None
        self.directory = run.directory
        self.keep = run.recipe.trainer.options.get("save_total_limit")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        checkpoint = self.directory.checkpoints / f"checkpoint-{state.global_step}"
        if not state.is_world_process_zero or not checkpoint.is_dir():
            return
        if self.directory.metrics.exists():
            sync(self.directory.metrics)
        mark(checkpoint)
        if self.keep:
            prune(self.directory, self.keep, Path(state.best_model_checkpoint).name if state.best_model_checkpoint else None)


class Interrupt(TrainerCallback):  # type: ignore[misc]
    """Ctrl-C ends training behind the current step with a checkpoint; a second one ends it at once."""

    def __init__(self, console: Console) -> None:
        self.console, self.asked = console, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.previous = signal.signal(signal.SIGINT, self._signal)

    def _signal(self, number: int, frame: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.console.say("Stopping behind this step with a checkpoint (Ctrl-C again: at once).")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked:
            control.should_save = control.should_log = control.should_training_stop = True

    def restore(self) -> None:
        if hasattr(self, "previous"):
            signal.signal(signal.SIGINT, self.previous)


def peak_memory() -> int:
    """Bytes: the most that the accelerator's allocator held, or on a CPU the most that the process held resident."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resident()
