"""Answers of judges that need not be asked again: one sqlite file, safe with threads and processes. It holds no key."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from ftx.errors import RunError, first_line

#: Raise it when the requests change in a way that their fields do not show.
FORMAT = 1
#: Seconds to wait for another thread or process that writes.
PATIENCE = 60


def digest(**fields: Any) -> str:
    """The key of an answer: sha256 over everything that changes it, whatever the order of the fields."""
    return hashlib.sha256(json.dumps([FORMAT, fields], sort_keys=True).encode()).hexdigest()


class Cache:
    """Key -> (text, input tokens, output tokens). Each answer is committed before `put` returns.

    A connection lives for one operation: a judge takes seconds, a connection well below a millisecond, and what is not
    held open needs no care about threads. RunError if the file cannot be used.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with self._open() as connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, model TEXT, text TEXT, input_tokens INTEGER, output_tokens INTEGER)"
                )
        except (sqlite3.Error, OSError) as error:
            raise RunError(f"the judge's cache {file} cannot be used: {first_line(error)}.", "Name another file as the option cache, or none.") from error

    def get(self, key: str) -> tuple[str, int, int] | None:
        with self._open() as connection:
            found = connection.execute("SELECT text, input_tokens, output_tokens FROM answers WHERE key = ?", (key,)).fetchone()
        return tuple(found) if found else None

    def put(self, key: str, model: str, text: str, input_tokens: int, output_tokens: int) -> None:
        """Keep an answer; one that stands there already, which could no longer be read, is replaced."""
        with self._open() as connection:
            connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", (key, model, text, input_tokens, output_tokens))

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.file, timeout=PATIENCE)) as connection, connection:
            yield connection
