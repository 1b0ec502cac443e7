"""The floor of a step: its own matrix products, each measured alone, in the dtype that the machine computes in.

`python tests/benchmarks/floor.py [TOKENS [SUPERVISED]]` prints them. Counted are, for each linear layer, the product forward and the input's
gradient (no weight's: they are frozen), the adapter's products of rank r, and the head on supervised positions, forward and back. Not
counted is attention, nor anything that is no product: the rest of a step has to fit under what is left.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch

from ftx.device import best_dtype

#: SmolLM2-135M: layers, hidden, intermediate, key and value width, vocabulary; the rank of the benchmark.
LAYERS, HIDDEN, INNER, KEYS, VOCABULARY, RANK = 30, 576, 1536, 192, 49152, 16
ATTENTION = [(HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN)]
MLP = [(HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)]


def shapes(tokens: int, supervised: int, adapter: str) -> dict[tuple[int, int, int], int]:
    """(rows, inner, columns) -> how often in a step."""
    count: dict[tuple[int, int, int], int] = {}

    def add(m: int, k: int, n: int, times: int = 1) -> None:
        count[m, k, n] = count.get((m, k, n), 0) + times

    adapted = ATTENTION if adapter == "attention" else ATTENTION + MLP
    for wide, out in ATTENTION + MLP:
        add(tokens, wide, out, LAYERS)
        add(tokens, out, wide, LAYERS)
    for wide, out in adapted:
        for m, k, n in ((tokens, wide, RANK), (tokens, RANK, out), (tokens, out, RANK), (tokens, RANK, wide), (out, tokens, RANK), (RANK, tokens, wide)):
            add(m, k, n, LAYERS)
    add(supervised, HIDDEN, VOCABULARY)
    add(supervised, VOCABULARY, HIDDEN)
    return count


def seconds_of(m: int, k: int, n: int, dtype: torch.dtype) -> float:
    x, y = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    times = []
    for _ in range(7):
        begun = time.perf_counter()
        x @ y.mT
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def products_of(tokens: int, supervised: int, adapter: str = "lora") -> float:
    """Seconds of all products of a step, fp32 through the library that ftx takes."""
    dtype = best_dtype("cpu")
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    if dtype is torch.float32 and not torch.cpu._is_amx_tile_supported():
        settings.fp32_precision = "bf16"
    try:
        return sum(times * seconds_of(*shape, dtype) for shape, times in shapes(tokens, supervised, adapter).items())
    finally:
        settings.fp32_precision = before


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]] or [1536, 400]
    print(f"{products_of(numbers[0], numbers[1] if len(numbers) > 1 else numbers[0]):.3f} s of products in {best_dtype('cpu')}")
