"""Memory, time and disk of a run before anything is loaded: closed forms, and what each chosen plugin contributes. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftx import activations
from ftx.hooks import Hooks
from ftx.shape import Shape

if TYPE_CHECKING:
    from ftx.run import Run

#: What stands from the first step to the last one.
STANDING = ("weights", "adapter", "optimizer", "reference")
#: Every kind of bytes that a plugin may add.
KINDS = (*STANDING, "gradients", "activations", "head", "buffers")
#: Rows and tokens of a batch of generation (ftx.generate).
GENERATED_ROWS, GENERATED_TOKENS = 96, 16384


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a run needs: bytes, tokens, steps and seconds; None where there is no data, or no speed of this machine, to tell from."""

    shape: Shape
    peak_memory: int
    """The largest sum of live tensor storage from the loaded model to the last optimizer step."""
    by_kind: dict[str, int]
    """What stands at that moment, by kind; sums to the peak."""
    moment: str
    """When that is: loss, backward, embedding or step."""
    evaluation: int = 0
    """The same while answers are generated."""
    tokens: int | None = None
    supervised_tokens: int | None = None
    steps: int | None = None
    disk: int | None = None
    seconds: float | None = None
    parts: dict[str, int] = field(default_factory=dict, repr=False)
    asked: Shape = field(repr=False)
    """The shape before the plugins said what they make of its batch."""

    @property
    def needed(self) -> int:
        """Bytes of tensors at the run's highest point, evaluation included."""
        return max(self.peak_memory, self.evaluation)

    def as_dict(self) -> dict[str, Any]:
        """`predicted` of plan.json; what is unknown is left out."""
        found = {"peak_memory": self.peak_memory, "by_kind": self.by_kind, "moment": self.moment, "evaluation_memory": self.evaluation}
        names = ("seconds", "tokens", "supervised_tokens", "steps", "disk")
        return found | {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def predict(run: Run, hooks: Hooks, shape: Shape) -> Prediction:
    """The memory of a run on the batch that `shape` holds. Asks `plan_shape`, then `memory_use`, of every chosen plugin."""
    asked, shape = shape, shaped(run, hooks, shape)
    kinds = base_use(shape)
    for _, found in hooks.each("memory_use", shape=shape, run=run):
        for kind, size in (found or {}).items():
            kinds[kind] = kinds.get(kind, 0) + int(size)
    moment, at_peak = highest(shape, kinds)
    return Prediction(
        shape=shape,
        asked=asked,
        peak_memory=sum(at_peak.values()),
        by_kind=at_peak,
        moment=moment,
        evaluation=sum(kinds[kind] for kind in ("weights", "adapter")) + generating(run, shape),
        parts=kinds,
    )


def shaped(run: Run, hooks: Hooks, shape: Shape) -> Shape:
    """The shape as the run's plugins make it, each over what those before it said."""
    for key in hooks.implementers("plan_shape"):
        shape = hooks.ask(key, "plan_shape", shape=shape, run=run) or shape
    return shape


def base_use(shape: Shape) -> dict[str, int]:
    """Bytes by kind of the model alone: weights as loaded, what transformers' layers keep, one layer's backward pass."""
    kinds = dict.fromkeys(KINDS, 0)
    kinds["weights"] = shape.loaded * shape.parameters + 8 * shape.head_dim // 2
    kinds["activations"] = activations.layers(shape)
    kinds["buffers"] = activations.backward(shape)
    return kinds


def highest(shape: Shape, kinds: dict[str, int]) -> tuple[str, dict[str, int]]:
    """The moment of a step at which most is alive, and what that is.

    `loss`: the forward pass is done. `last layer`: the backward pass begins. `first layer`: it ends, and the gradients of
    all other layers are there. `embedding`: behind it. `step`: the optimizer's. Gradients stand from the first backward
    pass of a step to its end, so with accumulation they are there at every moment.
    """
    standing = {kind: kinds[kind] for kind in STANDING}
    one = math.ceil(kinds["activations"] / shape.layers)
    edge = activations.boundary(shape)
    if shape.checkpointing:  # a layer's own input is kept already, and the last norm's is gone behind the loss
        saved, last, first = (shape.layers + 1) * edge, (shape.layers - 1) * edge + one, one
    else:  # where nothing before the first norm trains, it keeps nothing
        saved, last, first = kinds["activations"] + activations.last_norm(shape) * shape.trains_base, kinds["activations"], one
    gradients = kinds["gradients"]
    before = gradients if shape.accumulation > 1 else 0
    table = shape.vocabulary * shape.hidden * shape.between * shape.trains_base  # the gradient of an embedding or a head comes in one piece
    moments = {
        "loss": {"gradients": before, "activations": saved, "head": kinds["head"]},
        "last layer": {"gradients": before or table, "activations": last, "buffers": kinds["buffers"] + (table if before else 0)},
        "first layer": {
            "gradients": before or gradients - gradients // shape.layers,
            "activations": first,
            "buffers": kinds["buffers"] + (table if before and shape.tied else 0),
        },
        "embedding": {"gradients": gradients, "buffers": edge + table * (shape.tied + bool(before))},
        "step": {"gradients": gradients},
    }
    name = max(moments, key=lambda moment: sum(moments[moment].values()))
    return name, {kind: size for kind, size in (standing | moments[name]).items() if size}


def generating(run: Run, shape: Shape) -> int:
    """Bytes of a batch of generation: keys and values of every layer, and the logits of the last position. 0 without evaluators."""
    longest = max((int(choice.options.get("max_new_tokens", 0) or 0) for choice in run.recipe.evaluators), default=0)
    if not run.recipe.evaluators:
        return 0
    width = shape.longest + longest
    rows = max(1, min(GENERATED_ROWS, GENERATED_TOKENS // max(1, width)))
    size: int = rows * (width * shape.layers * 2 * shape.keys * shape.loaded + shape.vocabulary * (shape.loaded + 4))
    return size


def steps_of(rows: int, options: dict[str, Any]) -> int:
    """Optimizer steps of a transformers trainer with these options on so many rows (or packs)."""
    batch, accumulation = options.get("per_device_train_batch_size", 1), options.get("gradient_accumulation_steps", 1)
    if options.get("max_steps", -1) > 0:
        return int(options["max_steps"])
    batches = rows // batch if options.get("dataloader_drop_last") else math.ceil(rows / batch)
    steps: int = math.ceil(max(1, math.ceil(batches / accumulation)) * options.get("num_train_epochs", 1))
    return steps
