"""The real model: smollm2 fine-tuned through the command line, with every official adapter. One run serves many tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import REPO, read_rows

DATA = REPO / "examples" / "data"
FILES = {"recipe.yaml", "manifest.json", "plan.json", "audit.json", "ledger.jsonl", "metrics.jsonl", "scores.json", "report.html", "log.txt"}
FILES |= {"checkpoints", "model", "eval"}


def arguments(output: Path, adapter: str, *more: str) -> list[str]:
    return [
        *("run", "--model", "smollm2", "--formatter", "alpaca", "--adapter", adapter, "--trainer", "sft", "--evaluator", "exact-match"),
        *("--data", str(DATA / "products-train.jsonl"), "-o", "exact-match.max_new_tokens=40", "--output", str(output), *more),
    ]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """The first 8 questions of the test data."""
    file = tmp_path_factory.mktemp("questions") / "test.jsonl"
    file.write_text("".join((DATA / "products-test.jsonl").read_text("utf-8").splitlines(keepends=True)[:8]), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def lora(tmp_path_factory, process_of_module, questions) -> Path:
    """Ten real steps of 6 rows."""
    output = tmp_path_factory.mktemp("lora") / "run"
    steps = ("-o", "trainer.max_steps=10", "-o", "trainer.per_device_train_batch_size=6", "-o", "trainer.gradient_accumulation_steps=1")
    done = process_of_module(*arguments(output, "lora", "--eval-data", str(questions), *steps, "-o", "trainer.logging_steps=1"))
    assert done.returncode == 0, done.stderr
    return output


def test_it_learns(lora):
    losses = [line["loss"] for line in read_rows(lora / "metrics.jsonl")]
    assert len(losses) == 10 and losses[-1] < 0.5 * losses[0]
    assert all(line["grad_norm"] > 0 for line in read_rows(lora / "metrics.jsonl"))


def test_scores_have_both_phases_intervals_and_the_change(lora):
    scores = {(s["metric"], s["phase"]): s for s in json.loads((lora / "scores.json").read_text())}
    for phase in ("base", "tuned"):
        score = scores["exact_match", phase]
        assert score["n"] == 8 and score["ci_low"] <= score["value"] <= score["ci_high"] and score["unscored"] == 0
    assert scores["exact_match", "base"]["value"] <= 0.1
    assert scores["token_f1", "tuned"]["value"] > scores["token_f1", "base"]["value"]
    assert sum(scores[metric, "change"]["value"] for metric in ("fixed", "broken", "unchanged")) == 8


def test_the_run_directory_is_whole(lora):
    assert {file.name for file in lora.iterdir()} == FILES
    manifest = json.loads((lora / "manifest.json").read_text())
    assert manifest["model"]["reference"] == "smollm2" and manifest["plugins"]["adapter:lora"]["distribution"] == "ftx-lora"
    adapter = json.loads((lora / "model" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "smollm2"
    assert json.loads((lora / "audit.json").read_text())["train"]["rows"] == 500


def test_eval_reads_it_back_to_the_same_answers(lora, process_of_module):
    before = (lora / "eval" / "exact-match" / "tuned.jsonl").read_text()
    scores = json.loads((lora / "scores.json").read_text())
    done = process_of_module("eval", lora, "--json")
    assert done.returncode == 0, done.stderr
    assert (lora / "eval" / "exact-match" / "tuned.jsonl").read_text() == before
    assert json.loads((lora / "scores.json").read_text()) == scores


@pytest.mark.parametrize("adapter", ["dora", "qlora", "full"])
def test_every_adapter_really_trains_and_reads_back(adapter, tmp_path, questions, process_of_module):
    steps = ("-o", "trainer.max_steps=2", "-o", "trainer.per_device_train_batch_size=4", "-o", "trainer.gradient_accumulation_steps=1")
    few = tmp_path / "few.jsonl"
    few.write_text("".join(questions.read_text("utf-8").splitlines(keepends=True)[:2]), encoding="utf-8")
    done = process_of_module(
        *arguments(tmp_path / "run", adapter, "--eval-data", str(few), *steps, "-o", "trainer.warmup_steps=0", "-o", "exact-match.max_new_tokens=8")
    )
    assert done.returncode == 0, done.stderr
    metrics = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2] and all(line["grad_norm"] > 0 for line in metrics)
    assert {file.name for file in (tmp_path / "run").iterdir()} == FILES
    answers = (tmp_path / "run" / "eval" / "exact-match" / "tuned.jsonl").read_text()
    again = process_of_module("eval", tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "eval" / "exact-match" / "tuned.jsonl").read_text() == answers


@pytest.mark.full
def test_the_demo_recipe_reaches_its_mark(tmp_path, process_of_module):
    done = process_of_module("run", REPO / "examples" / "recipes" / "quickstart.yaml", "--output", tmp_path / "run", timeout=1800)
    assert done.returncode == 0, done.stderr
    scores = {s["phase"]: s["value"] for s in json.loads((tmp_path / "run" / "scores.json").read_text()) if s["metric"] == "exact_match"}
    assert scores["base"] <= 0.1 and scores["tuned"] >= 0.95
