"""One decoder layer of SmolLM2-135M in bf16, forward and backward: what each part of its body brings. Prints ratios.

Run by `python bench_body.py`; the parts alternate, so that a busy machine slows all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ftx_fast_attention
import ftx_fast_layers
from ftx_fast_rows import join

#: Layers: one, and a vocabulary that weighs nothing.
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 1, "vocab_size": 64}
REPEATS = 15


def measure(model: LlamaForCausalLM, ways: dict[str, tuple[list[Callable[..., Any]], dict[str, Any]]]) -> dict[str, float]:
    """Median milliseconds of each way (installs, inputs), in turn; putting it on and taking it off is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, (installs, inputs) in ways.items():
            done = [install(model) for install in installs]
            begun = time.perf_counter()
            model(**inputs, use_cache=False).logits.float().mean().backward()
            times[name].append(1000 * (time.perf_counter() - begun))
            for one in reversed(done):
                one.undo()
    return {name: median(taken[2:]) for name, taken in times.items()}


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation="sdpa")).bfloat16().train().requires_grad_(False)
    model.model.embed_tokens.requires_grad_()  # so that gradients go all the way back
    attention, layers = ftx_fast_attention.install, ftx_fast_layers.install
    lengths = torch.linspace(40, 140, 16).int().tolist()
    ragged = torch.randint(0, 64, (16, max(lengths)))
    joined = join(ragged, ragged, lengths, 0, 32)
    even, padded = {"input_ids": torch.randint(0, 64, (16, 111))}, {"input_ids": ragged}
    for title, inputs in {"16 rows of 111": even, "16 rows of 40 to 140": padded}.items():
        ways = {"transformers": ([], inputs), "attention": ([attention], inputs), "layers": ([layers], inputs), "both": ([attention, layers], inputs)}
        if inputs is padded:
            ways["both, rows joined"] = [attention, layers], {"input_ids": joined.input_ids, "position_ids": joined.position_ids}
        taken = measure(model, ways)
        for name, milliseconds in taken.items():
            print(f"{title:22} {name:18} {milliseconds:7.1f} ms   {taken['transformers'] / milliseconds:.2f} x")


if __name__ == "__main__":
    main()
