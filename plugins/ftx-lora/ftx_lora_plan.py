"""What an adapter of LoRA's kind says to `ftx plan`: what trains, and what its layers keep. Imports no torch.

The sums are of Llama-like decoder layers; arXiv 2106.09685, 2402.09353 and peft 0.21 say what is computed.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ftx.shape import Shape
    from ftx_lora import LoRA

#: Layers that are called with one input.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
BLOCKS = {"q_proj": "self_attn", "k_proj": "self_attn", "v_proj": "self_attn", "o_proj": "self_attn"}


def adapted(adapter: LoRA, shape: Shape) -> dict[str, tuple[int, int]]:
    """Adapted linear layers of one decoder layer -> (inputs, outputs)."""
    targets = adapter.target_modules
    if targets == "all-linear":
        return shape.linears
    paths = {name: f"model.layers.0.{BLOCKS.get(name, 'mlp')}.{name}" for name in shape.linears}
    if isinstance(targets, str):
        return {name: shape.linears[name] for name, path in paths.items() if re.fullmatch(targets, path)}
    return {name: shape.linears[name] for name, path in paths.items() if any(path == one or path.endswith(f".{one}") for one in targets)}


def shaped(adapter: LoRA, shape: Shape, *, dora: bool = False) -> Shape:
    """The shape with the count of what trains."""
    found = adapted(adapter, shape)
    trained = shape.layers * sum(adapter.r * (i + o) + o * dora for i, o in found.values())
    listed = adapter.target_modules if isinstance(adapter.target_modules, list) else []
    if "lm_head" in listed:
        trained += adapter.r * (shape.hidden + shape.vocabulary) + shape.vocabulary * dora
    trained += shape.vocabulary * shape.hidden * len({"lm_head", "embed_tokens"} & set(adapter.modules_to_save))
    if adapter.bias == "all":
        trained += shape.layers * shape.biases
    drops = adapter.dropout > 0
    return replace(shape, trained=trained, output_kept="o_proj" in found, dropout=shape.dropout or drops)


def memory(adapter: LoRA, shape: Shape, *, dora: bool = False) -> dict[str, int]:
    """Bytes by kind; adapters and their gradients are float32."""
    found, e, r = adapted(adapter, shape), shape.compute, adapter.r
    fused = "lora" in shape.fused and shape.packed != 8
    groups = [[name for name in names if name in found] for names in (*SIBLINGS, ("o_proj",), ("down_proj",))]
    inputs = [found[names[0]][0] for names in groups if names and names != ["o_proj"]]  # its input is the attention's output
    outputs = sum(o for _, o in found.values())
    once = 0
    if fused:
        kept = e * sum(inputs) + e * r * len(found) + e * outputs * dora
        kept += sum(i for i, _ in found.values()) * (adapter.dropout > 0)  # which of its inputs a layer drops
        once = sum(e * r * sum(found[name][0] for name in names) for names in groups if len(names) > 1 or e != 4)  # the A's as one matrix
    elif adapter.dropout:
        noise = 4 if shape.device == "cpu" else 1
        kept = sum((4 + noise) * i for i, _ in found.values()) + 4 * r * len(found)
    elif e == 4:
        kept = 4 * sum(inputs) + 4 * r * len(found)
    else:
        kept = 4 * sum(i for i, _ in found.values()) + 4 * r * len(found)  # peft: a float32 copy of each layer's input
    if dora and not fused:
        kept += 2 * 4 * outputs
    return {
        "adapter": 4 * shape.trained + shape.layers * 2 * 4 * outputs * dora,  # DoRA: norms of the weights, and of the adapted ones
        "gradients": 4 * shape.trained,
        "activations": shape.layers * (kept * shape.tokens + once),
        # what is gone when SwiGLU's backward pass stands highest: the down projection's own
        "buffers": -e * shape.tokens * shape.hidden if dora and fused and "down_proj" in found else 0,
    }
