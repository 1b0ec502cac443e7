"""The model in hand answers the questions as in FastChat: turn by turn, each category at its own temperature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftx_mt_bench_files import Answers, Bench, Question

if TYPE_CHECKING:
    from ftx.encode import Messages
    from ftx.generate import Generate

#: FastChat's (llm_judge/common.py); what is not in it is asked at OTHERWISE.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}
OTHERWISE = 0.7


def conversation(question: Question, answers: tuple[str, ...], turn: int) -> Messages:
    """What the model is asked in a turn (1 or 2): the second question comes after its own first answer."""
    messages = [{"role": "user", "content": question.turns[0]}]
    for answer, text in zip(answers, question.turns[1:turn], strict=False):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": text}]
    return messages


def ask_model(generate: Generate, bench: Bench, max_new_tokens: int, seed: int) -> Answers:
    """The model's answers to all turns. Sampled ones depend on the seed and the prompt only, not on the other questions."""
    answers: Answers = {question.id: () for question in bench.questions}
    for turn in (1, 2):
        by_temperature: dict[float, list[Question]] = {}
        for question in bench.questions:
            if len(question.turns) >= turn:
                by_temperature.setdefault(TEMPERATURES.get(question.category or "", OTHERWISE), []).append(question)
        for temperature, questions in by_temperature.items():
            prompts = [conversation(question, answers[question.id], turn) for question in questions]
            given = generate(prompts, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
            for question, answer in zip(questions, given, strict=True):
                answers[question.id] += (answer,)
    return answers
