"""When an answer equals its reference: exact match as an `evaluate.Metric`, token F1, and the fields of JSON answers.

The only module here that imports `evaluate`, which takes seconds: import it inside hooks.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import datasets
import evaluate

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_DIGITS = str.maketrans("", "", string.digits)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What does not count when two texts are compared. The defaults are evaluate's, which compares every character.

    The order is evaluate's (metrics/exact_match): the regexes one after another, lower case, ASCII punctuation, ASCII
    digits. `strip` is ours: white space around the text goes before the first step and again after the last, because
    a chat template or a removed word leaves some there.
    """

    regexes_to_ignore: Sequence[str] = ()
    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignore_numbers: bool = False
    strip: bool = False

    def comparable(self, text: str) -> tuple[str, str]:
        """What must be equal for two texts to match: what the rules leave, or the text itself if they leave nothing.

        Texts that are wiped out match only if they were equal before, as in evaluate's current exact_match; else "?!"
        would be a right answer to "..." as soon as punctuation is ignored.
        """
        given = text.strip() if self.strip else text
        left = given
        for regex in self.regexes_to_ignore:
            left = re.sub(regex, "", left)
        if self.ignore_case:
            left = left.lower()
        if self.ignore_punctuation:
            left = left.translate(_NO_PUNCTUATION)
        if self.ignore_numbers:
            left = left.translate(_NO_DIGITS)
        if self.strip:
            left = left.strip()
        return left, "" if left else given

    def match(self, answer: str, reference: str) -> bool:
        return self.comparable(answer) == self.comparable(reference)


class ExactMatchMetric(evaluate.Metric):
    """evaluate's `exact_match` without its download: `evaluate.load` fetches a script from the hub when it is called.

    Takes evaluate's keyword arguments, and `strip`. The result holds the share under `exact_match` and, so that every
    item can be shown, one bool for each pair under `matches`.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="The share of predictions that equal their references.",
            citation="",
            inputs_description="predictions and references: lists of texts of the same length.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str], regexes_to_ignore: Sequence[str] | None = None, **ignore: bool) -> dict[str, Any]:
        rules = Rules(regexes_to_ignore=regexes_to_ignore or (), **ignore)
        matches = [rules.match(prediction, reference) for prediction, reference in zip(predictions, references, strict=True)]
        return {"exact_match": sum(matches) / len(matches) if matches else float("nan"), "matches": matches}


def token_f1(answer: str, reference: str) -> float:
    """SQuAD's F1 in 0..1 (Rajpurkar et al., 2016): harmonic mean of the precision and recall of the words they share.

    Words are what white space separates after lower case, without ASCII punctuation and English articles; a word counts
    as often as it stands there. Where one side has no words left, 1 if the texts are the same, else 0.
    """
    given, expected = _words(answer), _words(reference)
    if not given or not expected:
        return float(answer.strip() == reference.strip())
    shared = (given & expected).total()
    return 2 * shared / (given.total() + expected.total())


def _words(text: str) -> Counter[str]:
    return Counter(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is, whole and strict (no fences, no NaN), or None."""
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def flatten(document: dict[str, Any], rules: Rules) -> dict[tuple[str | int, ...], tuple[str, Any]]:
    """A JSON object -> path (keys, and positions in lists) -> (kind, what is compared), one entry a leaf.

    1 equals 1.0 but not true; texts are compared by `rules`; an empty object or list inside another is a leaf. Not
    recursive, because an answer may nest as deeply as the parser allows.
    """
    leaves: dict[tuple[str | int, ...], tuple[str, Any]] = {}
    todo: list[tuple[tuple[str | int, ...], Any]] = [((key,), value) for key, value in document.items()]
    while todo:
        path, value = todo.pop()
        if isinstance(value, dict | list) and value:
            children = value.items() if isinstance(value, dict) else enumerate(value)
            todo.extend(((*path, key), child) for key, child in children)
        elif isinstance(value, str):
            leaves[path] = ("text", rules.comparable(value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            leaves[path] = ("number", value)
        else:
            leaves[path] = (type(value).__name__, value)
    return leaves


def field_counts(answer: str, reference: dict[str, Any], rules: Rules) -> dict[str, Any]:
    """Fields of one item: `matched` stand in both at the same path with equal values, `given` in the answer, `expected`
    in the reference; an answer that is no JSON object gives none, and `valid_json` is False."""
    expected = flatten(reference, rules)
    parsed = json_object(answer)
    given = flatten(parsed or {}, rules)
    matched = sum(path in given and given[path] == value for path, value in expected.items())
    return {"matched": matched, "given": len(given), "expected": len(expected), "valid_json": parsed is not None}
