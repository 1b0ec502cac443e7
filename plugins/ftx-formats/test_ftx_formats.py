"""The formatters of ftx-formats on real files, on rows of every shape they know, and on corrupted ones."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ftx import Run
from ftx.data import read_dataset, row_type, to_dataset
from ftx.encode import encode_row
from ftx.errors import DataError
from ftx.ledger import Ledger
from ftx.testing.tiny import tiny_tokenizer
from ftx_formats import PREAMBLE, PREAMBLE_INPUT, Alpaca, Completion, Messages, ShareGPT, Text
from ftx_formats_auto import FORMATTERS, Auto
from ftx_formats_preference import Preference

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

ALPACA = "alpaca_en_demo/alpaca_en_demo.json"
IDENTITY = "identity/identity.json"
SEEDS = "self_instruct/seed_tasks.jsonl"
EXPERTS = "self_instruct/user_oriented_instructions.jsonl"
FASTCHAT = "fastchat_dummy/dummy_conversation.json"
GLAIVE = "glaive_toolcall_en_demo/glaive_toolcall_en_demo.json"
DPO = "dpo_en_demo/dpo_en_demo.json"
KTO = "kto_en_demo/kto_en_demo.json"
OASST = "oasst_sample/en_100_tree.jsonl"
BANKING = "banking77/train.csv"
GSM8K = "gsm8k/train.first2000.jsonl"
HUMANEVAL = "humaneval/HumanEval.jsonl.gz"

#: file, formatter, row type, rows
READ = [
    (ALPACA, Alpaca(), "prompt-completion", 999),
    (ALPACA, Alpaca(style="instruction"), "prompt-completion", 999),
    (IDENTITY, Alpaca(), "prompt-completion", 91),
    (SEEDS, Alpaca(), "prompt-completion", 175),
    (EXPERTS, Alpaca(), "prompt-completion", 252),
    (FASTCHAT, ShareGPT(), "conversation", 500),
    (GLAIVE, ShareGPT(), "conversation", 300),
    (DPO, Preference(), "preference", 300),
    (KTO, Preference(), "unpaired-preference", 300),
    (KTO, Messages(), "conversation", 300),
    (OASST, Messages(), "conversation", 100),
    (OASST, Messages(trees="all", trim=True), "conversation", 546),
    (OASST, Preference(), "preference", 212),
    (OASST, Preference(pairs="all"), "preference", 754),
    (BANKING, Completion(prompt_column="text", completion_column="category"), "prompt-completion", 10003),
    ("banking77/test.csv", Completion(prompt_column="text", completion_column="category", style="chat"), "prompt-completion", 3080),
    (BANKING, Text(), "text", 10003),
    (GSM8K, Completion(prompt_column="question", completion_column="answer", style="chat"), "prompt-completion", 2000),
    ("gsm8k/test.jsonl", Completion(prompt_column="question", completion_column="answer"), "prompt-completion", 1319),
    (HUMANEVAL, Completion(completion_column="canonical_solution"), "prompt-completion", 164),
]
#: file, what auto says first, row type, rows
CHOSEN = [
    (ALPACA, "alpaca (columns instruction, input, output)", "prompt-completion", 999),
    (IDENTITY, "alpaca (columns instruction, input, output)", "prompt-completion", 91),
    (SEEDS, "alpaca (columns instruction, instances)", "prompt-completion", 175),
    (EXPERTS, "alpaca (columns instruction, instances)", "prompt-completion", 252),
    (FASTCHAT, "sharegpt (column conversations)", "conversation", 500),
    (GLAIVE, "sharegpt (column conversations)", "conversation", 300),
    (DPO, "preference (columns conversations, chosen, rejected)", "preference", 300),
    (KTO, "preference (columns messages, label)", "unpaired-preference", 300),
    (OASST, "messages (column prompt)", "conversation", 100),
    (GSM8K, "completion with prompt_column=question, completion_column=answer, style=chat (columns question, answer)", "prompt-completion", 2000),
]

UNREAD = "no prompt was found, and field '{0}' is not used: name the prompt's column, -o formatter.prompt_column={0}"
U = {"role": "user", "content": "Why?"}
A = {"role": "assistant", "content": "Because."}
NO = {"role": "assistant", "content": "No."}
S = {"role": "system", "content": "Be brief."}


def new_run(skip: bool = False) -> tuple[Run, list[str]]:
    said: list[str] = []
    return Run(recipe=None, ledger=Ledger(skip_bad_rows=skip), say=said.append), said


def formatted(plugin, rows, skip=False):
    """What the formatter makes of rows, without where they came from; absent fields are left out."""
    run, _ = new_run(skip)
    dataset = plugin.format_dataset(to_dataset(rows), run)
    return [{key: value for key, value in row.items() if not key.startswith("_") and value is not None} for row in dataset]


def refused(plugin, *rows) -> str:
    with pytest.raises(DataError) as error:
        formatted(plugin, list(rows))
    return error.value.problem


def real(name: str) -> Path:
    if not (DATA / name).exists():
        pytest.skip(f"the shared data has no {name}")
    return DATA / name


# ---------------------------------------------------------------------------------------------------------------------
# Real files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, plugin, kind, rows", READ, ids=lambda value: type(value).__name__ if hasattr(value, "format_dataset") else str(value))
def test_every_row_of_a_real_file_is_read(name, plugin, kind, rows):
    run, _ = new_run()
    dataset = plugin.format_dataset(read_dataset(str(real(name)), run.ledger), run)
    assert (row_type(dataset.column_names), len(dataset)) == (kind, rows)
    assert kind in type(plugin).produces
    assert not run.ledger.dropped()
    assert set(dataset["_file"]) == {str(DATA / name)}


@pytest.mark.parametrize("name, said, kind, rows", CHOSEN, ids=[row[0] for row in CHOSEN])
def test_auto_says_what_it_chose(name, said, kind, rows):
    run, lines = new_run()
    dataset = Auto().format_dataset(read_dataset(str(real(name)), run.ledger), run)
    assert lines[0] == f"formatter auto: {said}"
    assert (row_type(dataset.column_names), len(dataset)) == (kind, rows)
    assert not run.ledger.entries


def test_real_labels_and_system_texts():
    run, _ = new_run()
    assert Counter(Preference().format_dataset(read_dataset(str(real(KTO)), run.ledger), run)["label"]) == {True: 150, False: 150}
    pairs = Preference().format_dataset(read_dataset(str(real(DPO)), run.ledger), run)
    assert sum(row["prompt"][0]["role"] == "system" for row in pairs) == 80
    assert sum(sum(turn["role"] == "user" for turn in row["prompt"]) > 1 for row in pairs) == 106
    assert all(row["prompt"][-1]["role"] == "user" and len(row["chosen"]) == len(row["rejected"]) == 1 for row in pairs)


def test_real_trees_without_trim_give_their_400_complete_branches_and_ledger_the_rest():
    run, _ = new_run(skip=True)
    source = read_dataset(str(real(OASST)), run.ledger)
    dataset = Messages(trees="all").format_dataset(source, run)
    assert len(dataset) == 400
    assert len(run.ledger.dropped()) == 4 and len(set(dataset["_line"])) == 96
    assert all("no branch of the tree ends with an answer" in entry.reason for entry in run.ledger.entries if entry.action == "dropped")
    left_out = [entry for entry in run.ledger.entries if entry.action == "repaired"]
    assert left_out and all("branch(es) of the tree that end with a question" in entry.reason for entry in left_out)


def test_real_tool_calls_reach_the_tokens_without_loss():
    run, _ = new_run()
    source = read_dataset(str(real(GLAIVE)), run.ledger)
    tokenizer = tiny_tokenizer()
    calls = 0
    for raw, row in zip(source, ShareGPT().format_dataset(source, run), strict=True):
        encoded = encode_row(row, tokenizer)
        whole = tokenizer.decode(encoded.input_ids)
        learnt = tokenizer.decode([label for label in encoded.labels if label != -100])
        for tool in json.loads(raw["tools"]):
            assert json.dumps(tool, ensure_ascii=False) in whole
        for turn in raw["conversations"]:
            if turn["from"] == "function_call":
                calls += 1
                assert json.dumps(json.loads(turn["value"]), ensure_ascii=False) in learnt
            else:
                assert turn["value"] in whole
                assert (turn["from"] == "gpt") <= (turn["value"] in learnt)
        assert learnt.count("<|im_end|>") == sum(turn["from"] in ("gpt", "function_call") for turn in raw["conversations"])
    assert calls == 211


# ---------------------------------------------------------------------------------------------------------------------
# alpaca
# ---------------------------------------------------------------------------------------------------------------------


def test_alpaca_chat():
    rows = [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "Hello", "system": "Be kind.", "history": [["a", "b"]]},
        {"instruction": "", "input": "only input", "output": "x"},
    ]
    first, second, third = formatted(Alpaca(), rows)
    assert first == {"prompt": [{"role": "user", "content": "Add.\n1 2"}], "completion": [{"role": "assistant", "content": "3"}]}
    assert [(turn["role"], turn["content"]) for turn in second["prompt"]] == [("system", "Be kind."), ("user", "a"), ("assistant", "b"), ("user", "Hi")]
    assert third["prompt"][0]["content"] == "only input"


def test_alpaca_instruction_text():
    with_input, without, with_all = formatted(
        Alpaca(style="instruction"),
        [
            {"instruction": "Add.", "input": "1 2", "output": "3"},
            {"instruction": "Hi", "input": None, "output": "Hello"},
            {"instruction": "Hi", "output": "Hello", "system": "Be kind.", "history": [["a", "b"]]},
        ],
    )
    assert with_input == {"prompt": f"{PREAMBLE_INPUT}\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:", "completion": "3"}
    assert without["prompt"] == f"{PREAMBLE}\n\n### Instruction:\nHi\n\n### Response:"
    assert with_all["prompt"] == "Be kind.\n\n### Instruction:\na\n\n### Response:b\n\n### Instruction:\nHi\n\n### Response:"


def test_alpaca_gives_a_row_for_each_instance_and_counts_source_rows():
    good = {"instruction": "Sum.", "instances": [{"input": "1 1", "output": "2"}, {"input": "", "output": "none"}]}
    bad = {"instruction": "Sum.", "instances": [{"input": "1 1", "output": "2"}, {"input": "", "output": " "}]}
    run, _ = new_run(skip=True)
    dataset = Alpaca().format_dataset(to_dataset([{**good, "_file": "f", "_line": 1}, {**bad, "_file": "f", "_line": 2}]), run)
    assert [row["prompt"][0]["content"] for row in dataset] == ["Sum.\n1 1", "Sum."]
    assert [(entry.line, entry.reason) for entry in run.ledger.entries] == [(2, "field 'output' is empty")]


def test_alpaca_reads_other_column_names():
    plugin = Alpaca(instruction_column="question", output_column="response", system_column="system_prompt")
    [row] = formatted(plugin, [{"question": "q", "response": "r", "system_prompt": "s"}])
    assert [turn["content"] for turn in row["prompt"]] == ["s", "q"]


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"output": ""}, "field 'output' is empty"),
        ({"output": None}, "field 'output' is missing or null"),
        ({"output": 3}, "field 'output' must be a text, this is a number"),
        ({"output": ["a"]}, "field 'output' must be a text, this is a list"),
        ({"instruction": " "}, "field 'instruction' is empty"),
        ({"input": {}}, "field 'input' must be a text, this is an object"),
        ({"history": "a"}, "field 'history' must be a list of [question, answer] pairs, this is a text"),
        ({"history": [["a"]]}, "field 'history', pair 1 must be a question and an answer"),
        ({"history": [["a", ""]]}, "field 'history', pair 1 is empty"),
        ({"system": 1}, "field 'system' must be a text, this is a number"),
    ],
)
def test_alpaca_refuses(change, problem):
    good = {"instruction": "i", "input": "", "output": "o"}
    assert refused(Alpaca(), good, {**good, **change}) == f"row:2: {problem}."


# ---------------------------------------------------------------------------------------------------------------------
# sharegpt and messages
# ---------------------------------------------------------------------------------------------------------------------


def turns(*pairs):
    return [{"from": tag, "value": value} for tag, value in pairs]


def test_sharegpt_tools_calls_and_observations():
    call = {"name": "add", "arguments": {"a": 1}}
    row = {
        "conversations": turns(("human", "q"), ("function_call", json.dumps([call, {"name": "now"}])), ("observation", "1"), ("tool", ""), ("gpt", "a")),
        "system": "s",
        "tools": json.dumps([{"name": "add", "description": "d", "parameters": {}}]),
    }
    plain = {"conversations": turns(("human", "q"), ("gpt", "a"))}
    first, second = formatted(ShareGPT(), [row, plain])
    assert first["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": call}, {"type": "function", "function": {"name": "now", "arguments": {}}}],
        },
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "a"},
    ]
    assert first["tools"] == [{"type": "function", "function": {"name": "add", "description": "d", "parameters": {}}}]
    assert second == {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def test_sharegpt_reads_other_tags():
    plugin = ShareGPT(messages_column="messages", role_tag="role", content_tag="content", user_tag="user", assistant_tag="assistant")
    [row] = formatted(plugin, [{"messages": [S, U, A]}])
    assert row["messages"] == [S, U, A]


def test_sharegpt_options_are_checked():
    with pytest.raises(ValueError, match="two roles have the same tag 'gpt'"):
        ShareGPT(user_tag="gpt")
    with pytest.raises(ValueError, match="role_tag and content_tag are both 'value'"):
        ShareGPT(role_tag="value")


HINT = r" (-o formatter.trim=true drops such turns)"


@pytest.mark.parametrize(
    "value, problem",
    [
        ("hello", "field 'conversations' must be a list of messages, this is a text"),
        ([], "field 'conversations' is empty"),
        (None, "field 'conversations' is missing or null"),
        (["a"], "field 'conversations', message 1 must be an object, this is a text"),
        (
            turns(("bot", "a")),
            "field 'conversations', message 1: unknown role tag 'bot' under 'from'; known: tool, human, gpt, observation, function_call, system",
        ),
        (turns(("human", "a"), ("gpt", "")), "field 'conversations', message 2 (assistant) is empty"),
        (turns(("human", None), ("gpt", "a")), "field 'conversations', message 1 (user) is missing or null"),
        (turns(("human", "a"), ("human", "b"), ("gpt", "c")), "field 'conversations', message 2: a user turn cannot follow a user turn"),
        (turns(("human", "a"), ("gpt", "b"), ("gpt", "c")), "field 'conversations', message 3: an assistant turn cannot follow an assistant turn"),
        (turns(("human", "a"), ("gpt", "b"), ("system", "c")), "field 'conversations', message 3: a system turn must stand first"),
        (turns(("human", "a"), ("observation", "b"), ("gpt", "c")), "field 'conversations', message 2: a tool turn cannot follow a user turn"),
        (turns(("gpt", "a"), ("human", "b"), ("gpt", "c")), f"field 'conversations' begins with an assistant turn{HINT}"),
        (turns(("human", "a"), ("gpt", "b"), ("human", "c")), f"field 'conversations' ends with a user turn that no answer follows{HINT}"),
        (turns(("human", "a")), "field 'conversations' has no assistant turn"),
        (turns(("system", "a")), "field 'conversations' has no assistant turn"),
        (
            turns(("human", "a"), ("function_call", "{")),
            "field 'conversations', message 2 (function_call) is not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        ),
        (turns(("human", "a"), ("function_call", "3")), "field 'conversations', message 2 (function_call) must be an object with a name and arguments"),
        (turns(("human", "a"), ("function_call", "[]")), "field 'conversations', message 2 (function_call) calls nothing"),
        (
            turns(("human", "a"), ("function_call", '{"name": "f", "arguments": [1]}')),
            "field 'conversations', message 2 (function_call): arguments must be an object, this is a list",
        ),
        (
            [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}],
            "field 'conversations', message 2 has weight 0: turns cannot be weighted, every answer counts in the loss",
        ),
    ],
)
def test_sharegpt_refuses(value, problem):
    good = {"conversations": turns(("human", "a"), ("gpt", "b"))}
    assert refused(ShareGPT(), good, {"conversations": value}) == f"row:2: {problem}."


@pytest.mark.parametrize(
    "tools, problem",
    [
        ("[", "field 'tools' is not valid JSON (Expecting value: line 1 column 2 (char 1))"),
        ("[1]", "field 'tools', tool 1: a tool must be an object with a name"),
        ([{"name": "f"}, {"function": 3}], "field 'tools', tool 2: a tool must be an object with a name"),
        ('[{"name": "f", "parameters": NaN}]', "field 'tools' is not valid JSON (NaN is no JSON number)"),
    ],
)
def test_tools_are_checked(tools, problem):
    assert refused(ShareGPT(), {"conversations": turns(("human", "a"), ("gpt", "b")), "tools": tools}) == f"row:1: {problem}."


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools_give_no_column(tools):
    run, _ = new_run()
    rows = [{"conversations": turns(("human", "a"), ("gpt", "b")), "tools": tools}]
    assert "tools" not in ShareGPT().format_dataset(to_dataset(rows), run).column_names


def test_trim_drops_what_cannot_be_trained_on_and_says_so():
    rows = [{"conversations": turns(("system", "s"), ("gpt", "x"), ("human", "q"), ("gpt", "a"), ("human", "z")), "_file": "f", "_line": 7}]
    run, _ = new_run()
    [row] = ShareGPT(trim=True).format_dataset(to_dataset(rows), run)
    assert [turn["content"] for turn in row["messages"]] == ["s", "q", "a"]
    assert [(entry.file, entry.line, entry.action) for entry in run.ledger.entries] == [("f", 7, "repaired")] * 2
    assert [entry.reason for entry in run.ledger.entries] == ["dropped 1 turn(s) before the first user turn", "dropped 1 turn(s) after the last answer"]
    for hopeless in (turns(("human", "q")), turns(("gpt", "a")), turns(("gpt", "a"), ("human", "q"))):
        assert "row:1: field 'conversations'" in refused(ShareGPT(trim=True), {"conversations": hopeless})


def test_messages_with_tool_calls_parts_and_former_names():
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    row = {
        "messages": [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
            {"role": "assistant", "content": "two", "tool_calls": None, "weight": 1},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "", "function_call": {"name": "now", "arguments": ""}},
            {"role": "function", "name": "now", "content": "noon"},
            {"role": "assistant", "content": "noon"},
        ]
    }
    [row] = formatted(Messages(), [row])
    assert row["messages"] == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [{**call, "function": {"name": "add", "arguments": {"a": 1}}}]},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}]},
        {"role": "tool", "content": "noon", "name": "now"},
        {"role": "assistant", "content": "noon"},
    ]


@pytest.mark.parametrize(
    "second, problem",
    [
        ({"role": "gpt", "content": "a"}, "message 2: unknown role 'gpt'; known: system, user, assistant, tool"),
        ({"content": "a"}, "message 2: unknown role null; known: system, user, assistant, tool"),
        ({"role": "assistant", "content": None}, "message 2 (assistant) is missing or null"),
        ({"role": "assistant", "content": ""}, "message 2 (assistant) is empty"),
        ({"role": "assistant", "content": "", "tool_calls": []}, "message 2 (assistant) is empty"),
        ({"role": "assistant", "content": [{"type": "image_url"}]}, "message 2 (assistant) has a part of type 'image_url': only text can be trained on"),
        ({"role": "assistant", "content": {}}, "message 2 (assistant) must be a text, this is an object"),
        ({"role": "assistant", "tool_calls": {}}, "message 2: tool_calls must be a list, this is an object"),
        ({"role": "assistant", "tool_calls": [{"id": "x"}]}, "message 2, tool call must be an object with a name and arguments"),
        ({"role": "user", "content": "a", "tool_calls": [{"name": "f"}]}, "message 2: only an assistant turn can call tools"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]},
            "message 2, tool call: arguments is not valid JSON (Expecting value: line 1 column 1 (char 0))",
        ),
    ],
)
def test_messages_refuses(second, problem):
    assert refused(Messages(), {"messages": [U, second]}) == f"row:1: field 'messages', {problem}."


# ---------------------------------------------------------------------------------------------------------------------
# Trees
# ---------------------------------------------------------------------------------------------------------------------


def node(text, *replies, rank=None, **more):
    return {"text": text, "role": more.pop("role", None), "rank": rank, "replies": list(replies), **more}


def tree(root):
    """Fill in the roles: questions and answers by turns."""

    def fill(one, role, other):
        return {**one, "role": one["role"] or role, "replies": [fill(reply, other, role) for reply in one["replies"]]}

    return {"prompt": fill(root, "prompter", "assistant")}


TREE = tree(
    node(
        "q",
        node("worst", rank=2),
        node("best", node("q2"), node("q3", node("late", rank=None), node("early", rank=0), node("late too", rank=1)), rank=0),
        node("middle", node("unanswered"), rank=1),
        node("middle too", rank=1),
        node("gone", node("q4", node("gone too")), rank=-1, deleted=True),
    )
)


def said(messages):
    return "/".join(message["content"] for message in messages)


def test_the_best_conversation_of_a_tree():
    [row] = formatted(Messages(), [TREE])
    assert said(row["messages"]) == "q/best/q3/early"
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"] * 2


def test_all_conversations_of_a_tree():
    complete = ["q/worst", "q/best/q3/late", "q/best/q3/early", "q/best/q3/late too", "q/middle too"]
    run, _ = new_run()
    assert [said(row["messages"]) for row in Messages(trees="all").format_dataset(to_dataset([TREE]), run)] == complete
    assert [entry.reason for entry in run.ledger.entries] == [
        "left out 1 deleted message(s) of the tree, with what follows them",
        "left out 2 branch(es) of the tree that end with a question",
    ]
    run, _ = new_run()
    trimmed = [said(row["messages"]) for row in Messages(trees="all", trim=True).format_dataset(to_dataset([TREE]), run)]
    assert trimmed == [*complete[:4], "q/middle", complete[4]]
    assert run.ledger.entries[-1].reason == "dropped 2 question(s) that no answer follows"


def test_ranked_pairs_of_a_tree():
    def pairs(which):
        return [(said(row["prompt"]), said(row["chosen"]), said(row["rejected"])) for row in formatted(Preference(pairs=which), [TREE])]

    assert pairs("best-worst") == [("q", "best", "worst"), ("q/best/q3", "early", "late too")]
    assert pairs("all") == [
        ("q", "best", "middle"),
        ("q", "best", "middle too"),
        ("q", "best", "worst"),
        ("q", "middle", "worst"),
        ("q", "middle too", "worst"),
        ("q/best/q3", "early", "late too"),
    ]


@pytest.mark.parametrize(
    "plugin, root, problem",
    [
        (Messages(), node("q"), "field 'prompt': the tree has no answer"),
        (Messages(trees="all"), node("q", node("a", node("q2"))), "no branch of the tree ends with an answer (-o formatter.trim=true"),
        (Messages(), node("q", node("")), "field 'prompt', message 2 of a branch is empty"),
        (Messages(), node("q", node("a", role="prompter")), "field 'prompt', message 2 of a branch: the role must be 'assistant', this is 'prompter'"),
        (Messages(), node("q", node("a", rank="first")), "message 2 of a branch: the rank must be a whole number, this is a text"),
        (Preference(), node("q", node("a", rank=1), node("b", rank=1)), "no two answers of the tree have different ranks"),
    ],
)
def test_trees_that_do_not_fit(plugin, root, problem):
    assert problem in refused(plugin, tree(root))


def test_a_deep_tree_does_not_exhaust_the_stack():
    root: dict = {"text": "end", "role": "assistant", "rank": 0, "replies": []}
    for depth in range(200):
        root = {"text": str(depth), "role": "assistant" if depth % 2 else "prompter", "rank": 0, "replies": [root]}
    [row] = formatted(Messages(), [{"prompt": root["replies"][0]}])
    assert len(row["messages"]) == 200


# ---------------------------------------------------------------------------------------------------------------------
# completion and text
# ---------------------------------------------------------------------------------------------------------------------


def test_completion_texts_and_messages():
    texts, lists, mixed = formatted(
        Completion(), [{"prompt": "2+2=", "completion": "4"}, {"prompt": [S, U], "completion": [A]}, {"prompt": "Why?", "completion": [A]}]
    )
    assert texts == {"prompt": "2+2=", "completion": "4"}
    assert lists == {"prompt": [S, U], "completion": [A]}
    assert mixed == {"prompt": [U], "completion": [A]}


def test_completion_as_chat_with_tools():
    row = {"question": "Why?", "answer": "Because.", "tools": [{"name": "f"}]}
    plugin = Completion(prompt_column="question", completion_column="answer", style="chat")
    assert formatted(plugin, [row]) == [{"prompt": [U], "completion": [A], "tools": [{"type": "function", "function": {"name": "f"}}]}]
    problem = refused(Completion(prompt_column="question", completion_column="answer"), row)
    assert problem == "row:1: field 'tools' holds tools, which plain text cannot name: use -o formatter.style=chat."


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"prompt": "a", "completion": ""}, "field 'completion' is empty"),
        ({"prompt": "", "completion": "a"}, "field 'prompt' is empty"),
        ({"prompt": "a", "completion": 3}, "field 'completion' must be a text, this is a number"),
        ({"prompt": [U], "completion": [U]}, "field 'completion' must begin with an assistant turn, this is a user turn"),
        ({"prompt": [U, A], "completion": [A]}, "the prompt with field 'completion', message 3: an assistant turn cannot follow an assistant turn"),
        ({"prompt": [U], "completion": [A, U]}, "the prompt with field 'completion' ends with a user turn that no answer follows"),
        ({"prompt": [], "completion": [A]}, "field 'prompt' is empty"),
    ],
)
def test_completion_refuses(row, problem):
    assert refused(Completion(), row) == f"row:1: {problem}."


def test_text():
    assert formatted(Text(text_column="body"), [{"body": " a "}]) == [{"text": " a "}]
    assert refused(Text(), {"text": "a"}, {"text": "\n"}) == "row:2: field 'text' is empty."


# ---------------------------------------------------------------------------------------------------------------------
# preference
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row, plugin, expected",
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, Preference(), {"prompt": "p", "chosen": "c", "rejected": "r"}),
        ({"prompt": "Why?", "chosen": "Because.", "rejected": "No."}, Preference(style="chat"), {"prompt": [U], "chosen": [A], "rejected": [NO]}),
        ({"prompt": [U], "chosen": [A], "rejected": [NO]}, Preference(), {"prompt": [U], "chosen": [A], "rejected": [NO]}),
        ({"prompt": [U], "chosen": "Because.", "rejected": NO}, Preference(), {"prompt": [U], "chosen": [A], "rejected": [NO]}),
        ({"chosen": [S, U, A], "rejected": [S, U, NO]}, Preference(), {"prompt": [S, U], "chosen": [A], "rejected": [NO]}),
        ({"prompt": "Why?", "chosen": [U, A], "rejected": [U, NO]}, Preference(), {"prompt": [U], "chosen": [A], "rejected": [NO]}),
        ({"prompt": [U], "chosen": [U, A], "rejected": [U, NO]}, Preference(), {"prompt": [U], "chosen": [A], "rejected": [NO]}),
        ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, Preference(), {"prompt": "The sky is", "chosen": " blue.", "rejected": " black."}),
        (
            {"text": "t", "chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
            Preference(),
            {"prompt": [U], "chosen": [A], "rejected": [NO]},
        ),
        (
            {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No."},
            Preference(),
            {"prompt": [U], "chosen": [A], "rejected": [NO]},
        ),
        (
            {"chosen": "\n\nHuman: Why?\n\nAssistant: Because.", "rejected": "\n\nHuman: Why?\n\nAssistant: No.\n\nHuman: Why?\n\nAssistant: Because."},
            Preference(),
            {"prompt": [U], "chosen": [A], "rejected": [NO, U, A]},
        ),
        (
            {
                "conversations": turns(("system", "Be brief."), ("human", "Why?")),
                "chosen": {"from": "gpt", "value": "Because."},
                "rejected": {"from": "gpt", "value": "No."},
            },
            Preference(),
            {"prompt": [S, U], "chosen": [A], "rejected": [NO]},
        ),
        (
            {"instruction": "Why", "input": "?", "chosen": "Because.", "rejected": "No.", "system": "Be brief."},
            Preference(),
            {"prompt": [S, {"role": "user", "content": "Why\n?"}], "chosen": [A], "rejected": [NO]},
        ),
        (
            {"question": "Why?", "chosen": "Because.", "rejected": "No.", "system": "Be brief."},
            Preference(prompt_column="question"),
            {"prompt": [S, U], "chosen": [A], "rejected": [NO]},
        ),
        (
            {"p": "Why?", "good": "Because.", "bad": "No."},
            Preference(prompt_column="p", chosen_column="good", rejected_column="bad"),
            {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
        ),
    ],
)
def test_pairs(row, plugin, expected):
    assert formatted(plugin, [row]) == [expected]


@pytest.mark.parametrize(
    "row, problem",
    [
        ({"prompt": "p", "chosen": "c", "rejected": "c"}, "fields 'chosen' and 'rejected' are equal"),
        ({"prompt": "p", "chosen": "c", "rejected": ""}, "field 'rejected' is empty"),
        ({"prompt": "p", "chosen": None, "rejected": "r"}, "field 'chosen' is missing or null"),
        ({"chosen": [U, A], "rejected": [S, A]}, "fields 'chosen' and 'rejected' share no prompt, and the row has none beside them"),
        ({"chosen": [U, A], "rejected": "r"}, "fields 'chosen' and 'rejected' must both be texts or both be messages"),
        ({"chosen": [A], "rejected": [NO]}, "fields 'chosen' and 'rejected' share no prompt, and the row has none beside them"),
        ({"chosen": "Yes.", "rejected": "No."}, "the two answers share no beginning, and the row has no prompt beside them"),
        (
            {"system": "s", "question": "2 + 2?", "chosen": "It is 4.", "rejected": "It is 5."},
            UNREAD.format("question"),
        ),
        ({"Query": "2 + 2?", "chosen": "It is 4.", "rejected": "It is 5."}, UNREAD.format("Query")),
        ({"input": "2 + 2?", "chosen": "It is 4.", "rejected": "It is 5."}, UNREAD.format("input")),
        ({"prompt": None, "chosen": "It is 4.", "rejected": "It is 5."}, "field 'prompt' is missing or null"),
        ({"chosen": "The sky ", "rejected": "The sky is"}, "one of the two answers is empty behind what they share"),
        ({"prompt": "Who?", "chosen": [U, A], "rejected": [U, NO]}, "the prompt beside the conversations is not in them"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"}, "field 'rejected' is no transcript: it does not begin with 'Human:'"),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d", "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: e\n\nAssistant: f"},
            "field 'chosen' does not go on with an assistant turn where the two part",
        ),
        ({"chosen": "\n\nHuman: a\n\nAssistant:", "rejected": "\n\nHuman: a\n\nAssistant: b"}, "field 'chosen', message 2 (assistant) is empty"),
        ({"prompt": [U, A], "chosen": [A], "rejected": [NO]}, "the prompt with field 'chosen', message 3: an assistant turn cannot follow an assistant turn"),
    ],
)
def test_pairs_refused(row, problem):
    assert refused(Preference(), row) == f"row:1: {problem}."


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "p", "completion": "c", "label": True}, {"prompt": "p", "completion": "c", "label": True}),
        ({"prompt": [U], "completion": [A], "label": "False"}, {"prompt": [U], "completion": [A], "label": False}),
        ({"messages": [S, U, A], "label": False}, {"prompt": [S, U], "completion": [A], "label": False}),
        ({"conversations": turns(("human", "Why?"), ("gpt", "Because.")), "kto_tag": True}, {"prompt": [U], "completion": [A], "label": True}),
        ({"instruction": "Why?", "input": "", "output": "Because.", "kto_tag": True}, {"prompt": [U], "completion": [A], "label": True}),
    ],
)
def test_labelled_answers(row, expected):
    assert formatted(Preference(), [row]) == [expected]
    [automatic] = formatted(Auto(), [row])
    assert automatic == expected


@pytest.mark.parametrize("label, shown", [(1, "a number"), (None, "null"), ("good", "a text")])
def test_labels_are_true_or_false(label, shown):
    problem = refused(Preference(), {"prompt": "p", "completion": "c", "label": True}, {"prompt": "p", "completion": "c", "label": label})
    assert problem == f"row:2: field 'label' must be true or false, this is {shown}."


# ---------------------------------------------------------------------------------------------------------------------
# Columns, and auto
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plugin, row, problem, remedy",
    [
        (Alpaca(), {"a": "x", "b": "y"}, "no column is called 'instruction'; the file has: a, b.", "see `ftx plugins show formatter NAME`"),
        (Alpaca(), {"prompt": "x", "completion": "y"}, "no column is called 'instruction'; the file has: prompt, completion.", "fit --formatter completion"),
        (ShareGPT(), {"messages": [U, A]}, "no column is called 'conversations'; the file has: messages.", "fit --formatter messages"),
        (Messages(), {"conversations": turns(("human", "a"))}, "no column is called 'messages'; the file has: conversations.", "fit --formatter sharegpt"),
        (
            Completion(),
            {"question": "x", "answer": "y"},
            "no column is called 'prompt'; the file has: question, answer.",
            "fit --formatter completion -o formatter.prompt_column=question -o formatter.completion_column=answer -o formatter.style=chat",
        ),
        (Alpaca(input_column="inptu"), {"instruction": "x", "output": "y"}, "no column is called 'inptu'; the file has: instruction, output.", "alpaca"),
        (Text(), {"body": "x"}, "no column is called 'text'; the file has: body.", "see `ftx plugins show formatter NAME`"),
        (Preference(), {"prompt": "x", "chosen": "y"}, "no column is called 'rejected'; the file has: prompt, chosen.", "see `ftx plugins show"),
        (Preference(label_column="good"), {"prompt": "x", "completion": "y"}, "no column is called 'good'; the file has: prompt, completion.", "completion"),
    ],
)
def test_a_missing_column_names_those_there_and_a_formatter_that_fits(plugin, row, problem, remedy):
    run, _ = new_run(skip=True)
    with pytest.raises(DataError) as error:
        plugin.format_dataset(to_dataset([{**row, "_file": "f", "_line": 1}]), run)
    assert error.value.problem == problem
    assert remedy in error.value.remedy


def test_columns_left_out_are_named():
    run, lines = new_run()
    Alpaca().format_dataset(to_dataset([{"id": "1", "instruction": "i", "output": "o", "source": "x"}]), run)
    assert lines == ["formatter alpaca: not used: id, source"]


@pytest.mark.parametrize(
    "row, said",
    [
        ({"messages": [U, A], "text": "rendered"}, "messages (column messages)"),
        ({"conversations": [U, A]}, "messages with messages_column=conversations (column conversations)"),
        ({"messages": turns(("human", "a"), ("gpt", "b"))}, "sharegpt with messages_column=messages (column messages)"),
        ({"instruction": "i", "output": "o", "text": "t"}, "alpaca (columns instruction, output)"),
        (
            {"instruction": "i", "context": "", "response": "o"},
            "alpaca with output_column=response, input_column=context (columns instruction, context, response)",
        ),
        ({"prompt": "a", "completion": "b"}, "completion (columns prompt, completion)"),
        ({"prompt": "a", "completion": "b", "label": 3}, "completion (columns prompt, completion)"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "label": True, "messages": [U, A]}, "preference (columns prompt, chosen, rejected)"),
        (
            {"question": "a", "chosen": "b", "rejected": "c"},
            "preference with prompt_column=question, style=chat (columns question, chosen, rejected)",
        ),
        ({"text": "a", "url": "b"}, "text (column text)"),
    ],
)
def test_auto_chooses(row, said):
    run, lines = new_run()
    Auto().format_dataset(to_dataset([row]), run)
    assert lines[0] == f"formatter auto: {said}"


def test_auto_refuses_what_fits_nothing():
    run, _ = new_run()
    with pytest.raises(DataError) as error:
        Auto().format_dataset(to_dataset([{"a": "x", "b": 1, "_file": "f", "_line": 1}]), run)
    assert error.value.problem == "formatter auto: no formatter fits the columns a, b."
    assert "alpaca, completion, messages, preference, sharegpt, text" in error.value.remedy


@pytest.mark.parametrize(
    "row, problem, remedy",
    [
        (
            {"messages": [U, A], "prompt": "a", "completion": "b"},
            "formatter auto: messages (column messages) and completion (columns prompt, completion) fit alike.",
            "Name one:\n--formatter messages\n--formatter completion",
        ),
        (
            {"text": "a", "category": "b"},
            "formatter auto: text (column text) and completion with prompt_column=text, completion_column=category (columns text, category) fit alike.",
            "Name one:\n--formatter text\n--formatter completion -o formatter.prompt_column=text -o formatter.completion_column=category",
        ),
    ],
)
def test_auto_refuses_what_fits_two(row, problem, remedy):
    run, _ = new_run()
    with pytest.raises(DataError) as error:
        Auto().format_dataset(to_dataset([row]), run)
    assert (error.value.problem, error.value.remedy) == (problem, remedy)


def test_importing_the_modules_loads_no_ml_library():
    modules = "ftx_formats, ftx_formats_auto, ftx_formats_preference"
    code = f"import sys, {modules}; print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------------------
# Corrupted rows
# ---------------------------------------------------------------------------------------------------------------------

TOKENIZER = tiny_tokenizer()
CALL = json.dumps({"name": "f", "arguments": {"a": 1}})
#: formatter, a good row
SOUND = [
    (Alpaca(), {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["a", "b"]]}),
    (Alpaca(style="instruction"), {"instruction": "i", "instances": [{"input": "x", "output": "o"}]}),
    (ShareGPT(), {"conversations": turns(("human", "a"), ("function_call", CALL), ("observation", "1"), ("gpt", "b")), "tools": '[{"name": "f"}]'}),
    (ShareGPT(trim=True), {"conversations": turns(("gpt", "x"), ("human", "a"), ("gpt", "b"), ("human", "c")), "system": "s"}),
    (
        Messages(),
        {"messages": [S, U, {"role": "assistant", "tool_calls": [{"function": json.loads(CALL)}]}, {"role": "tool", "content": "1"}, A], "tools": []},
    ),
    (Messages(), TREE),
    (Messages(trees="all", trim=True), TREE),
    (Completion(), {"prompt": [U], "completion": "c", "tools": None}),
    (Preference(), {"conversations": turns(("human", "a")), "chosen": turns(("gpt", "c"))[0], "rejected": turns(("gpt", "r"))[0]}),
    (Preference(), {"chosen": [S, U, A], "rejected": [S, U, NO]}),
    (Preference(), {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}),
    (Preference(pairs="all"), TREE),
    (Preference(), {"messages": [U, A], "label": True}),
    (Text(), {"text": "t"}),
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(["gpt", "user", "{", "[]"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "replies", "text", "name", "arguments", "function", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def corrupted(draw, value):
    """A value with one to three of its parts, at any depth, replaced, removed, doubled or put in another order."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        places = []
        waiting = [value]
        while waiting:
            inside = waiting.pop()
            keys = list(inside) if isinstance(inside, dict) else range(len(inside))
            places += [(inside, key) for key in keys]
            waiting += [inside[key] for key in keys if isinstance(inside[key], dict | list)]
        if not places:
            break
        inside, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["replace", "replace", "remove", "double", "reverse"]))
        if how == "remove":
            del inside[key]
        elif how == "double" and isinstance(inside, list):
            inside.append(inside[key])
        elif how == "reverse" and isinstance(inside, list):
            inside.reverse()
        else:
            inside[key] = draw(JSON)
    return value


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_corrupted_rows_are_used_or_in_the_ledger(data):
    plugin, sound = data.draw(st.sampled_from(SOUND))
    rows = [sound, *data.draw(st.lists(corrupted(sound), min_size=1, max_size=4))]
    rows = [{**row, "_file": "f", "_line": line} for line, row in enumerate(rows, start=1)]
    for chosen in (plugin, Auto()):
        run, _ = new_run(skip=True)
        try:
            dataset = chosen.format_dataset(to_dataset(rows), run)
        except DataError:
            assert isinstance(chosen, Auto)  # it may find that two formatters fit; with one named, the sound row is used
            continue
        used = set(zip(dataset["_file"], dataset["_line"], strict=True))
        assert not used & run.ledger.dropped()
        assert used | run.ledger.dropped() == {("f", row["_line"]) for row in rows}
        assert ("f", 1) in used or isinstance(chosen, Auto)
        # what is used can be trained on: it has a row type, a supervised token, and no answer is empty
        kind = row_type(dataset.column_names)
        assert kind is not None
        for row in dataset:
            if "preference" not in kind:
                assert set(encode_row(row, TOKENIZER).labels) != {-100}
            for column in ("text", "completion", "chosen", "rejected", "messages"):
                part = row.get(column)
                assert part is None or (part.strip() if isinstance(part, str) else part[-1]["content"].strip() or part[-1]["tool_calls"])


def test_auto_knows_every_formatter():
    from importlib.metadata import entry_points

    ours = {entry.name: entry.load() for entry in entry_points(group="ftx.formatter") if entry.dist is not None and entry.dist.name == "ftx-formats"}
    assert ours == {**FORMATTERS, "auto": Auto}
