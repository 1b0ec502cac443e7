"""ftx resume: go on with a run that was interrupted."""

from __future__ import annotations

import click

from ftx.commands.common import answering, output_options


@click.command("resume")
@click.argument("run")
@click.option("--accept-drift", is_flag=True, help="Go on although data, model, plugins or libraries have changed; the manifest records it.")
@output_options
def command(run: str, accept_drift: bool, quiet: bool, as_json: bool, traceback: bool) -> None:
    """Go on with RUN from its newest whole checkpoint, to the same result as if it had never stopped.

    Refused where the run was made of something else than what is here now (see --accept-drift).
    """
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
        outcome = pipeline.train(recipe, catalogue=Catalogue(), console=console, resume=directory, accept_drift=accept_drift)
        result.content = outcome.as_dict()
