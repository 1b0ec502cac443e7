"""Answers -> judgments: the requests to a judge, and what it says as rows of FastChat's model_judgment files."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ftx_llm_judge_asking import Ask, Judge, Verdict
from ftx_llm_judge_guard import MARK, guard, nonce
from ftx_mt_bench_files import Answers, Bench, Question
from ftx_mt_bench_judgments import GAMES, NO_RATING, NO_WINNER
from ftx_mt_bench_prompts import Kind, Mode, Prompt
from ftx_mt_bench_verdicts import fastchat_rating, fastchat_winner, rating, winner

#: The categories that are judged with a reference answer.
WITH_REFERENCE = ("math", "reasoning", "coding")

#: What stands before each turn in FastChat's templates.
_HEADINGS = re.compile(r"^(\s*#+\s*)(?=(?:user|assistant(?: [ab])?|reference answer)\s*:)", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Judged:
    """One turn of one question: the prompt's name, and for each game (one, or both orders of a pair) what was asked and told.

    `verdict` is None for a game that was not asked because an answer is missing.
    """

    question: Question
    turn: int
    prompt: str
    games: list[tuple[str, Verdict | None]]

    @property
    def reason(self) -> dict[str, str]:
        """Why it is unscored, as a part of a row."""
        failed = next((verdict.reason if verdict else "an answer is missing" for _, verdict in self.games if verdict is None or verdict.value is None), None)
        return {"reason": failed} if failed is not None else {}


def judge_single(bench: Bench, judge: Judge, model: str, answers: Answers, *, strict: bool, seed: int) -> list[dict[str, Any]]:
    """Each answer rated by itself, one row a turn. `strict`: texts as they are, and FastChat's reading of the ratings."""
    rows = []
    for judged in _judged(bench, judge, "single", [{"": answers}], fastchat_rating if strict else rating, strict=strict, seed=seed):
        ((asked, verdict),) = judged.games
        rows.append(
            {
                **{"question_id": judged.question.id, "model": model, "judge": [judge.name, judged.prompt], "user_prompt": asked},
                "judgment": verdict.text if verdict else "",
                "score": verdict.value if verdict and verdict.value is not None else NO_RATING,
                **{"turn": judged.turn, "tstamp": time.time(), **judged.reason},
            }
        )
    return rows


def judge_pairs(bench: Bench, judge: Judge, models: tuple[str, str], one: Answers, other: Answers, *, strict: bool, seed: int) -> list[dict[str, Any]]:
    """Two models' answers compared in both orders, one row a turn."""
    rows = []
    orders = [{"a": one, "b": other}, {"a": other, "b": one}]
    for judged in _judged(bench, judge, "pairwise", orders, fastchat_winner if strict else winner, strict=strict, seed=seed):
        row = {"question_id": judged.question.id, "model_1": models[0], "model_2": models[1], "judge": [judge.name, judged.prompt]}
        for (game, sides), (asked, verdict) in zip(GAMES.items(), judged.games, strict=True):
            row[f"{game}_winner"] = sides[verdict.value] if verdict and verdict.value is not None else NO_WINNER
            row |= {f"{game}_user_prompt": asked, f"{game}_judgment": verdict.text if verdict else ""}
        rows.append(row | {"turn": judged.turn, "tstamp": time.time(), **judged.reason})
    return rows


def turns(bench: Bench) -> Iterator[tuple[Question, int]]:
    """Every turn that is judged, two a question at most."""
    return ((question, turn) for question in bench.questions for turn in range(1, min(len(question.turns), 2) + 1))


def _judged(
    bench: Bench, judge: Judge, mode: Mode, orders: Sequence[Mapping[str, Answers]], parse: Callable[[str], Any], *, strict: bool, seed: int
) -> Iterator[Judged]:
    """All turns, judged in one go; `orders` has the answers of each side for each game."""
    planned: list[tuple[Question, int, Prompt, list[Ask]]] = []
    for question, turn in turns(bench):
        reference = bench.reference(question, judge.name) if question.category in WITH_REFERENCE else ()
        prompt = bench.prompts[Kind(mode, bool(reference), turn)]
        asks = []
        if all(len(answers.get(question.id, ())) >= turn for answers in orders[0].values()):
            for sides in orders:
                texts = _texts(question, reference, {side: answers[question.id] for side, answers in sides.items()})
                asks.append(_request(prompt, texts, strict=strict, seed=seed))
        planned.append((question, turn, prompt, asks))
    verdicts = iter(judge.verdicts([ask for *_, asks in planned for ask in asks], parse))
    for question, turn, prompt, asks in planned:
        games = [(ask.user, next(verdicts)) for ask in asks]
        yield Judged(question, turn, prompt.name, games or [("", None) for _ in orders])


def _texts(question: Question, reference: Sequence[str], sides: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Placeholder -> text, by FastChat's names: without a number they mean the first turn."""
    texts = {"question": question.turns[0]}
    texts |= {f"question_{n}": text for n, text in enumerate(question.turns, start=1)}
    texts |= {f"ref_answer_{n}": text for n, text in enumerate(reference, start=1)}
    for side, answers in sides.items():
        name = f"answer_{side}" if side else "answer"
        texts |= {name: answers[0]} | {f"{name}_{n}": text for n, text in enumerate(answers, start=1)}
    return texts


def _request(prompt: Prompt, texts: Mapping[str, str], *, strict: bool, seed: int) -> Ask:
    """The texts in their places: neutralised, unless FastChat's own rules are wanted, and with a code that none of them can know."""
    code = nonce(prompt.name, *texts.values(), seed=seed)
    if not strict:
        texts = {name: _HEADINGS.sub(rf"\1{MARK}", guard(text, code)) or "(this text is empty)" for name, text in texts.items()}
    return Ask(system=prompt.system, user=prompt.filled(texts, code), what="mt-bench")
