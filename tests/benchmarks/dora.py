"""What DoRA costs beside LoRA; writes its line into docs/benchmarks.md.

`dora.py [--rounds N]`: snips, 16 rows a step, all parts of ftx-fast: forward and backward pass of the trainer's own loss and the optimizer's
step (behind which DoRA's norms are found anew), by turns in one thread of one process, on the same batch. Of processes of their own the ratio
differs by a tenth from one time to the next.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import tempfile
import time
from pathlib import Path

from direct import trainer_of
from levers import step
from run import command, middle_of, processor, replace, words_of, write_data

from ftx_fast import PARTS, install
from ftx_fast_machine import keep_memory

MARKS = "<!-- dora: begin -->", "<!-- dora: end -->"
#: What it may come to.
BAR = 1.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    keep_memory()
    parts = [part for part in PARTS if part != "memory"]
    seconds = {"lora": list[float](), "dora": list[float]()}
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))["snips"]
        trainers = {adapter: trainer_of(words_of("snips", adapter, data, 100, 16, 2e-4), Path(folder) / adapter, []) for adapter in seconds}
        for trainer in trainers.values():
            trainer.model.train()
            trainer.fast = install(trainer.model, parts)
            trainer.create_optimizer()
        batches = [batch for _, batch in zip(range(asked.rounds + 2), trainers["lora"].get_train_dataloader(), strict=False)]
        for number, batch in enumerate(batches):
            for adapter in random.sample(list(seconds), 2):
                began = time.perf_counter()
                step(trainers[adapter], batch, parts)
                trainers[adapter].optimizer.step()
                trainers[adapter].optimizer.zero_grad()
                if number >= 2:
                    seconds[adapter].append(time.perf_counter() - began)
    times, doubt = middle_of([a / b for a, b in zip(seconds["dora"], seconds["lora"], strict=True)])
    lines = [
        f"`{command()}`, {datetime.date.today()}, {processor()}, {os.cpu_count()} cores, {asked.rounds} rounds: DoRA takes",
        f"**{times:.3f} ± {doubt:.3f}** times as long as LoRA (at most {BAR} was asked for: {'reached' if times <= BAR else 'not reached'}).",
    ]
    replace(MARKS, lines)


if __name__ == "__main__":
    main()
