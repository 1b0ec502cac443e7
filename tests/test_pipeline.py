"""The run: what lies on disk, in which order hooks fire, what repeats to the bit, and what a failure leaves."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import read_rows as lines
from support import write_rows

FILES = {"recipe.yaml", "manifest.json", "plan.json", "audit.json", "ledger.jsonl", "metrics.jsonl", "scores.json", "report.html", "log.txt"}
FILES |= {"checkpoints", "model", "eval"}


def weights(run: Path) -> dict[str, str]:
    """File -> sha256 of all saved weights."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((run / "model").rglob("*.safetensors"))}


def leftovers(run: Path) -> list[str]:
    return [str(file) for file in run.rglob("*.tmp")]


# ---- what a run leaves ---------------------------------------------------------------------------------------------


def test_a_run_leaves_its_files(cli, toy_run, small, tmp_path):
    run = tmp_path / "run"
    result = cli(*toy_run("--eval-data", small["eval"], "--evaluator", "toys:Equal"))
    assert result.exit_code == 0, result.output
    assert {file.name for file in run.iterdir()} == FILES
    metrics = lines(run / "metrics.jsonl")
    assert next(line["step"] for line in metrics) == 1 and metrics[-1]["step"] == 6
    assert {"step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens", "tokens_per_second", "peak_memory"} <= set(metrics[-1])
    assert metrics[-1]["tokens"] > metrics[-1]["supervised_tokens"] > 0
    scores = json.loads((run / "scores.json").read_text())
    assert [(s["evaluator"], s["metric"], s["phase"], s["n"]) for s in scores] == [
        ("toys:Equal", "equal", "base", 6),
        ("toys:Equal", "equal", "tuned", 6),
        ("toys:Equal", "changed", "change", 6),
    ]
    questions = [row["q"] for row in lines(small["eval"])]
    for phase in ("base", "tuned"):
        items = lines(run / "eval" / "toys:Equal" / f"{phase}.jsonl")
        assert [item["prompt"][0]["content"] for item in items] == questions
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["finished"] and manifest["plugins"]["trainer:sft"]["distribution"] == "ftx-sft"
    assert next(iter(manifest["data"]["data"]["files"].values()))["sha256"] == hashlib.sha256(small["train"].read_bytes()).hexdigest()
    assert not [file for file in (run / "model").rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert (run / "model" / "tokenizer.json").exists() and not leftovers(run)
    log = (run / "log.txt").read_text()
    assert re.search(r"INFO ftx\.\S+: fast: \w", log), "which parts of the trainer's are on"
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    assert "output" not in recipe and Path(recipe["data"]).is_absolute()
    assert recipe["suggested"] == {"adapter:toys:Head": {"trainer.learning_rate": 5e-3}} and "learning_rate" not in recipe["trainer"]
    assert "equal" in result.output and str(run) in result.output


def test_json_is_one_object_on_standard_output(process, toy_run, tmp_path):
    done = process(*toy_run("--json"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "done" and result["run"] == str(tmp_path / "run") and "step 6/6" in done.stderr
    refused = process(*toy_run("--json", "-o", "trainer.per_device_train_batch_size=0", output=tmp_path / "other"))
    assert refused.returncode == 2 and json.loads(refused.stdout)["status"] == "refused"


def test_quiet_prints_nothing(process, toy_run):
    done = process(*toy_run("--quiet"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_hooks_fire_in_this_order(cli, toy_run, small, tmp_path):
    diary = tmp_path / "diary.jsonl"
    result = cli(*toy_run("--eval-data", small["eval"], "--observer", "toys:Diary", "-o", f"toys:Diary.file={diary}", "--evaluator", "toys:Equal"))
    assert result.exit_code == 0, result.output
    assert lines(diary) == [
        {"hook": "preflight", "directory": False},
        {"hook": "audit_dataset", "split": "train"},
        {"hook": "audit_dataset", "split": "eval"},
        {"hook": "run_started", "recipe": True},
        {"hook": "dataset_encoded", "split": "train"},
        {"hook": "dataset_encoded", "split": "eval"},
        {"hook": "model_loaded"},
        {"hook": "evaluate_model"},
        {"hook": "trainer_callbacks"},
        {"hook": "evaluate_model"},
        {"hook": "run_finished", "scores": 3},
    ]


# ---- what repeats --------------------------------------------------------------------------------------------------


def test_a_written_recipe_runs_again_to_the_same_weights(cli, toy_run, tmp_path):
    assert cli(*toy_run()).exit_code == 0
    again = cli("run", tmp_path / "run" / "recipe.yaml", "--output", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert weights(tmp_path / "run") == weights(tmp_path / "again")
    assert (tmp_path / "run" / "recipe.yaml").read_text() == (tmp_path / "again" / "recipe.yaml").read_text()
    other = cli("run", tmp_path / "run" / "recipe.yaml", "--seed", "7", "--output", tmp_path / "other")
    assert other.exit_code == 0 and weights(tmp_path / "other") != weights(tmp_path / "run")


def test_a_written_recipe_has_the_precision_that_was_taken(cli, toy_run, tmp_path, monkeypatch):
    """What a machine is good at is measured, so the recipe must not leave a repeat, an evaluation or a resumption to measure again."""
    monkeypatch.setattr("ftx.pipeline.best_dtype", lambda device: torch.bfloat16)
    assert cli(*toy_run("--dtype", "auto")).exit_code == 0
    monkeypatch.setattr("ftx.pipeline.best_dtype", lambda device: torch.float32)
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["dtype"] == "bfloat16"
    again = cli("run", tmp_path / "run" / "recipe.yaml", "--output", tmp_path / "again")
    assert again.exit_code == 0, again.output
    assert weights(tmp_path / "run") == weights(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "manifest.json").read_text())["dtype"] == "bfloat16"


def test_an_evaluator_does_not_change_the_weights(cli, toy_run, small, tmp_path):
    assert cli(*toy_run()).exit_code == 0
    more = ("--eval-data", small["eval"], "--evaluator", "toys:Equal", "-o", "toys:Equal.draws=1000")
    assert cli(*toy_run(*more, output=tmp_path / "judged")).exit_code == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "judged")


@pytest.mark.parametrize("at", [3, pytest.param(5, marks=pytest.mark.full)])
def test_killed_and_resumed_equals_never_stopped(process, toy_run, small, tmp_path, at):
    more = (
        "-o",
        "trainer.save_steps=2",
        "--eval-data",
        str(small["eval"]),
        "--evaluator",
        "toys:Equal",
        "--observer",
        "toys:Dying",
        "-o",
        f"toys:Dying.at={at}",
    )
    whole = process(*toy_run(*more, output=tmp_path / "whole"), FTX_TEST_SURVIVE="1")
    assert whole.returncode == 0, whole.stderr
    killed = process(*toy_run(*more))
    assert killed.returncode == -signal.SIGKILL
    resumed = process("resume", tmp_path / "run", FTX_TEST_SURVIVE="1")
    assert resumed.returncode == 0, resumed.stderr
    assert f"Going on from step {at // 2 * 2}." in resumed.stdout
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    keep = ("step", "loss", "tokens", "supervised_tokens")
    steps, expected = ([{k: line[k] for k in keep} for line in lines(tmp_path / name / "metrics.jsonl")] for name in ("run", "whole"))
    assert steps == expected
    assert (tmp_path / "run" / "scores.json").read_text() == (tmp_path / "whole" / "scores.json").read_text()


def test_resume_without_a_checkpoint_starts_over_and_says_so(process, toy_run, tmp_path):
    assert process(*toy_run("--observer", "toys:Dying", "-o", "toys:Dying.at=1")).returncode == -signal.SIGKILL
    resumed = process("resume", tmp_path / "run", FTX_TEST_SURVIVE="1")
    assert resumed.returncode == 0 and "There was no checkpoint: starting over." in resumed.stdout


def test_a_broken_checkpoint_does_not_count(process, toy_run, tmp_path):
    more = ("-o", "trainer.save_steps=2", "--observer", "toys:Dying", "-o", "toys:Dying.at=5")
    assert process(*toy_run(*more)).returncode == -signal.SIGKILL
    broken = tmp_path / "run" / "checkpoints" / "checkpoint-4" / "optimizer.pt"
    broken.write_bytes(broken.read_bytes()[:100])
    resumed = process("resume", tmp_path / "run", FTX_TEST_SURVIVE="1")
    assert resumed.returncode == 0 and "Going on from step 2." in resumed.stdout
    assert process(*toy_run(*more, output=tmp_path / "whole"), FTX_TEST_SURVIVE="1").returncode == 0
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")


def test_ctrl_c_leaves_a_resumable_run(process, toy_run, tmp_path):
    running = process(*toy_run("-o", "trainer.max_steps=100000", "-o", "trainer.logging_steps=1"), start=True)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and f"ftx resume {tmp_path / 'run'}" in errors
    last = lines(metrics)[-1]["step"]
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{last}" / "ftx-complete.json").exists()


def test_resume_of_a_finished_run_says_so(cli, toy_run, tmp_path):
    assert cli(*toy_run()).exit_code == 0
    before = weights(tmp_path / "run")
    again = cli("resume", tmp_path / "run")
    assert again.exit_code == 0 and "is finished" in again.output and weights(tmp_path / "run") == before
    again = cli("resume", tmp_path / "run", "-o", "trainer.max_steps=9")
    assert again.exit_code == 2 and "is finished, so -o changes nothing." in again.stderr and f"--from {tmp_path / 'run'}" in again.stderr
    assert "not a run (it has no recipe.yaml)" in cli("resume", tmp_path).stderr


# ---- reading a run back --------------------------------------------------------------------------------------------


def test_eval_gives_what_the_run_gave(cli, toy_run, small, tmp_path):
    assert cli(*toy_run("--eval-data", small["eval"], "--evaluator", "toys:Equal")).exit_code == 0
    run = tmp_path / "run"
    scores = json.loads((run / "scores.json").read_text())
    items = (run / "eval" / "toys:Equal" / "tuned.jsonl").read_text()
    (run / "eval" / "toys:Equal" / "tuned.jsonl").unlink()
    again = cli("eval", run)
    assert again.exit_code == 0, again.output
    assert json.loads((run / "scores.json").read_text()) == scores
    assert (run / "eval" / "toys:Equal" / "tuned.jsonl").read_text() == items
    shorter = cli("eval", run, "--evaluator", "toys:Equal", "-o", "toys:Equal.max_new_tokens=1", "--json")
    assert shorter.exit_code == 0 and json.loads(shorter.stdout)["status"] == "done"
    assert cli("eval").exit_code == 2


def test_from_starts_from_the_earlier_model(cli, toy_run, small, tmp_path):
    assert cli(*toy_run("--eval-data", small["eval"], "--evaluator", "toys:Equal")).exit_code == 0
    more = ("--from", tmp_path / "run", "--eval-data", small["eval"], "--evaluator", "toys:Equal")
    second = cli(*toy_run(*more, output=tmp_path / "second"))
    assert second.exit_code == 0, second.output
    assert (tmp_path / "second/eval/toys:Equal/base.jsonl").read_text() == (tmp_path / "run/eval/toys:Equal/tuned.jsonl").read_text()
    assert weights(tmp_path / "second") != weights(tmp_path / "run")
    assert cli("eval", tmp_path / "second").exit_code == 0
    assert "no run with a trained model" in cli(*toy_run("--from", tmp_path, output=tmp_path / "third")).stderr


def test_from_rounds_nothing_that_trains_on(cli, toy_run, tmp_path):
    """Full training in bfloat16 keeps float32 weights, from one run to the next as well."""
    full = ("--adapter", "full", "--dtype", "bfloat16")
    first = cli(*toy_run(*full))
    assert first.exit_code == 0 and "base in float32, computing in bfloat16 on cpu" in first.output, first.output
    still = cli(*toy_run(*full, "--from", tmp_path / "run", "-o", "trainer.learning_rate=1e-12", output=tmp_path / "second"))
    assert still.exit_code == 0, still.output
    before, after = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("run", "second"))
    assert all(torch.allclose(after[name], tensor, rtol=0, atol=1e-9) for name, tensor in before.items())
    assert not all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in before.values()), "nothing would be rounded"


# ---- what a failure leaves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (["--formatter", "toys:Losing"], "lost or invented 12 rows without a ledger entry"),
        (["--adapter", "toys:Frozen"], "the adapter left nothing to train"),
        (["--adapter", "toys:Nothing"], "returned nothing from adapt_model"),
        (["-o", "trainer.max_length=20"], "an answer cut by truncation in 24 rows"),
    ],
)
def test_a_refused_run_leaves_nothing(cli, toy_run, tmp_path, more, text):
    result = cli(*toy_run(*more))
    assert result.exit_code == 2 and text in result.stderr
    assert result.stderr.startswith("Error: ") and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_overlap_of_training_and_evaluation_refuses(cli, toy_run, small, tmp_path):
    both = write_rows(tmp_path / "both.jsonl", [*lines(small["eval"]), {"q": "WHAT  is 3?", "a": "it is 3"}])
    result = cli(*toy_run("--eval-data", both))
    assert result.exit_code == 2 and f"rows that stand in the training data in 1 row: {both}:7" in result.stderr
    assert cli(*toy_run("--eval-data", both, "--allow-overlap")).exit_code == 0
    assert json.loads((tmp_path / "run" / "audit.json").read_text())["overlap"] == {"eval_rows_in_train": 1}


def test_allowed_truncation_is_in_the_ledger(cli, toy_run, small, tmp_path):
    longest = write_rows(tmp_path / "long.jsonl", [*lines(small["train"]), {"q": "long?", "a": "x" * 300}])
    result = cli(*toy_run("--data", longest, "--allow-truncation", "-o", "trainer.max_length=100"))
    assert result.exit_code == 0, result.output
    assert lines(tmp_path / "run" / "ledger.jsonl") == [{"file": str(longest), "line": 25, "reason": "an answer cut by truncation", "action": "cut"}]
    assert json.loads((tmp_path / "run" / "audit.json").read_text())["train"]["cut_answers"] == 1


def test_what_a_run_left_out_is_not_asked_when_it_is_evaluated_again(cli, toy_run, small, tmp_path, monkeypatch):
    write_rows(tmp_path / "held.jsonl", [{"q": "long? " * 60, "a": "lost"}, *lines(small["eval"])])
    monkeypatch.chdir(tmp_path)
    more = ("--eval-data", "held.jsonl", "--evaluator", "toys:Equal", "--allow-truncation", "-o", "trainer.max_length=100", "-o", "trainer.max_steps=1")
    assert cli(*toy_run(*more)).exit_code == 0
    counts = [score["n"] for score in json.loads((tmp_path / "run" / "scores.json").read_text())]
    monkeypatch.chdir("/")
    assert cli("eval", tmp_path / "run").exit_code == 0
    assert [score["n"] for score in json.loads((tmp_path / "run" / "scores.json").read_text())] == counts and set(counts) == {6}
    assert lines(tmp_path / "run" / "ledger.jsonl")[0]["file"] == str(tmp_path / "held.jsonl")


def test_a_phase_says_which_questions_leave_no_room(tiny, capsys):
    from ftx import models, pipeline
    from ftx.console import Console

    model, tokenizer = models.load_model(tiny, dtype=torch.float32, device="cpu"), models.load_tokenizer(tiny)
    model.config.max_position_embeddings = 8
    pipeline.generator(model, tokenizer, Console())(["a question that goes on and on"], max_new_tokens=1)
    said = capsys.readouterr()
    assert "1 of 1 prompts leave no room to answer" in said.out + said.err


def test_an_evaluator_that_raises_costs_only_its_own_scores(cli, toy_run, small, tmp_path):
    result = cli(*toy_run("--eval-data", small["eval"], "--evaluator", "toys:Raising", "--evaluator", "toys:Equal"))
    assert result.exit_code == 1 and "evaluator 'toys:Raising' failed: the judge is on holiday" in result.stderr
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert [(s["evaluator"], s["phase"]) for s in scores] == [("toys:Equal", phase) for phase in ("base", "tuned", "change")]
    assert (tmp_path / "run" / "model").is_dir()


def test_a_raising_run_failed_does_not_mask_the_error(cli, toy_run, tmp_path):
    diary = tmp_path / "diary.jsonl"
    more = ("--observer", "toys:Diary", "-o", f"toys:Diary.file={diary}", "-o", "toys:Diary.raises=run_failed")
    result = cli(*toy_run(*more, adapter="toys:Nothing"))
    assert result.exit_code == 2 and "returned nothing from adapt_model" in result.stderr
    assert "returned nothing from adapt_model" in lines(diary)[-1]["error"]


def test_an_output_that_is_taken_is_refused(cli, toy_run, tmp_path):
    assert cli(*toy_run()).exit_code == 0
    before = sorted(str(file) for file in (tmp_path / "run").rglob("*"))
    again = cli(*toy_run())
    assert again.exit_code == 2 and "holds another run" in again.stderr and "ftx resume" in again.stderr
    assert sorted(str(file) for file in (tmp_path / "run").rglob("*")) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("dear diary")
    assert "is not an empty directory" in cli(*toy_run(output=tmp_path / "other")).stderr
    (tmp_path / "file").write_text("")
    assert cli(*toy_run(output=tmp_path / "file" / "run")).exit_code == 2


def test_a_read_only_directory_is_refused(process, toy_run, tmp_path):
    place = tmp_path / "fixed"
    place.mkdir()
    root = os.geteuid() == 0  # it writes everywhere but on a read-only mount
    mounted = root and subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", place], capture_output=True, check=False).returncode == 0
    if not root:
        place.chmod(0o555)
    elif not mounted:
        place = Path("/proc")  # where nobody makes a directory
    try:
        result = process(*toy_run(output=place / "run"))
        assert result.returncode == 2 and "cannot be written" in result.stderr and "Traceback" not in result.stderr
    finally:
        if mounted:
            subprocess.run(["umount", place], check=False)


@pytest.mark.parametrize(("adapter", "size"), [("toys:Head", 8192), ("lora", 100_000)], ids=["safetensors writes", "torch writes"])
def test_a_write_that_fails_keeps_the_last_whole_checkpoint(process, toy_run, tmp_path, adapter, size):
    """A limit on the size of files needs no rights, and fails a write just as a full disk does."""
    run, more = tmp_path / "run", ("--observer", "toys:Narrow", "-o", f"toys:Narrow.size={size}", "-o", "trainer.save_steps=1")
    failed = process(*toy_run(*more, adapter=adapter))
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert f"Error: no space left on the disk of {run}; the last whole checkpoint is kept." in failed.stderr and f"ftx resume {run}" in failed.stderr
    assert {marker.parent.name for marker in (run / "checkpoints").glob("*/ftx-complete.json")} == {"checkpoint-1", "checkpoint-2"}
    assert (run / "checkpoints" / "checkpoint-3").is_dir()
    resumed = process("resume", run, FTX_TEST_SURVIVE="1")
    assert resumed.returncode == 0 and "Going on from step 2" in resumed.stdout, resumed.stderr


def test_no_space_left_keeps_the_last_whole_checkpoint(process, toy_run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        more = ("-o", "trainer.save_steps=1", "-o", "trainer.save_total_limit=100", "-o", "trainer.max_steps=60", "-o", "trainer.logging_steps=1")
        full = process(*toy_run(*more, output=disk / "run"))
        assert full.returncode == 1, full.stdout + full.stderr
        assert "no space left" in full.stderr and "ftx resume" in full.stderr and "Traceback" not in full.stderr
        whole = list((disk / "run" / "checkpoints").glob("*/ftx-complete.json"))
        assert whole
        for old in sorted(whole, key=lambda marker: int(marker.parent.name.split("-")[1]))[:-1]:
            shutil.rmtree(old.parent)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        resumed = process("resume", disk / "run")
        assert resumed.returncode == 0 and "Going on from step" in resumed.stdout, resumed.stderr
    finally:
        subprocess.run(["umount", disk], check=False)


def test_a_default_observer_that_is_not_installed_is_named_and_left_out(toy_run, cli, monkeypatch, tmp_path):
    monkeypatch.setattr("ftx.recipe.OBSERVERS", ("report", "gone"))
    result = cli(*toy_run())
    assert result.exit_code == 0, result.output
    assert "not installed, so the run goes without: observer gone\n" in result.stdout
    observers = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["observers"]
    assert [one["name"] for one in observers] == ["report"] and (tmp_path / "run" / "report.html").is_file()
