"""Taking a file apart: copies out of it, and parts for training and testing that no near copy joins."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftx.errors import DataError, one_line
from ftx.ledger import Ledger
from ftx_data_files import Book, Output, own, rows_of
from ftx_data_look import digest

if TYPE_CHECKING:
    from datasets import Dataset

#: Candidates are looked for at so much less likeness than is asked for: at the threshold itself one in a hundred would be missed.
MARGIN = 0.15
#: Rows of one bucket that are compared pair by pair; more of them are taken for one group.
BUCKET = 500
CHUNK = 1000


# ---- copies ----------------------------------------------------------------------------------------------------------


def dedupe(reference: str, output: Output, ledger: Book, say: Any, *, near: float | None, formatter: str, assignments: tuple[str, ...]) -> dict[str, Any]:
    """Write a file without its copies, the first of each stays; what was done.

    Copies say the same, case, white space and Unicode form aside; with `near` also rows whose word 3-grams have at least that
    Jaccard similarity, which only formatted rows can tell.
    """
    import numpy

    places, digests = Places(), bytearray()
    for row in rows_of(reference, Ledger(skip_bad_rows=ledger.skip_bad_rows)):
        places.add(row)
        digests += digest(row)
    _, first, which = numpy.unique(numpy.frombuffer(bytes(digests), dtype=[("a", "<u8"), ("b", "<u8")]), return_index=True, return_inverse=True)
    original, likeness = first[which.reshape(-1)].astype(numpy.int64), numpy.ones(len(places))
    if near is not None:
        for later, earlier, alike in _near_copies(reference, places, near, formatter, assignments, say):
            if original[later] == later:
                original[later], likeness[later] = earlier, alike
    dropped = Counter[str]()
    with output:
        for number, row in enumerate(rows_of(reference, ledger)):
            if original[number] == number:
                output.write(row)
                continue
            kind = "repeats another row" if likeness[number] == 1 else "nearly repeats another row"
            alike = "" if likeness[number] == 1 else f" (similarity {likeness[number]:.2f})"
            ledger.add(*places[number], f"{kind}: line {places[int(original[number])][1]}{alike}", "dropped", kind=kind)
            dropped[kind] += 1
    return {"rows": len(places), "written": output.rows, "dropped": dict(dropped), "output": str(output.file)}


def _near_copies(reference: str, places: Places, near: float, formatter: str, assignments: tuple[str, ...], say: Any) -> Iterator[tuple[int, int, float]]:
    """(row, the earlier row that it nearly repeats, similarity): numbers of source rows, of which every part is a copy."""
    from ftx.columns import chunks
    from ftx_audit_copies import find_copies

    formatted = _formatted(reference, formatter, assignments, say)
    copies = find_copies(formatted, near)
    numbers = places.numbers((row["_file"], row["_line"]) for rows in chunks(formatted.select_columns(["_file", "_line"])) for row in rows)
    parts = Counter(numbers)
    found: dict[int, tuple[int, float]] = {}
    alike = Counter[int]()
    for later, earlier in [*((later, (earlier, 1.0)) for later, earlier in copies.exact.items()), *copies.near.items()]:
        alike[numbers[later]] += 1
        if numbers[earlier[0]] != numbers[later]:
            found[numbers[later]] = (numbers[earlier[0]], min(earlier[1], 0.9999))
    for number, (earlier, likeness) in found.items():
        if alike[number] == parts[number]:
            yield number, earlier, likeness


def _formatted(reference: str, formatter: str, assignments: tuple[str, ...], say: Any) -> Dataset:
    """What the rows say. Those that the formatter cannot use are compared word for word only."""
    from ftx_data_convert import format_file

    book = Book(None, skip_bad_rows=True)
    formatted = format_file(reference, formatter, assignments, book, say)[2]
    for one in book.summary():
        if one["action"] == "dropped":
            say(f"compared word for word only: {one['rows']} rows ({one['reason']})")
    return formatted


class Places:
    """Where each row came from, in 16 bytes a row: row number <-> (file, line)."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self._known: dict[str, int] = {}
        self._keys = array("q")

    def add(self, row: dict[str, Any]) -> None:
        self._keys.append(self._key(str(row["_file"]), int(row["_line"])))

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, number: int) -> tuple[str, int]:
        return self.files[self._keys[number] >> 40], self._keys[number] & ((1 << 40) - 1)

    def numbers(self, sources: Iterator[tuple[str, int]]) -> list[int]:
        """The row numbers of sources, which must be among those added."""
        import numpy

        keys = numpy.frombuffer(self._keys, dtype=numpy.int64)
        order = numpy.argsort(keys, kind="stable")
        wanted = numpy.fromiter((self._key(*source) for source in sources), dtype=numpy.int64)
        numbers: list[int] = order[numpy.searchsorted(keys, wanted, sorter=order)].tolist()
        return numbers

    def _key(self, file: str, line: int) -> int:
        if file not in self._known:
            self._known[file] = len(self.files)
            self.files.append(file)
        return self._known[file] << 40 | line


# ---- parts -----------------------------------------------------------------------------------------------------------


def split(
    reference: str,
    folder: Path,
    shares: dict[str, float],
    ledger: Book,
    say: Any,
    *,
    seed: int,
    stratify: str | None,
    group: str | None,
    near: float | None,
    formatter: str,
    assignments: tuple[str, ...],
    force: bool,
) -> dict[str, Any]:
    """Write `folder`/PART.jsonl for each of `shares` (part -> share of the rows) and train.jsonl for the rest; what was done.

    Rows that say the same, that share a value of the column `group`, or that nearly repeat each other (`near`: Jaccard
    similarity) go into one part together. Of each value of the column `stratify` every part gets its share. The order of the
    rows in the file does not count: where a group goes is drawn from the seed and from what its first row says.
    """
    places, joined, digests = Places(), Groups(), bytearray()
    strata: list[str] = []
    first: dict[bytes, int] = {}
    values: dict[str, int] = {}
    for number, row in enumerate(rows_of(reference, ledger)):
        for column in (stratify, group):
            if column is not None and column not in row:
                raise DataError(f"{row['_file']}:{row['_line']}: there is no column '{column}'.", f"Columns: {one_line(', '.join(own(row)))}.")
        places.add(row)
        joined.add()
        mark = digest(row)
        digests += mark
        joined.join(number, first.setdefault(mark, number))
        if group is not None:
            joined.join(number, values.setdefault(repr(row[group]), number))
        strata.append(repr(row[stratify]) if stratify is not None else "")
    if near is not None:
        _join_near(reference, places, joined, near, formatter, assignments, say)
    part_of = _assign(joined, strata, shares, seed, lambda number: bytes(digests[16 * number : 16 * number + 16]))
    empty = next((part for part in shares if part not in part_of.values()), None)
    if empty or not any(part_of.get(joined.root(number)) == "train" for number in range(len(places))):
        raise DataError(f"no row is left for '{empty or 'train'}': {len(places)} rows in {len(part_of)} groups.", "Give more rows, or other shares.")
    outputs = {part: Output(folder / f"{part}.jsonl", force=force) for part in ("train", *shares)}
    _write(reference, outputs, joined, part_of, Ledger(skip_bad_rows=ledger.skip_bad_rows))
    return {"rows": len(places), "groups": len(part_of), **{part: output.rows for part, output in outputs.items()}, "output": str(folder)}


def _write(reference: str, outputs: dict[str, Output], joined: Groups, part_of: dict[int, str], ledger: Ledger) -> None:
    import contextlib

    with contextlib.ExitStack() as stack:
        for output in outputs.values():
            stack.enter_context(output)
        for number, row in enumerate(rows_of(reference, ledger)):
            outputs[part_of[joined.root(number)]].write(row)


def _assign(joined: Groups, strata: list[str], shares: dict[str, float], seed: int, mark: Any) -> dict[int, str]:
    """Root of each group -> its part. A group goes by the stratum of its first row, and into a part only if it has room."""
    members: Counter[int] = Counter(joined.root(number) for number in range(len(strata)))
    by_stratum: dict[str, list[int]] = {}
    for root in members:
        by_stratum.setdefault(strata[root], []).append(root)
    part_of: dict[int, str] = {}
    owed = dict.fromkeys(shares, 0.0)  # what rounding has kept from a part so far: small strata must not all round to nothing
    for stratum in sorted(by_stratum):
        roots = sorted(by_stratum[stratum], key=lambda root: hashlib.blake2b(b"%d" % seed + mark(root), digest_size=16).digest())
        total, taken = sum(members[root] for root in roots), set[int]()
        for part, share in shares.items():
            owed[part] += share * total
            room = round(owed[part])
            for root in roots:
                if root not in taken and members[root] <= room:
                    taken.add(root)
                    part_of[root], room = part, room - members[root]
                    owed[part] -= members[root]
        part_of |= {root: "train" for root in roots if root not in taken}
    return part_of


class Groups:
    """Rows joined into groups (union-find, 8 bytes a row); the root of a group is its first row."""

    def __init__(self) -> None:
        self._parent = array("q")

    def add(self) -> None:
        self._parent.append(len(self._parent))

    def root(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def join(self, one: int, other: int) -> None:
        one, other = self.root(one), self.root(other)
        self._parent[max(one, other)] = min(one, other)


def _join_near(reference: str, places: Places, joined: Groups, near: float, formatter: str, assignments: tuple[str, ...], say: Any) -> None:
    """Join the rows of which two are near copies, however many steps lie between them."""
    from ftx.columns import chunks

    formatted = _formatted(reference, formatter, assignments, say)
    numbers = places.numbers((row["_file"], row["_line"]) for rows in chunks(formatted.select_columns(["_file", "_line"])) for row in rows)
    for one, other in near_pairs(formatted, near, lambda one, other: joined.root(numbers[one]) == joined.root(numbers[other])):
        joined.join(numbers[one], numbers[other])


def near_pairs(rows: Dataset, threshold: float, together: Any) -> Iterator[tuple[int, int]]:
    """Pairs of formatted rows whose word 3-grams have a Jaccard similarity of at least `threshold`, less those that are `together`.

    The rows of a crowded bucket are given as pairs without a comparison: a group too large keeps copies apart as well.
    """
    from functools import lru_cache

    import numpy

    from ftx_audit_copies import band_keys, bands_for, jaccard, own_text, shared_lines
    from ftx_audit_text import all_said, said, shingles

    shared = shared_lines(rows)
    bands, width = bands_for(max(0.3, threshold - MARGIN))
    numbers: list[int] = []
    keys: list[Any] = []
    waiting: list[tuple[int, frozenset[str]]] = []

    def flush() -> None:
        if waiting:
            numbers.extend(number for number, _ in waiting)
            keys.append(band_keys([tokens for _, tokens in waiting], bands, width))
            waiting.clear()

    for number, row in enumerate(all_said(rows)):
        if tokens := shingles(own_text(row, shared)):
            waiting.append((number, tokens))
        if len(waiting) >= CHUNK:
            flush()
    flush()
    if not keys:
        return

    @lru_cache(maxsize=50_000)
    def tokens_of(number: int) -> frozenset[str]:
        return shingles(own_text(said(rows[number]), shared))

    table = numpy.concatenate(keys)
    for band in range(table.shape[1]):
        order = numpy.argsort(table[:, band], kind="stable")
        column = table[order, band]
        starts = numpy.flatnonzero(numpy.concatenate([[True], column[1:] != column[:-1], [True]]))
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            bucket = [numbers[at] for at in order[start:end].tolist()]
            for at, one in enumerate(bucket):
                for other in bucket[at + 1 :] if len(bucket) <= BUCKET else bucket[at + 1 : at + 2]:
                    if not together(one, other) and (len(bucket) > BUCKET or jaccard(tokens_of(one), tokens_of(other)) >= threshold):
                        yield one, other
