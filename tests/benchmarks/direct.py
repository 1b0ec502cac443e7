"""The trainer of a run without the run: no observers, no metrics, no progress, no checkpoints of ftx's; and its steps without its loop."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ftx import pipeline
from ftx.catalogue import Catalogue
from ftx.commands.common import given_recipe, recipe_options
from ftx.console import Console
from ftx.models import load_tokenizer
from ftx.prepare import prepare
from ftx.recipe import resolve
from ftx.run import RunDir
from ftx_fast import PARTS, install
from ftx_fast_machine import keep_memory


def trainer_of(words: list[str], directory: Path, callbacks: list[Any]) -> Any:
    """The trainer that `ftx run WORDS` would make, with these callbacks only."""

    @click.command()
    @recipe_options
    def made(assignments: Any, **given: Any) -> Any:
        catalogue, console = Catalogue(), Console(quiet=True)
        recipe, hooks = resolve(given_recipe(None, assignments, given), catalogue)
        run = pipeline.begin(recipe, hooks, console)
        pipeline.preflight(hooks, run)
        tokenizer = load_tokenizer(run.model_path)
        splits, _ = prepare(hooks, tokenizer, run)
        run.directory = RunDir(directory)
        run.directory.checkpoints.mkdir(parents=True)
        model = pipeline.load_base(hooks, catalogue, run)
        pipeline.seed_everything(run.seed)
        model = hooks.call("adapt_model", model=model, run=run)
        data = {"train_dataset": splits["train"].tokens, "eval_dataset": None}
        return hooks.call("make_trainer", model=model, tokenizer=tokenizer, **data, callbacks=callbacks, run=run)

    return made.main(words, standalone_mode=False)


def passes(trainer: Any, batch: dict[str, Any]) -> None:
    """The forward and the backward pass of one batch, through the trainer's own loss."""
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=batch["supervised_tokens"])
    trainer.accelerator.backward(loss)


class Bare:
    """A trainer's steps one at a time, so that they can be taken in turns with something else in one thread. Of ftx-fast these parts are on;
    `memory` stays with the process."""

    def __init__(self, words: list[str], directory: Path, parts: Sequence[str] = tuple(PARTS), *, off_between: bool = False) -> None:
        """`off_between`: the parts are taken off between steps, for others of the process that have other parts: some of it is the process's."""
        if "memory" in parts:
            keep_memory()
        self.parts, self.off_between = [part for part in parts if part != "memory"], off_between
        self.trainer = trainer_of(words, directory, [])
        self.trainer.model.train()
        if self.trainer.args.activation_checkpointing:  # else the trainer's loop does it
            self.trainer.model.activation_checkpointing_enable()
        self.trainer.create_optimizer()
        self.positions = 0
        self.trainer.model.get_input_embeddings().register_forward_pre_hook(self._count)

    def _count(self, module: Any, given: tuple[Any, ...]) -> None:
        self.positions = given[0].numel()

    def batches(self, count: int) -> list[dict[str, Any]]:
        return [batch for _, batch in zip(range(count), self.trainer.get_train_dataloader(), strict=False)]

    def step(self, batch: dict[str, Any]) -> float:
        """Seconds of a whole step: forward, backward, optimizer (behind which DoRA's norms are found anew). `positions` went through the model."""
        if not self.trainer.fast.installed:
            self.trainer.fast = install(self.trainer.model, self.parts)
        began = time.perf_counter()
        passes(self.trainer, batch)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        seconds = time.perf_counter() - began
        if self.off_between:
            self.trainer.fast.undo()
        return seconds
