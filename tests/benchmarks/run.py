"""make bench: ftx beside a plain TRL script on snips, same rows, settings and seed; writes its table into docs/benchmarks.md.

Two processes one after the other on the same machine; times are seconds of an optimizer step (median), quality is the mean loss
of the last ten steps and the exact match on held-out requests. FTX_BENCH_STEPS and FTX_BENCH_QUESTIONS make it shorter.
"""

from __future__ import annotations

import datetime
import importlib.metadata as metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
SNIPS = REPO.parent / "shared" / "data" / "snips"
PAGE = REPO / "docs" / "benchmarks.md"
BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"
STEPS = int(os.environ.get("FTX_BENCH_STEPS", "60"))
QUESTIONS = int(os.environ.get("FTX_BENCH_QUESTIONS", "100"))


def main() -> None:
    if not SNIPS.is_dir():
        sys.exit("the snips data is not at ../shared/data/snips: nothing was measured")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subprocess.run([sys.executable, REPO / "examples" / "snips.py", SNIPS, work], check=True, stdout=subprocess.DEVNULL)
        train, held_out = work / "snips-train.jsonl", work / "some-validation.jsonl"
        lines = (work / "snips-validation.jsonl").read_text("utf-8").splitlines(keepends=True)
        held_out.write_text("".join(lines[:: len(lines) // QUESTIONS][:QUESTIONS]), encoding="utf-8")
        ours = bench_ftx(work, train, held_out)
        theirs = bench_trl(work, train, held_out)
    write_page(ours, theirs)


def bench_ftx(work: Path, train: Path, held_out: Path) -> dict:
    """`ftx run` as it comes."""
    steps = ("-o", f"trainer.max_steps={STEPS}", "-o", "trainer.per_device_train_batch_size=16", "-o", "trainer.gradient_accumulation_steps=1")
    more = ("-o", "trainer.logging_steps=1", "-o", "trainer.save_strategy=no", "-o", "exact-match.max_new_tokens=128", "--allow-overlap")
    plugins = ("--formatter", "alpaca", "--adapter", "lora", "--evaluator", "exact-match")
    command = [sys.executable, "-m", "ftx", "run", *plugins, "--data", train, "--eval-data", held_out, *steps, *more, "--output", work / "run"]
    subprocess.run([str(part) for part in command], check=True)
    metrics = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    tokens = [0, *(line["tokens"] for line in metrics)]
    scores = json.loads((work / "run" / "scores.json").read_text())
    exact = next(s for s in scores if (s["metric"], s["phase"]) == ("exact_match", "tuned"))
    seconds = [(after - before) / line["tokens_per_second"] for before, after, line in zip(tokens, tokens[1:], metrics, strict=False)]
    return {"losses": [line["loss"] for line in metrics], "seconds": seconds, "exact": exact, "tokens": tokens[-1]}


def bench_trl(work: Path, train: Path, held_out: Path) -> dict:
    """A plain TRL script as it comes: loaded in fp32, bf16 autocast, activation checkpointing; judged by the same evaluator."""
    settings = {"model": "smollm2", "data": str(train), "dtype": "float32", "bf16": True, "checkpointing": True, "steps": STEPS, "batch": 16}
    settings |= {"accumulation": 1, "output": str(work / "trl"), "result": str(work / "trl.json")}
    (work / "settings.json").write_text(json.dumps(settings))
    subprocess.run([sys.executable, str(REPO / "tests" / "toys" / "plain_trl.py"), str(work / "settings.json")], check=True, stdout=subprocess.DEVNULL)
    return json.loads((work / "trl.json").read_text()) | {"exact": judge(work / "trl", held_out)}


def judge(adapter: Path, held_out: Path) -> dict:
    """Exact match of a saved peft adapter on the held-out questions, through the plugin's own hooks."""
    from peft import PeftModel

    from ftx import models
    from ftx.data import read_dataset
    from ftx.generate import Generate
    from ftx.ledger import Ledger
    from ftx.run import Run
    from ftx_exact_match import ExactMatch
    from ftx_formats import Alpaca

    run = Run(recipe=None, ledger=Ledger())  # type: ignore[arg-type]
    path = models.resolve("smollm2")
    base = models.load_model(path, dtype=models.best_dtype("cpu"), device="cpu")
    generate = Generate(PeftModel.from_pretrained(base, adapter).eval(), models.load_tokenizer(path))
    questions = Alpaca().format_dataset(dataset=read_dataset(str(held_out), run.ledger), run=run)
    return ExactMatch(max_new_tokens=128).evaluate_model(generate=generate, dataset=questions, run=run).scores[0].as_dict()


def write_page(ours: dict, theirs: dict) -> None:
    final = [statistics.mean(side["losses"][-10:]) for side in (ours, theirs)]
    step = [statistics.median(side["seconds"][2:]) for side in (ours, theirs)]
    rows = [
        ("seconds a step, median", f"{step[0]:.2f}", f"{step[1]:.2f}", f"{step[1] / step[0]:.2f} times faster"),
        ("loss, mean of the last 10 steps", f"{final[0]:.4f}", f"{final[1]:.4f}", f"{(final[0] / final[1] - 1) * 100:+.2f} %"),
        (f"exact match of {QUESTIONS}", cell(ours["exact"]), cell(theirs["exact"]), f"{ours['exact']['value'] - theirs['exact']['value']:+.3f}"),
    ]
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("ftx-core", "torch", "transformers", "trl", "peft"))
    text = [
        BEGIN,
        "",
        f"`make bench`, {datetime.date.today()}, {processor()}, {os.cpu_count()} cores, {versions}.",
        f"SmolLM2-135M-Instruct, LoRA r16 on all linear layers, snips, {STEPS} steps of 16 rows, learning rate 2e-4, seed 42, both as they come.",
        "",
        "| | ftx | plain TRL | ftx against TRL |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        END,
    ]
    page = PAGE.read_text("utf-8")
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(before + "\n".join(text) + rest.partition(END)[2], encoding="utf-8")
    print("\n".join(text[2:-2]))
    if not math.isclose(final[0], final[1], rel_tol=0.02):
        sys.exit("the losses differ by more than 2 %")


def cell(score: dict) -> str:
    return f"{score['value']:.3f} [{score['ci_low']:.3f}, {score['ci_high']:.3f}]"


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
