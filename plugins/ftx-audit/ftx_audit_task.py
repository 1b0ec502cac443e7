"""What the answers of a data set are: labels, JSON, code or texts; how even, how alike, how many."""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftx_audit_text import Said, folded

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Task kind -> rows that are the least, a good number, and more than which seldom helps.
SIZES = {"classification": (100, 1_000, 10_000), "extraction": (500, 5_000, 50_000), "instruction": (1_000, 10_000, 100_000), "code": (1_000, 10_000, 100_000)}
NAMES = {"instruction": "instruction following"}
#: A label is one line of at most so many words and characters, and there are at most LABELS / rows of them on average three rows each.
WORDS, CHARACTERS, LABELS = 6, 60, 1_000
#: Share of the answers that makes a kind.
MOST, HALF = 0.8, 0.5
CODE = re.compile(r"^ *(?:def |class |import |from \w+ import |#include|function |public |const |let |var |SELECT |func |fn |<\?php|#!/)", re.MULTILINE)
#: Forms of an answer. Calls of tools have the form that the template gives them.
JSON, FENCED, XML, PROSE, CALL = range(5)
FORMS = ("JSON", "JSON in a code fence", "XML", "prose", "tool calls")
FENCE = re.compile(r"\A```(?:json)?\s*\n(.*)\n?```\Z", re.DOTALL)


@dataclass
class Answers:
    """Counted as the rows go by; `finish` says what they come to. Row numbers count from 0."""

    rows: int = 0
    short: int = 0
    code: int = 0
    verbatim: int = 0
    plain: int = 0
    forms: array[int] = field(default_factory=lambda: array("b"))
    systems: array[int] = field(default_factory=lambda: array("q"))
    instructions: array[int] = field(default_factory=lambda: array("q"))
    answers: array[int] = field(default_factory=lambda: array("q"))
    labels: dict[str, int] = field(default_factory=dict)
    labelled: Counter[bool] = field(default_factory=Counter)

    def see(self, row: Said) -> None:
        self.rows += 1
        answer = row.answer.strip()
        self.forms.append(CALL if row.calls else form(answer))
        self.systems.append(hash(row.system) if row.system else 0)
        self.instructions.append(hash(folded(row.instruction)) if row.instruction else 0)
        self.answers.append(hash(folded(answer)))
        if row.label is not None:
            self.labelled[row.label] += 1
        if not row.asked:
            self.plain += 1
            return
        if "\n" not in answer and len(answer) <= CHARACTERS and len(answer.split()) <= WORDS:
            self.short += 1
            label = folded(answer)
            if label in self.labels or len(self.labels) < LABELS:
                self.labels[label] = self.labels.get(label, 0) + 1
            self.verbatim += bool(answer) and folded(answer) in folded(row.question)
        self.code += ("```" in answer and not FENCE.match(answer)) or CODE.search(answer) is not None

    def task(self) -> str | None:
        """classification, extraction, code or instruction; None for plain text, which has no answers."""
        if self.plain > self.rows * HALF:
            return None
        if self.short >= 0.95 * self.rows and len(self.labels) <= max(2, self.rows // 3) and len(self.labels) < LABELS and not self.labelled:
            return "classification"
        if sum(self.forms.count(one) for one in (JSON, FENCED)) >= MOST * self.rows or self.verbatim >= MOST * self.rows:
            return "extraction"
        return "code" if self.code >= HALF * self.rows else "instruction"

    def balance(self, task: str | None) -> dict[str, int]:
        """label -> its rows, most frequent first, where the answers are labels or are labelled; else nothing."""
        counts = {str(label).lower(): count for label, count in self.labelled.items()} or (self.labels if task == "classification" else {})
        return dict(sorted(counts.items(), key=lambda one: (-one[1], one[0])))

    def commonest(self) -> list[int]:
        """The rows of the answer that most of them have."""
        import numpy

        if not self.answers:
            return []
        values, counts = numpy.unique(self.answers, return_counts=True)
        rows: list[int] = numpy.flatnonzero(numpy.array(self.answers) == values[counts.argmax()]).tolist()
        return rows

    def mixed_forms(self, least: int) -> tuple[list[int], list[dict[str, int]]]:
        """Rows whose answers have another form than most under the same instruction, and how many of each form a group has.

        Only JSON against what is none. Under one system text the other way round says little: a helpful assistant may answer
        in JSON when asked; so there most answers must be JSON.
        """
        import numpy

        forms = numpy.array(self.forms)
        odd: set[int] = set()
        groups: list[dict[str, int]] = []
        for keys, both_ways in ((numpy.array(self.instructions), True), (numpy.array(self.systems), False)):
            for members in _groups(keys, least if both_ways else max(least, 10)):
                counts = Counter(int(one) for one in forms[members] if one != CALL)
                structured = counts[JSON] + counts[FENCED]
                if not structured or len(counts) < 2 or (not both_ways and 2 * structured < counts.total()):
                    continue
                main = max(counts, key=lambda one: (counts[one], -one))
                found = {int(row) for row in members if forms[row] not in (main, CALL)} - odd
                if found:
                    odd |= found
                    groups.append({FORMS[one]: count for one, count in counts.most_common()})
        return sorted(odd), groups


def form(answer: str) -> int:
    """The form of an answer that is no call."""
    if answer[:1] in ("{", "[") and answer[-1:] in ("}", "]") and _is_json(answer):
        return JSON
    if answer.startswith("```") and (inside := FENCE.match(answer)) and inside[1].lstrip()[:1] in ("{", "[") and _is_json(inside[1]):
        return FENCED
    return XML if answer.startswith("<") and answer.endswith(">") and re.match(r"<([A-Za-z][\w-]*)[^>]*>.*</\1>\Z", answer, re.DOTALL) else PROSE


def size_advice(rows: int, task: str, steps: tuple[int, int, int]) -> tuple[str, dict[str, Any]]:
    """(a line, the figures): which of minimum, good and excellent the rows reach."""
    names = ("minimum", "good", "excellent")
    reached = next((name for name, least in reversed(list(zip(names, steps, strict=True))) if rows >= least), "below the minimum")
    figures = {"task": task, "rows": rows, **dict(zip(names, steps, strict=True)), "reached": reached}
    numbers = ", ".join(f"{name} {least:,}" for name, least in zip(names, steps, strict=True))
    return f"few rows for {NAMES.get(task, task)}: {rows:,} ({numbers})", figures


def _groups(keys: NDArray[Any], least: int) -> list[NDArray[Any]]:
    """Row numbers by equal key, of keys that at least `least` rows have; 0 is no key."""
    import numpy

    order = numpy.argsort(keys, kind="stable")
    ordered = keys[order]
    starts = numpy.flatnonzero(numpy.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(keys) else numpy.zeros(0, dtype=int)
    return [part for part in numpy.split(order, starts[1:]) if len(part) >= least and keys[part[0]] != 0]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
