"""Does ftx learn what plain TRL learns, and in bfloat16 what it learns in float32? The same steps on snips, the same held-out requests;
writes docs/benchmarks.md.

`learned.py [--steps N] [--questions N]`: LoRA, 16 rows a step, a process for each side. Compared are the mean loss of the last ten steps
(ftx's within 2 % of its own in float32, and no more than that above TRL's, or the status is 1) and the scores, by one evaluator. TRL
recomputes activations as it comes, and takes bfloat16 where ftx does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from run import DATA, REPO, measure, processor, replace

from ftx.device import best_dtype

MARKS = "<!-- learned: begin -->", "<!-- learned: end -->"
#: Side -> further words for ftx.
SIDES = {"ftx": (), "ftx, float32": ("--dtype", "float32"), "TRL": ()}
#: Tokens of an answer.
LONGEST_ANSWER = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--questions", type=int, default=100)
    asked = parser.parse_args()
    if not DATA.is_dir():
        sys.exit("the data is not at ../shared/data: nothing was measured")
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subprocess.run([sys.executable, REPO / "examples" / "snips.py", DATA / "snips", work], check=True, stdout=subprocess.DEVNULL)
        train, held_out = work / "snips-train.jsonl", work / "some-validation.jsonl"
        lines = (work / "snips-validation.jsonl").read_text("utf-8").splitlines(keepends=True)
        held_out.write_text("".join(lines[:: len(lines) // asked.questions][: asked.questions]), encoding="utf-8")
        sides = {side: learned(side, train, held_out, asked.steps, work / side) for side in SIDES}
    write_page(sides, asked)


def learned(side: str, data: Path, held_out: Path, steps: int, work: Path) -> dict:
    """A side's losses, and metric -> score of its tuned model; TRL's adapter answers through ftx's generator, judged by the same evaluator."""
    asked = ("--eval-data", held_out, "--allow-overlap", "--evaluator", "exact-match", "-o", f"exact-match.max_new_tokens={LONGEST_ANSWER}")
    losses = measure(side.partition(",")[0], "snips", "lora", data, steps, work, (*asked, *SIDES[side]))["losses"]
    if side == "TRL":
        return {"losses": losses, "scores": judge(work, held_out)}
    scores = json.loads((work / "run" / "scores.json").read_text())
    return {"losses": losses, "scores": {score["metric"]: score for score in scores if score["phase"] == "tuned"}}


def judge(adapter: Path, held_out: Path) -> dict:
    """metric -> score of a saved peft adapter on the held-out questions."""
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
    base = models.load_model(path, dtype=best_dtype("cpu"), device="cpu")
    generate = Generate(PeftModel.from_pretrained(base, adapter).eval(), models.load_tokenizer(path))
    questions = Alpaca().format_dataset(dataset=read_dataset(str(held_out), run.ledger), run=run)
    scores = ExactMatch(max_new_tokens=LONGEST_ANSWER).evaluate_model(generate=generate, dataset=questions, run=run).scores
    return {score.metric: score.as_dict() for score in scores}


def write_page(sides: dict[str, dict], asked: argparse.Namespace) -> None:
    final = {name: statistics.mean(side["losses"][-10:]) for name, side in sides.items()}
    lines = [
        f"`python tests/benchmarks/learned.py`, {datetime.date.today()}, {processor()}: LoRA on snips, {asked.steps} steps of 16 rows, learning rate",
        f"2e-4, seed 42, then {asked.questions} held-out requests.",
        "",
        "| | loss, mean of the last ten steps | exact match | slots and intent, F1 |",
        "|---|---|---|---|",
        *(f"| {name} | {final[name]:.4f} | {cell(side['scores']['exact_match'])} | {cell(side['scores']['field_f1'])} |" for name, side in sides.items()),
    ]
    replace(MARKS, lines)
    if not math.isclose(final["ftx"], final["ftx, float32"], rel_tol=0.02) or final["ftx"] > 1.02 * final["TRL"]:
        sys.exit("ftx's loss is 2 % from its own in float32, or above TRL's")


def cell(score: dict) -> str:
    return f"{score['value']:.3f} [{score['ci_low']:.3f}, {score['ci_high']:.3f}]"


if __name__ == "__main__":
    main()
