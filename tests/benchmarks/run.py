"""make bench: ftx beside TRL as it comes and TRL tuned, on the same rows, settings and seed; writes its tables into docs/benchmarks.md.

`run.py [WORKLOAD...] [--steps N] [--repeats N]`. Each run is a process of its own and the sides take turns, A B C A B C; times are
seconds of an optimizer step without start-up (the first two of each run are left out), memory is what the process held at most above
what it held when training began. Losses and gradient norms stand beside them, so that nobody wins by not learning.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata as metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
DATA = REPO.parent / "shared" / "data"
TOYS = REPO / "tests" / "toys"
PAGE = REPO / "docs" / "benchmarks.md"
BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"
#: TRL as it comes loads fp32, computes in bf16 autocast and recomputes activations; tuned it does neither.
TRL = {"TRL": {"dtype": "float32", "bf16": True, "checkpointing": True}, "TRL tuned": {"dtype": "bfloat16", "bf16": False, "checkpointing": False}}
#: What is trained on, how, and beside what.
WORKLOADS = {
    "snips, LoRA": ("snips", "lora", ["ftx", "TRL", "TRL tuned"]),
    "alpaca, LoRA": ("alpaca", "lora", ["ftx", "TRL", "TRL tuned"]),
    "snips, DoRA": ("snips", "dora", ["ftx", "TRL"]),
    "DPO, LoRA": ("pairs", "lora", ["ftx", "TRL"]),
}
#: A row is at most this long, in bytes of UTF-8: some 300 tokens. Nothing is cut, by nobody.
LONGEST = 1200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", help=f"some of: {', '.join(WORKLOADS)}")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=2)
    asked = parser.parse_args()
    if unknown := set(asked.workloads) - set(WORKLOADS):
        parser.error(f"no such workload: {', '.join(unknown)}")
    if not DATA.is_dir():
        sys.exit("the data is not at ../shared/data: nothing was measured")
    os.environ["HF_HUB_OFFLINE"] = "1"
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_data(Path(folder))
        for name in asked.workloads or WORKLOADS:
            kind, adapter, sides = WORKLOADS[name]
            found: dict[str, list[dict]] = {side: [] for side in sides}
            for repeat in range(asked.repeats):
                for side in sides:
                    work = Path(folder) / f"{name}-{side}-{repeat}".replace(" ", "")
                    found[side].append(measure(side, kind, adapter, files[kind], asked.steps, work))
                    seconds = statistics.median(found[side][-1]["seconds"][2:])
                    print(f"{name}: {side}: {seconds:.2f} s a step, loss {found[side][-1]['losses'][-1]:.4f}", flush=True)
            rows += table_rows(name, found)
    write_page(rows, asked)


def write_data(work: Path) -> dict[str, Path]:
    """The rows of each kind, in forms that both sides read."""
    subprocess.run([sys.executable, REPO / "examples" / "snips.py", DATA / "snips", work], check=True, stdout=subprocess.DEVNULL)
    alpaca = json.loads((DATA / "alpaca_en_demo" / "alpaca_en_demo.json").read_text("utf-8"))
    alpaca = [row for row in alpaca if size(row["instruction"] + row["input"] + row["output"]) < LONGEST and row["output"]]
    pairs = [
        {"prompt": row["conversations"][0]["value"], "chosen": row["chosen"]["value"], "rejected": row["rejected"]["value"]}
        for row in json.loads((DATA / "dpo_en_demo" / "dpo_en_demo.json").read_text("utf-8"))
        if len(row["conversations"]) == 1
    ]
    pairs = [row for row in pairs if all(row.values()) and size(row["prompt"]) + max(size(row["chosen"]), size(row["rejected"])) < LONGEST]
    for name, kept in (("alpaca", alpaca), ("pairs", pairs)):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return {"snips": work / "snips-train.jsonl", "alpaca": work / "alpaca.jsonl", "pairs": work / "pairs.jsonl"}


def size(text: str) -> int:
    return len(text.encode())


def measure(side: str, kind: str, adapter: str, data: Path, steps: int, work: Path) -> dict:
    """One run in a process of its own -> what tests/toys/watch.py notes, and for ftx `tokens` and `supervised_tokens`."""
    work.mkdir()
    batch, rate = (2, 1e-4) if kind == "pairs" else (16, 2e-4)
    if side != "ftx":
        settings = {"model": "smollm2", "data": str(data), "steps": steps, "batch": batch, "accumulation": 1, "learning_rate": rate, **TRL[side]}
        settings |= {"trainer": "dpo" if kind == "pairs" else "sft", "dora": adapter == "dora", "output": str(work), "result": str(work / "noted.json")}
        (work / "settings.json").write_text(json.dumps(settings))
        call([sys.executable, TOYS / "plain_trl.py", work / "settings.json"], work)
        return json.loads((work / "noted.json").read_text())
    plugins = ["--formatter", "preference" if kind == "pairs" else "alpaca", "--adapter", adapter, "--trainer", "dpo" if kind == "pairs" else "sft"]
    given = {"max_steps": steps, "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1, "learning_rate": rate, "logging_steps": 1}
    options = [word for name, value in {**given, "save_strategy": "no"}.items() for word in ("-o", f"trainer.{name}={value}")]
    probe = ["--observer", "watch:Probe", "-o", f"watch:Probe.file={work / 'noted.json'}"]
    call([sys.executable, "-m", "ftx", "run", "--data", data, *plugins, *options, *probe, "--output", work / "run"], work)
    last = json.loads((work / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    return json.loads((work / "noted.json").read_text()) | {name: last[name] for name in ("tokens", "supervised_tokens")}


def call(command: list, work: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(TOYS)}
    with (work / "said.txt").open("w") as said:
        done = subprocess.run([str(word) for word in command], env=environment, stdout=said, stderr=said, check=False)
    if done.returncode:
        sys.exit((work / "said.txt").read_text()[-3000:])


def table_rows(name: str, found: dict[str, list[dict]]) -> list[str]:
    """A line for each side: its time, ftx against it (median of the ratios of each turn), tokens, memory, loss."""
    steps = {side: [statistics.median(run["seconds"][2:]) for run in runs] for side, runs in found.items()}
    ours = found["ftx"][0]
    tokens = ours["tokens"] / len(ours["losses"])
    lines = []
    for side, runs in found.items():
        ratio = statistics.median(theirs / mine for theirs, mine in zip(steps[side], steps["ftx"], strict=True))
        step = statistics.median(steps[side])
        peak = statistics.median(run["peak"] for run in runs) / 2**20
        losses = statistics.mean(run["losses"][-1] for run in runs)
        norm = statistics.mean(run["grad_norms"][-1] for run in runs)
        faster = "" if side == "ftx" else f"{ratio:.2f} times"
        lines.append(f"| {name} | {side} | {step:.2f} | {tokens / step:.0f} | {faster} | {peak:.0f} | {losses:.4f} | {norm:.3f} |")
    return lines


def products() -> dict[str, float]:
    """GFLOP/s of 1200 x 576 x 1536 in each dtype, as the machine multiplies it at best."""
    import torch

    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        x, y = torch.ones(1200, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        times = []
        for _ in range(30):
            start = time.perf_counter()
            torch.nn.functional.linear(x, y)
            times.append(time.perf_counter() - start)
        found[str(dtype).removeprefix("torch.")] = 2 * 1200 * 576 * 1536 / min(times) / 1e9
    return found


def write_page(rows: list[str], asked: argparse.Namespace) -> None:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("ftx-core", "torch", "transformers", "trl", "peft"))
    speeds = ", ".join(f"{name} {speed:.0f}" for name, speed in products().items())
    text = [
        BEGIN,
        "",
        f"`make bench`, {datetime.date.today()}, {processor()}, {os.cpu_count()} cores (matrix products in GFLOP/s: {speeds}), {versions}.",
        f"SmolLM2-135M-Instruct, rank 16 on all linear layers, 16 rows (DPO: 2 pairs) a step, {asked.repeats} runs of {asked.steps} steps each, in turns.",
        "",
        "| workload | | seconds a step | useful tokens/s | ftx is faster | MiB above load | last loss | last gradient norm |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
        "",
        END,
    ]
    page = PAGE.read_text("utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + "\n".join(text) + rest.partition(END)[2], encoding="utf-8")
    print("\n".join(text[2:-2]))


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
