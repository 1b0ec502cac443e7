"""Rows that stand in a data set more than once, word for word or nearly: MinHash finds candidates, exact Jaccard decides."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ftx_audit_text import Said, all_said, folded, said, shingles, words

if TYPE_CHECKING:
    from datasets import Dataset

#: Hash functions of a MinHash signature.
PERMUTATIONS = 128
#: A pair exactly at the threshold is a candidate with at least this chance.
RECALL = 0.99
#: Rows of one bucket that differ from each other, and that a further row is compared with.
HEADS = 32
#: A line of a question that stands in more than this share of the rows (and in more than this many) is a shared instruction.
SHARED, SHARED_ROWS = 0.01, 10
#: Rows that are looked at for shared lines.
SAMPLE = 20_000
CHUNK = 1000
SEED = 42


@dataclass
class Copies:
    """`exact` and `near`: row -> the earlier row that it repeats, and for `near` their Jaccard similarity. `left_out`: comparisons
    that crowded buckets would have needed beyond HEADS a row."""

    exact: dict[int, int] = field(default_factory=dict)
    near: dict[int, tuple[int, float]] = field(default_factory=dict)
    left_out: int = 0


def find_copies(rows: Dataset, threshold: float) -> Copies:
    """Exact duplicates, and rows whose word 3-grams have a Jaccard similarity of at least `threshold` (0..1) with an earlier row."""
    finder = CopyFinder(rows, threshold)
    for row in all_said(rows):
        finder.see(row)
    return finder.finish()


class CopyFinder:
    """`find_copies` for who goes through the rows anyway: `see` each in turn, then `finish`.

    A question's lines that stand in many rows do not count: rows that share an instruction are not copies of each other.
    """

    def __init__(self, rows: Dataset, threshold: float) -> None:
        self.rows, self.threshold, self.shared = rows, threshold, shared_lines(rows)
        self.bands, self.width = bands_for(threshold)
        self.hashes, self.numbers = array("q"), array("q")  # of all rows, and of those that have something to compare: a list takes five times as much
        self.keys: list[Any] = []
        self.waiting: list[frozenset[str]] = []

    def see(self, row: Said) -> None:
        if tokens := shingles(own_text(row, self.shared)):
            self.numbers.append(len(self.hashes))
            self.waiting.append(tokens)
            if len(self.waiting) >= CHUNK:
                self._sign()
        self.hashes.append(hash((row.asked, row.answer, row.other, row.label, row.tools)))

    def finish(self) -> Copies:
        import numpy

        self._sign()

        @lru_cache(maxsize=50_000)
        def tokens_of(number: int) -> frozenset[str]:
            return shingles(own_text(said(self.rows[number]), self.shared))

        copies = Copies()
        _, first, which = numpy.unique(numpy.asarray(self.hashes), return_index=True, return_inverse=True)
        first = first[which]
        copies.exact = {number: int(first[number]) for number in numpy.flatnonzero(first != numpy.arange(len(first))).tolist()}
        if self.keys:
            numbers = numpy.asarray(self.numbers)
            once = first[numbers] == numbers
            _join(numpy.concatenate(self.keys)[once], numbers[once], tokens_of, self.threshold, copies)
        return copies

    def _sign(self) -> None:
        if self.waiting:
            self.keys.append(band_keys(self.waiting, self.bands, self.width))
            self.waiting = []


def bands_for(threshold: float) -> tuple[int, int]:
    """(bands, rows a band): as wide as a pair at the threshold still meets in a band with a chance of RECALL."""
    for width in range(PERMUTATIONS // 2, 1, -1):
        bands = PERMUTATIONS // width
        if 1 - (1 - threshold**width) ** bands >= RECALL:
            return bands, width
    return PERMUTATIONS, 1


def shared_lines(rows: Dataset) -> frozenset[str]:
    """The lines of questions that many rows share, from an even sample."""
    step = max(1, -(-len(rows) // SAMPLE))
    sample = rows.select(range(0, len(rows), step)) if step > 1 else rows
    counts: Counter[str] = Counter()
    for row in all_said(sample):
        counts.update({line for _, text in row.asked for line in map(folded, text.splitlines()) if line})
    least = max(SHARED * len(sample), SHARED_ROWS)
    return frozenset(line for line, count in counts.items() if count > least)


def own_text(row: Said, shared: frozenset[str]) -> str:
    """What a row says itself: without the lines that many share, unless nothing else is asked."""
    if not shared:
        return row.whole
    asked = [line for _, text in row.asked for line in text.splitlines() if folded(line) not in shared]
    if not any(words(line) for line in asked):
        return row.whole
    return "\n".join([*asked, row.answer, row.other or ""])


def jaccard(one: frozenset[str], other: frozenset[str]) -> float:
    """Shared share of two sets, 0..1; of two empty ones 0."""
    both = len(one & other)
    return both / (len(one) + len(other) - both) if both else 0.0


def band_keys(token_sets: list[frozenset[str]], bands: int, width: int) -> Any:
    """uint32 [rows, bands]: rows with an equal number in a column are candidates."""
    import numpy
    from rensa import RMinHash

    signatures = numpy.array(RMinHash.digest_matrix_from_token_sets([list(one) for one in token_sets], PERMUTATIONS, SEED).to_rows(), dtype=numpy.uint64)
    factors = numpy.random.default_rng(SEED).integers(1, 2**63, size=width, dtype=numpy.uint64) | numpy.uint64(1)
    blocks = signatures[:, : bands * width].reshape(len(token_sets), bands, width)
    mixed = (blocks * factors).sum(axis=2, dtype=numpy.uint64) >> numpy.uint64(32)  # wraps around
    return mixed.astype(numpy.uint32)  # a chance meeting is found out by the exact comparison


def _join(keys: Any, numbers: Any, tokens_of: Callable[[int], frozenset[str]], threshold: float, copies: Copies) -> None:
    """Compare the rows that meet in a band, each with those before it that differ from each other."""
    import numpy

    apart: set[tuple[int, int]] = set()
    for band in range(keys.shape[1]):
        order = numpy.argsort(keys[:, band], kind="stable")  # stable: rows of a bucket stay in the order of the file
        column = keys[order, band]
        starts = numpy.flatnonzero(numpy.concatenate([[True], column[1:] != column[:-1]]))
        sizes = numpy.diff(numpy.concatenate([starts, [len(column)]]))
        for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
            _join_bucket(numbers[order[start : start + size]].tolist(), tokens_of, threshold, copies, apart)


def _join_bucket(bucket: list[int], tokens_of: Callable[[int], frozenset[str]], threshold: float, copies: Copies, apart: set[tuple[int, int]]) -> None:
    heads: list[int] = []
    for number in bucket:
        if number in copies.near:
            continue
        for head in heads:
            if (head, number) in apart:
                continue
            likeness = jaccard(tokens_of(head), tokens_of(number))
            if likeness >= threshold:
                copies.near[number] = (head, round(likeness, 3))
                break
            if len(apart) < 500_000:
                apart.add((head, number))
        else:
            if len(heads) < HEADS:
                heads.append(number)
            else:
                copies.left_out += 1
