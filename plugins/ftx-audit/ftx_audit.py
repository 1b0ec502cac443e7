"""The observer `audit`: what the rows say, beyond their tokens, which the core looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ftx import hookimpl, option, plugin

if TYPE_CHECKING:
    from datasets import Dataset

    from ftx import Run
    from ftx.audit import Finding
    from ftx_audit_copies import Copies

#: Entries of a kind that audit.json holds; the counts beside them are of all.
SHOWN = 100


@dataclass(frozen=True)
class Check:
    """One thing to look for. `splits`: where. `finds`: what, for the table of the docs. `remedy`: what to do about it."""

    splits: tuple[str, ...]
    finds: str
    remedy: str


#: Every check by the name under which `refuse` and `off` know it.
CHECKS = {
    "near_duplicates": Check(
        ("train",),
        "rows whose word 3-grams have a Jaccard similarity of `near_duplicate` or more with an earlier row, exact duplicates apart",
        "Take the later ones out: ftx data dedupe",
    ),
    "overlap": Check(
        ("eval",),
        "evaluation rows whose question stands in the training data: the same words, or `ngram` words in a row",
        "Take them out of one of the two: their scores say nothing.",
    ),
    "secrets": Check(
        ("train", "eval"),
        "keys, tokens and passwords",
        "A model may say what it has seen: take them out and make them invalid, drop the rows with --skip-bad-rows, or -o audit.refuse=[] if they are none.",
    ),
    "personal_data": Check(
        ("train", "eval"), "e-mail addresses, telephone numbers, card numbers (Luhn), IBANs (check digits)", "Take it out, or replace it by made-up data."
    ),
    "label_imbalance": Check(
        ("train",), "a label that more than `imbalance` times as many rows have as another", "Add rows of the rare labels, or leave out some of the others."
    ),
    "same_answer": Check(
        ("train",),
        "one answer to more than the share `same_answer` of the rows, where answers are no labels",
        "The model will give it too often: leave out some of them.",
    ),
    "mixed_formats": Check(
        ("train",), "JSON under some rows of an instruction and prose, XML or a code fence under others", "Give all answers to one instruction the same form."
    ),
    "size": Check(("train",), "fewer rows than the minimum for the kind of task", "More rows help most."),
}


@plugin
class Audit:
    """Duplicates, overlap with the evaluation data, secrets and personal data, labels, mixed formats, and advice on size."""

    near_duplicate: float = option(0.8, "Jaccard similarity of two rows' word 3-grams (0..1) from which the later one is a near duplicate.")
    ngram: int = option(13, "So many words in a row of an evaluation question that stand in a training question are overlap.")
    shared: float = option(0.01, "n-grams that stand in more than this share of the training rows do not count as overlap: shared instructions.")
    imbalance: float = option(10.0, "Warn where one label has more than this many times the rows of another.")
    same_answer: float = option(0.1, "Warn where more than this share of the rows has one answer.")
    format_rows: int = option(2, "Compare the formats of answers under instructions that at least so many rows have.")
    task: Literal["auto", "classification", "extraction", "instruction", "code"] = option("auto", "Kind of task; auto looks at the answers.")
    minimum_rows: int | None = option(None, "Least rows; none: 100 for classification, 500 for extraction, 1000 for instruction following and code.")
    good_rows: int | None = option(None, "A good number of rows; none: 1000, 5000, 10000.")
    excellent_rows: int | None = option(None, "More than this seldom helps; none: 10000, 50000, 100000.")
    refuse: list[str] = option(["secrets"], "Checks whose findings refuse the run; the others warn.")
    off: list[str] = option([], "Checks that are not made.")

    def __post_init__(self) -> None:
        for name, least, most in (("near_duplicate", 0.1, 1.0), ("shared", 0.0, 1.0), ("same_answer", 0.0, 1.0)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"{name} must lie between {least} and {most}")
        for name, least in (("ngram", 1), ("format_rows", 2), ("imbalance", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}")
        for name in ("refuse", "off"):
            for one in getattr(self, name):
                if one not in CHECKS:
                    raise ValueError(f"{name}: no check is called '{one}'; there are {', '.join(CHECKS)}")

    @hookimpl
    def audit_dataset(self, rows: Dataset, train_rows: Dataset | None, split: str, run: Run) -> list[Finding]:
        """What the checks of this split find."""
        made = [name for name, check in CHECKS.items() if split in check.splits and name not in self.off]
        findings = self._one_by_one(rows, split, made) if set(made) - {"overlap"} else []
        if "overlap" in made and train_rows is not None:
            findings += self._overlap(rows, train_rows)
        return findings

    def _one_by_one(self, rows: Dataset, split: str, made: list[str]) -> list[Finding]:
        """The checks that take one pass over the rows."""
        from ftx_audit_copies import CopyFinder
        from ftx_audit_private import private
        from ftx_audit_task import Answers
        from ftx_audit_text import all_said

        answers, found = Answers(), {"secrets": Private(), "personal_data": Private()}
        copies = CopyFinder(rows, self.near_duplicate) if "near_duplicates" in made else None
        for number, row in enumerate(all_said(rows)):
            for kind, secret, masked in private(row.whole):
                found["secrets" if secret else "personal_data"].add(number, kind, masked)
            if split == "train":
                answers.see(row)
            if copies is not None:
                copies.see(row)
        findings = []
        for name, one in found.items():
            if name in made and one.rows:
                what = f"{'secrets' if name == 'secrets' else 'personal data'} ({', '.join(one.kinds)})"
                findings.append(self._finding(name, what, one.rows, {"kinds": one.kinds, "found": one.places(rows)}))
        findings += self._answers(rows, answers, made) if split == "train" else []
        return findings + (self._near_duplicates(rows, copies.finish()) if copies is not None else [])

    def _answers(self, rows: Dataset, answers: Any, made: list[str]) -> list[Finding]:
        from ftx_audit_private import scrubbed
        from ftx_audit_task import SIZES, size_advice

        task = answers.task() if self.task == "auto" else self.task
        findings = []
        labels = answers.balance(task)
        if "label_imbalance" in made and labels:
            counts = list(labels.values())
            names = [scrubbed(label)[:40] for label in labels]
            details = {"labels": dict(zip(names[:SHOWN], counts[:SHOWN], strict=True)), "different": len(labels), "ratio": round(counts[0] / counts[-1], 2)}
            what = f"label imbalance: {counts[0]} rows are '{names[0]}', {counts[-1]} '{names[-1]}'"
            findings.append(self._finding("label_imbalance", what, [], details, quiet=counts[0] <= self.imbalance * counts[-1]))
        common = answers.commonest()
        if "same_answer" in made and not labels and len(common) > max(2, self.same_answer * len(rows)):
            findings.append(self._finding("same_answer", "one answer to many questions", common, {"share": round(len(common) / len(rows), 4)}))
        if "mixed_formats" in made:
            odd, groups = answers.mixed_forms(self.format_rows)
            if odd:
                what = "another format than most answers to the same instruction"
                findings.append(self._finding("mixed_formats", what, odd, {"groups": groups[:SHOWN], "instructions": len(groups)}))
        if "size" in made and task is not None:
            own = (self.minimum_rows, self.good_rows, self.excellent_rows)
            least, good, best = (usual if given is None else given for given, usual in zip(own, SIZES[task], strict=True))
            what, details = size_advice(len(rows), task, (least, good, best))
            findings.append(self._finding("size", what, [], details, quiet=len(rows) >= least))
        return findings

    def _near_duplicates(self, rows: Dataset, copies: Copies) -> list[Finding]:
        details: dict[str, Any] = {"threshold": self.near_duplicate, "exact": len(copies.exact), "near": len(copies.near)}
        both = sorted([*copies.near.items(), *((number, (earlier, 1.0)) for number, earlier in copies.exact.items())])[:SHOWN]
        later, earlier = places(rows, [number for number, _ in both]), places(rows, [number for _, (number, _) in both])
        details["pairs"] = [{"row": row, "repeats": other, "jaccard": likeness} for row, other, (_, (_, likeness)) in zip(later, earlier, both, strict=True)]
        if copies.left_out:
            details["comparisons_left_out"] = copies.left_out
        if not copies.near:
            return [self._finding("near_duplicates", "no near duplicates", [], details, quiet=True)]
        return [self._finding("near_duplicates", "near duplicates of other rows", sorted(copies.near), details)]

    def _overlap(self, rows: Dataset, train_rows: Dataset) -> list[Finding]:
        from ftx_audit_overlap import find_overlap

        overlap = find_overlap(train_rows, rows, self.ngram, self.shared)
        kinds = {"exact": overlap.exact, "question": overlap.question, "ngram": overlap.ngram}
        both = [(number, earlier, kind) for kind in ("ngram", "question", "exact") for number, earlier in kinds[kind].items()][:SHOWN]
        ours, theirs = places(rows, [number for number, _, _ in both]), places(train_rows, [earlier for _, earlier, _ in both])
        pairs = [{"row": row, "train": other, "by": kind} for row, other, (_, _, kind) in zip(ours, theirs, both, strict=True)]
        details = {"rows": {kind: len(found) for kind, found in kinds.items()}, "ngram": self.ngram, "pairs": pairs}
        findings = []
        if overlap.question:
            findings.append(self._finding("overlap", "questions of the training data", sorted(overlap.question), details))
        if overlap.ngram:
            findings.append(self._finding("overlap", f"{self.ngram} words in a row of a training question", sorted(overlap.ngram), details))
        return findings or [self._finding("overlap", "no overlap beyond equal rows", [], details, quiet=True)]

    def _finding(self, name: str, what: str, rows: list[int], details: dict[str, Any], *, quiet: bool = False) -> Finding:
        from ftx.audit import Finding

        refuse = name in self.refuse and not quiet
        return Finding(what, rows, refuse, CHECKS[name].remedy, droppable=bool(rows), quiet=quiet, details={"check": name, **details})


class Private:
    """What is private in a split: its rows, how many of each kind, and the first examples, masked."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.kinds: dict[str, int] = {}
        self.examples: list[tuple[int, str, str]] = []

    def add(self, number: int, kind: str, masked: str) -> None:
        if not self.rows or self.rows[-1] != number:
            self.rows.append(number)
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        if len(self.examples) < SHOWN:
            self.examples.append((number, kind, masked))

    def places(self, rows: Dataset) -> list[dict[str, str]]:
        named = places(rows, [number for number, _, _ in self.examples])
        return [{"row": row, "kind": kind, "masked": masked} for row, (_, kind, masked) in zip(named, self.examples, strict=True)]


def places(rows: Dataset, numbers: list[int]) -> list[str]:
    """Where these rows came from, each as file:line."""
    if not {"_file", "_line"} <= set(rows.column_names):
        return [f"row:{number + 1}" for number in numbers]
    some = rows.select_columns(["_file", "_line"]).select(numbers)
    return [f"{file}:{line}" for file, line in zip(some["_file"], some["_line"], strict=True)]
