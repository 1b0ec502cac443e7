"""What an `ftx run` adds to the step of its trainer called without it; writes its line into docs/benchmarks.md.

`abreast.py [--steps N]`: LoRA on snips, 16 rows a step; both train in one process, a step of each in turn (turns.py). Two processes that do
the very same differ by a tenth on a machine that is shared; two steps of one process, one after the other, do not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from direct import trainer_of
from run import at_least, command, processor, replace, slower, words_of, write_data
from turns import Turn, in_turns

MARKS = "<!-- abreast: begin -->", "<!-- abreast: end -->"
#: What it may come to.
BAR = 1.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=at_least(5), default=40)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        train(Path(asked.worker[0]), json.loads(asked.worker[1]))
        return
    with tempfile.TemporaryDirectory() as folder:
        run, direct = measured(write_data(Path(folder))["snips"], asked.steps, Path(folder) / "work")
    times, doubt = slower(run, direct)
    middle = f"{statistics.median(run):.2f} and {statistics.median(direct):.2f} s"
    whole = sum(run[2:]) / sum(direct[2:])
    lines = [
        f"`{command()}`, {datetime.date.today()}, {processor()}, {os.cpu_count()} cores: LoRA on snips, 16 rows a step, {asked.steps} steps of each.",
        f"A step of `ftx run` takes **{times:.3f} ± {doubt:.3f}** times as long as the same step of its trainer called directly (at most {BAR} was",
        f"asked for: {'reached' if times <= BAR else 'not reached'}); medians {middle}. ±: half the middle half of the ratios by the root of their number.",
        f"All steps together take {whole:.3f} times as long: up to four steps of a run, however many it has, are measured for memory, and take longer.",
    ]
    replace(MARKS, lines)


def measured(data: Path, steps: int, work: Path) -> list[list[float]]:
    """Seconds of each step of the run, and of its trainer."""
    work.mkdir()
    words = words_of("snips", "lora", data, steps, 16, 2e-4)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "1"}  # else threads have heaps of their own, of 64 MiB
    with (work / "said.txt").open("w") as said:
        call = [sys.executable, __file__, "--worker", work, json.dumps(words)]
        done = subprocess.run(call, env=environment, stdout=said, stderr=said, check=False)
    if done.returncode:
        sys.exit((work / "said.txt").read_text()[-3000:])
    found: list[list[float]] = json.loads((work / "seconds.json").read_text())
    return found


def train(work: Path, words: list[str]) -> None:
    """In a process of its own."""

    def direct(turn: Turn) -> None:
        trainer_of(words, work / "direct", [turn]).train()

    def run(turn: Turn) -> None:
        from ftx.cli import main

        main(["run", *words, "--observer", "turns:Taker", "-o", f"turns:Taker.place={turn.name}", "--output", str(work / "run")], standalone_mode=False)

    found = in_turns({"direct": direct, "run": run})  # the run last: it wants the main thread, for its signals
    if found["run"].losses != found["direct"].losses:
        sys.exit("the two did not compute the same")
    (work / "seconds.json").write_text(json.dumps([found["run"].seconds, found["direct"].seconds]))


if __name__ == "__main__":
    main()
