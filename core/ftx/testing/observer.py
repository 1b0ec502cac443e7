"""The exam of observers: a real run with the observer gives the same weights as one without it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ftx.catalogue import Catalogue
from ftx.recipe import Choice
from ftx.testing.common import Contract
from ftx.testing.own import ROWS
from ftx.testing.runs import catalogue, make_run, train
from ftx.testing.trainer import OWN, weights_of

QUICK = {"max_steps": 2}


class ObserverContract(Contract):
    """For classes in the group ftx.observer, in short runs on the tiny model with the trainer sft, or the first one that is
    installed."""

    stage = "observer"

    def test_a_run_is_the_same_with_it(self, given: dict[str, Any], tmp_path: Path) -> None:
        """The run ends well, all hooks of the observer are called in it, and it saves the same weights, to the bit."""
        trainers = Catalogue().names("trainer")
        if not trainers:
            pytest.skip("no trainer is installed to run with: pip install ftx-sft")
        self.skip_if_refused(self.hooks(given), make_run(tmp_path / "asked", observers=(self.choice(given),)))
        plugins = catalogue(observer={"examined": self.plugin})
        trainer = Choice("sft" if "sft" in trainers else trainers[0], QUICK)
        for name, observers in (("with", (Choice("examined", given),)), ("without", ())):
            train(tmp_path / name, ROWS["prompt-completion"], plugins, adapter=OWN, trainer=trainer, observers=observers)
        assert weights_of(tmp_path / "with") == weights_of(tmp_path / "without"), "the observer changes the weights that training gives"
