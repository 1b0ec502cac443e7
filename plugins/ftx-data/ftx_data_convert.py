"""Rows of one format into another: read by one formatter, written by the reverse hook of the other, row by row."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ftx.catalogue import Catalogue
from ftx.data import read_dataset, to_dataset
from ftx.errors import DataError, OptionError, PluginError, RowError, one_line
from ftx.hooks import Hooks
from ftx.ledger import Ledger
from ftx.options import Text, build, fields
from ftx.prepare import check_rows
from ftx.recipe import Choice, Recipe
from ftx.run import Run
from ftx_data_files import SOURCE, Book, Output, refuse_or_drop

if TYPE_CHECKING:
    from datasets import Dataset

#: Rows with a value in a column that show whether a formatter reads it.
PROBE = 100
ALWAYS = "Drop such rows into the ledger with --skip-bad-rows."


@dataclasses.dataclass(frozen=True)
class Format:
    """A formatter with its options, alone among its hooks."""

    name: str
    plugin: Any
    hooks: Hooks
    run: Run

    def unformat(self, row: dict[str, Any]) -> dict[str, Any]:
        written: dict[str, Any] = self.hooks.call("unformat_row", row=row, run=self.run)
        return written

    @property
    def columns(self) -> set[str]:
        """The columns that its options name."""
        return {value for name in fields(type(self.plugin)) if name.endswith("_column") and isinstance(value := getattr(self.plugin, name), str)}


def open_format(name: str, assignments: tuple[str, ...], side: str, ledger: Book, say: Any, data: str | None = None) -> Format:
    """The formatter that is called so, with the options of `-o SIDE.K=V`."""
    options: dict[str, Any] = {}
    for one in assignments:
        path, equals, value = one.partition("=")
        if path.startswith(f"{side}.") and equals:
            options[path.removeprefix(f"{side}.")] = Text(value)
    cls = Catalogue().load("formatter", name)
    plugin, hooks = build(cls, options, stage="formatter", name=name, key=side), Hooks()
    hooks.add(plugin, "formatter", name)
    hooks.check()
    return Format(name, plugin, hooks, Run(recipe=Recipe(data=data, formatter=Choice(name)), ledger=ledger, hooks=hooks, say=say))


def check_assignments(assignments: tuple[str, ...], sides: tuple[str, ...]) -> None:
    for one in assignments:
        if not one.startswith(tuple(f"{side}." for side in sides)) or "=" not in one:
            raise OptionError(f"-o {one}: not of the form {'|'.join(sides)}.OPTION=VALUE.", f"For example: -o {sides[0]}.style=chat")


def format_file(reference: str, name: str, assignments: tuple[str, ...], ledger: Book, say: Any, side: str = "from") -> tuple[Format, Dataset, Dataset]:
    """A file read and formatted: the formatter (for `auto` the one that it chose), the raw rows, and the formatted ones."""
    raw = read_dataset(reference, ledger)
    if name == "auto":
        from ftx_formats_auto import chosen

        guess = chosen(raw)
        say(f"formatter auto: {guess}")
        name, assignments = guess.formatter, (*(f"{side}.{key}={value}" for key, value in guess.options.items()), *assignments)
    form = open_format(name, assignments, side, ledger, say, reference)
    formatted = form.hooks.call("format_dataset", dataset=raw, run=form.run)
    check_rows(raw, formatted, "formatter", form.hooks, form.run)
    return form, raw, formatted


def rows_in(dataset: Dataset) -> Iterator[dict[str, Any]]:
    """The rows of a dataset, a thousand of them in memory."""
    from ftx.columns import chunks

    for rows in chunks(dataset):
        yield from rows


def convert(
    reference: str,
    source: str,
    target: str,
    output: Output,
    ledger: Book,
    say: Any,
    *,
    assignments: tuple[str, ...] = (),
    keep: tuple[str, ...] = (),
    split_turns: bool = False,
    all_answers: bool = False,
    chosen: bool = False,
) -> dict[str, Any]:
    """Write a file anew in another format; what was done. Each written row is one that the target reads as what the source read.

    `split_turns`, `all_answers` and `chosen` say what becomes of rows that the target cannot hold as they are. Columns that
    the source does not read are left out, with a ledger entry each, unless they are in `keep`. Raises DataError.
    """
    check_assignments(assignments, ("from", "to"))
    read, raw, formatted = format_file(reference, source, assignments, ledger, say)
    write = open_format(target, assignments, "to", ledger, say)
    if not write.hooks.owners("unformat_row"):
        raise PluginError(f"formatter '{target}' cannot write rows: it has no unformat_row.", "Choose another --to.")
    columns = [column for column in raw.column_names if column not in SOURCE]
    missing = next((column for column in keep if column not in columns), None)
    if missing:
        raise DataError(f"--keep {missing}: the file has no such column.", f"It has: {one_line(', '.join(columns))}.")
    clash = next((column for column in keep if column in write.columns), None)
    if clash:
        raise DataError(f"--keep {clash}: {target} reads a column of that name as its own.", "Rename it in the file first.")
    for column, (file, line) in unread(read, raw).items():
        if column not in keep:
            ledger.add(file, line, f"column '{column}' is left out of every row (--keep {column} carries it over)", "cut")
    kept = _carried(raw, keep)
    with output:
        for row in rows_in(formatted):
            place = (str(row.pop("_file", "row")), int(row.pop("_line", 0)))
            more = next((values for at, values in kept if at == place), {}) if keep else {}
            for part, note in _parts(row, split_turns, all_answers, chosen):
                if note:
                    ledger.add(*place, note[0], note[1])
                if part is None:
                    continue
                try:
                    written = write.unformat(part)
                except RowError as error:
                    refuse_or_drop(ledger, {"_file": place[0], "_line": place[1]}, f"{error}{_hint(part)}")
                    continue
                _refuse_clash(more, written, place)
                output.write({**written, **more})
            kept = _again(place, more, kept) if keep else kept
    return {"rows": len(raw), "written": output.rows, "from": read.name, "to": write.name, "output": str(output.file)}


def unread(form: Format, raw: Dataset) -> dict[str, tuple[str, int]]:
    """The columns without which a formatter makes the same rows, and where each first has a value.

    Asked of the formatter itself, which may tell of such columns or not: the first rows that have a value, with and without.
    """
    rows: dict[str, list[dict[str, Any]]] = {column: [] for column in raw.column_names if column not in SOURCE}
    for row in rows_in(raw):
        wanting = [column for column in rows if len(rows[column]) < PROBE]
        if not wanting:
            break
        for column in wanting:
            if row.get(column) not in (None, "", [], {}):
                rows[column].append(row)
    found = {}
    for column, sample in rows.items():
        made = _made(form, sample)
        if made is not None and made == _made(form, [{key: value for key, value in row.items() if key != column} for row in sample]):
            found[column] = (str(sample[0]["_file"]), int(sample[0]["_line"]))
    return found


def _made(form: Format, rows: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """What a formatter makes of rows; None where it makes nothing, or fails: a formatter of one's own may do so in any way."""
    try:
        run = dataclasses.replace(form.run, ledger=Ledger(skip_bad_rows=True), say=lambda text: None)
        return list(rows_in(form.hooks.call("format_dataset", dataset=to_dataset(rows), run=run))) if rows else None
    except Exception:
        return None


def _carried(raw: Dataset, keep: tuple[str, ...]) -> Iterator[tuple[tuple[str, int], dict[str, Any]]]:
    """Where each raw row came from, and its columns that are carried over."""
    for row in rows_in(raw):
        yield (str(row["_file"]), int(row["_line"])), {column: row[column] for column in keep if row.get(column) is not None}


def _again(place: tuple[str, int], more: dict[str, Any], rest: Iterator[Any]) -> Iterator[Any]:
    """Put back what the row before had: a raw row may give several."""
    yield place, more
    yield from rest


def _refuse_clash(more: dict[str, Any], written: dict[str, Any], place: tuple[str, int]) -> None:
    both = next((column for column in more if column in written), None)
    if both:
        raise DataError(f"{place[0]}:{place[1]}: --keep {both}: the written row has a column of that name.", "Rename it in the file first.")


def _parts(row: dict[str, Any], split_turns: bool, all_answers: bool, chosen: bool) -> Iterator[tuple[dict[str, Any] | None, tuple[str, str] | None]]:
    """The rows that one row becomes before it is written, and what is to be said of that: (reason, action)."""
    if chosen and "chosen" in row:
        prompt, answer = row.get("prompt") or ([] if isinstance(row["chosen"], list) else ""), row["chosen"]
        row = {"prompt": prompt, "completion": answer, **({"tools": row["tools"]} if row.get("tools") else {})}
        yield None, ("the rejected answer is left out", "cut")
    elif chosen and "label" in row:
        if not row["label"]:
            yield None, ("the answer is labelled bad", "dropped")
            return
        row = {key: value for key, value in row.items() if key != "label"}
        yield None, ("the label is left out", "cut")
    chat = isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list)
    if "chosen" in row or "label" in row or not (chat or row.get("messages")):
        yield row, None
        return
    messages = row["messages"] if row.get("messages") else [*row["prompt"], *row["completion"]]
    first = 0 if row.get("messages") else len(row["prompt"])
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    if split_turns:
        for at, message in enumerate(messages):
            if at >= first and message["role"] == "assistant":
                yield {"prompt": messages[:at], "completion": [message], **tools}, None
        return
    earlier = sum(message["role"] == "assistant" for message in messages[:first])
    if all_answers and earlier:
        yield {"messages": messages, **tools}, (f"{earlier} earlier answer(s), context so far, count in the loss", "repaired")
        return
    yield row, None


def _hint(row: dict[str, Any]) -> str:
    """Which option would write such a row."""
    if "chosen" in row or "label" in row:
        return "; --chosen takes the good answers"
    messages = row.get("messages") or (row["completion"] if isinstance(row.get("completion"), list) else [])
    if sum(message["role"] == "assistant" for message in messages) > 1:
        return "; --split-turns makes a row of every answer"
    if isinstance(row.get("prompt"), list) and any(message["role"] == "assistant" for message in row["prompt"]):
        return "; --all-answers lets them count, --split-turns makes a row of every answer"
    return ""


@contextlib.contextmanager
def booked(ledger: Book) -> Iterator[None]:
    """The ledger goes where its output goes."""
    try:
        yield
    except BaseException:
        ledger.close(keep=False)
        raise
    ledger.close(keep=True)
