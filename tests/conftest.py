"""Shared by the core's tests: a tiny model on disk, small data, and ftx called as a person calls it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from ftx.testing.tiny import tiny_model_dir

TOYS = Path(__file__).resolve().parent / "toys"
sys.path.insert(0, str(TOYS))

from support import write_rows  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A tiny model directory."""
    return tiny_model_dir(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> dict[str, Path]:
    """24 training and 6 evaluation rows with the columns q and a."""
    folder = tmp_path_factory.mktemp("small")
    rows = [{"q": f"what is {i}?", "a": f"it is {i}" + " and more" * (i % 3)} for i in range(30)]
    return {"train": write_rows(folder / "train.jsonl", rows[:24]), "eval": write_rows(folder / "eval.jsonl", rows[24:])}


@pytest.fixture
def toy_run(tiny, small, tmp_path):
    """The arguments of a short run on toys; `toy_run(...)` appends to them."""

    def arguments(*more: str, output: Path | str | None = None, adapter: str = "toys:Head", formatter: str = "toys:Pairs") -> list[str]:
        return [
            *("run", "--model", str(tiny), *(() if "--data" in more else ("--data", str(small["train"]))), "--formatter", formatter, "--adapter", adapter),
            *("-o", "trainer.max_steps=6", "-o", "trainer.per_device_train_batch_size=4", "-o", "trainer.gradient_accumulation_steps=2"),
            *("--dtype", "float32", "--output", str(output or tmp_path / "run"), *more),
        ]

    return arguments


@pytest.fixture
def cli():
    """ftx in this process: `cli(*args)` gives click's result (.exit_code, .stdout, .stderr)."""

    def call(*arguments: str):
        from ftx.cli import main

        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return call


@pytest.fixture
def process():
    """ftx in its own process: `process(*args)` gives a CompletedProcess; `start=True` a Popen."""
    return _process()


@pytest.fixture(scope="module")
def process_of_module():
    """`process`, for fixtures of a module."""
    return _process()


def _process():
    def call(*arguments: str, start: bool = False, timeout: float = 1500, **environment: str):
        path = os.pathsep.join([str(TOYS), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **environment}
        command = [sys.executable, "-m", "ftx", *(str(argument) for argument in arguments)]
        if start:
            return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout, check=False)

    return call
