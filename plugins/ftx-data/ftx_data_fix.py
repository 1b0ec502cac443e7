"""Mending texts: white space around them, JSON in one form, Unicode in NFC. Each change is in the ledger."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from typing import Any

from ftx_data_files import SOURCE, Book, Output, rows_of


def fix(reference: str, output: Output, ledger: Book, *, strip: bool, as_json: bool, nfc: bool, columns: tuple[str, ...] = ()) -> dict[str, Any]:
    """Write a file anew with its texts mended; what was done. `columns`: only those (none: all)."""
    steps: list[tuple[str, Callable[[str], str]]] = []
    if nfc:
        steps.append(("Unicode in NFC", lambda text: text if text.isascii() else unicodedata.normalize("NFC", text)))
    if strip:
        steps.append(("white space around it stripped", str.strip))
    if as_json:
        steps.append(("JSON in one form", unified))
    changed = 0
    with output:
        for row in rows_of(reference, ledger):
            said: list[tuple[str, str]] = []
            mended = {name: value if name in SOURCE or (columns and name not in columns) else _mended(value, name, steps, said) for name, value in row.items()}
            for field, what in said:
                ledger.add(str(row["_file"]), int(row["_line"]), f"field '{field}': {what}", "repaired", kind=what)
            changed += bool(said)
            output.write(mended)
    return {"rows": output.rows, "changed": changed, "output": str(output.file)}


def _mended(value: Any, field: str, steps: list[tuple[str, Callable[[str], str]]], said: list[tuple[str, str]]) -> Any:
    if isinstance(value, dict):
        return {key: _mended(one, f"{field}.{key}", steps, said) for key, one in value.items()}
    if isinstance(value, list):
        return [_mended(one, f"{field}[{at}]", steps, said) for at, one in enumerate(value)]
    if not isinstance(value, str):
        return value
    for what, step in steps:
        made = step(value)
        if made != value:
            said.append((field, what))
            value = made
    return value


class _Kept(ValueError):
    """Writing the value would change it."""


def unified(text: str) -> str:
    """A text that is a JSON object or list, with one space behind commas and colons and characters as they are; any other as it is.

    So is one that would not stay what it is: with a key that stands there twice, or a number that is not written as Python
    writes it (1.10, 1e3).
    """
    if text[:1] not in "{[" or text[-1:] not in "}]":
        return text
    try:
        value = json.loads(text, parse_float=_float, parse_int=_int, parse_constant=_constant, object_pairs_hook=_pairs)
        made = json.dumps(value, ensure_ascii=False)
        made.encode()
    except (ValueError, RecursionError):
        return text
    return made


def _float(digits: str) -> float:
    if repr(float(digits)) != digits:
        raise _Kept
    return float(digits)


def _int(digits: str) -> int:
    if str(int(digits)) != digits:
        raise _Kept
    return int(digits)


def _constant(name: str) -> None:
    raise _Kept


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise _Kept
    return dict(pairs)
