"""What the trainers on TRL say to `ftx plan`: the batch, what is fused, the optimizer's states, the head. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import ftx_fast_memory as fast
from ftx_fast import parts_of

if TYPE_CHECKING:
    from ftx.shape import Shape
    from ftx_sft_options import Training

#: Bytes of state for each number that trains, by the beginning of transformers' names of optimizers; Adam's two in float32 otherwise.
STATES = {
    "sgd": 0.0,
    "adafactor": 0.02,
    "lion_8bit": 1.02,
    "paged_lion_8bit": 1.02,
    "lion": 4.0,
    "paged_lion": 4.0,
    "rmsprop_bnb_8bit": 1.02,
    "rmsprop": 4.0,
    "adagrad": 4.0,
    "adamw_8bit": 2.04,
    "adamw_bnb_8bit": 2.04,
    "paged_adamw_8bit": 2.04,
    "ademamix_8bit": 3.06,
    "paged_ademamix_8bit": 3.06,
    "ademamix": 12.0,
    "paged_ademamix": 12.0,
    "adamw_torch_8bit": 2.04,
    "adamw_torch_4bit": 1.04,
}


def shaped(options: Training, shape: Shape) -> Shape:
    """The shape as the trainer trains it: what of ftx-fast is on, and whether it computes in bfloat16 over float32 weights."""
    autocast = shape.trains_base and shape.compute == 2
    shape = replace(
        shape,
        autocast=autocast,
        residual=4 if autocast else shape.residual,
        accumulation=options.gradient_accumulation_steps,
        checkpointing=bool(options.gradient_checkpointing),
        dropout=shape.dropout or bool(options.args.get("neftune_noise_alpha")),
    )
    return fast.shaped(shape, parts_of(options.fast), packed=getattr(options, "packing", False))


def memory(options: Training, shape: Shape, *, compared: bool = False) -> dict[str, int]:
    """Bytes by kind: the optimizer's states, what the loss needs, what ftx-fast saves."""
    found = fast.changes(shape)
    found["optimizer"] = round(shape.trained * STATES.get(options.optim, 8.0))
    found["head"] = fast.head(shape, compared=compared) if "head" in shape.fused else fast.plain_head(shape)
    if shape.autocast:
        # the weights in bfloat16, kept from forward to backward, and the input of query, key and value cast for each of them
        found["activations"] = found.get("activations", 0) + 2 * shape.linear_parameters + shape.layers * shape.tokens * 3 * 2 * shape.hidden
    return found
