"""Real user requests: in fp32 the loss of ftx equals a plain TRL script's, step by step."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support import REPO, SHARED_DATA, read_rows, write_rows

SNIPS = SHARED_DATA / "snips"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The first 160 rows of every intent mixed: what both sides train on."""
    if not SNIPS.is_dir():
        pytest.skip("the snips data is not at ../shared/data/snips")
    out = tmp_path_factory.mktemp("snips")
    subprocess.run([sys.executable, REPO / "examples" / "snips.py", SNIPS, out], check=True, capture_output=True)
    return write_rows(out / "some.jsonl", read_rows(out / "snips-train.jsonl")[::13])


@pytest.mark.parametrize(("steps", "apart"), [(8, 1e-4), pytest.param(100, 0.01, marks=pytest.mark.full)])
def test_loss_equals_plain_trl_step_by_step(rows, tmp_path, process, steps, apart):
    """Eight steps to 1e-4; a hundred to a hundredth of the loss, which rounding moves from step to step."""
    batch, accumulation = 16, 1
    settings = {
        "model": "smollm2",
        "data": str(rows),
        "dtype": "float32",
        "bf16": False,
        "checkpointing": False,
        "steps": steps,
        "batch": batch,
        "accumulation": accumulation,
        "output": str(tmp_path / "trl"),
        "result": str(tmp_path / "trl.json"),
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    script = REPO / "tests" / "toys" / "plain_trl.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path / "settings.json"], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    expected = json.loads((tmp_path / "trl.json").read_text())["losses"]
    options = {"max_steps": steps, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "logging_steps": 1, "save_strategy": "no"}
    run = process(
        *("run", "--model", "smollm2", "--data", rows, "--formatter", "alpaca", "--adapter", "lora", "--dtype", "float32", "--output", tmp_path / "run"),
        *(part for name, value in options.items() for part in ("-o", f"trainer.{name}={value}")),
        timeout=1500 if steps < 100 else 5400,
    )
    assert run.returncode == 0, run.stderr
    losses = [line["loss"] for line in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == len(expected) == steps and losses[0] > 1.3 * losses[-1]
    bounds = [apart if steps < 100 else apart * theirs for theirs in expected]
    assert all(abs(ours - theirs) <= bound for ours, theirs, bound in zip(losses, expected, bounds, strict=True)), list(zip(losses, expected, strict=True))
