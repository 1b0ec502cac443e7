"""ftx eval: evaluate a finished run again, base and tuned."""

from __future__ import annotations

import click

from ftx.commands.common import answering, one_file, output_options


@click.command("eval")
@click.argument("run", required=False)
@click.option("--evaluator", metavar="NAME", multiple=True, help="How it is judged (default: the run's own); repeatable.")
@one_file("--eval-data", help="Data to evaluate on (default: the run's own).")
@click.option("-o", "--option", "assignments", metavar="NAME.K=V", multiple=True, help="An option of an evaluator; repeatable.")
@output_options
def command(
    run: str | None, evaluator: tuple[str, ...], eval_data: str | None, assignments: tuple[str, ...], quiet: bool, as_json: bool, traceback: bool
) -> None:
    """Evaluate RUN's base and tuned model. New scores replace those of the same evaluators in scores.json.

    Without RUN: evaluators that score files (see their options); --json then prints the list of their scores.
    """
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx.catalogue import Catalogue
        from ftx.console import Console
        from ftx.errors import RecipeError
        from ftx.lock import locked
        from ftx.readback import evaluate_again, evaluate_files
        from ftx.run import RunDir

        console = Console(quiet=quiet, json=as_json)
        if run is None:
            if eval_data is not None:
                raise RecipeError("--eval-data is given, and no run that could be asked.", "ftx eval RUN --eval-data FILE")
            result.content = [score.as_dict() for score in evaluate_files(evaluator, assignments, Catalogue(), console)]
        else:
            with locked(RunDir(run)):
                result.content = evaluate_again(run, evaluator, eval_data, assignments, Catalogue(), console).as_dict()
