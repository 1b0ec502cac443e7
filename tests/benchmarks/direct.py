"""The trainer of a run called directly: direct.py NOTED RUN [words of `ftx run`]. No observers, no metrics, no progress, no checkpoints of ftx's."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from clock import Watch

from ftx import pipeline
from ftx.catalogue import Catalogue
from ftx.commands.common import given_recipe, recipe_options
from ftx.console import Console
from ftx.models import load_tokenizer
from ftx.prepare import prepare
from ftx.recipe import resolve
from ftx.run import RunDir


@click.command()
@recipe_options
def main(assignments, **given):
    noted, directory = sys.argv[1:3]
    catalogue, console = Catalogue(), Console(quiet=True)
    recipe, hooks = resolve(given_recipe(None, assignments, given), catalogue)
    run = pipeline.begin(recipe, hooks, console)
    pipeline.preflight(hooks, run)
    tokenizer = load_tokenizer(run.model_path)
    splits, _ = prepare(hooks, tokenizer, run)
    run.directory = RunDir(Path(directory))
    run.directory.checkpoints.mkdir(parents=True)
    model = pipeline.load_base(hooks, catalogue, run)
    pipeline.seed_everything(run.seed)
    model = hooks.call("adapt_model", model=model, run=run)
    trainer = hooks.call(
        "make_trainer", model=model, tokenizer=tokenizer, train_dataset=splits["train"].tokens, eval_dataset=None, callbacks=[Watch(noted)], run=run
    )
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[3:])
