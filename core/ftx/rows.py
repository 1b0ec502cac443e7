"""The training data as the plan needs it: lengths, labels, what rows begin with alike, and the batches that need most. Imports no torch."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

#: Rows that TRL packs together, apart from the others: those of one batch of `datasets.map`.
PACKED_AT_ONCE = 1000
#: Rows that are looked at in one piece.
AT_ONCE = 10_000


@dataclass(frozen=True, eq=False)
class Rows:
    """Of each training row the tokens of its sequences (DPO has two) and how many count in the loss, and what they begin with alike.

    Arrays of int32, made of whatever numpy takes: a million rows are 8 MB, or 16 with two sequences.
    """

    lengths: Any
    """[rows, sequences], or [rows]."""
    supervised: Any
    """[rows]."""
    alike: Any = ()
    """[rows]: with how many equal tokens a row's two sequences begin; empty where a row has one."""
    prefix: int = 0
    """With how many equal tokens all sequences begin."""

    def __post_init__(self) -> None:
        import numpy

        for name in ("lengths", "supervised", "alike"):
            array = numpy.asarray(getattr(self, name), dtype=numpy.int32)
            object.__setattr__(self, name, array.reshape(-1, 1) if name == "lengths" and array.ndim == 1 else array)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


def rows_of(encoded: Dataset) -> Rows:
    """Of an encoded split: `input_ids` and `labels`, or a pair of each for chosen and rejected."""
    import numpy

    from ftx.encode import IGNORE

    pieces: list[Any] = []
    for columns in _columns(encoded, "labels"):
        counts: Any = 0
        for lists in columns:
            labels, starts, lengths = _flat(lists)
            ends = starts + lengths
            first = numpy.minimum(starts + 1, ends)  # a row's first token follows nothing
            before = numpy.concatenate([[0], (labels != IGNORE).cumsum()])
            counts = counts + before[ends] - before[first]
        pieces.append(counts)
    return Rows(lengths_of(encoded), _joined(pieces), alike_of(encoded), prefix_of(encoded))


def lengths_of(encoded: Dataset) -> Any:
    """int32 [rows, sequences]: tokens of each sequence of each row. KeyError for a dataset without `input_ids`."""
    import numpy

    pieces = [numpy.stack([lists.value_lengths().to_numpy() for lists in columns], 1) for columns in _columns(encoded, "input_ids")]
    return numpy.concatenate(pieces) if pieces else numpy.zeros((0, 1), numpy.int32)


def alike_of(encoded: Dataset) -> Any:
    """int32 [rows]: with how many equal tokens the two sequences of each row begin; empty for rows of one."""
    return _joined([_common(*map(_flat, columns)) for columns in _columns(encoded, "input_ids") if len(columns) == 2])


def _joined(pieces: list[Any]) -> Any:
    import numpy

    return numpy.concatenate(pieces, dtype=numpy.int32, casting="same_kind") if pieces else numpy.zeros(0, numpy.int32)


def prefix_of(encoded: Dataset) -> int:
    """With how many equal tokens all sequences of all rows begin."""
    model: Any = None
    for columns in _columns(encoded, "input_ids"):
        for lists in columns:
            values, starts, lengths = _flat(lists)
            if not len(starts):
                continue
            if model is None:
                model = values[starts[0] : starts[0] + lengths[0]]
            model = model[: int(_common((model, 0 * starts, 0 * lengths + len(model)), (values, starts, lengths)).min())]
    return 0 if model is None else len(model)


def _flat(lists: Any) -> tuple[Any, Any, Any]:
    """A pyarrow.ListArray as numpy: its values one after another, where each list begins there, and its length."""
    lengths = lists.value_lengths().to_numpy()
    return lists.flatten().to_numpy(), lengths.cumsum() - lengths, lengths


def _common(one: tuple[Any, Any, Any], other: tuple[Any, Any, Any]) -> Any:
    """[rows]: with how many equal values the lists of two arrays begin."""
    import numpy

    (values, starts, lengths), (theirs, others, more) = one, other
    found, bounds = numpy.zeros(len(starts), dtype=numpy.int64), numpy.minimum(lengths, more)
    alive = numpy.flatnonzero(bounds)
    while len(alive):
        place = int(found[alive[0]])
        alive = alive[values[starts[alive] + place] == theirs[others[alive] + place]]
        found[alive] = place + 1
        alive = alive[bounds[alive] > place + 1]
    return found


def _columns(encoded: Dataset, ending: str) -> Iterator[list[Any]]:
    """The columns whose name ends so, as pyarrow.ListArrays of some thousand rows at a time. KeyError where there is none."""
    names = [name for name in encoded.column_names if name.endswith(ending)]
    if not names:
        raise KeyError(ending)
    some = encoded.select_columns(names).with_format("arrow")
    for start in range(0, len(some), AT_ONCE):
        table = some[start : start + AT_ONCE]
        yield [table[name].combine_chunks() for name in names]


# ---- what goes through the model


def typical_batch(rows: Rows, size: int) -> tuple[tuple[int, ...], int, int]:
    """`size` rows that stand for all, evenly spaced among those sorted by their longest sequence -> as of `largest_batches`."""
    import numpy

    order = numpy.argsort(rows.lengths.max(1), kind="stable")
    chosen = order[(2 * numpy.arange(size) + 1) * len(order) // (2 * size)] if len(order) else order
    alike = int(rows.alike[chosen].sum()) if len(rows.alike) else 0
    return _said(rows.lengths[chosen]), int(rows.supervised[chosen].sum()), alike + max(0, len(chosen) - 1) * rows.prefix


def computed(rows: Rows, size: int, *, joined: bool, shared: bool) -> float:
    """Positions that one pass over the rows computes, in batches of `size` rows in an order that chance gives.

    What all sequences begin with once a batch and what a pair begins with once, if that is `shared` (and no sequence's last token,
    which predicts nothing); without padding if batches are `joined`.
    """
    import numpy

    if shared:
        sequences = int(rows.lengths.size)
        again = max(0, sequences - len(rows.alike) - math.ceil(len(rows.lengths) / size))  # sequences that find the beginning of all there
        return rows.tokens - sequences - int(rows.alike.sum()) - again * rows.prefix
    if joined or not len(rows.lengths):
        return rows.tokens
    order = numpy.random.default_rng(0).permutation(len(rows.lengths))
    starts = numpy.arange(0, len(order), size)
    counts = numpy.diff(starts, append=len(order)) * rows.lengths.shape[1]
    return float(numpy.maximum.reduceat(rows.lengths.max(1)[order], starts) @ counts)


# ---- the batches that need most


def largest_batches(rows: Rows, size: int, longest: int | None = None) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Batches of `size` rows, cut to `longest` tokens, one of which needs most in a forward pass: those of the longest sequences and, of
    rows with two, of the most tokens that differ -> lengths of their sequences, supervised positions, positions that repeat another
    sequence's beginning."""
    import numpy

    cut = numpy.minimum(rows.lengths, min(longest, 2**31 - 1)) if longest else rows.lengths
    alike = numpy.minimum(rows.alike, cut.min(1)) if len(rows.alike) else numpy.zeros(len(cut), numpy.int32)
    orders = [numpy.argsort(-cut.max(1), kind="stable")[:size]]
    if len(rows.alike):
        orders.append(numpy.argsort(alike - cut.sum(1), kind="stable")[:size])
    for order in orders:
        lengths = _said(cut[order])
        shared = int(alike[order].sum()) + (len(order) - 1) * min(rows.prefix, *lengths) if lengths else 0
        yield lengths, int(rows.supervised[order].sum()), shared


def _said(lengths: Any) -> tuple[int, ...]:
    """[rows, sequences] -> the sequences one after the other."""
    return tuple(lengths.ravel().tolist())


def packed(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of the rows in each pack of at most `size` tokens, as TRL's `pack_dataset` makes them: of each 1,000 rows the
    longest first, each into the fullest pack that has room for it."""
    packs: list[list[int]] = []
    for start in range(0, len(lengths), PACKED_AT_ONCE):
        rooms: list[tuple[int, int]] = []  # (tokens left, pack), sorted
        some = range(start, min(start + PACKED_AT_ONCE, len(lengths)))
        for number in sorted((one for one in some if lengths[one]), key=lambda one: -lengths[one]):
            at = bisect.bisect_left(rooms, (lengths[number], 0))
            room, pack = rooms.pop(at) if at < len(rooms) else (size, len(packs))
            if pack == len(packs):
                packs.append([])
            packs[pack].append(number)
            bisect.insort(rooms, (room - lengths[number], pack))
    return packs


def largest_packs(lengths: Sequence[int], supervised: Sequence[int], size: int, pack: int) -> tuple[tuple[int, ...], int]:
    """The `size` fullest packs of at most `pack` tokens -> lengths of the rows in them, and the most supervised positions of any `size` packs."""
    lengths = [min(length, pack) for length in lengths]
    packs = packed(lengths, pack)
    fullest = sorted(packs, key=lambda numbers: -sum(lengths[number] for number in numbers))[:size]
    counts = sorted(sum(supervised[number] for number in numbers) for numbers in packs)[-size:]
    return tuple(lengths[number] for numbers in fullest for number in numbers), sum(counts)
