"""ftx plan: everything but training."""

from __future__ import annotations

from typing import Any

import click

from ftx.commands.common import answering, given_recipe, output_options, recipe_options


@click.command("plan")
@click.argument("recipe", required=False)
@recipe_options
@click.option("--device-memory", metavar="SIZE", help="Plan for a GPU (with --device cpu: a machine) with so much memory, such as 48GB, not for this machine.")
@click.option("--fit", is_flag=True, help="Change what keeps the run from fitting, cheapest first; the effective batch stays.")
@click.option("--force", is_flag=True, help="Exit 0 also where the run would not fit.")
@click.option("--show", type=click.IntRange(min=0), default=0, metavar="N", help="Print the first N training rows as the model sees them.")
@click.option("--trace", is_flag=True, help="Find the peak a second way: the plugins' own training step, run on shapes without numbers.")
@click.option("--measure", is_flag=True, help="Time four real training steps, and keep the speed for the seconds of this and later plans on this machine.")
@output_options
def command(
    recipe: str | None,
    assignments: tuple[str, ...],
    device_memory: str | None,
    fit: bool,
    trace: bool,
    measure: bool,
    force: bool,
    show: int,
    quiet: bool,
    as_json: bool,
    traceback: bool,
    **given: Any,
) -> None:
    """Predict memory, time and disk of a run as RECIPE and the options say, before anything is loaded.

    Takes what `ftx run` takes. Without --data, or where the model has no weights, the data's part is left out; then a
    config.json is enough, and --model also takes the names that `ftx models` lists. Exit status: 0 it fits, 2 it does not.
    """
    with answering(as_json=as_json, traceback=traceback) as result:
        wanted = given_recipe(recipe, assignments, given)
        from ftx.catalogue import Catalogue
        from ftx.console import Console
        from ftx.foresight import plan

        console = Console(quiet=quiet, json=as_json)
        result.content = plan(wanted, Catalogue(), console, device_memory=device_memory, fit=fit, force=force, show=show, trace=trace, measure=measure)
