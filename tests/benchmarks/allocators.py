"""The allocator of a run: glibc's as it comes, with what the part `memory` sets, and others preloaded; writes its table into docs/benchmarks.md.

`allocators.py [--rounds N] LIBRARY...`: paths of libjemalloc.so.2 or libtcmalloc_minimal.so.4, as a distribution's package has them. LoRA on snips, 16 rows
a step, all other parts on; a process for each, which take a step of the same batch in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from direct import Bare
from run import at_least, command, processor, replace, slower, words_of, write_data

from ftx_fast import PARTS

MARKS = "<!-- allocators: begin -->", "<!-- allocators: end -->"
#: jemalloc gives memory back after ten seconds; here it need not.
KEEPING = {"MALLOC_CONF": "dirty_decay_ms:-1,muzzy_decay_ms:-1"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("libraries", nargs="*", type=Path, metavar="LIBRARY")
    parser.add_argument("--rounds", type=at_least(2), default=15)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    if asked.worker:
        work(Path(asked.worker[0]), Path(asked.worker[1]), asked.worker[2] == "memory")
        return
    sides: dict[str, tuple[str, dict[str, str]]] = {"glibc's, with `memory`": ("memory", {}), "glibc's as it comes": ("", {})}
    for library in asked.libraries:
        sides |= {f"{library.name}": ("", {"LD_PRELOAD": str(library.resolve())})}
        if "jemalloc" in library.name:
            sides |= {f"{library.name} that keeps all": ("", {"LD_PRELOAD": str(library.resolve()), **KEEPING})}
    seconds, held = {name: list[float]() for name in sides}, dict[str, int]()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        data = write_data(Path(folder))["snips"]
        workers = {}
        for number, (name, (memory, environment)) in enumerate(sides.items()):
            call = [sys.executable, __file__, "--worker", str(data), str(Path(folder) / str(number)), memory]
            process = subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})
            workers[name] = stack.enter_context(process)
            stack.callback(process.kill)
            process.stdout.readline()  # it is ready, and the next one has the machine to itself
        for turn in range(asked.rounds + 2):
            for name in random.sample(list(sides), len(sides)):
                workers[name].stdin.write(f"{turn}\n")
                workers[name].stdin.flush()
                took, most = workers[name].stdout.readline().split()
                seconds[name].append(float(took))
                held[name] = int(most)
    first = next(iter(sides))
    lines = [
        f"`{command()}`, {datetime.date.today()}, {processor()}, {os.cpu_count()} cores, {asked.rounds} rounds:",
        "",
        f"| allocator | a step takes as many times as long as with {first} | MiB at most |",
        "|---|---|---|",
    ]
    for name in sides:
        times, doubt = slower(seconds[name], seconds[first])
        lines.append(f"| {name} | {'' if name == first else f'{times:.3f} ± {doubt:.3f}'} | {held[name] / 2**20:.0f} |")
    replace(MARKS, lines)


def work(data: Path, folder: Path, memory: bool) -> None:
    """For each number on standard input a step of that batch, and a line with its seconds and the bytes held at most so far."""
    sys.path.append(str(Path(__file__).resolve().parent.parent / "toys"))
    from clock import held

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever else prints
    bare = Bare(words_of("snips", "lora", data, 100, 16, 2e-4), folder, [part for part in PARTS if memory or part != "memory"])
    batches = bare.batches(100)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(bare.step(batches[int(line)]), held(), file=answers, flush=True)


if __name__ == "__main__":
    main()
