"""Paths and small helpers that the core's tests import."""

from __future__ import annotations

import json
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent.parent
SHARED_DATA = REPO.parent / "shared" / "data"


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write rows as JSON lines; the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict]:
    """JSON lines as rows."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
