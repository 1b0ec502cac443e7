"""Columns and fields: which formatters a file's columns fit, and clear words for what is missing or of the wrong kind."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ftx import RowError, format_rows
from ftx.errors import DataError, one_line

if TYPE_CHECKING:
    from datasets import Dataset

    from ftx import Run

#: How many rows `guesses` looks at.
SAMPLE = 100
#: Other names under which what is asked stands: none of them is ignored while a prompt is made out of the answers.
ASKED = ("question", "query", "input", "instruction", "context", "problem", "user", "text")
#: Columns of conversations, of labels that call an answer good or bad, of a pair's prompt, and of classes, by the names in use.
CONVERSATIONS = ("messages", "conversations", "conversation")
LABELS = ("label", "kto_tag")
PROMPTS: tuple[str, ...] = ("prompt", "conversations", "instruction")
CLASSES = ("label", "category", "class", "intent")
#: (prompt, completion) columns, and whether they are text to continue or a question and its answer.
PAIRS = (("prompt", "completion", "text"), ("prompt", "response", "chat"), ("question", "answer", "chat"), ("query", "response", "chat"))

Note = Callable[[str], None]


# ---------------------------------------------------------------------------------------------------------------------
# One field of one row
# ---------------------------------------------------------------------------------------------------------------------


def kind(value: Any) -> str:
    """A value's JSON type in words, for an error text."""
    return {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")


def text(row: dict[str, Any], name: str) -> str:
    """The text in field `name` as it stands; RowError if it is missing, null, empty or no text."""
    return as_text(row.get(name), f"field '{name}'")


def optional_text(row: dict[str, Any], name: str | None) -> str:
    """The text in field `name`, or "" where the field is not read, missing, null or blank."""
    value = row.get(name) if name is not None else None
    return "" if value is None or (isinstance(value, str) and not value.strip()) else as_text(value, f"field '{name}'")


def as_text(value: Any, where: str) -> str:
    if value is None:
        raise RowError(f"{where} is missing or null")
    if not isinstance(value, str):
        raise RowError(f"{where} must be a text, this is {kind(value)}")
    if not value.strip():
        raise RowError(f"{where} is empty")
    return value


def parse_json(value: str, where: str) -> Any:
    """JSON text -> its value; RowError for what is no JSON, NaN included, and for half a character (a lone surrogate)."""
    try:
        parsed = json.loads(value, parse_constant=_refuse_constant)
        json.dumps(parsed, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RowError(f"{where} is not valid JSON ({error})") from error
    return parsed


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


# ---------------------------------------------------------------------------------------------------------------------
# All rows
# ---------------------------------------------------------------------------------------------------------------------


def columns_of(dataset: Dataset) -> list[str]:
    """The columns of the file, without those that say where a row came from."""
    return [column for column in dataset.column_names if not column.startswith("_")]


def check_columns(dataset: Dataset, plugin: Any, needed: Iterable[str]) -> None:
    """DataError if a needed column is absent, or one that an option names: a misspelt name must not read as 'no such field'."""
    columns = columns_of(dataset)
    named = [
        getattr(plugin, option.name)
        for option in dataclasses.fields(plugin)
        if option.name.endswith("_column") and getattr(plugin, option.name) not in (None, option.default)
    ]
    missing = [column for column in [*needed, *named] if column not in columns]
    if not missing:
        return
    fitting = " or ".join(guess.command for guess in guesses(dataset))
    remedy = f"These columns fit {fitting}" if fitting else "Name the file's own columns with the formatter's options: see `ftx plugins show formatter NAME`."
    raise DataError(f"no column is called '{missing[0]}'; the file has: {one_line(', '.join(columns))}.", remedy)


def say_unused(dataset: Dataset, run: Run, formatter: str, used: Iterable[str | None]) -> None:
    """One line about the columns that a formatter leaves out, so that no label or system text goes unseen."""
    unused = [column for column in columns_of(dataset) if column not in set(used)]
    if unused:
        run.say(f"formatter {formatter}: not used: {', '.join(unused)}")


def format_noted(dataset: Dataset, convert: Callable[[dict[str, Any], Note], Any], run: Run) -> Dataset:
    """`ftx.format_rows` for a `convert(row, note)`: each reason given to `note` becomes a `repaired` entry of the row's ledger."""
    from ftx.columns import chunks

    sources: Iterator[tuple[str, int]] = (("row", number) for number in itertools.count(1))  # format_rows converts every row once, in order
    if {"_file", "_line"} <= set(dataset.column_names):
        sources = ((row["_file"], row["_line"]) for rows in chunks(dataset.select_columns(["_file", "_line"])) for row in rows)

    def noted(row: dict[str, Any]) -> Any:
        file, line = next(sources)
        reasons: list[str] = []
        result = convert(row, reasons.append)
        for reason in reasons:
            run.ledger.add(file, line, reason, "repaired")
        return result

    return format_rows(dataset, noted, run)


# ---------------------------------------------------------------------------------------------------------------------
# Which formatter fits
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guess:
    """A formatter that fits a file, with the columns that say so and the options that it needs. The greater weight wins."""

    formatter: str
    columns: tuple[str, ...]
    options: dict[str, str] = field(default_factory=dict)
    weight: int = 1

    @property
    def command(self) -> str:
        return " ".join([f"--formatter {self.formatter}", *(f"-o formatter.{key}={value}" for key, value in self.options.items())])

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        columns = f"column{'s' if len(self.columns) > 1 else ''} {', '.join(self.columns)}"
        return f"{self.formatter} {f'with {options} ' if options else ''}({columns})"


def guesses(dataset: Dataset) -> list[Guess]:
    """The formatters that fit, by column names and the first rows: of those, the most specific. Several: it is ambiguous.

    Pairs of answers are more specific than labelled answers, those than answers, and any of them than plain text.
    """
    sample = dataset.select(range(min(SAMPLE, len(dataset))))
    seen = {column: [value for value in sample[column] if value is not None] for column in columns_of(dataset)}
    found = [*_preferences(seen), *_conversations(seen), *_instructions(seen), *_completions(seen), *_texts(seen)]
    return [guess for guess in found if guess.weight == max(one.weight for one in found)]


Seen = dict[str, list[Any]]


def _preferences(seen: Seen) -> Iterable[Guess]:
    if {"chosen", "rejected"} <= seen.keys():
        prompts = [column for column in PROMPTS if column in seen][:1]
        options = {}
        if not prompts and "question" in seen:
            prompts, options = ["question"], {"prompt_column": "question", "style": "chat"}
        yield Guess("preference", (*prompts, "chosen", "rejected"), options, weight=3)
    label = next((name for name in LABELS if any(is_label(value) for value in seen.get(name, []))), None)
    if label is not None:
        for answers in (("prompt", "completion"), ("instruction", "output"), *((name,) for name in CONVERSATIONS[:2])):
            if set(answers) <= seen.keys():
                yield Guess("preference", (*answers, label), weight=2)
                break


def _conversations(seen: Seen) -> Iterable[Guess]:
    if any(is_tree(value) for value in seen.get("prompt", [])):
        yield Guess("messages", ("prompt",))
    for column in CONVERSATIONS:
        first = next((value[0] for value in seen.get(column, []) if isinstance(value, list) and value and isinstance(value[0], dict)), {})
        for formatter, keys, usual in (("sharegpt", {"from", "value"}, "conversations"), ("messages", {"role", "content"}, "messages")):
            if keys <= first.keys():
                yield Guess(formatter, (column,), {} if column == usual else {"messages_column": column})


def _instructions(seen: Seen) -> Iterable[Guess]:
    answer = next((column for column in ("output", "instances", "response") if column in seen), None)
    if "instruction" in seen and answer is not None:
        extra = next((column for column in ("input", "context") if column in seen), None) if answer != "instances" else None
        options = {"output_column": "response"} if answer == "response" else {}
        options |= {"input_column": "context"} if extra == "context" else {}
        yield Guess("alpaca", ("instruction", *([extra] if extra else []), answer), options)


def _completions(seen: Seen) -> Iterable[Guess]:
    for prompt, completion, style in PAIRS:
        if {prompt, completion} <= seen.keys() and not any(is_tree(value) for value in seen[prompt]):
            usual = {"prompt_column": "prompt", "completion_column": "completion", "style": "text"}
            options = {"prompt_column": prompt, "completion_column": completion, "style": style}
            yield Guess("completion", (prompt, completion), {key: value for key, value in options.items() if value != usual[key]})


def _texts(seen: Seen) -> Iterable[Guess]:
    if "text" in seen:
        yield Guess("text", ("text",), weight=0)
        for column in CLASSES:
            if any(isinstance(value, str) for value in seen.get(column, [])):
                yield Guess("completion", ("text", column), {"prompt_column": "text", "completion_column": column}, weight=0)


def is_tree(value: Any) -> bool:
    """True for a message with replies, the root of an OpenAssistant tree."""
    return isinstance(value, dict) and "replies" in value


def is_label(value: Any) -> bool:
    """True for a boolean, or its text: CSV has no other."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))
