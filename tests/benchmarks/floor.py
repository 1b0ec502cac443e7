"""The floor of a step: its own matrix products, each measured alone, in the dtype that the machine computes in; writes docs/benchmarks.md.

`floor.py [--rounds N]`: LoRA, 16 rows a step. In each round a whole step and then its products, for what a processor multiplies a second changes
within minutes where others use it, too. Counted are, for each linear layer, the product forward and the input's
gradient (no weight's: they are frozen), the adapter's products of rank r, and the head on supervised positions, forward and back. Not
counted is attention, nor anything that is no product: the rest of a step has to fit under what is left.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from direct import Bare
from run import at_least, command, processor, replace, slower, words_of, write_data

from ftx.device import best_dtype

MARKS = "<!-- floor: begin -->", "<!-- floor: end -->"
#: What of a step its products should at least take.
BAR = 0.5

#: SmolLM2-135M: layers, hidden, intermediate, key and value width, vocabulary; the rank of the benchmark.
LAYERS, HIDDEN, INNER, KEYS, VOCABULARY, RANK = 30, 576, 1536, 192, 49152, 16
ATTENTION = [(HIDDEN, HIDDEN), (HIDDEN, KEYS), (HIDDEN, KEYS), (HIDDEN, HIDDEN)]
MLP = [(HIDDEN, INNER), (HIDDEN, INNER), (INNER, HIDDEN)]


def shapes(tokens: int, supervised: int) -> dict[tuple[int, int, int], int]:
    """(rows, inner, columns) -> how often in a step."""
    count: dict[tuple[int, int, int], int] = {}

    def add(m: int, k: int, n: int, times: int = 1) -> None:
        count[m, k, n] = count.get((m, k, n), 0) + times

    for wide, out in ATTENTION + MLP:
        add(tokens, wide, out, LAYERS)
        add(tokens, out, wide, LAYERS)
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


def products_of(tokens: int, supervised: int) -> float:
    """Seconds of all products of a step, fp32 through the library that ftx takes."""
    dtype = best_dtype("cpu")
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    if dtype is torch.float32 and not torch.cpu._is_amx_tile_supported():
        settings.fp32_precision = "bf16"
    try:
        return sum(times * seconds_of(*shape, dtype) for shape, times in shapes(tokens, supervised).items())
    finally:
        settings.fp32_precision = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=at_least(2), default=20)
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    dtype = str(best_dtype("cpu")).removeprefix("torch.")
    lines = [
        f"`{command()}`, {datetime.date.today()}, {processor()}, {os.cpu_count()} cores, {asked.rounds} rounds, in {dtype}:",
        "",
        "| workload | seconds a step | of them its products | share | at least | reached |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        files = write_data(Path(folder))
        for kind in ("snips", "alpaca"):
            bare = Bare(words_of(kind, "lora", files[kind], 100, 16, 2e-4), Path(folder) / kind)
            steps, floors = list[float](), list[float]()
            for batch in bare.batches(asked.rounds + 2):
                steps.append(bare.step(batch))
                floors.append(products_of(bare.positions, batch["supervised_tokens"]))
            share, doubt = slower(floors, steps)
            middle = f"{statistics.median(steps[2:]):.2f} | {statistics.median(floors[2:]):.2f}"
            lines.append(f"| {kind}, LoRA | {middle} | {share:.3f} ± {doubt:.3f} | {BAR} | {'yes' if share >= BAR else 'no'} |")
    replace(MARKS, lines)


if __name__ == "__main__":
    main()
