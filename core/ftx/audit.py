"""The gate before training: what the encoded rows really teach. It refuses, or says what it lets through."""

from __future__ import annotations

import functools
import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftx.encode import IGNORE, end_tokens
from ftx.errors import DataError, PluginError, one_line

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from ftx.run import Run

#: A span of labels this short may hold no answer at all: the end token, and what the template writes around it.
SHORT = 6
#: Rows of a finding that audit.json names one by one.
PLACES = 1000


@dataclass(frozen=True)
class Finding:
    """Something that the audit found: `what` (a few words), the row numbers (from 0), and whether it refuses the run.

    `remedy` says what to do. `droppable`: with --skip-bad-rows the rows go to the ledger instead. `drop`: they go there anyway.
    `quiet`: for audit.json only, nothing is printed. `details`: JSON values that audit.json keeps with it.
    """

    what: str
    rows: list[int]
    refuse: bool = False
    remedy: str = ""
    droppable: bool = True
    drop: bool = False
    quiet: bool = False
    details: dict[str, Any] = field(default_factory=dict)


def audit_tokens(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, run: Run) -> tuple[list[Finding], dict[str, Any]]:
    """Look at every encoded row of a split: the findings of the core, and the figures for audit.json."""
    import numpy

    blank = functools.lru_cache(maxsize=100_000)(lambda answer: not str(tokenizer.decode(answer, skip_special_tokens=True)).strip())
    ends = end_tokens(tokenizer)
    names = ("none", "empty", "no_end", "double_bos", "identical", "cut", "crossed", "lost")
    found: dict[str, list[int]] = {name: [] for name in names}
    lengths, supervised, seen, number = array("l"), 0, array("Q"), 0
    sides = [""] if "labels" in dataset.column_names else ["chosen_", "rejected_"]
    for piece in _pieces(dataset, sides):
        faults = {"cut": piece.cut > 0, "crossed": piece.crossed > 0}
        for lists in piece.sides:
            for name, rows in _faults(*lists, piece.cut, ends, tokenizer.bos_token_id, blank).items():
                faults[name] = faults.get(name, False) | rows
            lengths.extend(lists[0].lengths.tolist())
            supervised += int(_counted(*lists).sum())
        digests = [piece.digest(row) for row in range(len(piece.cut))]
        seen.extend(both[0] if len(both) == 1 else hash(both) & (2**64 - 1) for both in digests)
        if len(sides) == 2:
            faults["identical"] = numpy.array([chosen == rejected for chosen, rejected in digests], dtype=bool)
        if run.recipe.allow_truncation:
            faults["lost"] = faults["cut"] & faults["none"]
            faults |= {name: rows & ~faults["lost"] for name, rows in faults.items() if name != "lost"}
        for name, rows in faults.items():
            found[name] += (number + numpy.flatnonzero(rows)).tolist()
        number += len(piece.cut)
    copies = numpy.setdiff1d(numpy.arange(len(seen)), numpy.unique(seen, return_index=True)[1]).tolist()  # all but the first of each
    figures = {
        "rows": len(dataset),
        "tokens": sum(lengths),
        "supervised_tokens": supervised,
        "supervised_share": round(supervised / max(1, sum(lengths)), 4),
        "length": _percentiles(lengths),
        "rows_without_supervised_token": len(found["none"]) + len(found["lost"]),
        "empty_answers": len(found["empty"]),
        "cut_answers": len(found["cut"]) + len(found["lost"]),
        "missing_eos": len(found["no_end"]),
        "double_bos": len(found["double_bos"]),
        "boundary_mismatches": len(found["crossed"]),
        "identical_answers": len(found["identical"]),
        "duplicates": len(copies),
    }
    longer = "raise -o trainer.max_length=N, or let answers be cut with --allow-truncation"
    findings = [
        Finding("no supervised token", found["none"], True, f"Mend them, {longer.split(',')[0]}, or drop them with --skip-bad-rows."),
        Finding("an answer wholly lost to truncation", found["lost"], drop=True),
        Finding("an empty answer", found["empty"], True, "Mend them, or drop them with --skip-bad-rows."),
        Finding("an answer cut by truncation", found["cut"], not run.recipe.allow_truncation, longer[0].upper() + longer[1:] + ".", droppable=False),
        Finding(
            "an answer without its end token",
            found["no_end"],
            True,
            "The model would never learn to stop: use a chat template or formatter that ends answers.",
            droppable=False,
        ),
        Finding("a doubled BOS token", found["double_bos"], True, "The template writes one and the tokenizer adds another: drop one of them.", droppable=False),
        Finding("a chosen answer equal to the rejected one", found["identical"], True, "Such a pair teaches nothing: mend or drop it (--skip-bad-rows)."),
        Finding("a token across the border of an answer", found["crossed"], remedy="Let the prompt end without a space, and the answer begin with it."),
        Finding("exact duplicates of other rows", copies, remedy="Take the later ones out."),
    ]
    return [finding for finding in findings if finding.rows], figures


@dataclass
class _Lists:
    """A column of lists of whole numbers: all of them one after another, and where each list begins and ends."""

    values: NDArray[Any]
    lengths: NDArray[Any]

    def __post_init__(self) -> None:
        self.stops = self.lengths.cumsum()
        self.starts = self.stops - self.lengths


@dataclass
class _Piece:
    """Some rows: (ids, labels) of each side, and per row the supervised tokens cut and the borders crossed."""

    sides: list[tuple[_Lists, _Lists]]
    cut: NDArray[Any]
    crossed: NDArray[Any]

    def digest(self, row: int) -> tuple[int, ...]:
        """64 bits of the ids of each side."""
        import xxhash

        return tuple(xxhash.xxh3_64_intdigest(ids.values[ids.starts[row] : ids.stops[row]].tobytes()) for ids, _ in self.sides)


def _pieces(dataset: Dataset, sides: list[str]) -> Iterable[_Piece]:
    import numpy

    from ftx.columns import arrays

    names = [f"{side}{what}" for side in sides for what in ("input_ids", "labels")]
    extra = [name for name in ("cut", "crossed") if name in dataset.column_names]
    for some in zip(*(arrays(dataset, name) for name in [*names, *extra]), strict=True):
        lists = [_lists(one) for one in some[: len(names)]]
        rows = len(some[0])
        counts = {name: numpy.array([one or 0 for one in column.to_pylist()], dtype=int) for name, column in zip(extra, some[len(names) :], strict=True)}
        for ids, labels in zip(lists[::2], lists[1::2], strict=True):
            if not (ids.lengths == labels.lengths).all():
                raise PluginError("the trainer gave a row whose token ids and labels have different lengths.", "Each token needs a label: see docs/hooks.md.")
        zeros = numpy.zeros(rows, dtype=int)
        yield _Piece(list(zip(lists[::2], lists[1::2], strict=True)), counts.get("cut", zeros), counts.get("crossed", zeros))


def _lists(column: Any) -> _Lists:
    import numpy
    import pyarrow

    if not pyarrow.types.is_list(column.type):  # lists that are all empty are kept as JSON
        column = pyarrow.array([json.loads(one or "[]") for one in column.to_pylist()], pyarrow.list_(pyarrow.int32()))
    lengths = numpy.array([one or 0 for one in column.value_lengths().to_pylist()], dtype=numpy.int64)
    return _Lists(column.flatten().to_numpy(zero_copy_only=False).astype(numpy.int32), lengths)


def _counted(ids: _Lists, labels: _Lists) -> NDArray[Any]:
    """bool, one a token: whether the loss counts it. The first of a row it never does: nothing stands before it."""
    counted: NDArray[Any] = labels.values != IGNORE
    counted[ids.starts[ids.lengths > 0]] = False
    return counted


def _faults(
    ids: _Lists, labels: _Lists, cut: NDArray[Any], ends: set[int], bos: int | None, blank: Callable[[tuple[int, ...]], bool]
) -> dict[str, NDArray[Any]]:
    """What is wrong with one side of some rows: name -> bool, one a row."""
    import numpy

    rows, filled = len(ids.lengths), ids.lengths > 0
    sums = numpy.concatenate([[0], numpy.cumsum(_counted(ids, labels))])
    faults = {"none": sums[ids.stops] == sums[ids.starts]}
    label = numpy.concatenate([[False], labels.values != IGNORE, [False]])
    begins, finishes = label[1:-1] & ~label[:-2], label[1:-1] & ~label[2:]
    begins[ids.starts[filled]] = label[1:-1][ids.starts[filled]]  # a span ends with its row
    finishes[ids.stops[filled] - 1] = label[1:-1][ids.stops[filled] - 1]
    start, stop = numpy.flatnonzero(begins), numpy.flatnonzero(finishes) + 1
    row = numpy.searchsorted(ids.stops, start, side="right")
    whole = ~((cut[row] > 0) & (stop == ids.stops[row]))  # else reported as cut
    start, stop, row = start[whole], stop[whole], row[whole]
    is_end = numpy.isin(ids.values, list(ends))
    ended = numpy.concatenate([[0], numpy.cumsum(is_end)])
    for name in ("no_end", "empty", "double_bos"):
        faults[name] = numpy.zeros(rows, dtype=bool)
    faults["no_end"][row[ended[stop] == ended[numpy.maximum(start, stop - SHORT)]]] = True
    for at in numpy.flatnonzero(stop - start <= SHORT).tolist():
        span = slice(start[at], stop[at])
        if blank(tuple(ids.values[span][~is_end[span]].tolist())):
            faults["empty"][row[at]] = True
    if bos is not None:
        two = numpy.flatnonzero(ids.lengths > 1)
        faults["double_bos"][two] = (ids.values[ids.starts[two]] == bos) & (ids.values[ids.starts[two] + 1] == bos)
    return faults


def gate(dataset: Dataset, split: str, findings: list[tuple[str, Finding]], run: Run) -> Dataset:
    """Let the dataset through, without the rows that may be dropped, or raise one DataError that lists every refusal."""
    refusals: list[tuple[str, Finding]] = []
    dropped: set[int] = set()
    reasons: list[tuple[str, list[int]]] = []
    for author, finding in findings:
        if finding.refuse and finding.droppable and run.recipe.skip_bad_rows and finding.rows:
            dropped.update(finding.rows)
            reasons.append((finding.what, finding.rows))
        elif finding.refuse:
            refusals.append((author, finding))
        else:
            places = f" in {_count(finding.rows)} ({_places(dataset, finding.rows)})" if finding.rows else ""
            if not finding.quiet:
                run.say(f"warning: {split} data: {finding.what}{places}{', left out' if finding.drop else ''}")
            if finding.drop:
                dropped.update(finding.rows)
                reasons.append((finding.what, finding.rows))
            if finding.what == "an answer cut by truncation":
                for source in _sources(dataset, finding.rows):
                    run.ledger.add(*source, finding.what, "cut")
    if refusals:
        lines = [
            f"{split} data has {finding.what}{f' in {_count(finding.rows)}: {_places(dataset, finding.rows)}' if finding.rows else ''}"
            for _, finding in refusals
        ]
        raise DataError("\n       ".join(lines), "\n".join(dict.fromkeys(finding.remedy for _, finding in refusals if finding.remedy)))
    if len(dropped) == len(dataset):
        raise DataError(f"{split} data: no row is left; all are in the ledger.", "Mend the data, or choose another formatter.")
    if not dropped:
        return dataset
    from ftx.columns import without

    left = without(dataset, dropped)
    still = set(_sources(left, range(len(left)))) if "_part" in left.column_names else set()  # a source of several rows may keep some of them
    for what, rows in reasons:
        for source in _sources(dataset, rows):
            run.ledger.add(*source, what, "cut" if source in still else "dropped")
    return left


def described(author: str, finding: Finding, dataset: Dataset) -> dict[str, Any]:
    """A finding as audit.json has it: `places` names at most PLACES of its rows."""
    entry = {"by": author, "what": finding.what, "rows": len(finding.rows), "refuses": finding.refuse}
    places = [f"{file}:{line}" for file, line in _sources(dataset, finding.rows[:PLACES])]
    return {**entry, "places": places, **({"details": finding.details} if finding.details else {})}


def overlap(train: Dataset, evaluation: Dataset) -> list[int]:
    """Row numbers of the evaluation data that stand in the training data: equal after case and white space are folded."""
    import numpy

    from ftx.columns import chunks

    ours, theirs = (array("Q", (_digest(_normal(row)) for rows in chunks(split) for row in rows)) for split in (train, evaluation))
    found: list[int] = numpy.flatnonzero(numpy.isin(theirs, ours)).tolist()
    return found


def _digest(text: str) -> int:
    """64 bits of a row: two different ones of a million have the same with a chance of one in 40 million."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _normal(row: dict[str, Any]) -> str:
    """A row's content, case and white space folded, whatever empty columns its split has besides."""
    return json.dumps(_folded({key: value for key, value in row.items() if not key.startswith("_")}), sort_keys=True, default=str)


def _folded(value: Any) -> Any:
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    if isinstance(value, dict):
        return {key: _folded(one) for key, one in value.items() if one is not None}
    return [_folded(one) for one in value] if isinstance(value, list) else value


def _sources(dataset: Dataset, rows: Sequence[int]) -> Iterable[tuple[str, int]]:
    """File and line of each of these rows; of rows without them, their numbers."""
    if not {"_file", "_line"} <= set(dataset.column_names):
        return [("row", number + 1) for number in rows]
    some = dataset.select_columns(["_file", "_line"]).select(rows)
    return zip(some["_file"], some["_line"], strict=True)


def _places(dataset: Dataset, rows: list[int], most: int = 3) -> str:
    named = [one_line(f"{file}:{line}") for file, line in _sources(dataset, rows[:most])]
    return ", ".join(named) + (f" and {len(rows) - most} more" if len(rows) > most else "")


def _count(rows: list[int]) -> str:
    return "1 row" if len(rows) == 1 else f"{len(rows)} rows"


def _percentiles(lengths: Sequence[int]) -> dict[str, int]:
    import numpy

    ordered = numpy.sort(lengths) if len(lengths) else numpy.zeros(1, dtype=int)
    shares = {"p5": 0.05, "p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    return {name: int(ordered[min(len(ordered) - 1, int(share * len(ordered)))]) for name, share in shares.items()}
