"""The gate before training: what the encoded rows really teach. It refuses, or says what it lets through."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftx.encode import IGNORE, end_tokens
from ftx.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
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


def audit_tokens(dataset: Dataset, split: str, tokenizer: PreTrainedTokenizerBase, run: Run) -> tuple[list[Finding], dict[str, Any]]:
    """Look at every encoded row of a split: the findings of the core, and the figures for audit.json."""
    import numpy

    from ftx.columns import chunks

    ends = end_tokens(tokenizer)
    bos = tokenizer.bos_token_id
    found: dict[str, list[int]] = {"none": [], "lost": [], "empty": [], "cut": [], "no_end": [], "double_bos": [], "crossed": [], "identical": []}
    lengths, supervised, seen = array("l"), 0, array("Q")
    columns = [("input_ids", "labels")] if "labels" in dataset.column_names else [(f"{side}_input_ids", f"{side}_labels") for side in ("chosen", "rejected")]
    for number, row in enumerate(row for rows in chunks(dataset) for row in rows):
        cut = int(row.get("cut") or 0)
        faults = set()
        for ids_column, labels_column in columns:
            ids, labels = row[ids_column], row[labels_column]
            faults |= _faults(ids, labels, cut, ends, bos, tokenizer)
            lengths.append(len(ids))
            supervised += sum(label != IGNORE for label in labels[1:])
        if row.get("crossed"):
            faults.add("crossed")
        if len(columns) == 2 and row["chosen_input_ids"] == row["rejected_input_ids"]:
            faults.add("identical")
        seen.append(_digest(repr([row[ids] for ids, _ in columns])))
        if run.recipe.allow_truncation and cut and "none" in faults:
            faults = {"lost"}
        for fault in faults:
            found[fault].append(number)
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


def _faults(ids: list[int], labels: list[int], cut: int, ends: set[int], bos: int | None, tokenizer: PreTrainedTokenizerBase) -> set[str]:
    faults = set()
    spans = list(_spans(labels))
    if not any(label != IGNORE for label in labels[1:]):
        faults.add("none")
    if cut:
        faults.add("cut")
    for start, stop in spans:
        if cut and stop == len(ids):
            continue  # reported as cut
        answer = [i for i in ids[start:stop] if i not in ends]
        if stop - start <= SHORT and not str(tokenizer.decode(answer, skip_special_tokens=True)).strip():
            faults.add("empty")
        if not ends.intersection(ids[max(start, stop - SHORT) : stop]):
            faults.add("no_end")
    if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        faults.add("double_bos")
    return faults


def _spans(labels: list[int]) -> Iterable[tuple[int, int]]:
    start = None
    for position, label in enumerate([*labels, IGNORE]):
        if label != IGNORE and start is None:
            start = position
        elif label == IGNORE and start is not None:
            yield start, position
            start = None


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
    named = [f"{file}:{line}" for file, line in _sources(dataset, rows[:most])]
    return ", ".join(named) + (f" and {len(rows) - most} more" if len(rows) > most else "")


def _count(rows: list[int]) -> str:
    return "1 row" if len(rows) == 1 else f"{len(rows)} rows"


def _percentiles(lengths: Sequence[int]) -> dict[str, int]:
    import numpy

    ordered = numpy.sort(lengths) if len(lengths) else numpy.zeros(1, dtype=int)
    shares = {"p5": 0.05, "p50": 0.5, "p95": 0.95, "max": 1.0}
    return {name: int(ordered[min(len(ordered) - 1, int(share * len(ordered)))]) for name, share in shares.items()}
