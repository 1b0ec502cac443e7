"""Predicted and measured memory over a grid: smollm2, four adapters, two trainers, activations kept and recomputed, three lengths, in
float32; and a part of it in bfloat16 where the processor multiplies that in fact.

`python tests/benchmarks/plan_grid.py` runs all cells and writes each into the table of docs/benchmarks.md as it comes; words after it
choose cells (`lora`, `dpo-64`, `full-sft-kept-64`, `bfloat16`), and the others' rows stay. Each cell loads the model and trains two steps of one
row or pair.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
from pathlib import Path
from typing import Any

ADAPTERS = ("full", "lora", "dora", "qlora")
TRAINERS = ("sft", "dpo")
CHECKPOINTING = (False, True)
LENGTHS = (64, 256, 640)
CELLS = list(itertools.product(ADAPTERS, TRAINERS, CHECKPOINTING, LENGTHS, ("float32",)))
#: In bfloat16 a processor without it needs minutes a step.
HALF = list(itertools.product(ADAPTERS, TRAINERS, CHECKPOINTING, (256,), ("bfloat16",)))
PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- plan grid: begin -->", "<!-- plan grid: end -->"


def cells() -> list[tuple[str, str, bool, int, str]]:
    """Those for this machine."""
    import torch

    from ftx.device import best_dtype

    return CELLS + HALF * (best_dtype("cpu") is torch.bfloat16)


def cell(adapter: str, trainer: str, checkpointing: bool, length: int, dtype: str = "float32", *, trace: bool = False) -> dict[str, Any]:
    """One cell: `predicted` and `measured` bytes with their kinds, and with `trace` the bytes of the second predictor."""
    import torch

    from ftx import models
    from ftx.catalogue import Catalogue
    from ftx.ledger import Ledger
    from ftx.machine import Machine
    from ftx.planning import Planner
    from ftx.recipe import Choice, Recipe
    from ftx.rehearse import like, rehearse
    from ftx.rehearse import trace as traced
    from ftx.rows import Rows
    from ftx.run import Run

    gc.collect()
    catalogue, path = Catalogue(), models.resolve("smollm2")
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "gradient_checkpointing": checkpointing, "max_length": None}
    wanted = Recipe(data="-", formatter=Choice("auto"), adapter=Choice(adapter), trainer=Choice(trainer, options), dtype=dtype, device="cpu")
    sides = 2 if trainer == "dpo" else 1
    run = Run(recipe=wanted, ledger=Ledger(), dtype=getattr(torch, dtype), model="smollm2", model_path=path, say=lambda line: None)
    planner = Planner(catalogue, run, Machine("cpu", None, True), path, Rows([(length,) * sides], [sides * length // 2]))
    case = planner.case(wanted)
    run.recipe, run.hooks = case.recipe, case.hooks
    tokenizer, tokens = models.load_tokenizer(path), like(case)
    found = {"predicted": case.prediction.as_dict(), "measured": rehearse(case, run, tokens, tokenizer, catalogue)}
    return found | ({"traced": traced(case, run, tokens, tokenizer, catalogue)} if trace else {})


def main(words: list[str]) -> None:
    for one in cells():
        if words and not any(set(word.split("-")) <= set(named(one)) for word in words):
            continue
        began = time.monotonic()
        found = cell(*one)
        predicted, measured = (found[name]["peak_memory"] for name in ("predicted", "measured"))
        line = f"| {' | '.join(named(one))} | {predicted / 2**20:.1f} | {measured / 2**20:.1f} | {100 * (predicted / measured - 1):+.2f} % |"
        print(line, f"{time.monotonic() - began:.0f} s", {name: found[name]["by_kind"] for name in ("predicted", "measured")}, flush=True)
        write(line)


def named(one: tuple[str, str, bool, int, str]) -> tuple[str, ...]:
    """A cell's first columns."""
    return one[0], one[1], "recomputed" if one[2] else "kept", str(one[3]), one[4]


def write(line: str) -> None:
    """A cell's row into the page's table, in the order of the cells; one of the same cell goes."""
    import torch

    text = PAGE.read_text("utf-8")
    before, _, rest = text.partition(BEGIN)
    inside, _, after = rest.partition(END)
    rows = {tuple(row.strip("| ").split(" | "))[:5]: row for row in [*inside.splitlines(), line] if row.startswith("| ")}
    ordered = [rows[named(one)] for one in CELLS + HALF if named(one) in rows]
    worst = max(abs(float(row.strip("| %").rsplit(" | ", 1)[1])) for row in ordered)
    head = f"`python tests/benchmarks/plan_grid.py`, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, on a CPU; "
    head += f"{len(ordered)} of {len(CELLS + HALF)} cells, the worst {worst:.2f} % apart."
    columns = "| adapter | trainer | activations | tokens | dtype | predicted MiB | measured MiB | apart |\n|---|---|---|---|---|---|---|---|"
    PAGE.write_text(f"{before}{BEGIN}\n\n{head}\n\n{columns}\n" + "\n".join(ordered) + f"\n\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
