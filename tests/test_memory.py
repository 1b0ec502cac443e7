"""Running out of memory, really: what the message says, and the resume that it asks for."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ftx.memory import memory_error, ran_out, remedies, smaller_batch
from ftx.recipe import Choice
from ftx.run import RunDir
from ftx.testing.runs import make_run

LIMIT = 8 << 30


def limited(*arguments: object) -> subprocess.CompletedProcess:
    """ftx in a process that may have LIMIT bytes of addresses."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent / "toys")}
    command = [sys.executable, "-m", "ftx", *map(str, arguments)]
    bound = lambda: resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))  # noqa: E731
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False, preexec_fn=bound)


def test_a_run_that_finds_no_memory_goes_on_with_a_smaller_micro_batch(toy_run, tmp_path, cli):
    run = tmp_path / "run"
    short = ("-o", "trainer.save_steps=1", "-o", "trainer.fast=off")  # joined rows would be one
    failed = limited(*toy_run(*short, adapter="toys:Hungry", output=run))
    assert failed.returncode == 1, failed.stderr
    said = failed.stderr
    assert "Error: out of memory while training: 6.0 GB more were asked for; the process had " in said
    assert "MB resident at most, and the process may have 8.0 GB of addresses (ulimit -v)." in said
    remedy = f"The effective batch stays as it is: ftx resume {run} -o trainer.per_device_train_batch_size=2"
    assert remedy in said
    assert "The plan was " in said and " of tensors (" in said
    assert "Traceback" not in said

    went_on = limited(*remedy.partition("ftx ")[2].split())
    assert went_on.returncode == 0, went_on.stderr
    assert "Going on from step 2." in went_on.stdout
    assert "trainer.per_device_train_batch_size: 4 -> 2" in went_on.stdout
    assert "trainer.gradient_accumulation_steps: 2 -> 4" in went_on.stdout
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["changed"] == [{"trainer.per_device_train_batch_size": [4, 2], "trainer.gradient_accumulation_steps": [2, 4]}]
    recipe = (run / "recipe.yaml").read_text()
    assert "per_device_train_batch_size: 2" in recipe and "gradient_accumulation_steps: 4" in recipe

    assert cli(*toy_run(*short, output=tmp_path / "whole")).exit_code == 0  # never stopped, never short of memory
    ours, whole = (load_file(path / "model" / "head.safetensors")["weight"] for path in (run, tmp_path / "whole"))
    assert torch.allclose(ours, whole, atol=1e-5)


def test_only_what_leaves_the_training_as_it_is_may_change(toy_run, tmp_path, cli):
    run = tmp_path / "run"
    assert cli(*toy_run("-o", "trainer.save_steps=1", "-o", "trainer.max_steps=2", output=run)).exit_code == 0
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({name: value for name, value in manifest.items() if name != "finished"}))
    other = cli("resume", run, "-o", "trainer.learning_rate=1")
    assert other.exit_code == 2
    assert "a run cannot go on with another trainer.learning_rate: it would train something else." in other.stderr
    odd = cli("resume", run, "-o", "trainer.per_device_train_batch_size=3")
    assert odd.exit_code == 2
    assert "3 rows a pass and 2 passes a step are not the 8 rows a step that the run began with." in odd.stderr
    assert "Give a per_device_train_batch_size that divides 8" in odd.stderr


@pytest.mark.parametrize("killed", ["ftx.memory.write_text", "ftx.pipeline.write_manifest"])
def test_a_kill_while_the_change_is_written_is_no_edit(toy_run, tmp_path, cli, monkeypatch, killed):
    """Before recipe.yaml is written, and between it and the manifest: the next resume goes on either way, and the manifest tells the truth."""
    run, change = tmp_path / "run", {"trainer.per_device_train_batch_size": [4, 2], "trainer.gradient_accumulation_steps": [2, 4]}
    stop = ("--observer", "ftx.testing.own:CtrlC", "-o", "ftx.testing.own:CtrlC.after=1")
    assert cli(*toy_run("-o", "trainer.save_steps=1", "-o", "trainer.max_steps=2", *stop)).exit_code == 130

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(killed, dies)
        assert cli("resume", run, "-o", "trainer.per_device_train_batch_size=2").exit_code == 130
    written = killed == "ftx.pipeline.write_manifest"
    assert ("per_device_train_batch_size: 2" in (run / "recipe.yaml").read_text()) == written
    result = cli("resume", run)
    assert result.exit_code == 0, result.output
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest.get("changed") == ([change] if written else None) and "changing" not in manifest and "drift" not in manifest


def test_the_plan_stands_beside_it(tmp_path):
    run = make_run(tmp_path / "run")
    run.directory.write_json("plan.json", {"predicted": {"peak_memory": 3 << 30, "by_kind": {"weights": 1 << 30, "activations": 2 << 30}}})
    error = memory_error(failure(), run.directory, run)
    assert error.status == 1
    first, second = error.problem.splitlines()
    assert first.startswith("out of memory during the run: 4096.0 GB more were asked for; the process had ")
    assert second == "The plan was 3.0 GB of tensors (activations 2.0 GB, weights 1.0 GB), beside the program itself."


def failure() -> BaseException:
    try:
        torch.empty(1 << 42, dtype=torch.uint8)
    except RuntimeError as error:
        return error
    pytest.skip("this machine gives 4 TiB")


def test_what_says_that_there_is_no_memory():
    assert ran_out(failure())
    assert ran_out(MemoryError())
    wrapped = ValueError("could not be loaded")
    wrapped.__cause__ = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")
    assert ran_out(wrapped) is wrapped.__cause__
    assert ran_out(RuntimeError("shapes do not fit")) is None
    assert memory_error(RuntimeError("other"), RunDir("/nowhere"), make_run()) is None


@pytest.mark.parametrize(("size", "accumulation", "smaller"), [(4, 2, 2), (3, 4, 1), (6, 1, 3), (5, 2, 2), (1, 8, None)])
def test_the_next_smaller_micro_batch(size, accumulation, smaller):
    assert smaller_batch({"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}) == smaller


@pytest.mark.parametrize(
    ("size", "checkpointing", "change"),
    [
        (4, True, "ftx resume /run -o trainer.per_device_train_batch_size=2"),
        (1, False, "ftx resume /run -o trainer.gradient_checkpointing=true"),
        (1, True, "ftx run /run/recipe.yaml -o trainer.max_length=N --adapter qlora --output NEW"),
    ],
)
def test_the_cheapest_change_first(size, checkpointing, change):
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4, "gradient_checkpointing": checkpointing}
    (line,) = remedies("while training", RunDir("/run"), make_run(trainer=Choice("sft", options)))
    assert line.endswith(change)
