"""What the commands share: options that stand on several of them, and how errors end."""

from __future__ import annotations

import contextlib
import json as jsonlib
import sys
import traceback as tracebacks
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from ftx.errors import FAILED, INTERRUPTED, REFUSED, FtxError, printable

Command = TypeVar("Command", bound=Callable[..., Any] | click.Command)
STATUS = {REFUSED: "refused", FAILED: "failed", INTERRUPTED: "interrupted"}


def output_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--quiet, --json, --traceback."""
    for option in (
        click.option("--traceback", is_flag=True, help="Show the whole traceback of an error."),
        click.option("--json", "as_json", is_flag=True, help="One JSON result on standard output, all else on standard error."),
        click.option("--quiet", is_flag=True, help="Print errors only."),
    ):
        command = option(command)
    return command


def echo(text: str) -> None:
    """Print a line; text from a plugin, a file or data cannot move the cursor or recolour the terminal."""
    click.echo(printable(text))


def one_file(name: str, **settings: Any) -> Callable[[Command], Command]:
    """click.option for a file of data. Of two click would take the last in silence; here they are refused."""
    return click.option(name, multiple=True, callback=_once, metavar="FILE", **settings)


def _once(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> str | None:
    if len(values) > 1:
        names = " and ".join(values)
        raise click.UsageError(f"{option.opts[0]} is given twice: {names}. It takes one file, or a directory of files that are read together.", context)
    return values[0] if values else None


def recipe_options(command: Any) -> Any:
    """The options that make a recipe; they stand over the recipe file's values."""
    for option in reversed(
        [
            click.option("--model", metavar="M", help="Hub id, directory, .gguf file or installed name (default: smollm2)."),
            one_file("--data", help="Training data: .jsonl, .json, .csv, .parquet (.gz), a directory, or a hub id."),
            one_file("--eval-data", help="Data to evaluate on."),
            click.option("--formatter", metavar="NAME", help="How rows are read (default: auto)."),
            click.option("--quantizer", metavar="NAME", help="How weights are quantised (default: none)."),
            click.option("--adapter", metavar="NAME", help="What is trained (default: lora)."),
            click.option("--trainer", metavar="NAME", help="How it is trained (default: sft)."),
            click.option("--evaluator", metavar="NAME", multiple=True, help="How it is judged; repeatable."),
            click.option("--observer", metavar="NAME", multiple=True, help="What watches the run; repeatable."),
            click.option("-o", "--option", "assignments", metavar="STAGE.K=V", multiple=True, help="An option of a plugin; repeatable."),
            click.option("--from", "start", metavar="RUN", help="Start from an earlier run's model."),
            click.option("--seed", type=int, metavar="N", help="Seed (default: 42)."),
            click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16", "float16"]), help="What the model computes in (default: auto)."),
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


class Result:
    """What --json prints at the end."""

    def __init__(self) -> None:
        self.content: Any = {}


@contextlib.contextmanager
def answering(*, as_json: bool = False, traceback: bool = False) -> Iterator[Result]:
    """Run a command's body: an FtxError becomes its two lines and its exit status, anything else a bug with status 1."""
    result, status = Result(), 0
    stdout = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
            yield result
        if isinstance(result.content, dict):
            result.content = {"status": "done", **result.content}
    except FtxError as error:
        status = error.status
        result.content = {"status": STATUS[status], "error": error.problem, "remedy": error.remedy, **result.content}
        _print_error(error.problem, error.remedy, traceback)
    except KeyboardInterrupt:
        status = INTERRUPTED
        result.content = {"status": "interrupted", **result.content}
        _print_error("interrupted.", "", traceback)
    except (click.ClickException, click.exceptions.Exit, SystemExit, BrokenPipeError):
        raise
    except Exception as error:
        status = FAILED
        first = (str(error).strip().splitlines() or [""])[0]
        result.content = {"status": "failed", "error": f"{type(error).__name__}: {first}", "remedy": "", **result.content}
        _print_error(f"{type(error).__name__}: {first}", "This is not a known problem: see it all with --traceback.", traceback)
    if as_json:
        text = jsonlib.dumps(result.content, ensure_ascii=False, default=str)
        # JSON escapes the controls below 32 only; the others move a cursor, or turn the reading direction, as well
        stdout.write("".join(c if c.isprintable() else jsonlib.dumps(c)[1:-1] for c in text) + "\n")
        stdout.flush()
    if status:
        sys.exit(status)


def _print_error(problem: str, remedy: str, traceback: bool) -> None:
    if traceback:
        tracebacks.print_exc(file=sys.stderr)
    lines = [line.strip() for text in (problem, remedy) for line in text.split("\n") if line.strip()]
    click.echo(printable("Error: " + "\n       ".join(lines)).replace("\t", " "), err=True)
