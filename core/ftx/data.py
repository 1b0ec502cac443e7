"""The rows of a run's data: read, formatted, and their types."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftx.errors import DataError, RowError, first_line, one_line
from ftx.files import SUFFIXES, data_files, rows_of, suffix
from ftx.readers import Source, sources

if TYPE_CHECKING:
    from datasets import Dataset

    from ftx.ledger import Ledger
    from ftx.run import Run

#: Row type -> the columns that make it, most specific first (TRL's names).
ROW_TYPES: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "unpaired-preference": ("prompt", "completion", "label"),
    "prompt-completion": ("prompt", "completion"),
    "conversation": ("messages",),
    "text": ("text",),
}


def row_type(columns: Iterable[str]) -> str | None:
    """The row type that a formatted dataset's columns make, or None."""
    present = set(columns)
    return next((name for name, needed in ROW_TYPES.items() if present.issuperset(needed)), None)


def read_dataset(reference: str, ledger: Ledger) -> Dataset:
    """A file, a directory of files, FILE:NAME (see ftx.readers) or a hub id -> its rows, each with `_file` and `_line`.

    JSON and CSV are parsed by ftx and not by `datasets`: its readers name no line, turn dates and the text "None" into
    other types, and drop keys that the first row lacks. Nested columns are kept as JSON, so that no key is invented.
    Raises DataError for what cannot be read; with `ledger.skip_bad_rows` such a row becomes a ledger entry.
    """
    if sources(reference) is None and not Path(reference).expanduser().exists():
        return _read_hub(reference, ledger)
    return to_dataset(read_rows(reference, ledger))


def read_rows(reference: str, ledger: Ledger) -> Iterator[dict[str, Any]]:
    """The rows of `read_dataset` one by one, never all in memory. DataError where there is no row."""
    used = False
    for row in _rows(reference, ledger):
        used = True
        yield row
    if not used:
        problem = f"{reference}: no row can be used; all {len(ledger.dropped())} are in the ledger."
        raise DataError(problem, "Mend the file: its rows are not in a form that can be read.")


def _rows(reference: str, ledger: Ledger) -> Iterator[dict[str, Any]]:
    found, path = sources(reference), Path(reference).expanduser()
    if found is not None:
        for source in found:
            yield from _converted(source, ledger)
    elif path.exists():
        for file in data_files(path):
            yield from _read_file(file, ledger)
    else:
        yield from _read_hub(reference, ledger)


def _converted(source: Source, ledger: Ledger) -> Iterator[dict[str, Any]]:
    for row in _rows(source.reference, ledger):
        file, line = row.pop("_file"), row.pop("_line")
        try:
            yield {**source.convert(row), "_file": file, "_line": line}
        except RowError as error:
            if not ledger.skip_bad_rows:
                raise bad_row(file, line, str(error)) from error
            ledger.add(file, line, str(error), "dropped")


def _read_hub(reference: str, ledger: Ledger) -> Dataset:
    if reference.count("/") != 1 or reference.startswith((".", "/", "~")) or suffix(Path(reference)) in SUFFIXES:
        raise DataError(f"{reference}: no such file or directory.", "Check the path, or give a dataset's hub id as owner/name.")
    import datasets

    try:
        name, _, revision = reference.partition("@")
        dataset = datasets.load_dataset(name, revision=revision or None, split="train")
    except Exception as error:
        raise DataError(
            f"{reference}: neither a file here nor a dataset on the hub ({first_line(error)}).", "Check the path or the id, and the network."
        ) from error
    ledger.count(len(dataset))
    return dataset.add_column("_file", [reference] * len(dataset)).add_column("_line", list(range(1, len(dataset) + 1)))


def _read_file(file: Path, ledger: Ledger) -> Iterator[dict[str, Any]]:
    empty = True
    for line, row in rows_of(file):
        empty = False
        ledger.count()
        if isinstance(row, dict):
            yield {**row, "_file": str(file), "_line": line}
        elif ledger.skip_bad_rows:
            ledger.add(str(file), line, row, "dropped")
        else:
            raise bad_row(str(file), line, row)
    if empty:
        raise DataError(f"{file}: the file has no rows.", "Give a file with at least one row.")


def bad_row(file: str, line: int, problem: str) -> DataError:
    return DataError(one_line(f"{file}:{line}: {problem}."), "Mend the row, or drop such rows into the ledger with --skip-bad-rows.")


def to_dataset(rows: Iterable[dict[str, Any]]) -> Dataset:
    """Rows -> a Dataset with the union of their keys; nested or mixed columns are stored as JSON, key for key."""
    from ftx.columns import Rows

    made = Rows()
    for row in rows:
        made.add(row)
    return made.dataset()


def format_rows(dataset: Dataset, convert: Callable[[dict[str, Any]], Any], run: Run) -> Dataset:
    """Apply `convert` to each row and collect what it returns: one row, or a list of rows.

    `convert` gets the row without `_file` and `_line` and raises RowError for one that does not fit: an error that
    names file and line, or a ledger entry with `--skip-bad-rows`. The result keeps `_file` and `_line`; `_part` numbers
    the rows of a source that gives several. An empty list is a row that gave nothing: refused in the same way, because
    nothing is dropped in silence.
    """

    def each(rows: list[dict[str, Any]]) -> Iterator[Any]:
        for row in rows:
            try:
                yield convert(row)
            except RowError as error:
                yield error

    return format_batches(dataset, each, run)


def format_batches(dataset: Dataset, convert: Callable[[list[dict[str, Any]]], Iterable[Any]], run: Run) -> Dataset:
    """`format_rows` for a `convert` that takes many rows at once and gives the result of each, or its RowError."""
    from ftx.columns import Rows, chunks

    made, number = Rows(), 0
    kept: set[tuple[str, int]] = set()  # sources of several rows: one that cannot be used drops the others not
    lost: list[tuple[str, int, str]] = []
    for rows in chunks(dataset):
        places = [(str(row.pop("_file", "row")), int(row.pop("_line", at)), row.pop("_part", None)) for at, row in enumerate(rows, start=number + 1)]
        number += len(rows)
        for (file, line, part), result in zip(places, convert(rows), strict=True):
            results = result if isinstance(result, list) else [] if result is None else [result]
            error = result if isinstance(result, RowError) else None if results else RowError("the row gives nothing to train on")
            if error is not None and not run.ledger.skip_bad_rows:
                raise bad_row(file, line, str(error)) from error
            if error is not None and part is None:
                run.ledger.add(file, line, str(error), "dropped")
            elif error is not None:
                lost.append((file, line, str(error)))
            else:
                if part is not None:
                    kept.add((file, line))
                for at, one in enumerate(results):
                    own = part if len(results) == 1 else at
                    made.add({**one, "_file": file, "_line": line, **({} if own is None else {"_part": own})})
    for file, line, reason in lost:
        run.ledger.add(file, line, reason, "cut" if (file, line) in kept else "dropped")
    if not len(made):
        raise DataError("the formatter used no row; all are in the ledger.", "Is it the right formatter? `ftx plugins` lists them.")
    return made.dataset()
