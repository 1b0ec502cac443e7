"""The command `ftx advise`: a recipe to start from, for the data and the memory at hand, with the reason for each choice."""

from __future__ import annotations

from pathlib import Path

import click

from ftx.commands.common import answering, one_file, output_options


@click.command("advise")
@one_file("--data", required=True, help="Training data, as for `ftx run`.")
@one_file("--eval-data", help="Data to evaluate on, if there are some.")
@click.option("--formatter", metavar="NAME", default="auto", show_default=True, help="How rows are read.")
@click.option("--device-memory", metavar="SIZE", help="Advise for a GPU with so much memory, such as 24GB, not for this machine.")
@click.option("--output", metavar="FILE", help="Where to write the recipe (default: standard output).")
@click.option("--force", is_flag=True, help="Write over an existing OUTPUT.")
@click.option("--skip-bad-rows", is_flag=True, help="Pass over rows that cannot be read.")
@output_options
def command(
    data: str,
    eval_data: str | None,
    formatter: str,
    device_memory: str | None,
    output: str | None,
    force: bool,
    skip_bad_rows: bool,
    quiet: bool,
    as_json: bool,
    traceback: bool,
) -> None:
    """Print a recipe to start from: model, adapter, trainer and their main options, each with its reason."""
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx.errors import RecipeError
        from ftx.run import write_text
        from ftx_advise_rules import advise, written

        if output is not None and Path(output).exists() and not force:
            raise RecipeError(f"{output} exists.", "Give another --output, or --force to write over it.")
        advice = advise(data, eval_data, formatter, device_memory, skip_bad_rows=skip_bad_rows)
        text = written(advice)
        result.content = {"recipe": advice.recipe, "reasons": advice.reasons, "needs": advice.needs, "notes": advice.notes}
        if output is not None:
            write_text(Path(output), text)
        if not as_json and not (output and quiet):
            click.echo(text if output is None else f"{output}: a recipe to start from", nl=output is not None)
