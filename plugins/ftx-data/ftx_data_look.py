"""Looking at a file before training: columns, the format it seems to be in, lengths, copies, samples."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from ftx.data import row_type, to_dataset
from ftx.errors import FtxError
from ftx.ledger import Ledger
from ftx_data_files import Book, own, rows_of

#: Rows from the beginning by which the format is told.
FIRST = 100
#: Signs of a value that a sample shows.
SHOWN = 120
BARS = 40


def inspect(reference: str, *, samples: int, seed: int, ledger: Ledger, tokenizer: Any = None) -> dict[str, Any]:
    """All that `ftx data inspect` shows. One row in memory at a time, and 20 bytes for each that was read.

    `lengths`: characters of all texts of a row, or tokens where a tokenizer is given. `duplicates`: rows that say the same
    as an earlier one, case, white space and Unicode form aside.
    """
    columns: dict[str, dict[str, Any]] = {}
    lengths, digests = array("q"), bytearray()
    first: list[dict[str, Any]] = []
    kept = Reservoir(samples, seed)
    for row in rows_of(reference, ledger):
        if len(first) < FIRST:
            first.append(row)
        kept.add(row)
        texts = list(texts_of(own(row)))
        lengths.append(sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts) if tokenizer else sum(map(len, texts)))
        digests += digest(row)
        for name, value in own(row).items():
            _note(columns.setdefault(name, {"rows": 0, "empty": 0, "types": Counter(), "longest": 0}), value)
    return {
        "rows": len(lengths),
        "columns": {name: {**about, "types": dict(about["types"])} for name, about in columns.items()},
        "format": guess(first),
        "unit": "tokens" if tokenizer else "characters",
        "lengths": percentiles(lengths),
        "histogram": histogram(lengths),
        "duplicates": len(lengths) - distinct(digests),
        "samples": [own(row) for row in kept.rows],
    }


class Reservoir:
    """So many rows of a stream, each with the same chance, in the order of the file (Vitter, 1985, algorithm R)."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.random, self.seen = size, random.Random(seed), 0
        self._kept: list[tuple[int, dict[str, Any]]] = []

    def add(self, row: dict[str, Any]) -> None:
        at = self.seen if self.seen < self.size else self.random.randrange(self.seen + 1)
        if at < self.size:
            self._kept[at : at + 1] = [(self.seen, row)]
        self.seen += 1

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for _, row in sorted(self._kept, key=lambda one: one[0])]


def guess(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Which formatter fits, with which options, what it makes of the first rows, and which of them it cannot use."""
    from ftx_data_convert import open_format
    from ftx_formats_auto import chosen

    if not rows:
        return {"formatter": None, "why": "there is no row"}
    dataset, book = to_dataset(rows), Book(None, skip_bad_rows=True)
    try:
        found = chosen(dataset)
        form = open_format(found.formatter, tuple(f"from.{key}={value}" for key, value in found.options.items()), "from", book, lambda text: None)
        formatted = form.hooks.call("format_dataset", dataset=dataset, run=form.run)
    except FtxError as error:
        return {"formatter": None, "why": error.problem, "remedy": error.remedy}
    bad = [{"reason": reason, "rows": count} for (reason, action), count in book.reasons.items() if action == "dropped"]
    return {"formatter": found.formatter, "options": found.options, "row_type": row_type(formatted.column_names), "command": found.command, "unfit": bad}


def texts_of(value: Any) -> Iterator[str]:
    """Every text in a JSON value, in order; keys do not count."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from texts_of(one)
    elif isinstance(value, list):
        for one in value:
            yield from texts_of(one)


def digest(row: dict[str, Any]) -> bytes:
    """16 bytes: rows that differ only in case, white space and Unicode form have the same."""
    text = json.dumps(_folded(own(row)), ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _folded(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join((value if value.isascii() else unicodedata.normalize("NFKC", value)).casefold().split())
    if isinstance(value, dict):
        return {key: _folded(one) for key, one in value.items()}
    return [_folded(one) for one in value] if isinstance(value, list) else value


def distinct(digests: bytes | bytearray) -> int:
    import numpy

    return len(numpy.unique(numpy.frombuffer(bytes(digests), dtype=[("a", "<u8"), ("b", "<u8")])))


def percentiles(lengths: array[int]) -> dict[str, int]:
    if not lengths:
        return {}
    import numpy

    values = numpy.frombuffer(lengths, dtype=numpy.int64)
    marks = {"min": 0, "p10": 10, "median": 50, "p90": 90, "p99": 99, "max": 100}
    return {name: int(numpy.percentile(values, mark, method="lower")) for name, mark in marks.items()} | {"sum": int(values.sum())}


def histogram(lengths: Iterable[int]) -> list[dict[str, int]]:
    """Rows by length in steps of powers of two: `from` (included), `to` (not), `rows`."""
    counts = Counter(length.bit_length() for length in lengths)
    if not counts:
        return []
    return [{"from": 1 << (bits - 1) if bits else 0, "to": 1 << bits, "rows": counts[bits]} for bits in range(min(counts), max(counts) + 1)]


def _note(about: dict[str, Any], value: Any) -> None:
    kinds = {str: "text", bool: "true/false", int: "number", float: "number", list: "list", dict: "object", type(None): "null"}
    about["rows"] += 1
    about["empty"] += value is None or value == "" or value == [] or value == {}
    about["types"][kinds[type(value)]] += 1
    about["longest"] = max(about["longest"], sum(map(len, texts_of(value))))


def lines_of(found: dict[str, Any]) -> Iterator[str]:
    """What a person reads, 80 columns wide where the data let it."""
    yield f"{found['rows']} rows, {found['duplicates']} of them say what an earlier one says"
    form = found["format"]
    if form["formatter"] is None:
        yield f"format: {form['why']}"
    else:
        options = ", ".join(f"{key}={value}" for key, value in form["options"].items())
        yield f"format: {form['formatter']}{f' with {options}' if options else ''}, rows of type {form['row_type']}"
        for bad in form["unfit"]:
            yield f"  of the first {FIRST}, {bad['rows']} cannot be used: {bad['reason']}"
    yield ""
    yield f"{'column':<20} {'rows':>9} {'empty':>9} {'longest':>9}  types"
    for name, about in found["columns"].items():
        types = ", ".join(kind if len(about["types"]) == 1 else f"{kind} {count}" for kind, count in about["types"].items())
        yield f"{name:<20} {about['rows']:>9} {about['empty']:>9} {about['longest']:>9}  {types}"
    if found["lengths"]:
        yield ""
        yield f"{found['unit']} a row: " + ", ".join(f"{name} {value}" for name, value in found["lengths"].items())
        most = max(step["rows"] for step in found["histogram"])
        for step in found["histogram"]:
            bar = "#" * -(-step["rows"] * BARS // most)
            yield f"{step['from']:>9} - {step['to'] - 1:<9} {step['rows']:>9}  {bar}"
    for row in found["samples"]:
        yield ""
        for name, value in row.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield f"  {name}: {text[:SHOWN].replace(chr(10), ' ')}{'...' if len(text) > SHOWN else ''}"


def sample(reference: str, count: int, seed: int, ledger: Ledger) -> list[dict[str, Any]]:
    """`count` rows of a file by chance, in its order."""
    kept = Reservoir(count, seed)
    for row in rows_of(reference, ledger):
        kept.add(row)
    return kept.rows


def first_rows(reference: str, count: int, ledger: Ledger) -> list[dict[str, Any]]:
    return list(itertools.islice(rows_of(reference, ledger), count))
