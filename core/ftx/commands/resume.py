"""ftx resume: go on with a run that was interrupted."""

from __future__ import annotations

from typing import Any

import click

from ftx.commands.common import answering, output_options


@click.command("resume")
@click.argument("run")
@click.option("--accept-drift", is_flag=True, help="Go on although data, model, plugins or libraries have changed; the manifest records it.")
@click.option("-o", "--option", "assignments", metavar="trainer.K=V", multiple=True, help="Another micro-batch or checkpointing, where memory ran out.")
@output_options
def command(run: str, accept_drift: bool, assignments: tuple[str, ...], quiet: bool, as_json: bool, traceback: bool) -> None:
    """Go on with RUN from its newest whole checkpoint, to the same result as if it had never stopped.

    Refused where the run was made of something else than what is here now (see --accept-drift). With -o it goes on with
    another trainer.per_device_train_batch_size (the effective batch is kept), gradient_accumulation_steps,
    gradient_checkpointing or per_device_eval_batch_size; recipe and manifest record it, and no other option may change.
    """
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx import pipeline
        from ftx.catalogue import Catalogue
        from ftx.console import Console
        from ftx.errors import RecipeError
        from ftx.readback import recipe_of
        from ftx.run import RunDir

        directory, console = RunDir(run), Console(quiet=quiet, json=as_json)
        recipe = recipe_of(directory)
        if directory.read_json("manifest.json", {}).get("finished"):
            if assignments:
                raise RecipeError(f"{directory} is finished, so -o changes nothing.", f"Train on from its model: ftx run {directory.recipe} --from {directory}")
            console.say(f"{directory} is finished: there is nothing to go on with.")
            result.content = {"run": str(directory), "scores": directory.read_json("scores.json", [])}
            return
        catalogue, changed = Catalogue(), dict[str, Any]()
        if assignments:
            from ftx.memory import with_changes

            recipe, changed = with_changes(directory, assignments, catalogue)
        outcome = pipeline.train(recipe, catalogue=catalogue, console=console, resume=directory, accept_drift=accept_drift, changed=changed)
        result.content = outcome.as_dict()
