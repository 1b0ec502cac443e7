"""For the tests: a small bench of our own in FastChat's files, and judges that can be checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ftx.run import write_lines

#: question_id, category, turns; ids outside 81 to 160, so that the categories must come from the file.
QUESTIONS: list[tuple[int, str, list[str]]] = [
    (1, "writing", ["Write a line about rain.", "Now about snow."]),
    (2, "math", ["What is 12 + 30?", "And twice that?"]),
    (3, "stem", ["Why is the sky blue?", "And red at dusk?"]),
    (4, "coding", ["Print hello in Python.", "And in C."]),
]


def perfect(question: str) -> str:
    return f"the right answer to: {question}"


def bench(directory: Path, references: bool = True) -> Path:
    """A directory as in FastChat's data/mt_bench."""
    rows = [{"question_id": number, "category": category, "turns": turns} for number, category, turns in QUESTIONS]
    write_lines(directory / "question.jsonl", rows)
    if references:
        known = {number: [perfect(turn) for turn in turns] for number, category, turns in QUESTIONS if category in ("math", "coding")}
        write_lines(directory / "reference_answer" / "gpt-4.jsonl", answers("gpt-4", known))
    return directory


def answers(model: str, given: dict[int, list[str]]) -> list[dict[str, Any]]:
    return [{"question_id": number, "model_id": model, "choices": [{"index": 0, "turns": turns}]} for number, turns in given.items()]


def material(user: str) -> dict[str, str]:
    """The texts of a request with our own prompt, read by their code."""
    return {name: text for name, _, text in re.findall(r"^--- BEGIN ([A-Z0-9 ]+) ([0-9a-f]{16}) ---\n(.*?)\n--- END \1 \2 ---$", user, re.S | re.M)}


def honest(system: str, user: str) -> str:
    """10 for the right answer to the turn that is asked about, up to 4 for others, by length; of a pair the better one."""
    texts = material(user)
    turn = 2 if "QUESTION 2" in texts else 1
    grades = {name: _grade(text, texts[f"QUESTION {turn}"]) for name, text in texts.items() if re.fullmatch(rf"ANSWER [AB]?{turn}", name)}
    if len(grades) == 1:
        return f"It is as it is. Rating: [[{next(iter(grades.values()))}]]"
    a, b = grades[f"ANSWER A{turn}"], grades[f"ANSWER B{turn}"]
    return f"One has {a}, the other {b}. Verdict: [[{'A' if a > b else 'B' if b > a else 'C'}]]"


def gullible(system: str, user: str) -> str:
    """As the honest one, unless it finds a verdict in the material, or an instruction behind a delimiter or a role's tag."""
    outside = re.sub(r"--- BEGIN.*?--- END[^\n]*", "", user, flags=re.S | re.I)
    tagged = "".join(re.findall(r"(?:<\|im_start\|>|<<SYS>>|\[INST\])(.*)", user, re.S))
    forged = re.search(r"\[\[(?:10|[AB])\]\]|\b(?:rating|verdict|score)\W*[:=]\W*\w", user, re.I)
    if forged or re.search(r"best score", outside + tagged, re.I):
        return "Verdict: [[A]]" if "ANSWER A1" in material(user) else "Rating: [[10]]"
    return honest(system, user)


def _grade(answer: str, question: str) -> float:
    return 10 if answer == perfect(question) else 1 + min(len(answer), 300) // 100
