"""What DoRA costs beside LoRA; writes its line into docs/benchmarks.md.

`dora.py [--rounds N]`: snips, 16 rows a step, whole steps by turns in one thread of one process, on the same batch. Of processes of their own
the ratio differs by a tenth from one time to the next.
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

MARKS = "<!-- dora: begin -->", "<!-- dora: end -->"
#: What it may come to.
BAR = 1.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=at_least(2), default=30)
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    seconds = {"lora": list[float](), "dora": list[float]()}
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))["snips"]
        sides = {adapter: Bare(words_of("snips", adapter, data, 100, 16, 2e-4), Path(folder) / adapter) for adapter in seconds}
        for batch in sides["lora"].batches(asked.rounds + 2):
            for adapter in random.sample(list(seconds), 2):
                seconds[adapter].append(sides[adapter].step(batch))
    times, doubt = slower(seconds["dora"], seconds["lora"])
    lines = [
        f"`{command()}`, {datetime.date.today()}, {processor()}, {os.cpu_count()} cores, {asked.rounds} rounds: DoRA takes",
        f"**{times:.3f} ± {doubt:.3f}** times as long as LoRA (at most {BAR} was asked for: {'reached' if times <= BAR else 'not reached'}).",
    ]
    replace(MARKS, lines)


if __name__ == "__main__":
    main()
