"""ftx beside itself: what a step of one training takes beside the same step of another; writes its table into docs/benchmarks.md.

`abreast.py [--steps N]`: LoRA on snips, 16 rows a step; two trainings in one process, a step of each in turn (turns.py). Two processes that do
the very same differ by a tenth on a machine that is shared; two steps of one process, one after the other, do not.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from direct import trainer_of
from run import command, processor, replace, words_of, write_data
from turns import Turn, in_turns

MARKS = "<!-- abreast: begin -->", "<!-- abreast: end -->"
#: What is compared, (how, adapter, trainer.fast) of the one and of the other, and what it may come to.
PAIRS = [
    ("`ftx run` / its trainer called directly", ("run", "lora", "auto"), ("direct", "lora", "auto"), 1.01),
    ("DoRA / LoRA", ("direct", "dora", "auto"), ("direct", "lora", "auto"), 1.2),
    ("`fast=[auto,compile]` / `fast=auto`", ("direct", "lora", "[auto,compile]"), ("direct", "lora", "auto"), None),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        train(*asked.worker)
        return
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))["snips"]
        for number, (title, *sides, bound) in enumerate(PAIRS):
            times, doubt = slower(measured(sides, data, asked.steps, Path(folder) / str(number)))
            met = "" if bound is None else "yes" if times <= bound else "no"
            lines.append(f"| {title} | {'' if bound is None else f'at most {bound}'} | {times:.3f} ± {doubt:.3f} | {met} |")
            print(lines[-1], flush=True)
    replace(
        MARKS,
        [
            f"`{command()}`, {datetime.date.today()}, {processor()}, {os.cpu_count()} cores: LoRA on snips, 16 rows a step, {asked.steps} steps",
            "of two trainings in one process, a step of each in turn on the same batches: medians of the ratios, and half the middle half of them",
            "by the root of their number.",
            "",
            "| step / step | bar | measured | reached |",
            "|---|---|---|---|",
            *lines,
        ],
    )


def measured(sides: list[tuple[str, str, str]], data: Path, steps: int, work: Path) -> list[list[float]]:
    """Seconds of each step of both sides."""
    work.mkdir()
    words = [[*words_of("snips", adapter, data, steps, 16, 2e-4), "-o", f"trainer.fast={fast}"] for _, adapter, fast in sides]
    (work / "sides.json").write_text(json.dumps([[how, given, str(work / f"run-{n}")] for n, ((how, *_), given) in enumerate(zip(sides, words, strict=True))]))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "1"}  # else threads have heaps of their own, of 64 MiB
    with (work / "said.txt").open("w") as said:
        call = [sys.executable, __file__, "--worker", work / "sides.json", work / "seconds.json"]
        done = subprocess.run(call, env=environment, stdout=said, stderr=said, check=False)
    if done.returncode:
        sys.exit((work / "said.txt").read_text()[-3000:])
    found: list[list[float]] = json.loads((work / "seconds.json").read_text())
    return found


def train(given: Path, result: Path) -> None:
    """In a process of its own: [how, words, directory] of each side -> the seconds of its steps."""
    hows = {"run": whole, "direct": only}
    sides = {f"side {n}": functools.partial(hows[how], words, directory) for n, (how, words, directory) in enumerate(json.loads(given.read_text()))}
    found = in_turns(dict(reversed(sides.items())))  # an `ftx run` must come last: it wants the main thread for its signals
    losses = [turn.losses for turn in found.values()]
    assert all(losses), "a side has logged no loss"
    result.write_text(json.dumps([found[name].seconds for name in sides]))


def whole(words: list[str], directory: str, turn: Turn) -> None:
    from ftx.cli import main

    main(["run", *words, "--observer", "turns:Taker", "-o", f"turns:Taker.place={turn.name}", "--output", directory], standalone_mode=False)


def only(words: list[str], directory: str, turn: Turn) -> None:
    trainer_of(words, Path(directory), [turn]).train()


def slower(found: list[list[float]]) -> tuple[float, float]:
    """How many times as long a step of the first takes as the same step of the second: the median, and how sure it is.

    The first two of each are left out.
    """
    times: list[Any] = [a / b for a, b in zip(*(seconds[2:] for seconds in found), strict=True)]
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / 2 / len(times) ** 0.5


if __name__ == "__main__":
    main()
