"""The ledger: every row that is not used as it came, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from ftx.readers import absolute


@dataclass(frozen=True)
class Entry:
    """One source row not used as it came. `line` counts from 1; `action` is `dropped`, `cut` (a part of it is lost: an end
    of an answer, or one of the rows that it gives) or `repaired`."""

    file: str
    line: int
    reason: str
    action: str


@dataclass
class Ledger:
    """The entries of one run, and whether bad rows may be dropped into it at all (`--skip-bad-rows`).

    `came` counts the source rows of each split as they are read. One file may serve for two splits, so what became of a row
    is kept by split; `begin` says which one is read now.
    """

    skip_bad_rows: bool = False
    entries: list[Entry] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.split = ""
        self.came: dict[str, int] = {}
        self._seen: set[Entry] = set(self.entries)
        self._actions: dict[str, dict[tuple[str, int], set[str]]] = {}
        for entry in self.entries:
            self._note(entry)

    def begin(self, split: str) -> None:
        """The rows that are read from now on are those of `split`."""
        self.split = split
        self.came[split] = 0
        self._actions[split] = {}

    def count(self, rows: int = 1) -> None:
        """So many source rows have been read, whether they can be used or not."""
        self.came[self.split] = self.came.get(self.split, 0) + rows

    def add(self, file: str, line: int, reason: str, action: str) -> None:
        entry = Entry(file, line, reason, action)
        self._note(entry)
        if entry not in self._seen:
            self._seen.add(entry)
            self.entries.append(entry)

    def dropped(self) -> set[tuple[str, int]]:
        """(file, line) of every source row of the split that gave nothing."""
        return {source for source, actions in self._of_split().items() if "dropped" in actions}

    def changed(self) -> set[tuple[str, int]]:
        """(file, line) of every source row of the split that is used, but not as it came."""
        return {source for source, actions in self._of_split().items() if "dropped" not in actions}

    def as_rows(self) -> list[dict[str, Any]]:
        """The entries with the whole path of each file: who reads them may be somewhere else."""
        paths = {file: absolute(file) or file for file in {entry.file for entry in self.entries}}
        return [{**asdict(entry), "file": paths[entry.file]} for entry in self.entries]

    def _note(self, entry: Entry) -> None:
        self._of_split().setdefault((entry.file, entry.line), set()).add(entry.action)

    def _of_split(self) -> dict[tuple[str, int], set[str]]:
        return self._actions.setdefault(self.split, {})
