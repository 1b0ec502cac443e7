"""What a run really took: the step of its longest batch measured, its time and its disk, beside the prediction in plan.json."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ftx.longest import longest_of, sizes_of_steps
from ftx.measure import Measured, measure, resident, size_of
from ftx.run import Run, RunDir, write_text

log = logging.getLogger("ftx")

#: A batch is measured if it has this many times the tokens of any before it: of near lengths one is enough.
LONGER = 1.02
#: In every checkpoint: `measured` of plan.json as it was at that step, for the process that goes on from there.
MEASURED = "ftx-measured.json"
#: Steps that were neither the first nor measured from which a run's speed is taken over for later plans.
TIMED = 5


class Peak(TrainerCallback):  # type: ignore[misc]
    """Measures the step of the longest batch and changes nothing in it; every other step pays for a hook that counts tokens.

    Which steps those may be is known when training begins (`ftx.longest`), and they are measured if they are longer than all
    that were; so is the first that has optimizer states, which a run that ends early has to show. Where it is not known, each
    batch is measured that is longer than all before it: of n random ones about ln n.

    plan.json has what is known since the last save, however the process ends; `checkpoint` is the one that it goes on from.
    """

    def __init__(self, run: Run, apart: Sequence[Any] = (), checkpoint: Path | None = None) -> None:
        self.run, self.apart = run, apart
        kept = checkpoint / MEASURED if checkpoint else None
        self.earlier: dict[str, Any] = json.loads(kept.read_text("utf-8")) if kept and kept.exists() else {}
        self.began: float | None = None
        self.since: float | None = None  # the end of the step before; None where something else came between
        self.peak, self.about = 0, dict[str, Any]()
        self.longest = self.tokens = 0
        self.steps = list[tuple[float, int, bool]]()  # seconds, positions that went through the model, whether measured
        self.block: contextlib.ExitStack | None = None
        self.hook: Any = None
        self.working = True
        self.looks: set[int] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, train_dataloader: Any = None, **_: Any) -> None:
        if self.run.device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        self.looks = self._worth_a_look(train_dataloader, args, state)
        self.model, self.began = model, time.monotonic()
        self.hook = model.register_forward_pre_hook(self._forward, with_kwargs=True)

    def _worth_a_look(self, loader: Any, args: Any, state: Any) -> set[int] | None:
        """Numbers of the steps that may be measured; None for all."""
        accumulation, done, last = getattr(args, "gradient_accumulation_steps", 1), state.global_step, state.max_steps
        stateful = done + (not done and last > 1)  # behind the first step of a run there are the optimizer's states
        sizes = sizes_of_steps(loader, accumulation=accumulation, after=done, last=last)
        if sizes is None:
            return None
        with_states = {step: size for step, size in sizes.items() if step > stateful}
        return {stateful + 1, *longest_of(sizes), *longest_of(with_states)}

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.looking = self.working and (self.looks is None or state.global_step + 1 in self.looks)
        if self.since is None:
            self.since = time.monotonic()
        self.positions, self.batch, self.has_states = 0, 0, bool(self.steps) or bool(getattr(optimizer, "state", None))

    def _forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass that trains: measure from here on if no batch before was as long."""
        import torch

        if not module.training or not torch.is_grad_enabled():
            return
        given = [kwargs["input_ids"]] if kwargs.get("input_ids") is not None else [*args, *kwargs.values()]
        size = max((one.numel() for one in given if isinstance(one, torch.Tensor) and not one.is_floating_point()), default=0)
        self.positions += size
        if self.block is not None or (self.looking and size > LONGER * self.longest):
            self.batch = max(self.batch, size)
            if self.has_states:
                self.longest = max(self.longest, size)
            if self.block is None:
                self._begin()

    def _begin(self) -> None:
        self.block, self.found = contextlib.ExitStack(), Measured()
        gradients = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.before, self.arrived = size_of(one.grad for one in gradients), list[tuple[int, int]]()
        if self.run.device == "cuda":
            return  # its allocator counts by itself
        try:
            self.found = self.block.enter_context(measure(apart=self.apart))
        except Exception as error:  # another profiler is at work, for one
            log.warning("memory is not measured: %s", error)
            self.working = self.looking = False
            self.block = None
            return
        for one in gradients:
            if one.grad is None:
                self.block.callback(one.register_post_accumulate_grad_hook(self._arrived).remove)

    def _arrived(self, parameter: Any) -> None:
        self.arrived.append((time.time_ns(), parameter.grad.untyped_storage().nbytes()))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.stepped = time.time_ns()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if self.block is None:
            return
        kinds = persistent(self.model, optimizer)
        gradients = size_of(parameter.grad for parameter in self.model.parameters())
        block, self.block = self.block, None
        block.close()
        peak, other = self.found.peak, 0
        if self.run.device == "cuda":
            import torch

            peak = int(torch.cuda.max_memory_allocated())
        else:
            seen = {when: size for when, size in reversed(self.arrived)}
            gradients = self.before + sum(size for when, size in seen.items() if when <= self.found.moment)
            states = kinds["optimizer"]
            if not self.has_states and self.found.moment < self.stepped:
                kinds["optimizer"] = 0  # it stood highest before they came
            other = max(0, self.found.start - self.before - sum(kinds.values()) + (0 if self.has_states else states))
        kinds |= {"gradients": gradients, "other": other}
        kinds["activations"] = peak - sum(kinds.values())
        if peak > self.peak:
            self.peak = peak
            self.about = {"by_kind": kinds, "step": state.global_step + 1, "batch_tokens": self.batch}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step lasts from the end of the one before: what a GPU has still to do when it ends is waited for in the next one."""
        now = time.monotonic()
        assert self.since is not None
        self.steps.append((now - self.since, self.positions, self.batch > 0))
        self.since = now

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.since = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        self.tokens = int((logs or {}).get("tokens", self.tokens))

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._keep(f"checkpoint-{state.global_step}")
        self.since = None

    def _keep(self, checkpoint: str | None = None) -> None:
        """Write what is known into plan.json, and into a checkpoint that was just saved."""
        if self.began is None or not self.run.is_main:
            return
        assert self.run.directory is not None
        found = self._with_earlier(self.result(time.monotonic() - self.began))
        if checkpoint and (self.run.directory.checkpoints / checkpoint).is_dir():
            write_text(self.run.directory.checkpoints / checkpoint / MEASURED, json.dumps(found))
        note(self.run, found)

    def _with_earlier(self, found: dict[str, Any]) -> dict[str, Any]:
        """What this process found, with what those before it did: the largest peak, all time and tokens, the surest speed."""
        joined = {**self.earlier, **found}
        for leading, following in (("peak_memory", ("by_kind", "step", "batch_tokens")), ("timed_steps", ("seconds_per_position",))):
            if self.earlier.get(leading, 0) > found.get(leading, 0):
                joined |= {name: self.earlier[name] for name in (leading, *following) if name in self.earlier}
        for name, join in (("seconds", sum), ("tokens", sum), ("resident_memory", max)):
            joined[name] = join([self.earlier.get(name, 0), found[name]])
        return joined

    def close(self) -> None:
        """Take away the hook, and a measurement that an error broke off; keep what is known."""
        if self.block is not None:
            self.block.close()
        if self.hook is not None:
            self.hook.remove()
        self.block = self.hook = None
        with contextlib.suppress(OSError):  # a full disk is what ended the training, and is told as that
            self._keep()

    def result(self, seconds: float) -> dict[str, Any]:
        """What this process knows, as `measured` of plan.json has it: bytes, seconds, tokens."""
        found: dict[str, Any] = {"peak_memory": self.peak, **self.about} if self.peak else {}
        found |= {"resident_memory": resident(), "seconds": round(seconds, 3), "tokens": self.tokens}
        plain = [(seconds, count) for seconds, count, measured in self.steps[1:] if not measured]
        if positions := sum(count for _, count in plain):
            found |= {"timed_steps": len(plain), "seconds_per_position": sum(seconds for seconds, _ in plain) / positions}
        return found


def persistent(model: Any, optimizer: Any) -> dict[str, int]:
    """Bytes of what stands between two steps: weights (quantised ones with their scales), adapter (what trains, if not all does), buffers,
    optimizer states."""
    import torch

    parameters = list(model.parameters())
    trained = [one for one in parameters if one.requires_grad]
    frozen = [part for one in parameters if not one.requires_grad for part in parts_of(one)]
    states = [value for state in getattr(optimizer, "state", {}).values() for value in (state.values() if isinstance(state, dict) else [])]
    if any(one.is_cuda for one in parameters):
        states = [one for one in states if isinstance(one, torch.Tensor) and one.is_cuda]  # paged ones lie in the host's memory
    kinds = {"weights": size_of(frozen), "adapter": size_of(trained)} if frozen else {"weights": size_of(trained), "adapter": 0}
    return kinds | {"buffers": size_of(model.buffers()), "optimizer": size_of(states)}


def parts_of(parameter: Any) -> list[Any]:
    """A parameter's own tensor, and those that hang on it: the scales of a quantised one."""
    import torch

    found, waiting = [parameter], list(vars(parameter).values())
    while waiting:
        one = waiting.pop()
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif type(one).__name__ == "QuantState":
            waiting += vars(one).values()
    return found


def note(run: Run, measured: dict[str, Any]) -> None:
    """Write `measured` of the run's plan.json."""
    assert run.directory is not None
    run.directory.write_json("plan.json", {**run.directory.read_json("plan.json", {}), "measured": measured})


def finish(run: Run) -> None:
    """At the end of a run: its disk, and the speed of this machine for later plans where enough steps tell it."""
    from ftx.shape import read_shape
    from ftx.speed import remember

    assert run.directory is not None
    measured = run.directory.read_json("plan.json", {}).get("measured", {}) | {"disk": disk_of(run.directory)}
    note(run, measured)
    if measured.get("timed_steps", 0) >= TIMED and "seconds_per_position" in measured and run.recipe.start is None:
        remember(run.recipe, read_shape(run.model_path), run.device, measured["seconds_per_position"])


def disk_of(directory: RunDir) -> int:
    """Bytes of all files of a run."""
    return bytes_of(directory.path.rglob("*"))


def bytes_of(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())
