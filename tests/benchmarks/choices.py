"""What the choices of a run bring that are no part of ftx-fast; writes its table into docs/benchmarks.md.

`choices.py [--rounds N]`: LoRA on snips, 16 rows a step, whole steps by turns in one thread of one process, on the same batch.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import tempfile
from pathlib import Path

from direct import Bare
from run import at_least, command, processor, replace, slower, words_of, write_data

from ftx_fast import PARTS

MARKS = "<!-- choices: begin -->", "<!-- choices: end -->"
FLOAT32 = ["--dtype", "float32"]
RECOMPUTED = ["-o", "trainer.gradient_checkpointing=true"]
DROPOUT = ["-o", "adapter.dropout=0.05"]
WITHOUT = [part for part in PARTS if part != "lora"]
#: What it is called -> the adapter, what else `ftx run` is told, and the parts of ftx-fast that are on.
WAYS = {
    "all": ("lora", [], list(PARTS)),
    "off": ("lora", [], []),
    "all, float32": ("lora", FLOAT32, list(PARTS)),
    "off, float32": ("lora", FLOAT32, []),
    "all, recomputed": ("lora", RECOMPUTED, list(PARTS)),
    "off, recomputed": ("lora", RECOMPUTED, []),
    "all, dropout": ("lora", DROPOUT, list(PARTS)),
    "all but lora, dropout": ("lora", DROPOUT, WITHOUT),
    "all, DoRA's dropout": ("dora", DROPOUT, list(PARTS)),
    "all but lora, DoRA's dropout": ("dora", DROPOUT, WITHOUT),
}
#: What is chosen, and the ways that are compared: without it, with it.
LINES = [
    ("a frozen base in bfloat16, not float32", [("off, float32", "off"), ("all, float32", "all")]),
    ("activations kept, not recomputed", [("off, recomputed", "off"), ("all, recomputed", "all")]),
    ("LoRA with dropout of 0.05 as one function, not in peft's layers", [None, ("all but lora, dropout", "all, dropout")]),
    ("DoRA with dropout of 0.05 as one function, not in peft's layers", [None, ("all but lora, DoRA's dropout", "all, DoRA's dropout")]),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=at_least(2), default=8)
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    seconds = {name: list[float]() for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))["snips"]
        sides = {
            name: Bare([*words_of("snips", adapter, data, 100, 16, 2e-4), *more], Path(folder) / name, parts, off_between=True)
            for name, (adapter, more, parts) in WAYS.items()
        }
        for number, batch in enumerate(sides["all"].batches(asked.rounds + 1)):
            for name in random.sample(list(WAYS), len(WAYS)):
                seconds[name].append(sides[name].step(batch))
            print(f"round {number}: off {seconds['off'][-1]:.2f} s, all {seconds['all'][-1]:.2f} s", flush=True)

    def times(pair: tuple[str, str] | None) -> str:
        if pair is None:
            return ""
        middle, doubt = slower(seconds[pair[0]], seconds[pair[1]], skip=1)
        return f"{middle:.2f} ± {doubt:.2f}"

    lines = [
        f"`{command()}`, {datetime.date.today()}, {processor()}, {os.cpu_count()} cores: LoRA on snips, 16 rows, whole steps, {asked.rounds} rounds.",
        "Medians of how many times as long a step without it takes as with it, and half the middle half by the root of their number.",
        "",
        "| chosen | with no part but `memory` | with all parts |",
        "|---|---|---|",
        *(f"| {what} | {times(plain)} | {times(fast)} |" for what, (plain, fast) in LINES),
    ]
    replace(MARKS, lines)


if __name__ == "__main__":
    main()
