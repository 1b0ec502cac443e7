"""`unformat_row`: a formatted row goes into a file and back, between all formats, or is refused."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftx import RowError
from ftx.data import to_dataset
from ftx.ledger import Ledger
from ftx.run import Run
from ftx_formats import Alpaca, Completion, Messages, ShareGPT, Text
from ftx_formats_auto import Auto
from ftx_formats_preference import Preference

TARGETS = {
    "alpaca": Alpaca(),
    "alpaca-classic": Alpaca(style="instruction"),
    "alpaca-renamed": Alpaca(instruction_column="q", output_column="a", input_column=None, history_column=None),
    "sharegpt": ShareGPT(),
    "sharegpt-tags": ShareGPT(role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant", observation_tag="tool", tools_column=None),
    "messages": Messages(),
    "completion": Completion(),
    "completion-chat": Completion(style="chat", prompt_column="question", completion_column="answer"),
    "preference": Preference(),
    "text": Text(),
    "auto": Auto(),
}
RUN = Run(recipe=None, ledger=Ledger(), say=lambda text: None)

some_text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=12).filter(str.strip) | st.sampled_from(
    ["### Instruction:\nx", "a\n\n### Response:b", " padded ", "\n\n### Input:\n", '{"a": 1}', "Human:", "1", "null", "é\r\n", "\\"]
)
json_value = st.none() | st.booleans() | st.integers() | some_text
call = st.builds(
    lambda name, arguments, more: {"type": "function", "function": {"name": name, "arguments": arguments}, **more},
    some_text,
    st.dictionaries(some_text, json_value, max_size=2),
    st.just({}) | st.builds(lambda one: {"id": one}, some_text),
)
tool = st.builds(lambda name: {"type": "function", "function": {"name": name, "description": "d", "parameters": {}}}, some_text)
tools = st.just([]) | st.lists(tool, min_size=1, max_size=2)


@st.composite
def conversations(draw) -> list[dict]:
    """A conversation as formatters give it, mostly simple."""
    turns = [{"role": "system", "content": draw(some_text)}] if draw(st.booleans()) else []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        extra = {"name": draw(some_text)} if draw(st.integers(0, 9)) == 0 else {}
        turns.append({"role": "user", "content": draw(some_text), **extra})
        if draw(st.integers(0, 3)) == 0:
            said = draw(st.just("") | st.just("") | some_text)
            turns.append({"role": "assistant", "content": said, "tool_calls": draw(st.lists(call, min_size=1, max_size=2))})
            turns += [{"role": "tool", "content": draw(st.text(max_size=3, alphabet="ab {"))} for _ in range(draw(st.integers(1, 2)))]
        turns.append({"role": "assistant", "content": draw(some_text)})
    return turns


@st.composite
def rows(draw) -> dict:
    """A formatted row of any row type."""
    kind = draw(st.sampled_from(["conversation", "turns", "texts", "pair", "pair-texts", "label", "text"]))
    if kind == "text":
        return {"text": draw(some_text)}
    if kind == "texts":
        return {"prompt": draw(some_text | classic()), "completion": draw(some_text)}
    if kind == "pair-texts":
        chosen, rejected = draw(st.tuples(some_text, some_text).filter(lambda two: two[0] != two[1]))
        return {"prompt": draw(some_text), "chosen": chosen, "rejected": rejected}
    turns, more = draw(conversations()), draw(tools)
    if kind == "conversation":
        return {"messages": turns, **({"tools": more} if more else {})}
    cut = draw(st.sampled_from([i for i, one in enumerate(turns) if one["role"] == "assistant" and turns[i - 1]["role"] == "user"]))
    if kind == "turns":
        return {"prompt": turns[:cut], "completion": turns[cut:], **({"tools": more} if more else {})}
    if kind == "label":
        return {"prompt": turns[:-1], "completion": turns[-1:], "label": draw(st.booleans())}
    return {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": [{"role": "assistant", "content": turns[-1]["content"] + "!"}]}


def classic() -> st.SearchStrategy[str]:
    """Prompts in Alpaca's own text."""
    row = st.fixed_dictionaries({"instruction": some_text, "input": st.just("") | some_text, "output": st.just("x")}, optional={"system": some_text})
    return row.map(lambda one: read(TARGETS["alpaca-classic"], one)["prompt"])


def read(formatter, row: dict) -> dict:
    """A row of a file -> the one formatted row that it gives, through real JSON and a real dataset."""
    raw = to_dataset([{**json.loads(json.dumps(row, ensure_ascii=False)), "_file": "f", "_line": 1}])
    formatted = formatter.format_dataset(raw, RUN)
    assert len(formatted) == 1
    return {key: value for key, value in formatted[0].items() if not key.startswith("_")}


def meaning(row: dict):
    """What a row trains, whatever form it has: every turn with whether it counts. Written here anew, to check the code by it."""
    if row.get("messages"):
        turns, counts = row["messages"], [one["role"] == "assistant" for one in row["messages"]]
    elif isinstance(row.get("completion"), list) and row.get("label") is None:
        turns = row["prompt"] + row["completion"]
        counts = [False] * len(row["prompt"]) + [one["role"] == "assistant" for one in row["completion"]]
    else:
        return {key: value for key, value in row.items() if value is not None and value != []}
    return list(zip(({k: v for k, v in one.items() if v is not None} for one in turns), counts, strict=True)), row.get("tools") or []


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(row=rows())
def test_there_and_back_is_equal_or_it_is_refused(row):
    there_and_back(row)


@pytest.mark.full
@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@given(row=rows())
def test_there_and_back_of_many_rows(row):
    there_and_back(row)


def there_and_back(row: dict) -> None:
    """Through every pair of formats: whatever the second can hold of what the first held comes back as it was."""
    written = {}
    for name, target in TARGETS.items():
        try:
            written[name] = target.unformat_row(row, RUN)
        except RowError:
            continue
        assert meaning(read(target, written[name])) == meaning(row), name
    assert written, "no format holds the row"
    written.pop("auto")  # it writes a row in the form of its type
    held = {name: read(TARGETS[name], file) for name, file in written.items()}
    for one, other in itertools.permutations(written, 2):
        over = TARGETS[other].unformat_row(held[one], RUN)
        assert TARGETS[one].unformat_row(read(TARGETS[other], over), RUN) == written[one], f"{one} -> {other} -> {one}"


SIMPLE = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}
SYSTEM = {"messages": [{"role": "system", "content": "s"}, *SIMPLE["messages"]]}
LONG = {"messages": [*SIMPLE["messages"], {"role": "user", "content": "c?"}, {"role": "assistant", "content": "d"}]}
HISTORY = {"prompt": LONG["messages"][:3], "completion": LONG["messages"][3:]}
TEXTS = {"prompt": "a?", "completion": "b"}
PAIR = {"prompt": "a?", "chosen": "b", "rejected": "c"}
CALLS = {
    "messages": [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "b"},
    ],
    "tools": [{"type": "function", "function": {"name": "f"}}],
}


@pytest.mark.parametrize(
    ("name", "row", "file"),
    [
        ("alpaca", SIMPLE, {"instruction": "a?", "input": "", "output": "b"}),
        ("alpaca", SYSTEM, {"instruction": "a?", "input": "", "output": "b", "system": "s"}),
        ("alpaca", HISTORY, {"instruction": "c?", "input": "", "output": "d", "history": [["a?", "b"]]}),
        ("sharegpt", LONG, {"conversations": [{"from": f, "value": v} for f, v in (("human", "a?"), ("gpt", "b"), ("human", "c?"), ("gpt", "d"))]}),
        (
            "sharegpt",
            CALLS,
            {
                "conversations": [
                    {"from": "human", "value": "a?"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "1"},
                    {"from": "gpt", "value": "b"},
                ],
                "tools": CALLS["tools"],
            },
        ),
        ("messages", CALLS, CALLS),
        ("completion", TEXTS, TEXTS),
        ("completion", LONG, {"prompt": LONG["messages"][:1], "completion": LONG["messages"][1:]}),
        ("completion-chat", SIMPLE, {"question": "a?", "answer": "b"}),
        ("preference", PAIR, PAIR),
        ("text", {"text": " a "}, {"text": " a "}),
        ("auto", SIMPLE, SIMPLE),
        ("auto", TEXTS, TEXTS),
    ],
)
def test_what_is_written(name, row, file):
    assert TARGETS[name].unformat_row(row, RUN) == file


@pytest.mark.parametrize(
    ("name", "row", "problem"),
    [
        ("alpaca", LONG, "alpaca trains on one answer, and 3 turns of this row count"),
        ("alpaca", CALLS, "alpaca has no place for tools"),
        ("alpaca", TEXTS, "alpaca holds turns, and this row is plain text to continue"),
        ("alpaca-renamed", HISTORY, "alpaca has no column for earlier turns"),
        ("alpaca-classic", SIMPLE, "style=instruction holds texts"),
        ("alpaca-classic", TEXTS, "the prompt is not Alpaca's own text"),
        ("messages", HISTORY, "messages trains on every answer, and 1 of this row are context only"),
        ("messages", PAIR, "messages holds one answer, this row has a chosen and a rejected one"),
        ("sharegpt", {"prompt": "a", "completion": "b", "label": True}, "no place for a label"),
        ("sharegpt", {"messages": [{**SIMPLE["messages"][0], "name": "Ann"}, SIMPLE["messages"][1]]}, "no place for name of a turn"),
        ("sharegpt-tags", CALLS, "the format has no column for tools"),
        ("completion", {"text": "a"}, "this row is plain text"),
        ("preference", SIMPLE, "this row has one answer"),
        ("text", SIMPLE, "this row has a question, or turns"),
    ],
)
def test_what_is_refused(name, row, problem):
    with pytest.raises(RowError, match=problem):
        TARGETS[name].unformat_row(row, RUN)


def test_auto_writes_what_the_training_data_have(tmp_path):
    from ftx.recipe import Recipe

    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"question": "x?", "answer": "y"}) + "\n")
    run = Run(recipe=Recipe(data=str(file)), ledger=Ledger(), say=lambda text: None)
    assert Auto().unformat_row(SIMPLE, run) == {"question": "a?", "answer": "b"}
    file.unlink()
    assert Auto().unformat_row(SIMPLE, run) == SIMPLE
