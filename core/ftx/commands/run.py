"""ftx run: the pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ftx.commands.common import answering, output_options


def recipe_options(command: Any) -> Any:
    """The options that make a recipe; they stand over the recipe file's values."""
    for option in reversed(
        [
            click.option("--model", metavar="M", help="Hub id, directory, .gguf file or installed name (default: smollm2)."),
            click.option("--data", metavar="FILE", help="Training data: .jsonl, .json, .csv, .parquet (.gz), a directory, or a hub id."),
            click.option("--eval-data", metavar="FILE", help="Data to evaluate on."),
            click.option("--formatter", metavar="NAME", help="How rows are read (default: auto)."),
            click.option("--quantizer", metavar="NAME", help="How weights are quantised (default: none)."),
            click.option("--adapter", metavar="NAME", help="What is trained (default: lora)."),
            click.option("--trainer", metavar="NAME", help="How it is trained (default: sft)."),
            click.option("--evaluator", metavar="NAME", multiple=True, help="How it is judged; repeatable."),
            click.option("--observer", metavar="NAME", multiple=True, help="What watches the run; repeatable."),
            click.option("-o", "--option", "assignments", metavar="STAGE.K=V", multiple=True, help="An option of a plugin; repeatable."),
            click.option("--from", "start", metavar="RUN", help="Start from an earlier run's model."),
            click.option("--seed", type=int, metavar="N", help="Seed (default: 42)."),
            click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), help="Precision of the base model (default: auto)."),
            click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="Where it runs (default: auto)."),
            click.option("--skip-bad-rows", is_flag=True, default=None, help="Drop rows that cannot be used into the ledger."),
            click.option("--allow-truncation", is_flag=True, default=None, help="Let answers be cut at max_length."),
            click.option("--allow-overlap", is_flag=True, default=None, help="Let evaluation rows stand in the training data."),
            click.option("--trust-remote-code", metavar="MODEL", help="Run the code that MODEL brings; it must be the --model, by name."),
            click.option("--no-cache", is_flag=True, default=None, help="Format and encode the data anew, and keep nothing of it."),
        ]
    ):
        command = option(command)
    return command


def given_recipe(recipe: str | None, assignments: tuple[str, ...], given: dict[str, Any]) -> Any:
    """The unresolved Recipe of a command line."""
    from ftx.recipe import merge, read_recipe

    content = read_recipe(Path(recipe)) if recipe else {}
    given = {("from" if key == "start" else key): value for key, value in given.items()}
    return merge(content, given, assignments)


@click.command("run")
@click.argument("recipe", required=False)
@recipe_options
@click.option("--output", metavar="DIR", help="The run's directory (default: a new one under runs/).")
@click.option("--force", is_flag=True, help="Try it also where the plan says that memory will not do.")
@output_options
def command(
    recipe: str | None,
    assignments: tuple[str, ...],
    output: str | None,
    force: bool,
    quiet: bool,
    as_json: bool,
    traceback: bool,
    **given: Any,
) -> None:
    """Fine-tune as RECIPE (YAML) and the options say.

    Exit status: 0 done, 1 the run failed, 2 refused before it started, 130 interrupted (see `ftx resume`).
    """
    with answering(as_json=as_json, traceback=traceback) as result:
        wanted = given_recipe(recipe, assignments, given)
        from ftx import pipeline
        from ftx.catalogue import Catalogue
        from ftx.console import Console

        outcome = pipeline.train(wanted, catalogue=Catalogue(), console=Console(quiet=quiet, json=as_json), output=output, force=force)
        result.content = outcome.as_dict()
