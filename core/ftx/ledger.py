"""The ledger: every row that is not used as it came, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One source row not used as it came. `line` counts from 1; `action` is `dropped`, `cut` or `repaired`."""

    file: str
    line: int
    reason: str
    action: str


@dataclass
class Ledger:
    """The entries of one run, and whether bad rows may be dropped into it at all (`--skip-bad-rows`)."""

    skip_bad_rows: bool = False
    entries: list[Entry] = field(default_factory=list)

    def add(self, file: str, line: int, reason: str, action: str) -> None:
        entry = Entry(file, line, reason, action)
        if entry not in self._seen:
            self._seen.add(entry)
            self.entries.append(entry)

    def __post_init__(self) -> None:
        self._seen: set[Entry] = set(self.entries)

    def dropped(self) -> set[tuple[str, int]]:
        """(file, line) of every source row that gave nothing."""
        return {(entry.file, entry.line) for entry in self.entries if entry.action == "dropped"}

    def as_rows(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self.entries]
