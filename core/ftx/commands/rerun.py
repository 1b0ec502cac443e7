"""ftx rerun: repeat a run into a new directory, and say whether the result is equal."""

from __future__ import annotations

import click

from ftx.commands.common import answering, output_options


@click.command("rerun")
@click.argument("run")
@click.option("--output", metavar="DIR", help="The new run's directory (default: RUN-rerun beside it).")
@click.option("--force", is_flag=True, help="Try it also where the plan says that memory will not do.")
@output_options
def command(run: str, output: str | None, force: bool, quiet: bool, as_json: bool, traceback: bool) -> None:
    """Repeat RUN: `ftx run RUN/recipe.yaml` into a new directory. Exit status 1 if weights or scores are not equal to the bit."""
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx import pipeline
        from ftx.catalogue import Catalogue
        from ftx.compare import equality
        from ftx.console import Console
        from ftx.errors import RunError
        from ftx.readback import recipe_of
        from ftx.run import RunDir

        directory, console = RunDir(run), Console(quiet=quiet, json=as_json)
        recipe = recipe_of(directory)
        beside = [directory.path.with_name(f"{directory.path.name}-rerun{number}") for number in ("", *(f"-{i}" for i in range(2, 1000)))]
        place = output or str(next(path for path in beside if not path.exists()))
        outcome = pipeline.train(recipe, catalogue=Catalogue(), console=console, output=place, force=force)
        found = equality(directory, outcome.directory)
        result.content = {**outcome.as_dict(), **found}
        if found["equal"] is None:
            console.say(f"{directory} has no trained model, so there is nothing to hold this one against.")
        elif found["equal"]:
            console.say(f"Equal to {directory}: the weights and all scores, to the bit.")
        else:
            why = [f"Since then: {', '.join(found['changed'])}."] if found["changed"] else ["Nothing that the manifests know has changed."]
            raise RunError("\n".join(["the result is not equal:", *found["differs"]]), "\n".join([*why, f"ftx compare {directory} {outcome.directory}"]))
