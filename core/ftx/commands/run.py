"""ftx run: the pipeline."""

from __future__ import annotations

from typing import Any

import click

from ftx.commands.common import answering, given_recipe, output_options, recipe_options


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
