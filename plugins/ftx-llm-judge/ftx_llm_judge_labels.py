"""Files of what people (or a judge that is trusted) said of answers: pairs with a better one, or answers with a score."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

from ftx.errors import DataError
from ftx_llm_judge_prompts import question_text
from ftx_llm_judge_rubric import SCALE, Criterion

_FORMS = (
    "Rows are {prompt, chosen, rejected}, {prompt, answer, score} with a score from 1 to 5 and perhaps a reference,"
    " or Prometheus's {chosen_instruction, rejected_instruction} or {instruction, gpt4_score}; JSON or JSON lines, also with .gz."
)
_SECTION = re.compile(
    r"^###(Task Description|The instruction to evaluate|Response to evaluate|Reference Answer \(Score 5\)|Score Rubrics|Feedback):[ \n]?", re.M
)
_RUBRIC = re.compile(r"\[(.*?)\]\s*" + r"\s*".join(rf"Score {score}:(.*?)" for score in SCALE) + r"\s*", re.S)

#: For answers with a score and no rubric of their own.
_OVERALL = Criterion(
    "score",
    "How good is the answer, all in all?",
    {
        1: "Useless or wrong.",
        2: "Poor: more wrong or missing than right.",
        3: "Fair: right in part.",
        4: "Good, with small flaws.",
        5: "Excellent: nothing to improve.",
    },
)


@dataclass(frozen=True)
class LabelledPair:
    question: str
    chosen: str
    rejected: str
    criterion: str = ""


@dataclass(frozen=True)
class LabelledScore:
    """`score` is the label, the lower median where there are several."""

    question: str
    answer: str
    score: int
    reference: str = ""
    criterion: Criterion = _OVERALL


def read_labels(file: str | Path) -> list[LabelledPair] | list[LabelledScore]:
    """The rows of a labelled file, all of one kind; DataError for one that cannot be read or used."""
    rows = _rows(Path(file))
    read = [_labelled(file, number, row) for number, row in enumerate(rows, start=1)]
    pairs = [one for one in read if isinstance(one, LabelledPair)]
    scores = [one for one in read if isinstance(one, LabelledScore)]
    if pairs and scores:
        raise DataError(f"{file} holds both pairs and scores.", "Put them into two files.")
    if not read:
        raise DataError(f"{file} holds no row.", _FORMS)
    return pairs or scores


def _rows(file: Path) -> list[Any]:
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if file.suffix == ".gz" else raw).decode("utf-8")
        rows: list[Any] = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"the labelled file {file} cannot be read ({error}).", _FORMS) from error
    return rows


def _labelled(file: str | Path, number: int, row: Any) -> LabelledPair | LabelledScore:
    try:
        if "chosen_instruction" in row:
            chosen, rejected = _prometheus(row["chosen_instruction"]), _prometheus(row["rejected_instruction"])
            return LabelledPair(chosen["question"], chosen["answer"], rejected["answer"], "The better answer by this: " + chosen["criterion"].description)
        if "gpt4_score" in row:
            return LabelledScore(**_prometheus(row["instruction"]), score=_score(row["gpt4_score"]))
        if "chosen" in row:
            return LabelledPair(question_text(row["prompt"]), _answer(row["chosen"]), _answer(row["rejected"]))
        return LabelledScore(question_text(row["prompt"]), _answer(row["answer"]), _score(row["score"]), row.get("reference") or "")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{file}: row {number} is not a labelled answer ({why}).", _FORMS) from error


def _prometheus(prompt: str) -> dict[str, Any]:
    """The parts of one of Prometheus's prompts; ValueError for another text."""
    parts = _SECTION.split(prompt)
    named = dict(zip(parts[1::2], (part.strip() for part in parts[2::2]), strict=True))
    rubric = _RUBRIC.fullmatch(named["Score Rubrics"])
    if not rubric:
        raise ValueError("its score rubric cannot be read")
    description, *scores = (part.strip() for part in rubric.groups())
    return {
        "question": named["The instruction to evaluate"],
        "answer": named["Response to evaluate"],
        "reference": named.get("Reference Answer (Score 5)", ""),
        "criterion": Criterion("score", description, dict(zip(SCALE, scores, strict=True))),
    }


def _answer(answer: Any) -> str:
    """An answer as text: of messages, the last one's."""
    return answer if isinstance(answer, str) else str(answer[-1]["content"])


def _score(score: Any) -> int:
    scores = score if isinstance(score, list) else [score]
    if not scores or any(isinstance(one, bool) or one not in SCALE for one in scores):
        raise ValueError(f"its score {score!r} is no whole number from {SCALE[0]} to {SCALE[-1]}")
    return int(median_low(scores))
