"""One item an answer turn, with what each judge said of it; and the items of a run as FastChat's own files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ftx.run import write_lines
from ftx_mt_bench_answering import conversation
from ftx_mt_bench_files import Answers, Bench, answer_rows
from ftx_mt_bench_judging import turns
from ftx_mt_bench_numbers import Rating


def items_of(bench: Bench, model: str, answers: Answers, rows: Iterable[dict[str, Any]], ratings: Iterable[Rating], *, pairwise: bool) -> list[dict[str, Any]]:
    """The items of one model. `verdict`: the mean of the judges' ratings, in pairs `win`, `tie` or `loss`, or `unscored` with the
    first `reason`; `judgments`: their rows as in FastChat's files."""
    said: dict[Any, list[tuple[dict[str, Any], Rating]]] = {}
    for row, rating in zip(rows, ratings, strict=True):
        said.setdefault((rating.question, rating.turn), []).append((row, rating))
    items = []
    for question, turn in turns(bench):
        given, judged = answers.get(question.id, ()), said[question.id, turn]
        item = {
            **{"question_id": question.id, "category": question.category, "turn": turn, **({"model": model} if model else {})},
            "prompt": conversation(question, given, turn),
            "answer": given[turn - 1] if len(given) >= turn else "",
            "reference": next(iter(bench.reference(question)[turn - 1 : turn]), ""),
            **_verdict([rating for _, rating in judged], pairwise),
            "judgments": [row for row, _ in judged],
        }
        items.append(item)
    return items


def _verdict(ratings: Sequence[Rating], pairwise: bool) -> dict[str, Any]:
    values = [rating.value for rating in ratings if rating.value is not None]
    if not values:
        return {"verdict": "unscored", "reason": ratings[0].reason}
    mean = fmean(values)
    return {"verdict": ("win" if mean > 0.5 else "loss" if mean < 0.5 else "tie") if pairwise else mean}


def write_fastchat(folder: Path, phases: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """model_answer/PHASE.jsonl, and model_judgment/JUDGE_single.jsonl or _pair.jsonl with the phases as models."""
    judgments: dict[str, list[dict[str, Any]]] = {}
    for phase, items in phases.items():
        by_question = itertools.groupby(items, key=lambda item: item["question_id"])
        answers = {question: [item["answer"] for item in turns_of_it] for question, turns_of_it in by_question}
        write_lines(folder / "model_answer" / f"{phase}.jsonl", answer_rows(phase, answers))
        for row in (row for item in items for row in item["judgments"]):
            kind, model = ("pair", "model_1") if "model_1" in row else ("single", "model")
            file = f"{re.sub(r'[^A-Za-z0-9._-]+', '-', row['judge'][0])}_{kind}.jsonl"
            judgments.setdefault(file, []).append(row | {model: phase})
    for file, rows in judgments.items():
        write_lines(folder / "model_judgment" / file, rows)
