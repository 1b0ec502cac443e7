"""Rows in and out of files, a row at a time: what a command writes stands there whole or not at all, with its ledger beside it."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ftx.data import bad_row, read_rows
from ftx.errors import DataError
from ftx.ledger import Ledger

#: Where a row came from; not part of it.
SOURCE = ("_file", "_line")
KINDS = (".jsonl", ".json", ".csv")


class Book(Ledger):
    """A ledger that writes each entry into a file beside the output at once: there may be one for every row.

    `reasons` counts the entries by what they say. Nothing is written where there is no entry.
    """

    def __init__(self, output: Path | None, *, skip_bad_rows: bool = False) -> None:
        super().__init__(skip_bad_rows=skip_bad_rows)
        self.path = output.with_name(f"{output.name}.ledger.jsonl") if output is not None else None
        self.temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp") if self.path else None
        self.reasons: Counter[tuple[str, str]] = Counter()
        self._stream: IO[str] | None = None

    def add(self, file: str, line: int, reason: str, action: str, kind: str | None = None) -> None:
        """`kind`: what the reason is counted as, where it holds figures of its own."""
        if action == "dropped":
            self._actions.setdefault(self.split, {}).setdefault((file, line), set()).add(action)  # for the core's check of lost rows
        self.reasons[kind or reason, action] += 1
        if self.temporary is not None:
            if self._stream is None:
                self.temporary.parent.mkdir(parents=True, exist_ok=True)
                self._stream = open(self.temporary, "w", encoding="utf-8")  # noqa: SIM115  it stays open until close()
            self._stream.write(json.dumps({"file": file, "line": line, "reason": reason, "action": action}, ensure_ascii=False) + "\n")

    def close(self, *, keep: bool) -> None:
        """Put the ledger in its place, or throw it away with the output that it belongs to."""
        if self._stream is not None and self.temporary is not None and self.path is not None:
            self._stream.close()
            os.replace(self.temporary, self.path) if keep else self.temporary.unlink(missing_ok=True)
        elif keep and self.path is not None:
            self.path.unlink(missing_ok=True)  # an earlier command's

    def summary(self) -> list[dict[str, Any]]:
        return [{"reason": reason, "action": action, "rows": count} for (reason, action), count in self.reasons.most_common()]


class Output:
    """A file that rows are written to; it takes its name when the block ends well.

    .jsonl (a row a line), .json (a list) or .csv (texts and numbers only); .gz behind it compresses. Raises DataError.
    """

    def __init__(self, file: str | Path, *, force: bool = False) -> None:
        self.file = Path(file).expanduser()
        self.kind = Path(self.file.stem).suffix.lower() if self.file.suffix.lower() == ".gz" else self.file.suffix.lower()
        self.rows = 0
        if self.kind not in KINDS:
            raise DataError(f"{self.file}: cannot write a '{self.kind or self.file.name}' file.", f"Use one of {', '.join(KINDS)} (.gz too).")
        if self.file.exists() and (not force or self.file.is_dir()):
            raise DataError(f"{self.file} exists.", "Give another --output, or --force to write over it.")
        self.temporary = self.file.with_name(f".{self.file.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Output:
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            raw: Any = gzip.open(self.temporary, "wb") if self.file.suffix.lower() == ".gz" else open(self.temporary, "wb")
        except OSError as error:
            raise DataError(f"{self.file} cannot be written ({error.strerror}).", "Give another --output.") from error
        self.stream = io.TextIOWrapper(raw, encoding="utf-8", newline="")
        self.columns: list[str] = []
        return self

    def write(self, row: dict[str, Any]) -> None:
        row = {key: value for key, value in row.items() if key not in SOURCE}
        if self.kind == ".csv":
            self._csv(row)
        else:
            text = json.dumps(row, ensure_ascii=False)
            self.stream.write(f"{text}\n" if self.kind == ".jsonl" else f"{',' if self.rows else '['}\n{text}")
        self.rows += 1

    def _csv(self, row: dict[str, Any]) -> None:
        if not self.columns:
            self.columns = list(row)
            csv.writer(self.stream, lineterminator="\n").writerow(self.columns)
        if list(row) != self.columns or not all(isinstance(value, str) for value in row.values()):
            raise DataError(f"{self.file}: row {self.rows + 1} has other columns than the first, or a value that is no text.", "Write .jsonl instead.")
        csv.writer(self.stream, lineterminator="\n").writerow(row.values())

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None and self.kind == ".json":
            self.stream.write("\n]\n" if self.rows else "[]\n")
        try:
            self.stream.flush()
            if self.file.suffix.lower() != ".gz":
                os.fsync(self.stream.fileno())
            self.stream.close()
            if kind is None:
                os.replace(self.temporary, self.file)
        finally:
            self.temporary.unlink(missing_ok=True)


def rows_of(reference: str, ledger: Ledger) -> Iterator[dict[str, Any]]:
    """The rows of a file with `_file` and `_line`, one in memory at a time."""
    return read_rows(reference, ledger)


def own(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it stands in its file."""
    return {key: value for key, value in row.items() if key not in SOURCE}


def refuse_or_drop(ledger: Ledger, row: dict[str, Any], problem: str) -> None:
    """A row that cannot be used: DataError with file and line, or with --skip-bad-rows a ledger entry."""
    file, line = str(row.get("_file", "row")), int(row.get("_line", 0))
    if not ledger.skip_bad_rows:
        raise bad_row(file, line, problem)
    ledger.add(file, line, problem, "dropped")
