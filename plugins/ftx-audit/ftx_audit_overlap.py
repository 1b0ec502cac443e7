"""Evaluation rows whose questions stand in the training data: the same words, or many of them in a row."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ftx_audit_text import Said, all_said, folded, words

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Overlap:
    """Evaluation row -> the first training row that has it: as a whole (case and white space folded), its question (words only), or
    `size` words of its question in a row."""

    exact: dict[int, int] = field(default_factory=dict)
    question: dict[int, int] = field(default_factory=dict)
    ngram: dict[int, int] = field(default_factory=dict)


def find_overlap(train: Dataset, evaluation: Dataset, size: int, shared: float) -> Overlap:
    """Compare by 64-bit hashes. n-grams that stand in more than the share `shared` of the training rows (and in more than one) do not
    count. Only the evaluation data is held in memory, as numbers."""
    wholes, questions, grams = array("q"), array("q"), []
    wanted: dict[int, list[int]] = {}
    for row in all_said(evaluation):
        wholes.append(_whole(row))
        questions.append(_question(row))
        own = frozenset(ngrams(row, size))
        grams.append(own)
        for gram in own:
            wanted.setdefault(gram, [])
    whole_at: dict[int, int] = dict.fromkeys(wholes, -1)
    question_at: dict[int, int] = dict.fromkeys(questions, -1)
    counts: dict[int, int] = {}
    gram_at: dict[int, int] = {}
    total = 0
    for number, row in enumerate(all_said(train)):
        total += 1
        for known, key in ((whole_at, _whole(row)), (question_at, _question(row))):
            if known.get(key) == -1:
                known[key] = number
        for gram in {gram for gram in ngrams(row, size) if gram in wanted}:
            counts[gram] = counts.get(gram, 0) + 1
            gram_at.setdefault(gram, number)
    most, found = max(1.0, shared * total), Overlap()
    for number, own in enumerate(grams):
        if (where := whole_at[wholes[number]]) >= 0:
            found.exact[number] = where
        elif (where := question_at[questions[number]]) >= 0:
            found.question[number] = where
        elif hits := [gram_at[gram] for gram in own if 0 < counts.get(gram, 0) <= most]:
            found.ngram[number] = min(hits)
    return found


def ngrams(row: Said, size: int) -> Iterator[int]:
    """Hashes of `size` words in a row within each turn of what is asked; of plain text, within the text."""
    for _, text in row.asked or (("", row.answer),):
        found = words(text)
        for at in range(len(found) - size + 1):
            yield hash(tuple(found[at : at + size]))


def _whole(row: Said) -> int:
    return hash((tuple((role, folded(text)) for role, text in row.asked), folded(row.answer), folded(row.other or "")))


def _question(row: Said) -> int:
    return hash(tuple(tuple(words(text)) or text for role, text in (row.asked or (("", row.answer),)) if role != "system"))
