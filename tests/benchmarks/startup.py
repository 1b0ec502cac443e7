"""How long until the first step is done: `ftx run` and `trl sft`, the same rows, model and settings, in turns; writes docs/benchmarks.md.

`startup.py [--rounds N] [--rows N]`. Counted from the start of the command to the first line with a loss, a process
of its own each time, and two steps of one row (of a single one ftx would measure the memory); TRL is asked to leave out its activation
checkpointing and its bfloat16, which only cost on such a short run. The first round of each warms the disk and TRL's cache of tokens and is
left out.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run import DATA, REPO, at_least, command, processor, replace

MARKS = "<!-- startup: begin -->", "<!-- startup: end -->"
#: What it may come to.
BAR = 2.0
#: One row: what is measured is the way to the first step, not the step.
BATCH = 1


def commands(work: Path, rows: list[dict[str, str]]) -> dict[str, list[str]]:
    """What is run, over the same rows in the form that each reads."""
    from ftx import models

    data, theirs = work / "rows.jsonl", work / "trl"
    theirs.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (theirs / "train.jsonl").open("w") as stream:
        for row in rows:
            asked = {"role": "user", "content": f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"]}
            stream.write(json.dumps({"prompt": [asked], "completion": [{"role": "assistant", "content": row["output"]}]}) + "\n")
    settings = {"max_steps": 2, "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "learning_rate": 2e-4, "logging_steps": 1}
    ours = [word for name, value in {**settings, "save_strategy": "no"}.items() for word in ("-o", f"trainer.{name}={value}")]
    flags = {**settings, "save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "use_peft": True}
    flags |= {"lora_r": 16, "lora_alpha": 32, "lora_target_modules": "all-linear", "dtype": "float32"}
    flags |= {"model_name_or_path": models.resolve("smollm2", print), "dataset_name": theirs, "output_dir": work / "trl-out"}
    return {
        "ftx run": [sys.executable, "-m", "ftx", "run", "--data", str(data), "--formatter", "alpaca", "--dtype", "float32", *ours],
        "trl sft": [str(Path(sys.executable).parent / "trl"), "sft", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))],
    }


def first_step(words: list[str], work: Path) -> tuple[float, float]:
    """Seconds until a line with a loss stands there, and the seconds of processor time that the command took by then or later."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "FTX_CACHE": os.environ.get("FTX_CACHE", "")}
    if not environment["FTX_CACHE"]:
        del environment["FTX_CACHE"]
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun, seconds, said = time.perf_counter(), 0.0, []
    with subprocess.Popen(words, cwd=work, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if not seconds and ("'loss'" in line or "loss " in line):
                seconds = time.perf_counter() - begun
    if process.returncode or not seconds:
        sys.exit("".join(said)[-3000:])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=at_least(1), default=3)
    parser.add_argument("--rows", type=int, default=2000)
    given = parser.parse_args()
    found: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subprocess.run([sys.executable, REPO / "examples" / "snips.py", DATA / "snips", work], check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (work / "snips-train.jsonl").read_text().splitlines()][: given.rows]
        sides = commands(work, rows)
        for number in range(given.rounds + 1):
            for name, words in sides.items():
                seconds = first_step(words, work)
                if number:
                    found.setdefault(name, []).append(seconds)
                print(f"{name}: {seconds[0]:.1f} s, {seconds[1]:.1f} s of processors{'' if number else ' (not counted)'}", flush=True)
    middle = {name: statistics.median(seconds for seconds, _ in times) for name, times in found.items()}
    ratio = statistics.median(theirs[0] / ours[0] for theirs, ours in zip(found["trl sft"], found["ftx run"], strict=True))
    lines = [
        f"`{command()}`, {datetime.date.today()}, {processor()}, {os.cpu_count()} cores: seconds from the command to the first line with a loss, the same",
        f"{len(rows):,} rows, two steps of one row, medians of {given.rounds} rounds in turns.",
        "",
        "| | seconds to the first step |",
        "|---|---|",
        *(f"| `{name}` | {seconds:.1f} |" for name, seconds in middle.items()),
        "",
        f"That is **{ratio:.2f} times** faster (at least {BAR:g} was asked for: {'reached' if ratio >= BAR else 'not reached'}).",
    ]
    if len(rows) == 2000:
        replace(MARKS, lines)
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
