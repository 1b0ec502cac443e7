"""Data with one fault each, given to `ftx plan` and `ftx run`: the line on the console, and what audit.json keeps."""

from __future__ import annotations

import json

import pytest
from support import write_rows

from ftx.testing.tiny import CHATML, tiny_model_dir

WORDS = "amber birch cedar delta ember fjord grove hazel inlet jetty knoll larch".split()
#: Thirteen words in a row and more.
QUESTION = "how many red apples does the old farmer carry home when seven of his twenty baskets are left at the mill"


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pair(question: str, chosen: str, rejected: str) -> dict:
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


#: Twelve rows in which there is nothing to find but that they are few.
GOOD = [
    chat(f"Tell me of {word} and {other}.", f"The {word} is {number} years old.") for number, (word, other) in enumerate(zip(WORDS, WORDS[::-1], strict=True))
]
PAIRS = [pair(f"Tell me of {word}.", f"The {word} is old.", f"No {word} here.") for word in WORDS]
TASK = "Give the person as data."
FORMS = [{"instruction": TASK, "input": f"{word} of {other}", "output": json.dumps({"name": word})} for word, other in zip(WORDS, WORDS[::-1], strict=True)]
LABELS = [chat(f"Is {word} {other} a tree?", "yes") for word in WORDS for other in WORDS[:4]]
LONG = " ".join(f"{word} {other}" for word in WORDS for other in WORDS[:4])
BARE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
COUNTING = "{{ messages | length }}" + CHATML


def warns(what: str, line: int | None = 13, split: str = "train", more: str = "") -> tuple[str, int]:
    places = f" in 1 row ({{{split}}}:{line})" if line else ""
    return f"warning: {split} data: {what}{places}{more}", 0


def refuses(what: str, places: str = "in 1 row: {train}:13", split: str = "train") -> tuple[str, int]:
    return f"Error: {split} data has {what} {places}", 2


#: name -> (training rows, evaluation rows, further arguments, (line on the console, exit status)).
FAULTS = {
    "no supervised token": ([*GOOD, chat("x" * 400, "yes")], [], ["-o", "trainer.max_length=120"], refuses("no supervised token")),
    "lost answer": (
        [*GOOD, chat("x" * 400, "yes")],
        [],
        ["-o", "trainer.max_length=120", "--allow-truncation"],
        warns("an answer wholly lost to truncation", more=", left out"),
    ),
    "cut answer": ([*GOOD, chat("Go.", "x" * 400)], [], ["-o", "trainer.max_length=120"], refuses("an answer cut by truncation")),
    "cut answer allowed": ([*GOOD, chat("Go.", "x" * 400)], [], ["-o", "trainer.max_length=120", "--allow-truncation"], warns("an answer cut by truncation")),
    "no end token": (GOOD, [], ["--model", BARE], refuses("an answer without its end token", "in 12 rows: {train}:1, {train}:2, {train}:3 and 9 more")),
    "doubled BOS": (
        GOOD,
        [],
        ["--model", "{{ bos_token }}" + CHATML],
        refuses("a doubled BOS token", "in 12 rows: {train}:1, {train}:2, {train}:3 and 9 more"),
    ),
    "unstable template": (GOOD, [], ["--model", COUNTING], ("{train}:1: the chat template renders message 2 differently when more follows", 2)),
    "token across the border": (
        [*({"prompt": f"say {word}:", "completion": f" it is {word}"} for word in WORDS), {"prompt": "go on to ", "completion": "the end"}],
        [],
        ["--model", "merges"],
        warns("a token across the border of an answer"),
    ),
    "empty answer": ([*GOOD, chat("Go.", " ")], [], [], ("message 2 (assistant) is empty", 2)),
    "equal answers": ([*PAIRS, pair("Go.", "Gone.", "Gone.")], [], ["--trainer", "dpo"], ("fields 'chosen' and 'rejected' are equal", 2)),
    "exact duplicate": ([*GOOD, GOOD[4]], [], [], warns("exact duplicates of other rows")),
    "near duplicate": ([*GOOD[:11], chat("Go.", LONG), chat("Go.", f"{LONG} again")], [], [], warns("near duplicates of other rows")),
    "equal evaluation row": (GOOD, [chat("Go.", "Gone."), GOOD[4]], [], refuses("rows that stand in the training data", "in 1 row: {eval}:2", "eval")),
    "equal but for case": (
        GOOD,
        [chat("Go.", "Gone."), json.loads(json.dumps(GOOD[4]).replace("Tell me", "TELL  ME"))],
        ["--allow-overlap"],
        warns("rows that stand in the training data", 2, "eval"),
    ),
    "question of the training data": (
        [*GOOD, chat(QUESTION, "91")],
        [chat("Go.", "Gone."), chat(f"{QUESTION}?".capitalize(), "19")],
        [],
        warns("questions of the training data", 2, "eval"),
    ),
    "words of a training question": (
        [*GOOD, chat(f"Tell me {QUESTION}", "91")],
        [chat("Go.", "Gone."), chat(f"{QUESTION}, and why", "19")],
        [],
        warns("13 words in a row of a training question", 2, "eval"),
    ),
    "label imbalance": ([*LABELS, chat("Is ember hazel a tree?", "no")], [], [], warns("label imbalance: 48 rows are 'yes', 1 'no'", None)),
    "one answer": (
        [*GOOD, *(chat(f"Why {word}?", "I do not know that, nor does anybody else here.") for word in WORDS[:4])],
        [],
        [],
        ("warning: train data: one answer to many questions in 4 rows ({train}:13, {train}:14, {train}:15 and 1 more)", 0),
    ),
    "mixed formats": (
        [*FORMS, {"instruction": TASK, "input": "oak", "output": "The person is called oak."}],
        [],
        [],
        warns("another format than most answers to the same instruction"),
    ),
    "key": ([*GOOD, chat("Go.", "AKIA" + "Q3EGRZ7XJ2MPLT5V")], [], [], refuses("secrets (AWS key)")),
    "e-mail": ([*GOOD, chat("Write to whom?", "max.muster@firma.ch")], [], [], warns("personal data (e-mail address)")),
    "phone": ([*GOOD, chat("Call whom?", "Call +41 44 668 18 00 now.")], [], [], warns("personal data (telephone number)")),
    "card": ([*GOOD, chat("Pay how?", "With 4111 1111 1111 1111 please.")], [], [], warns("personal data (card number)")),
    "IBAN": ([*GOOD, chat("Pay whom?", "CH93 0076 2011 6238 5295 7 it is.")], [], [], warns("personal data (IBAN)")),
    "few rows": (
        GOOD,
        [],
        ["-o", "audit.minimum_rows=none"],
        ("warning: train data: few rows for instruction following: 12 (minimum 1,000, good 10,000, excellent 100,000)", 0),
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """`models(template)`: a tiny model with that chat template; "merges": one whose tokens have several bytes."""
    made: dict[str, str] = {}

    def model(template: str) -> str:
        if template not in made:
            folder = tiny_model_dir(tmp_path_factory.mktemp("model"), merges=template == "merges")
            if template != "merges":
                (folder / "chat_template.jinja").write_text(template)
            made[template] = str(folder)
        return made[template]

    return model


@pytest.fixture
def given(models, tmp_path):
    """`given(training rows, evaluation rows, further arguments)`: the arguments of a run on the CPU, and the files."""

    def arguments(train: list[dict], evaluation: list[dict], more: list[str]) -> tuple[list[str], dict[str, str]]:
        files = {"train": str(write_rows(tmp_path / "train.jsonl", train)), "eval": str(write_rows(tmp_path / "eval.jsonl", evaluation))}
        template = more[more.index("--model") + 1] if "--model" in more else CHATML
        rest = [one for at, one in enumerate(more) if one != "--model" and (at == 0 or more[at - 1] != "--model")]
        held_out = ["--eval-data", files["eval"]] if evaluation else []
        few = [] if "audit.minimum_rows=none" in more else ["-o", "audit.minimum_rows=5"]
        return ["--model", models(template), "--data", files["train"], "--device", "cpu", "--dtype", "float32", *held_out, *few, *rest], files

    return arguments


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_gives_its_line(name, given, cli):
    train, evaluation, more, (line, status) = FAULTS[name]
    arguments, files = given(train, evaluation, more)
    result = cli("plan", *arguments, "--json")
    line = line.format(**files)
    assert result.exit_code == status, result.output
    assert line in result.stderr
    assert "\u001b" not in result.stderr and "AKIA" not in result.output
    if status == 0:
        split = "eval" if "eval data" in line else "train"
        findings = json.loads(result.stdout)["audit"][split]["findings"]
        found = [one for one in findings if line.startswith(f"warning: {split} data: {one['what']}")]
        assert found and not found[0]["refuses"], findings
        assert not found[0]["places"] or found[0]["places"][0] in line


def test_what_has_no_fault_gives_figures_only(given, cli):
    arguments, files = given(GOOD, [], [])
    result = cli("plan", *arguments, "--json")
    figures = json.loads(result.stdout)["audit"]["train"]
    assert "warning: train data" not in result.stderr
    assert f"train: 12 rows of 12 in {files['train']}, {figures['tokens']} tokens, {figures['supervised_share']:.0%} supervised, lengths " in result.stderr
    assert list(figures["length"].values()) == sorted(figures["length"].values()) and figures["length"]["p5"] < figures["length"]["max"]
    assert figures["supervised_share"] == round(figures["supervised_tokens"] / figures["tokens"], 4)


def test_a_run_says_the_same_and_keeps_it(given, cli, tmp_path):
    rows = [*GOOD, GOOD[4], chat("Write to whom?", "max.muster@firma.ch")]
    arguments, files = given(rows, [chat("Go.", "Gone.")], ["-o", "trainer.max_steps=1"])
    planned = json.loads(cli("plan", *arguments, "--json").stdout)["audit"]
    result = cli("run", *arguments, "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert f"warning: train data: exact duplicates of other rows in 1 row ({files['train']}:13)" in result.output
    assert f"warning: train data: personal data (e-mail address) in 1 row ({files['train']}:14)" in result.output
    kept = json.loads((tmp_path / "run" / "audit.json").read_text())
    assert kept == planned
    assert {(one["by"], one["what"], one["places"][0]) for one in kept["train"]["findings"] if one["places"]} == {
        ("core", "exact duplicates of other rows", f"{files['train']}:13"),
        ("observer:audit", "personal data (e-mail address)", f"{files['train']}:14"),
    }
    assert "muster" not in json.dumps(kept)


def test_rows_are_shown_as_the_model_sees_them(given, cli, monkeypatch):
    arguments, files = given(GOOD, [], [])
    plain = cli("plan", *arguments, "--show", "3").output
    for line in (1, 2, 3):
        assert f"-- {files['train']}:{line}: " in plain
    assert f"-- {files['train']}:4: " not in plain
    assert "<|im_start|>assistant\u23ce\n\u27e6The amber is 0 years old.<|im_end|>\u23ce" in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = cli("plan", *arguments, "--show", "3").output
    assert "Supervised tokens are green" in coloured and "\u27e6" not in coloured
    assert "\u001b[32mThe amber is 0 years old.\u001b[0m" in coloured and "\u001b[1;7;32m<|im_end|>\u001b[0m" in coloured
    assert "\u001b[2;7m<|im_start|>\u001b[0m" in coloured
