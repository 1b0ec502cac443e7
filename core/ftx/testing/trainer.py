"""The exam of trainers: two steps with every installed adapter, and an interrupted run that ends as if it had not been."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest

from ftx.authoring import declared
from ftx.catalogue import Catalogue
from ftx.console import Console
from ftx.errors import REFUSED, FtxError, Interrupted
from ftx.options import fields
from ftx.pipeline import Outcome
from ftx.pipeline import train as run_recipe
from ftx.readback import recipe_of
from ftx.recipe import Choice
from ftx.run import RunDir, read_lines
from ftx.testing.common import Contract
from ftx.testing.own import ROWS
from ftx.testing.runs import catalogue, train

OWN = "ftx.testing.own:Norms"


class TrainerContract(Contract):
    """For classes in the group ftx.trainer, in whole runs on the tiny model. `rows`: training rows; left empty, the exam's
    own of the first row type that the trainer accepts. `quick`: options beside `max_steps` for short runs, used where the
    trainer has them and a test's options do not say otherwise."""

    stage = "trainer"
    needs = ("encode_dataset", "make_trainer")
    rows: ClassVar[list[dict[str, Any]]] = []
    quick: ClassVar[dict[str, Any]] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
    }

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        super().pytest_generate_tests(metafunc)
        if "adapter" in metafunc.fixturenames:
            metafunc.parametrize("adapter", [*Catalogue().names("adapter"), OWN], ids=lambda name: name.rpartition(":")[2])

    def train(self, given: dict[str, Any], output: Path, *, max_steps: int, adapter: str = OWN, observers: tuple[Choice, ...] = ()) -> Outcome:
        """A whole run of `max_steps` steps."""
        known = fields(self.plugin)
        assert "max_steps" in known, "a trainer has the option max_steps, so that a run can be short"
        values = {name: value for name, value in self.quick.items() if name in known} | {"max_steps": max_steps} | given
        accepts = declared(self.plugin, "accepts") or ("prompt-completion",)
        plugins = catalogue(trainer={"examined": self.plugin})
        return train(output, self.rows or ROWS[accepts[0]], plugins, adapter=adapter, trainer=Choice("examined", values), observers=observers)

    def test_two_steps_with(self, adapter: str, tmp_path: Path) -> None:
        """The run ends well, its first and its last step are in metrics.jsonl, and the model is saved."""
        output = tmp_path / "run"
        try:
            self.train({}, output, max_steps=2, adapter=adapter)
        except FtxError as error:
            if error.status == REFUSED and adapter != OWN:
                pytest.skip(f"refused: {error.problem}")
            raise
        metrics = [line for line in read_lines(output / "metrics.jsonl") if "loss" in line]
        steps = [line["step"] for line in metrics]
        assert steps[:1] == [1] and steps[-1:] == [2], f"metrics.jsonl must have the first and the last of two steps, it has {steps}"
        assert all(math.isfinite(line["loss"]) for line in metrics), f"the losses are {[line['loss'] for line in metrics]}"
        assert list((output / "model").glob("*.safetensors")), "the run saved no weights"

    def test_it_learns(self, given: dict[str, Any], tmp_path: Path) -> None:
        """Twenty steps lower the loss of the exam's rows."""
        self.train(given, tmp_path / "run", max_steps=20)
        losses = [line["loss"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line]
        assert losses[-1] < losses[0], f"twenty steps do not lower the loss: {losses[0]:.4f} to {losses[-1]:.4f}"

    def test_resume_is_never_having_stopped(self, given: dict[str, Any], tmp_path: Path) -> None:
        """A run that Ctrl-C ends behind the fourth of five steps, in its second epoch, and that is resumed saves the same
        weights, to the bit, as one that was never stopped."""
        from ftx.checkpoints import step_of, whole_checkpoints

        observers = (Choice("ftx.testing.own:CtrlC", {"after": 3}),)
        whole, stopped = tmp_path / "whole", tmp_path / "stopped"
        self.train(given, whole, max_steps=5)
        with pytest.raises(Interrupted):
            self.train(given, stopped, max_steps=5, observers=observers)
            pytest.fail("Ctrl-C does not end the training: it must call the callbacks it is given and heed their control")
        directory = RunDir(stopped)
        saved = [step_of(checkpoint) for checkpoint in whole_checkpoints(directory)]
        assert saved[-1:] == [4], f"Ctrl-C must leave a checkpoint of step 4 in checkpoints/checkpoint-4, there are {saved}: heed control.should_save"
        try:
            run_recipe(recipe_of(directory), catalogue=catalogue(trainer={"examined": self.plugin}), console=Console(quiet=True), resume=directory)
        except Interrupted as error:  # it came by the place where Ctrl-C is pressed once more
            raise AssertionError("a resumed run starts over: heed resume_from_checkpoint") from error
        steps = [[line["step"] for line in read_lines(run / "metrics.jsonl") if "loss" in line] for run in (whole, stopped)]
        assert steps[1][0] == 1 and steps[1][-1] == 5 and steps[1] == sorted(set(steps[1])), f"the resumed run's metrics have the steps {steps[1]}"
        assert weights_of(stopped) == weights_of(whole), "the resumed run's weights are not those of a run that was never stopped"


def weights_of(run: Path) -> dict[str, str]:
    """File -> sha256 of all saved weights."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted((run / "model").rglob("*.safetensors"))}
