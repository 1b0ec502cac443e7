"""The command `ftx data`: looking at data before training, and turning it into what is wanted. The work is in the modules beside it."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Any

import click

from ftx.commands.common import answering, output_options

FORMATS = "alpaca, argilla, completion, messages, preference, sharegpt, text"


@click.group("data")
def command() -> None:
    """Look at data, convert, mend and split it, before training on it.

    FILE is what `ftx run --data` takes: .jsonl, .json, .csv, .parquet (.gz), a directory, or FILE:NAME for LLaMA-Factory's
    dataset_info.json. Files are read row by row, so they may be larger than memory. What a command changes or leaves out is in
    OUTPUT.ledger.jsonl.
    """


def _writing(function: Any) -> Any:
    """Options of the commands that write a file."""
    for option in (
        output_options,
        click.option("--skip-bad-rows", is_flag=True, help="Leave rows out that cannot be read or written, with a ledger entry each."),
        click.option("--force", is_flag=True, help="Write over an existing OUTPUT."),
        click.option("--output", metavar="FILE", required=True, help="Where to write: .jsonl, .json or .csv (.gz)."),
    ):
        function = option(function)
    return function


def _reading(function: Any) -> Any:
    """Options of the commands that must understand rows to compare them."""
    for option in (
        click.option("-o", "--option", "assignments", metavar="from.K=V", multiple=True, help="An option of the formatter; repeatable."),
        click.option("--formatter", metavar="NAME", default="auto", show_default=True, help="How rows are read, to compare what they say."),
    ):
        function = option(function)
    return function


def _console(quiet: bool, as_json: bool) -> Any:
    from ftx.console import Console

    return Console(quiet=quiet, json=as_json)


def _told(console: Any, ledger: Any, text: str) -> None:
    """What was done, and what became of rows that were not used as they came."""
    console.say(text)
    for one in ledger.summary():
        console.say(f"  {one['action']}: {one['rows']} x {one['reason']}")
    if ledger.reasons and ledger.path is not None:
        console.say(f"  each in {ledger.path}")


@command.command("inspect")
@click.argument("file")
@click.option("--samples", type=click.IntRange(0), default=3, show_default=True, help="How many rows to show.")
@click.option("--seed", type=int, default=42, show_default=True, help="Which rows are shown.")
@click.option("--model", metavar="M", help="Count tokens of this model instead of characters.")
@click.option("--skip-bad-rows", is_flag=True, help="Pass over rows that cannot be read.")
@output_options
def inspect(file: str, samples: int, seed: int, model: str | None, skip_bad_rows: bool, quiet: bool, as_json: bool, traceback: bool) -> None:
    """Show columns, the format that FILE seems to be in, lengths, copies and some rows."""
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx_data_files import Book
        from ftx_data_look import inspect as look
        from ftx_data_look import lines_of

        tokenizer, ledger, console = None, Book(None, skip_bad_rows=skip_bad_rows), _console(quiet, as_json)
        if model is not None:
            from ftx import models

            tokenizer = models.load_tokenizer(models.resolve(model, console.say))
        result.content = {**look(file, samples=samples, seed=seed, ledger=ledger, tokenizer=tokenizer), "unread": ledger.summary()}
        for line in lines_of(result.content):
            console.say(line)
        for one in ledger.summary():
            console.say(f"not read: {one['rows']} x {one['reason']}")


@command.command("convert")
@click.argument("file")
@click.option("--from", "source", metavar="F", default="auto", show_default=True, help="Formatter that reads FILE.")
@click.option("--to", "target", metavar="F", required=True, help=f"Formatter that is to read OUTPUT: {FORMATS}, or another that can write.")
@click.option("-o", "--option", "assignments", metavar="from.K=V|to.K=V", multiple=True, help="An option of one of the two; repeatable.")
@click.option("--keep", metavar="COLUMN", multiple=True, help="Carry over a column that the formatter does not read; repeatable.")
@click.option("--split-turns", is_flag=True, help="Of a conversation make a row of each answer, with what went before as its context.")
@click.option("--all-answers", is_flag=True, help="Let answers that were context only count in the loss, where the target knows no other.")
@click.option("--chosen", is_flag=True, help="Of preferences take the chosen answers, or those labelled good.")
@_writing
def convert(
    file: str,
    source: str,
    target: str,
    assignments: tuple[str, ...],
    keep: tuple[str, ...],
    split_turns: bool,
    all_answers: bool,
    chosen: bool,
    output: str,
    force: bool,
    skip_bad_rows: bool,
    quiet: bool,
    as_json: bool,
    traceback: bool,
) -> None:
    """Write FILE anew in another format.

    A row that the target cannot hold, so that it would be read as the same row again, is refused with its line.
    """
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx_data_convert import booked
        from ftx_data_convert import convert as run
        from ftx_data_files import Book, Output

        out, console = Output(output, force=force), _console(quiet, as_json)
        ledger = Book(out.file, skip_bad_rows=skip_bad_rows)
        with booked(ledger):
            done = run(
                *(file, source, target, out, ledger, console.say),
                assignments=assignments,
                keep=keep,
                split_turns=split_turns,
                all_answers=all_answers,
                chosen=chosen,
            )
        result.content = {**done, "ledger": ledger.summary()}
        _told(console, ledger, f"{done['written']} rows of {done['to']} from {done['rows']} of {done['from']}: {out.file}")


@command.command("dedupe")
@click.argument("file")
@click.option("--near", type=click.FloatRange(0.3, 1), metavar="S", help="Take out near copies too: Jaccard similarity of word 3-grams, such as 0.8.")
@_reading
@_writing
def dedupe(
    file: str,
    near: float | None,
    formatter: str,
    assignments: tuple[str, ...],
    output: str,
    force: bool,
    skip_bad_rows: bool,
    quiet: bool,
    as_json: bool,
    traceback: bool,
) -> None:
    """Write FILE without its copies; the first of each stays. Case, white space and Unicode form do not count."""
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx_data_convert import booked, check_assignments
        from ftx_data_files import Book, Output
        from ftx_data_parts import dedupe as run

        check_assignments(assignments, ("from",))
        out, console = Output(output, force=force), _console(quiet, as_json)
        ledger = Book(out.file, skip_bad_rows=skip_bad_rows)
        with booked(ledger):
            done = run(file, out, ledger, console.say, near=near, formatter=formatter, assignments=assignments)
        result.content = {**done, "ledger": ledger.summary()}
        _told(console, ledger, f"{done['written']} of {done['rows']} rows: {out.file}")


@command.command("split")
@click.argument("file")
@click.option("--output", metavar="DIR", required=True, help="Where train.jsonl, test.jsonl and validation.jsonl go.")
@click.option("--test", type=click.FloatRange(0, 1, max_open=True), default=0.1, show_default=True, help="Share of the rows for the test.")
@click.option("--validation", type=click.FloatRange(0, 1, max_open=True), default=0.0, show_default=True, help="Share of the rows for validation.")
@click.option("--seed", type=int, default=42, show_default=True, help="Another seed gives another split.")
@click.option("--stratify", metavar="COLUMN", help="Each part gets its share of the rows of every value of this column.")
@click.option("--group", metavar="COLUMN", help="Rows with the same value of this column stay together.")
@click.option(
    "--near",
    type=click.FloatRange(0, 1),
    default=0.8,
    show_default=True,
    metavar="S",
    help="Likeness from which rows stay together (0: none).",
)
@_reading
@click.option("--force", is_flag=True, help="Write over existing files.")
@click.option("--skip-bad-rows", is_flag=True, help="Leave rows out that cannot be read, with a ledger entry each.")
@output_options
def split(
    file: str,
    output: str,
    test: float,
    validation: float,
    seed: int,
    stratify: str | None,
    group: str | None,
    near: float,
    formatter: str,
    assignments: tuple[str, ...],
    force: bool,
    skip_bad_rows: bool,
    quiet: bool,
    as_json: bool,
    traceback: bool,
) -> None:
    """Part FILE into training and test rows, copies and near copies always on one side."""
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx.errors import OptionError
        from ftx_data_convert import booked, check_assignments
        from ftx_data_files import Book
        from ftx_data_parts import split as run

        check_assignments(assignments, ("from",))
        shares = {name: share for name, share in (("test", test), ("validation", validation)) if share}
        if not shares or sum(shares.values()) >= 1:
            raise OptionError("the shares of test and validation must add up to something between 0 and 1.", "For example: --test 0.1 --validation 0.1")
        folder, console = Path(output).expanduser(), _console(quiet, as_json)
        ledger = Book(folder / "split", skip_bad_rows=skip_bad_rows)
        with booked(ledger):
            done = run(
                *(file, folder, shares, ledger, console.say),
                seed=seed,
                stratify=stratify,
                group=group,
                near=near or None,
                formatter=formatter,
                assignments=assignments,
                force=force,
            )
        result.content = {**done, "ledger": ledger.summary()}
        parts = ", ".join(f"{name} {done[name]}" for name in ("train", *shares))
        _told(console, ledger, f"{parts} of {done['rows']} rows in {done['groups']} groups: {folder}")


@command.command("fix")
@click.argument("file")
@click.option("--strip/--no-strip", default=True, show_default=True, help="Take away white space around texts.")
@click.option("--unify-json/--no-unify-json", "unify", default=True, show_default=True, help="Write texts that are JSON in one form.")
@click.option("--nfc/--no-nfc", default=True, show_default=True, help="Compose Unicode characters (NFC).")
@click.option("--column", "columns", metavar="COLUMN", multiple=True, help="Only this column; repeatable.")
@_writing
def fix(
    file: str,
    strip: bool,
    unify: bool,
    nfc: bool,
    columns: tuple[str, ...],
    output: str,
    force: bool,
    skip_bad_rows: bool,
    quiet: bool,
    as_json: bool,
    traceback: bool,
) -> None:
    """Write FILE with its texts mended. Each change is in the ledger, with its field.

    Where a completion goes on in the middle of a line, white space in front of it counts: use --no-strip there.
    """
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx_data_convert import booked
        from ftx_data_files import Book, Output
        from ftx_data_fix import fix as run

        out, console = Output(output, force=force), _console(quiet, as_json)
        ledger = Book(out.file, skip_bad_rows=skip_bad_rows)
        with booked(ledger):
            done = run(file, out, ledger, strip=strip, as_json=unify, nfc=nfc, columns=columns)
        result.content = {**done, "ledger": ledger.summary()}
        _told(console, ledger, f"{done['changed']} of {done['rows']} rows mended: {out.file}")


@command.command("sample")
@click.argument("file")
@click.option("-n", "count", type=click.IntRange(1), default=10, show_default=True, help="How many rows.")
@click.option("--seed", type=int, default=42, show_default=True, help="Another seed gives other rows.")
@click.option("--output", metavar="FILE", help="Where to write them (default: standard output, as JSON lines).")
@click.option("--force", is_flag=True, help="Write over an existing OUTPUT.")
@click.option("--skip-bad-rows", is_flag=True, help="Pass over rows that cannot be read.")
@output_options
def sample(file: str, count: int, seed: int, output: str | None, force: bool, skip_bad_rows: bool, quiet: bool, as_json: bool, traceback: bool) -> None:
    """Take rows by chance, in the order of FILE, each with the same chance."""
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx_data_files import Book, Output, own
        from ftx_data_look import sample as run

        out = Output(output, force=force) if output else None
        rows = run(file, count, seed, Book(None, skip_bad_rows=skip_bad_rows))
        if out is not None:
            with out:
                for row in rows:
                    out.write(row)
            _console(quiet, as_json).say(f"{out.rows} rows: {out.file}")
            result.content = {"written": out.rows, "output": str(out.file)}
        else:
            result.content = {"rows": [own(row) for row in rows]}
            for row in [] if as_json else rows:
                click.echo(jsonlib.dumps(own(row), ensure_ascii=False))


@command.command("failures")
@click.argument("run")
@click.option("--evaluator", metavar="NAME", help="By which evaluation (default: every one of the run).")
@click.option("--below", type=float, metavar="RATING", help="For evaluators that rate: a rating below this is wrong.")
@click.option("--broken", is_flag=True, help="Only what the base got right.")
@_writing
def failures(
    run: str,
    evaluator: str | None,
    below: float | None,
    broken: bool,
    output: str,
    force: bool,
    skip_bad_rows: bool,
    quiet: bool,
    as_json: bool,
    traceback: bool,
) -> None:
    """Write what RUN's tuned model got wrong as rows to correct and train on, in the form that the run was trained on."""
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx_data_convert import booked
        from ftx_data_failures import failures as collect
        from ftx_data_files import Book, Output

        out, console = Output(output, force=force), _console(quiet, as_json)
        ledger = Book(out.file, skip_bad_rows=skip_bad_rows)
        with booked(ledger):
            done = collect(run, out, ledger, console.say, evaluator=evaluator, below=below, broken=broken)
        result.content = {**done, "ledger": ledger.summary()}
        _told(console, ledger, f"{done['written']} of {done['items']} items: {out.file}")


def _server(function: Any) -> Any:
    for option in (
        click.option("--url", metavar="URL", help="The server (default: ARGILLA_API_URL); the key is in ARGILLA_API_KEY."),
        click.option("--workspace", metavar="NAME", help="Argilla's workspace (default: the first one)."),
    ):
        function = option(function)
    return function


@command.command("pull")
@click.argument("name")
@_server
@_writing
def pull(name: str, url: str | None, workspace: str | None, output: str, force: bool, skip_bad_rows: bool, quiet: bool, as_json: bool, traceback: bool) -> None:
    """Fetch the records of the data set NAME from an Argilla server, with the status of each response."""
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx_data_files import Output
        from ftx_data_server import client, dataset_of
        from ftx_data_server import pull as records

        out = Output(output, force=force)
        found = dataset_of(client(url), name, workspace)
        with out:
            for record in records(found):
                out.write(record)
        result.content = {"written": out.rows, "output": str(out.file)}
        _console(quiet, as_json).say(f"{out.rows} records: {out.file}")


@command.command("push")
@click.argument("file")
@click.argument("name")
@_server
@click.option("--skip-bad-rows", is_flag=True, help="Pass over rows that cannot be read.")
@output_options
def push(file: str, name: str, url: str | None, workspace: str | None, skip_bad_rows: bool, quiet: bool, as_json: bool, traceback: bool) -> None:
    """Log the records in FILE (`ftx data convert --to argilla` writes them) to the data set NAME of an Argilla server."""
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx_data_files import Book, own, rows_of
        from ftx_data_server import client, dataset_of
        from ftx_data_server import push as log

        found = dataset_of(client(url), name, workspace)
        count = log(found, (own(row) for row in rows_of(file, Book(None, skip_bad_rows=skip_bad_rows))))
        result.content = {"pushed": count}
        _console(quiet, as_json).say(f"{count} records to {name}")
