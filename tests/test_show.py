"""Rows as the model sees them."""

from __future__ import annotations

import io

import pytest
from rich.console import Console as Rich

from ftx.console import Console
from ftx.data import to_dataset
from ftx.encode import IGNORE, encode_row
from ftx.show import pieces, show_rows
from ftx.testing import tiny_tokenizer

ROW = {"messages": [{"role": "user", "content": "Say\thi."}, {"role": "assistant", "content": "Hi \u00e9!"}]}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def printed(rows, tokenizer, count: int = 3, **rich) -> str:
    console, stream = Console(), io.StringIO()
    console.rich = Rich(file=stream, highlight=False, markup=False, soft_wrap=True, width=80, **rich)
    show_rows(to_dataset(rows), tokenizer, count, console)
    return stream.getvalue()


def encoded(tokenizer, row=ROW, line: int = 7) -> dict:
    one = encode_row(row, tokenizer)
    return {"input_ids": one.input_ids, "labels": one.labels, "_file": "d.jsonl", "_line": line}


def test_pieces_are_all_of_the_text_and_say_what_counts(tokenizer):
    row = encoded(tokenizer)
    found = list(pieces(row["input_ids"], row["labels"], tokenizer))
    assert "".join(text for text, _, _ in found) == tokenizer.decode(row["input_ids"], skip_special_tokens=False)
    assert [text for text, supervised, _ in found if supervised] == ["Hi \u00e9!", "<|im_end|>", "\n"]
    assert {text for text, _, special in found if special} == {"<|im_start|>", "<|im_end|>"}


def test_without_colours_supervised_tokens_stand_in_brackets(tokenizer):
    assert printed([encoded(tokenizer)], tokenizer).splitlines() == [
        "Supervised tokens stand in \u27e6 \u27e7:",
        "-- d.jsonl:7: 34 tokens, 8 supervised",
        "<|im_start|>user\u23ce",
        "Say\u21e5hi.<|im_end|>\u23ce",
        "<|im_start|>assistant\u23ce",
        "\u27e6Hi \u00e9!<|im_end|>\u23ce",
        "\u27e7",
    ]


def test_on_a_terminal_they_are_green(tokenizer):
    text = printed([encoded(tokenizer)], tokenizer, force_terminal=True, color_system="standard")
    assert "\x1b[32mHi \u00e9!\x1b[0m" in text and "\u27e6" not in text
    assert "\x1b[2;7m<|im_start|>\x1b[0m" in text and "\x1b[1;7;32m<|im_end|>\x1b[0m" in text


def test_as_many_rows_as_asked_for_and_both_sides_of_a_pair(tokenizer):
    rows = [encoded(tokenizer, line=line) for line in range(1, 6)]
    assert printed(rows, tokenizer, 2).count("-- d.jsonl:") == 2 and printed(rows, tokenizer, 9).count("-- d.jsonl:") == 5
    assert printed(rows, tokenizer, 0) == ""
    one = encode_row({"prompt": "q", "completion": "a"}, tokenizer)
    pair = {f"{side}_{what}": getattr(one, what) for side in ("chosen", "rejected") for what in ("input_ids", "labels")}
    assert [line for line in printed([pair], tokenizer).splitlines() if line.startswith("--")] == [
        "-- row 1, chosen: 3 tokens, 2 supervised",
        "-- row 1, rejected: 3 tokens, 2 supervised",
    ]


def test_text_from_data_cannot_touch_the_terminal(tokenizer):
    row = {"messages": [{"role": "user", "content": "\x1b[2J[red]a"}, {"role": "assistant", "content": "b\x07\u202e"}]}
    text = printed([encoded(tokenizer, row)], tokenizer)
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text and "[red]a" in text


def test_the_first_label_never_counts(tokenizer):
    ids = tokenizer("abc")["input_ids"]
    assert [(text, supervised) for text, supervised, _ in pieces(ids, list(ids), tokenizer)] == [("a", False), ("bc", True)]
    assert [(text, supervised) for text, supervised, _ in pieces(ids, [IGNORE] * 3, tokenizer)] == [("abc", False)]
