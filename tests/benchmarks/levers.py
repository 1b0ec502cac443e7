"""What each part of ftx-fast brings; writes its table into docs/benchmarks.md.

`python tests/benchmarks/levers.py [--rounds N]`: snips, 16 rows a step: forward and backward pass of the trainer's own loss, one thread of one process
for all ways. In each round each way takes one step on the same batch, in a new order; ratios are of steps of one round. The ways without
`memory` have a process to themselves: what glibc's allocator was told once stays with it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from direct import passes, trainer_of
from run import at_least, command, processor, replace, slower, words_of, write_data

from ftx_fast import PARTS, Fast, install

#: Parts that want others: rows are joined only where attention keeps them apart, and grow together only where they are joined.
WITH = {"rows": ["attention", "rows"], "prefixes": ["attention", "rows", "prefixes"]}
MARKS = "<!-- levers: begin -->", "<!-- levers: end -->"


def ways() -> dict[str, list[str]]:
    """What it is called -> the parts that are on."""
    alone = {f"{part} alone": WITH.get(part, [part]) for part in PARTS}
    without = {f"all but {part}": [other for other in PARTS if other != part and part not in WITH.get(other, [])] for part in PARTS}
    return {"off": [], **alone, "all": list(PARTS), **without, "compile": [*PARTS, "compile"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=at_least(2), default=8)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if asked.worker:
        work(Path(asked.worker[0]), Path(asked.worker[1]))
        return
    seconds, peaks = {name: list[float]() for name in ways()}, dict[str, int]()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        data = write_data(Path(folder))["snips"]
        workers = {kept: stack.enter_context(worker(data, Path(folder) / f"worker-{kept}")) for kept in (False, True)}

        def ask(name: str, number: int, what: str) -> Any:
            process = workers["memory" in ways()[name]]
            process.stdin.write(json.dumps([name, number, what]) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
            return json.loads(answer) if answer else sys.exit("a worker ended: what it said stands above")

        for name in ways():
            peaks[name] = ask(name, 0, "bytes")
        for number in range(asked.rounds):
            for name in random.sample(list(ways()), len(ways())):
                seconds[name].append(ask(name, number, "seconds"))
            print(f"round {number}: off {seconds['off'][-1]:.2f} s, all {seconds['all'][-1]:.2f} s", flush=True)

    def times(one: str, other: str) -> str:
        middle, doubt = slower(seconds[one], seconds[other], skip=0)
        return f"{middle:.2f} ± {doubt:.2f}"

    def mib(name: str) -> str:
        return f"{peaks[name] / 2**20:.0f}"

    lines = [
        f"`{command()}`, {datetime.date.today()}, {processor()}, {os.cpu_count()} cores: LoRA on snips, 16 rows, forward and backward pass,",
        f"{asked.rounds} rounds; off takes {statistics.median(seconds['off']):.2f} s. Medians of the ratios of a round, and half the middle half",
        "of them by the root of their number. MiB: tensors at most, above the model's. A part that another wants is left out with it.",
        "",
        "| part | | off takes as many times as long as it alone | the others take as many times as long as all | MiB, it alone | MiB, the others |",
        "|---|---|---|---|---|---|",
    ]
    for part, what in PARTS.items():
        beside = ("", "") if part == "memory" else (mib(f"{part} alone"), mib(f"all but {part}"))  # an allocator's pages are no tensors
        lines.append(f"| `{part}` | {what} | {times('off', f'{part} alone')} | {times(f'all but {part}', 'all')} | {beside[0]} | {beside[1]} |")
    lines += [
        f"| all | | {times('off', 'all')} | | {mib('all')} | (off) {mib('off')} |",
        "",
        f"With `compile` in place of `layers` a step takes {times('compile', 'all')} times as long as with all, and {mib('compile')} MiB.",
    ]
    replace(MARKS, lines)


@contextlib.contextmanager
def worker(data: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that takes the steps it is asked for (`work`)."""
    folder.mkdir()
    call = [sys.executable, __file__, "--worker", str(data), str(folder)]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def work(data: Path, folder: Path) -> None:
    """For each line [name of the way, number of the batch, "seconds" or "bytes"] on standard input a line with the number."""
    from ftx.measure import measure
    from ftx_fast_machine import keep_memory

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    trainers: dict[str, Any] = {}
    batches: list[dict[str, Any]] = []
    compiled: Fast | None = None
    for line in sys.stdin:
        name, number, what = json.loads(line)
        parts = ways()[name]
        if "memory" in parts:
            keep_memory()
        held = "compiled" if name == "compile" else "plain"  # what is compiled is compiled once
        if held not in trainers:
            trainers[held] = trainer_of(words_of("snips", "lora", data, 100, 16, 2e-4), folder / held, [])
            trainers[held].model.train()
            batches = batches or [batch for _, batch in zip(range(100), trainers[held].get_train_dataloader(), strict=False)]
        trainer, batch = trainers[held], batches[number]
        if name == "compile" and compiled is None:
            compiled = install(trainer.model, parts)
        fast = trainer.fast = compiled if name == "compile" and compiled is not None else install(trainer.model, [one for one in parts if one != "memory"])
        if what == "bytes":
            step(trainer, batch, parts)
            trainer.model.zero_grad()
            with measure() as found:
                step(trainer, batch, parts)
            answer: float = found.added
        else:
            trainer.model.zero_grad()
            began = time.perf_counter()
            step(trainer, batch, parts)
            answer = time.perf_counter() - began
        if fast is not compiled:
            fast.undo()
        print(json.dumps(answer), file=answers, flush=True)


def step(trainer: Any, batch: dict[str, Any], parts: list[str]) -> None:
    passes(trainer, batch if "prefixes" in parts else {name: value for name, value in batch.items() if name != "tree"})


if __name__ == "__main__":
    main()
