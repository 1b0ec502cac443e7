"""Rubrics: criteria with a description for each score from 1 to 5, the default ones or those of a YAML file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftx.errors import DataError

SCALE = (1, 2, 3, 4, 5)
_FORM = "A rubric is a mapping: NAME: {description: TEXT, 1: TEXT, 2: TEXT, 3: TEXT, 4: TEXT, 5: TEXT, reference: true or false}"


@dataclass(frozen=True)
class Criterion:
    """What is rated, and what each score from 1 to 5 means. `reference`: rows without a reference answer cannot be rated."""

    name: str
    description: str
    scores: dict[int, str]
    reference: bool = False


DEFAULT = (
    Criterion(
        "helpfulness",
        "Does the answer do what the question asks for?",
        {
            1: "Useless: it is empty, off the subject, or refuses without a reason.",
            2: "It touches the question, but what was asked for is mostly missing.",
            3: "It does part of what was asked; the rest must be found elsewhere.",
            4: "It does what was asked, with small gaps or some needless text.",
            5: "It does all that was asked, in the form asked for, and nothing needed is missing.",
        },
    ),
    Criterion(
        "accuracy",
        "Is what the answer says true, and do its steps and results hold?",
        {
            1: "Wrong in what matters, made up, or it says nothing that could be true.",
            2: "More wrong than right, or the main result is wrong.",
            3: "Right in the main, with an error that matters.",
            4: "Right, with a small slip that misleads nobody.",
            5: "All of it is right.",
        },
    ),
    Criterion(
        "coherence",
        "Is the answer clear, in order, and free of contradiction and repetition?",
        {
            1: "It cannot be understood, or it is empty.",
            2: "Hard to follow: broken sentences, repetition, or parts that contradict each other.",
            3: "It can be followed with effort.",
            4: "Clear, with small flaws in order or language.",
            5: "Clear, well ordered, and complete sentences where sentences are called for.",
        },
    ),
)


def read_rubric(file: str | Path) -> tuple[Criterion, ...]:
    """The criteria of a YAML file, in its order; DataError for one that cannot be used."""
    import yaml

    from ftx import yamls

    try:
        content = yamls.load(Path(file).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"the rubric {file} cannot be read ({str(error).splitlines()[0]}).", _FORM) from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"the rubric {file} names no criterion.", _FORM)
    return tuple(_criterion(file, name, entry) for name, entry in content.items())


def _criterion(file: str | Path, name: Any, entry: Any) -> Criterion:
    # the name becomes a key of the judge's JSON and a metric; `rating` and `reasoning` are taken
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or name in ("reasoning", "rating"):
        raise DataError(f"the rubric {file}: {name!r} cannot name a criterion.", "Letters, digits, - and _; not 'rating' or 'reasoning'.")
    if not isinstance(entry, dict):
        raise DataError(f"the rubric {file}: '{name}' has no descriptions.", _FORM)
    missing = [str(score) for score in SCALE if not isinstance(entry.get(score), str)]
    if missing:
        raise DataError(f"the rubric {file}: '{name}' does not say what the score {missing[0]} means.", _FORM)
    unknown = [key for key in entry if key not in (*SCALE, "description", "reference")]
    if unknown:
        raise DataError(f"the rubric {file}: '{name}' has the unknown key '{unknown[0]}'.", _FORM)
    reference = entry.get("reference", False)
    if not isinstance(reference, bool):
        raise DataError(f"the rubric {file}: reference of '{name}' must be true or false, not {reference!r}.", _FORM)
    return Criterion(name, str(entry.get("description", "")), {score: entry[score] for score in SCALE}, reference)
