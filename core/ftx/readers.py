"""`--data FILE:NAME`: files that say what other files hold, read by functions that distributions bring.

An entry point of the group `ftx.reader` is called as the file, in small letters with hyphens and without its suffix
(`dataset-info` for dataset_info.json). It leads to a function `(file, name) -> list[Source]`, which raises DataError.
"""

from __future__ import annotations

import importlib.metadata as metadata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftx.errors import DataError, FtxError, first_line

GROUP = "ftx.reader"


@dataclass(frozen=True)
class Source:
    """What `--data` takes (a file, a directory, a hub id), and what makes of each of its rows the row that a formatter sees.

    `convert` keeps every field, under another name where need be; RowError for a row that does not fit.
    """

    reference: str
    convert: Callable[[dict[str, Any]], dict[str, Any]]


def sources(reference: str) -> list[Source] | None:
    """What `FILE:NAME` leads to; None where it is none, and the reference stands for itself. DataError for an unknown name."""
    if not reference.strip():  # as a path it would be the directory that one is in
        raise DataError("the name of the data is empty.", "Give a file: a variable of the shell may not be set.")
    file, name = parted(reference)
    point = _point(file) if file is not None else None
    if file is None or point is None:
        return None
    try:
        found: list[Source] = point.load()(file, name)
    except FtxError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(f"{file}: its reader ({point.value}) could not be used: {first_line(error)}", "See it all with --traceback.") from error
    return found


def parted(reference: str) -> tuple[Path | None, str]:
    """`FILE:NAME` -> the file and the name (""), or (None, "") where there is no such file."""
    for path, name in ((reference, ""), reference.rpartition(":")[::2]):
        file = Path(path).expanduser()
        if path and file.is_file():
            return file, name
    return None, ""


def absolute(reference: str, base: Path | None = None) -> str | None:
    """The reference with its path made absolute (relative to `base`), if there is such a file or directory; else None."""
    for path, colon, name in ((reference, "", ""), reference.rpartition(":")):
        where = Path(path).expanduser()
        where = (base / where) if base is not None else where
        if path and where.exists() and (not colon or _point(where)):
            return f"{straight(where)}{colon}{name}"
    return None


def straight(path: Path) -> Path:
    """The absolute path without `..`. Links keep the name by which they were called: what they point to may have another, and
    may be another file tomorrow."""
    path = path.absolute()
    last = max((at for at, part in enumerate(path.parts, start=1) if part == ".."), default=0)
    return Path(*path.parts[:last]).resolve().joinpath(*path.parts[last:]) if last else path


def behind(reference: str) -> list[str]:
    """The reference itself, or for `FILE:NAME` the file and all that it leads to: what a fingerprint covers."""
    found = sources(reference)
    return [reference] if found is None else [str(parted(reference)[0]), *(source.reference for source in found)]


def _point(file: Path) -> metadata.EntryPoint | None:
    key = file.stem.lower().replace("_", "-")
    return next((point for point in metadata.entry_points(group=GROUP) if point.name == key), None)
