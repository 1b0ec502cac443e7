"""The trainer of a run without the run: no observers, no metrics, no progress, no checkpoints of ftx's."""

from __future__ import annotations

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
