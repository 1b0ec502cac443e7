"""ftx resume: go on with a run that was interrupted."""

from __future__ import annotations

import click

from ftx.commands.common import answering, output_options


@click.command("resume")
@click.argument("run")
@output_options
def command(run: str, quiet: bool, as_json: bool, traceback: bool) -> None:
    """Go on with RUN from its newest whole checkpoint, to the same result as if it had never stopped."""
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx import pipeline
        from ftx.catalogue import Catalogue
        from ftx.console import Console
        from ftx.readback import recipe_of
        from ftx.run import RunDir

        directory, console = RunDir(run), Console(quiet=quiet, json=as_json)
        recipe = recipe_of(directory)
        if directory.read_json("manifest.json", {}).get("finished"):
            console.say(f"{directory} is finished: there is nothing to go on with.")
            result.content = {"run": str(directory), "scores": directory.read_json("scores.json", [])}
            return
        outcome = pipeline.train(recipe, catalogue=Catalogue(), console=console, resume=directory)
        result.content = outcome.as_dict()
