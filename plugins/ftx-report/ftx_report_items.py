"""The items of an evaluator in a form to browse: one question with the answer of each model, and what came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ftx_report_read import Told, whole_lines

#: Keys of an item that are shown in places of their own.
KNOWN = {"prompt", "answer", "reference", "verdict", "category", "judges", "judgments", "base_answer", "rejected"}
WORTH = {"correct": 1.0, "wrong": 0.0, "win": 1.0, "tie": 0.5, "loss": 0.0}
#: Longest text of a detail; answers and prompts are whole.
DETAIL = 600


def item_sets(told: Told, limit: int) -> list[dict[str, Any]]:
    """One set for each evaluator with items: base and tuned side by side."""
    sets = []
    for evaluator in told.evaluators:
        folder = told.directory / "eval" / evaluator
        phases = {phase: whole_lines(folder / f"{phase}.jsonl") for phase in ("base", "tuned")}
        shown = {phase: items for phase, items in phases.items() if items}
        if shown:
            sets.append(item_set(evaluator, shown, whole_lines(folder / "change.jsonl"), limit))
    return sets


def run_sets(runs: Sequence[Told], limit: int) -> list[dict[str, Any]]:
    """The same for several runs: the tuned answers of each, where they answered the same questions as the first that has the evaluator."""
    sets = []
    for evaluator in dict.fromkeys(name for told in runs for name in told.evaluators):
        answered = {told.name: whole_lines(told.directory / "eval" / evaluator / "tuned.jsonl") for told in runs}
        answered = {name: items for name, items in answered.items() if items}
        if len(answered) > 1:
            first = next(iter(answered.values()))
            alike = {name: items for name, items in answered.items() if _questions(items) == _questions(first)}
            others = [name for name in answered if name not in alike]
            sets.append(item_set(evaluator, alike, [], limit) | {"left_out": others})
    return sets


def item_set(name: str, columns: Mapping[str, Sequence[Mapping[str, Any]]], changes: Sequence[Mapping[str, Any]], limit: int) -> dict[str, Any]:
    """`columns`: who answered -> items, in one order. Each item becomes a list, because 10,000 of them go into a page:

    [prompt (text or [[role, text]]), reference, [answers], [verdicts], status, category, [[label, text]]]
    """
    whos = list(columns)
    length = max(map(len, columns.values()))
    items = []
    for place in range(min(length, limit)):
        row = [column[place] if place < len(column) else {} for column in columns.values()]
        change = changes[place] if place < len(changes) else {}
        head = next((one for one in row if one), {})
        items.append(
            [
                prompt_of(head.get("prompt")),
                plain(head.get("reference", "")),
                [plain(one.get("answer", "")) for one in row],
                [verdict_text(one) for one in row],
                status(row, change),
                str(head.get("category", "")),
                [*_said(whos, row, change), *_details(whos, row)],
            ]
        )
    return {"name": name, "who": whos, "items": items, "total": length}


def status(row: Sequence[Mapping[str, Any]], change: Mapping[str, Any]) -> str:
    """`fixed` and `broken` where answers are right or wrong, `better` and `worse` where they are rated, `unchanged`, or `unscored`."""
    if len(row) < 2:
        return "unscored" if worth(row[0]) is None else "scored"
    first, *others = (worth(one) for one in row)
    if first is None or None in others:
        by_pair = worth(change)
        return "unscored" if by_pair is None else "better" if by_pair > 0.5 else "worse" if by_pair < 0.5 else "unchanged"
    up, down = any(other > first for other in others if other is not None), any(other < first for other in others if other is not None)
    if up and down:
        return "mixed"
    if not up and not down:
        return "unchanged"
    right_or_wrong = all(one.get("verdict") in ("correct", "wrong") for one in row)
    return ("fixed" if up else "broken") if right_or_wrong else "better" if up else "worse"


def worth(item: Mapping[str, Any]) -> float | None:
    """A verdict as a number that is higher for better; None if there is none."""
    said = item.get("rating", item.get("verdict"))
    if isinstance(said, str):
        return WORTH.get(said)
    if isinstance(said, Mapping):
        numbers = [value for value in said.values() if isinstance(value, int | float)]
        return sum(numbers) / len(numbers) if numbers else None
    return float(said) if isinstance(said, int | float) and math.isfinite(said) else None


def prompt_of(prompt: Any) -> str | list[list[str]]:
    """A text, or [role, text] of each message."""
    if isinstance(prompt, list) and all(isinstance(one, Mapping) and "role" in one for one in prompt):
        return [[str(one["role"]), plain(one.get("content")) or plain(one.get("tool_calls") or "")] for one in prompt]
    return plain(prompt)


def plain(value: Any) -> str:
    """Anything as text: no number of the data goes into the page as a number, because NaN is no JSON."""
    return value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def verdict_text(item: Mapping[str, Any]) -> str:
    said = item.get("verdict", "")
    if isinstance(said, Mapping):
        return ", ".join(f"{name} {short(value)}" for name, value in said.items())
    return short(said)


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else plain(value)[:DETAIL]


def _said(whos: Sequence[str], row: Sequence[Mapping[str, Any]], change: Mapping[str, Any]) -> list[list[str]]:
    """What judges said: of each answer, and of the pair."""
    found = []
    for who, item in [*zip(whos, row, strict=True), ("the pair", change)]:
        for one in item.get("judges") or []:
            reasons = one.get("reasoning") or one.get("reason") or ""
            text = "\n\n".join(map(plain, reasons)) if isinstance(reasons, list) else plain(reasons)
            found.append([f"{plain(one.get('judge')) or 'judge'} on {who}: {verdict_text(one)}", text])
        for one in item.get("judgments") or []:
            judge = one.get("judge")
            texts = [plain(one[key]) for key in ("judgment", "g1_judgment", "g2_judgment") if one.get(key)] or [plain(one.get("reason", ""))]
            said = short(one["score"]) if "score" in one else ", ".join(plain(one.get(key)) for key in ("g1_winner", "g2_winner"))
            found.append([f"{judge[0] if isinstance(judge, list) and judge else judge} on {who}: {said}", "\n\n".join(texts)])
    return found


def _details(whos: Sequence[str], row: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Whatever else an evaluator says of its items; once where it is the same for all who answered."""
    found = []
    if rejected := next((one["rejected"] for one in row if one.get("rejected")), None):
        found.append(["rejected", plain(rejected)])
    for key in dict.fromkeys(key for one in row for key in one if key not in KNOWN):
        values = [short(one[key]) if key in one else "" for one in row]
        text = values[0] if len(set(values)) == 1 else "\n".join(f"{who}: {value}" for who, value in zip(whos, values, strict=True))
        found.append([key, text])
    return found


def _questions(items: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Any]]:
    return [(item.get("prompt"), item.get("reference")) for item in items]


def embedded(value: Any) -> str:
    """JSON for a <script> element: no `<`, so that nothing in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text
