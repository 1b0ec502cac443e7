"""FastChat's files of questions, reference answers, judge prompts and model answers."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftx.data import read_dataset
from ftx.errors import DataError
from ftx.ledger import Ledger
from ftx_mt_bench_prompts import Kind, Prompt, fastchat_prompts, own_prompts

#: The categories of questions 81 to 160, ten each: judgments can be scored without the questions.
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
FIRST_ID, PER_CATEGORY = 81, 10

#: question_id -> the answers of one model, or the reference answers, turn by turn.
Answers = dict[Any, tuple[str, ...]]


@dataclass(frozen=True)
class Question:
    """One question. `reference` is its own field, which FastChat's judge never sees; reference_answer/ goes before it."""

    id: Any
    category: str | None
    turns: tuple[str, ...]
    reference: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bench:
    """What a directory holds: questions, judge -> its reference answers, and the judge prompts (ours where it has none)."""

    questions: list[Question]
    references: dict[str, Answers]
    prompts: dict[Kind, Prompt]

    def reference(self, question: Question, judge: str = "") -> tuple[str, ...]:
        """The reference answers of the judge's own file, else of the first file, else the question's own; may be empty."""
        answers = self.references.get(judge) or next(iter(self.references.values()), {})
        return answers.get(question.id) or question.reference


def category_of(question_id: Any) -> str | None:
    """The category of one of MT-Bench's own questions, None for another's."""
    at = question_id - FIRST_ID if type(question_id) is int else -1
    return CATEGORIES[at // PER_CATEGORY] if 0 <= at < len(CATEGORIES) * PER_CATEGORY else None


def read_bench(reference: str, max_questions: int | None = None) -> Bench:
    """A directory with question.jsonl and, if there, reference_answer/*.jsonl and judge_prompts.jsonl; or a hub id."""
    path = Path(reference).expanduser()
    questions = [_question(row, place) for place, row in rows_of(str(path / "question.jsonl") if path.is_dir() else reference)]
    folder = path / "reference_answer"
    references = read_answers(str(folder)) if folder.is_dir() else {}
    own = path / "judge_prompts.jsonl"
    prompts = fastchat_prompts((row for _, row in rows_of(str(own))), str(own)) if own.is_file() else own_prompts()
    return Bench(_spread(questions, max_questions), references, prompts)


def _question(row: dict[str, Any], place: str) -> Question:
    """FastChat's form, or that of its copies on the hub (`prompt_id` and `prompt`)."""
    question_id = row.get("question_id") if row.get("question_id") is not None else row.get("prompt_id")
    turns = row.get("turns") or row.get("prompt")
    if question_id is None or not _texts(turns):
        raise DataError(f"{place}: not a question: it needs question_id and turns.", "Give FastChat's question.jsonl.")
    reference = row.get("reference")
    return Question(question_id, row.get("category") or category_of(question_id), tuple(turns or ()), tuple(reference or ()) if _texts(reference) else ())


def _spread(questions: list[Question], count: int | None) -> list[Question]:
    """The first `count` questions, taken from the categories in turn, in the order of the file."""
    if count is None:
        return questions
    seen: dict[str | None, int] = {}
    rounds = []
    for at, question in enumerate(questions):
        seen[question.category] = seen.get(question.category, 0) + 1
        rounds.append((seen[question.category], at))
    return [questions[at] for at in sorted(at for _, at in sorted(rounds)[:count])]


def read_answers(reference: str) -> dict[str, Answers]:
    """Model -> its answers, from a file or a directory of FastChat's model_answer. Of several choices the first counts.

    The file's name is the model's, as in FastChat: the `model_id` inside may be another (vicuna-13b-v1.3's is).
    """
    models: dict[str, Answers] = {}
    for place, row in rows_of(reference):
        choices = row.get("choices")
        turns = choices[0].get("turns") if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
        if row.get("question_id") is None or not _texts(turns):
            raise DataError(f"{place}: not an answer: it needs question_id and choices[0].turns.", "Give files as in FastChat's model_answer.")
        models.setdefault(_stem(Path(place.rpartition(":")[0])), {})[row["question_id"]] = tuple(turns or ())
    return models


def read_baseline(file: str | None) -> tuple[str | None, Answers]:
    """The model of a file of answers, and these; nothing for no file. DataError for a file with several models."""
    if file is None:
        return None, {}
    models = read_answers(file)
    if len(models) > 1:
        raise DataError(f"mt-bench.baseline: {file} has the answers of {len(models)} models ({', '.join(models)}).", "Name the file of one.")
    return next(iter(models.items()))


def answer_rows(model: str, answers: Mapping[Any, Sequence[str]]) -> Iterator[dict[str, Any]]:
    """One model's answers as rows of a model_answer file."""
    for question_id, turns in answers.items():
        answer_id = hashlib.sha256(json.dumps([model, question_id, *turns]).encode()).hexdigest()[:22]
        yield {"question_id": question_id, "answer_id": answer_id, "model_id": model, "choices": [{"index": 0, "turns": list(turns)}], "tstamp": time.time()}


def rows_of(reference: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a file (.gz too), of a directory of files, or of a hub id; each with its place, FILE:LINE."""
    for row in read_dataset(reference, Ledger()):
        yield f"{row.pop('_file')}:{row.pop('_line')}", row


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def _stem(file: Path) -> str:
    return file.name.partition(".jsonl")[0]
