"""`ftx data` on real files: nothing is lost without a word, copies stay together, and files larger than memory pass."""

from __future__ import annotations

import itertools
import json
import os
import resource
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftx.testing import ftx, tiny_model_dir
from ftx_data_fix import unified
from ftx_data_look import Reservoir

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
ALPACA = SHARED / "alpaca_en_demo" / "alpaca_en_demo.json"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def put(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def data(*words: object) -> dict:
    """What `ftx data ... --json` says; it must be done."""
    answer = ftx("data", *words, "--json")
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)


def refused(*words: object) -> str:
    answer = ftx("data", *words)
    assert answer.exit_code == 2, answer.output
    return answer.output


# ---- inspect and sample ----------------------------------------------------------------------------------------------


@real
def test_inspect_tells_the_real_file():
    found = data("inspect", ALPACA)
    assert found["rows"] == 999 and found["duplicates"] == 14, "as counted by other means"
    assert found["format"] == {"formatter": "alpaca", "options": {}, "row_type": "prompt-completion", "command": "--formatter alpaca", "unfit": []}
    assert found["columns"]["input"] == {"rows": 999, "empty": 587, "types": {"text": 999}, "longest": 747}
    assert sum(step["rows"] for step in found["histogram"]) == 999
    assert all(step["to"] == max(1, 2 * step["from"]) for step in found["histogram"])
    text = ftx("data", "inspect", ALPACA).output
    assert "format: alpaca, rows of type prompt-completion" in text and "999 rows, 14 of them say what an earlier one says" in text


def test_inspect_says_what_does_not_fit(tmp_path):
    rows = [{"instruction": "a?", "output": "b"}, {"instruction": "a?", "output": ""}, {"instruction": "A?  ", "output": "b"}, {"x": [1]}]
    found = data("inspect", put(tmp_path / "rows.jsonl", rows), "--samples", 2)
    assert found["format"]["formatter"] == "alpaca" and found["duplicates"] == 1 and len(found["samples"]) == 2
    assert sum(one["rows"] for one in found["format"]["unfit"]) == 2
    assert found["columns"]["x"]["types"] == {"list": 1}
    strange = data("inspect", put(tmp_path / "strange.jsonl", [{"city": "Bern"}]))
    assert strange["format"]["formatter"] is None and "no formatter fits the columns city" in strange["format"]["why"]


def test_inspect_counts_tokens_of_a_model(tmp_path):
    model = tiny_model_dir(tmp_path / "tiny")
    found = data("inspect", put(tmp_path / "rows.jsonl", [{"text": "abc"}, {"text": "ü"}]), "--model", model)
    assert found["unit"] == "tokens" and found["lengths"]["sum"] == 5, "one token a byte"


def test_every_row_has_the_same_chance():
    counts = [0] * 20
    for seed in range(4000):
        kept = Reservoir(5, seed)
        for number in range(20):
            kept.add({"n": number})
        assert [row["n"] for row in kept.rows] == sorted(row["n"] for row in kept.rows) and len(kept.rows) == 5
        for row in kept.rows:
            counts[row["n"]] += 1
    assert all(abs(count - 1000) < 5 * (4000 * 0.25 * 0.75) ** 0.5 for count in counts)


def test_sample(tmp_path):
    file = put(tmp_path / "rows.jsonl", [{"n": number} for number in range(50)])
    printed = ftx("data", "sample", file, "-n", 4, "--seed", 1).stdout
    assert printed == ftx("data", "sample", file, "-n", 4, "--seed", 1).stdout != ftx("data", "sample", file, "-n", 4, "--seed", 2).stdout
    assert len(printed.splitlines()) == 4
    assert data("sample", file, "-n", 4, "--seed", 1, "--output", tmp_path / "some.jsonl")["written"] == 4
    assert lines(tmp_path / "some.jsonl") == [json.loads(line) for line in printed.splitlines()]


# ---- convert ---------------------------------------------------------------------------------------------------------


@real
@pytest.mark.parametrize(
    ("file", "to"),
    [("fastchat_dummy", "messages"), ("alpaca_en_demo", "sharegpt"), ("glaive_toolcall_en_demo", "messages"), ("dpo_en_demo", "preference")],
)
def test_real_files_go_there_and_back(tmp_path, file, to):
    """The original format, another, and back: the rows that the trainer gets are the same, and so is the file in its own format."""
    file = next((SHARED / file).iterdir())
    there = data("convert", file, "--to", to, "--output", tmp_path / "there.jsonl")
    assert there["written"] == there["rows"]
    back = data("convert", tmp_path / "there.jsonl", "--to", there["from"], "--output", tmp_path / "back.jsonl")
    again = data("convert", tmp_path / "back.jsonl", "--to", to, "--output", tmp_path / "again.jsonl")
    assert back["written"] == again["written"] == there["rows"]
    assert lines(tmp_path / "again.jsonl") == lines(tmp_path / "there.jsonl")


def test_a_formatter_that_tells_of_no_columns(monkeypatch, tmp_path):
    """What is left out is found by the columns, not by what a formatter says, and a column with a value late in the file counts."""
    import ftx_formats

    monkeypatch.setattr(ftx_formats, "say_unused", lambda *args: None)
    rows = [{"instruction": "a?", "output": "b"}] * 3 + [{"instruction": "c?", "input": "x", "output": "d", "source, of it": 7}]
    done = data("convert", put(tmp_path / "rows.jsonl", rows), "--to", "messages", "--output", tmp_path / "out.jsonl")
    assert [entry["reason"].partition(" is left")[0] for entry in done["ledger"]] == ["column 'source, of it'"]
    assert lines(tmp_path / "out.jsonl.ledger.jsonl")[0]["line"] == 4


def test_columns_that_no_format_reads(tmp_path):
    """They are left out with an entry each, or carried over; one that the target would take for its own is refused."""
    file = put(
        tmp_path / "rows.jsonl", [{"instruction": "a?", "output": "b", "id": 7, "tools": "t"}, {"instruction": "c?", "output": "d", "id": None, "tools": ""}]
    )
    done = data("convert", file, "--to", "messages", "--output", tmp_path / "out.jsonl", "--keep", "id")
    assert [row.get("id") for row in lines(tmp_path / "out.jsonl")] == [7, None]
    assert done["ledger"] == [{"reason": "column 'tools' is left out of every row (--keep tools carries it over)", "action": "cut", "rows": 1}]
    assert lines(tmp_path / "out.jsonl.ledger.jsonl")[0]["file"] == str(file)
    assert "messages reads a column of that name as its own." in refused(
        "convert", file, "--to", "messages", "--output", tmp_path / "no.jsonl", "--keep", "tools"
    )
    assert "--keep no: the file has no such column." in refused("convert", file, "--to", "messages", "--output", tmp_path / "no.jsonl", "--keep", "no")
    assert not (tmp_path / "no.jsonl").exists()


LONG = [
    {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]},
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a?"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c?"},
            {"role": "assistant", "content": "d"},
        ]
    },
]


def test_what_the_target_cannot_hold(tmp_path):
    file, out = put(tmp_path / "rows.jsonl", LONG), tmp_path / "out.jsonl"
    said = refused("convert", file, "--to", "alpaca", "--output", out)
    assert "rows.jsonl:2: alpaca trains on one answer, and 3 turns of this row count; --split-turns makes a row of every answer." in said
    assert not list(tmp_path.glob("*out*")), "neither the file nor its ledger nor a temporary one"
    done = data("convert", file, "--to", "alpaca", "--output", out, "--skip-bad-rows")
    assert done["written"] == 1 and lines(tmp_path / "out.jsonl.ledger.jsonl")[0]["line"] == 2
    data("convert", file, "--to", "alpaca", "--output", out, "--split-turns", "--force")
    assert lines(out) == [
        {"instruction": "a?", "input": "", "output": "b"},
        {"instruction": "a?", "input": "", "output": "b", "system": "s"},
        {"instruction": "c?", "input": "", "output": "d", "system": "s", "history": [["a?", "b"]]},
    ]
    assert not (tmp_path / "out.jsonl.ledger.jsonl").exists(), "an earlier command's ledger would belong to another file"
    back = tmp_path / "back.jsonl"
    assert "--all-answers lets them count" in refused("convert", out, "--to", "messages", "--output", back)
    done = data("convert", out, "--to", "messages", "--output", back, "--all-answers")
    assert lines(back)[2] == LONG[1] and done["ledger"] == [
        {"reason": "1 earlier answer(s), context so far, count in the loss", "action": "repaired", "rows": 1}
    ]


def test_preferences_give_their_good_answers(tmp_path):
    file, out = put(tmp_path / "rows.jsonl", [{"prompt": "a?", "chosen": "b", "rejected": "c"}]), tmp_path / "out.jsonl"
    assert "--chosen takes the good answers" in refused("convert", file, "--to", "completion", "--output", out)
    done = data("convert", file, "--to", "completion", "--output", out, "--chosen")
    assert lines(out) == [{"prompt": "a?", "completion": "b"}] and done["ledger"][0] == {
        "reason": "the rejected answer is left out",
        "action": "cut",
        "rows": 1,
    }
    labelled = put(tmp_path / "labelled.jsonl", [{"prompt": "a?", "completion": "b", "label": good} for good in (True, False)])
    done = data("convert", labelled, "--to", "completion", "--output", out, "--chosen", "--force")
    assert done["written"] == 1 and {one["action"] for one in done["ledger"]} == {"cut", "dropped"}


def test_options_of_both_sides(tmp_path):
    file, out = put(tmp_path / "rows.jsonl", [{"prompt": "a?", "completion": "b"}]), tmp_path / "out.jsonl"
    assert "(read with style=chat it is turns)" in refused("convert", file, "--to", "sharegpt", "--output", out)
    data("convert", file, "--from", "completion", "-o", "from.style=chat", "--to", "sharegpt", "-o", "to.user_tag=user", "--output", out)
    assert lines(out)[0]["conversations"][0] == {"from": "user", "value": "a?"}
    assert "not of the form from|to.OPTION=VALUE" in refused("convert", file, "--to", "text", "-o", "style=chat", "--output", tmp_path / "x.jsonl")
    assert "no formatter is called 'mesages'. Did you mean 'messages'?" in refused("convert", file, "--to", "mesages", "--output", tmp_path / "x.jsonl")


def test_a_formatter_without_the_reverse_hook_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "reads_only.py").write_text(
        "from ftx import format_rows, hookimpl, plugin\n\n@plugin\nclass Mine:\n    '''Reads only.'''\n\n    @hookimpl\n"
        "    def format_dataset(self, dataset, run):\n        return format_rows(dataset, lambda row: {'text': row['a']}, run)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    file = put(tmp_path / "rows.jsonl", [{"a": "b"}])
    assert "cannot write rows: it has no unformat_row." in refused(
        "convert", file, "--from", "reads_only:Mine", "--to", "reads_only:Mine", "--output", tmp_path / "x.jsonl"
    )
    assert data("convert", file, "--from", "reads_only:Mine", "--to", "text", "--output", tmp_path / "x.jsonl")["written"] == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz"])
def test_files_that_are_written_can_be_read(tmp_path, suffix):
    rows = [{"text": f'ü "{number}",\n'} for number in range(3)]
    data("convert", put(tmp_path / "rows.jsonl", rows), "--to", "text", "--output", tmp_path / f"out{suffix}")
    data("convert", tmp_path / f"out{suffix}", "--to", "text", "--output", tmp_path / "again.jsonl")
    assert lines(tmp_path / "again.jsonl") == rows


def test_outputs_are_not_written_over(tmp_path):
    file = put(tmp_path / "rows.jsonl", [{"text": "a"}])
    assert "exists." in refused("fix", file, "--output", file)
    assert "cannot write a '.parquet' file." in refused("fix", file, "--output", tmp_path / "x.parquet")
    assert "a value that is no text" in refused("fix", put(tmp_path / "n.jsonl", [{"a": 1}]), "--output", tmp_path / "x.csv")
    assert not (tmp_path / "x.csv").exists()


# ---- copies and parts ------------------------------------------------------------------------------------------------


@real
def test_dedupe_finds_the_known_copies(tmp_path):
    done = data("dedupe", ALPACA, "--output", tmp_path / "out.jsonl")
    assert (done["rows"], done["written"]) == (999, 985), "14 duplicates, as counted by other means"
    near = data("dedupe", ALPACA, "--near", 0.8, "--output", tmp_path / "near.jsonl")
    assert near["written"] <= 985
    entries = lines(tmp_path / "near.jsonl.ledger.jsonl")
    assert len(entries) == 999 - near["written"] and all("repeats another row: line " in entry["reason"] for entry in entries)


def test_dedupe_keeps_the_first(tmp_path):
    words = "the quick brown fox jumps over the lazy dog while the cat sleeps in the warm sun all day long".split()
    rows = [
        {"instruction": "Say  it.", "output": "One."},
        {"instruction": "say it.", "output": "one."},
        {"instruction": "Write down.", "output": " ".join(words)},
        {"instruction": "Write down.", "output": " ".join([*words, "today"])},
        {"instruction": "Say it.", "output": "Two."},
    ]
    file = put(tmp_path / "rows.jsonl", rows)
    data("dedupe", file, "--output", tmp_path / "exact.jsonl")
    assert lines(tmp_path / "exact.jsonl") == [rows[0], *rows[2:]]
    data("dedupe", file, "--near", 0.8, "--output", tmp_path / "near.jsonl")
    assert lines(tmp_path / "near.jsonl") == [rows[0], rows[2], rows[4]]
    assert "nearly repeats another row: line 3 (similarity 0." in lines(tmp_path / "near.jsonl.ledger.jsonl")[1]["reason"]


def brute_force(rows: list[dict], threshold: float) -> list[tuple[int, int]]:
    """Every pair of rows that is at least so alike, compared one by one."""
    from ftx.data import to_dataset
    from ftx.ledger import Ledger
    from ftx.run import Run
    from ftx_audit_copies import jaccard, own_text, shared_lines
    from ftx_audit_text import all_said, shingles
    from ftx_formats import Alpaca

    formatted = Alpaca().format_dataset(to_dataset(rows), Run(recipe=None, ledger=Ledger(), say=lambda text: None))
    shared = shared_lines(formatted)
    sets = [shingles(own_text(one, shared)) for one in all_said(formatted)]
    return [(i, j) for i, j in itertools.combinations(range(len(rows)), 2) if sets[i] and sets[j] and jaccard(sets[i], sets[j]) >= threshold]


@real
@pytest.mark.parametrize("seed", [1, 2])
def test_near_copies_never_straddle(tmp_path, seed):
    """Real rows, and chains of edited ones in which the ends are not alike any more; all pairs are compared one by one."""
    import random

    dice = random.Random(seed)
    rows = json.loads(ALPACA.read_text("utf-8"))[:300]
    for start in dice.sample(rows, 20):
        words = start["output"].split()
        for _ in range(6):
            if len(words) > 20:
                words = words[:]
                words[dice.randrange(len(words))] = f"w{dice.randrange(999)}"
            rows.append({**start, "output": " ".join(words)})
    dice.shuffle(rows)
    file = put(tmp_path / "rows.jsonl", rows)
    done = data("split", file, "--output", tmp_path / "parts", "--test", 0.2, "--validation", 0.1, "--near", 0.7, "--seed", seed)
    where = {}
    for part in ("train", "test", "validation"):
        for row in lines(tmp_path / "parts" / f"{part}.jsonl"):
            where.setdefault(json.dumps(row, sort_keys=True), set()).add(part)
    assert sum(done[part] for part in ("train", "test", "validation")) == len(rows)
    assert all(len(parts) == 1 for parts in where.values()), "equal rows"
    pairs = brute_force(rows, 0.7)
    assert len(pairs) > 50
    part_of = [next(iter(where[json.dumps(row, sort_keys=True)])) for row in rows]
    assert [(i, j) for i, j in pairs if part_of[i] != part_of[j]] == []
    assert abs(done["test"] - 0.2 * len(rows)) <= 10 and abs(done["validation"] - 0.1 * len(rows)) <= 10


def test_split_by_seed_strata_and_groups(tmp_path):
    rows = [{"text": f"row {number} {chr(97 + number % 26) * 5}", "kind": "rare" if number % 10 == 0 else "usual", "who": number // 4} for number in range(400)]
    file = put(tmp_path / "rows.jsonl", rows)
    words = ("split", file, "--near", 0, "--test", 0.2)
    data(*words, "--output", tmp_path / "a", "--stratify", "kind")
    kinds = [row["kind"] for row in lines(tmp_path / "a" / "test.jsonl")]
    assert (kinds.count("rare"), kinds.count("usual")) == (8, 72)
    data(*words, "--output", tmp_path / "b", "--group", "who")
    train, test = ({row["who"] for row in lines(tmp_path / "b" / f"{part}.jsonl")} for part in ("train", "test"))
    assert not train & test and len(lines(tmp_path / "b" / "test.jsonl")) == 80
    data(*words, "--output", tmp_path / "c")
    data("split", put(tmp_path / "turned.jsonl", rows[::-1]), "--near", 0, "--test", 0.2, "--output", tmp_path / "d")
    assert sorted(map(str, lines(tmp_path / "c" / "test.jsonl"))) == sorted(map(str, lines(tmp_path / "d" / "test.jsonl"))), "the order does not count"
    data(*words, "--output", tmp_path / "e", "--seed", 7)
    assert lines(tmp_path / "c" / "test.jsonl") != lines(tmp_path / "e" / "test.jsonl")
    assert "there is no column 'knd'" in refused(*words, "--output", tmp_path / "f", "--stratify", "knd")
    assert "exists." in refused(*words, "--output", tmp_path / "c")
    assert "no row is left for 'test'" in refused("split", put(tmp_path / "two.jsonl", rows[:2]), "--near", 0, "--output", tmp_path / "g")
    assert not (tmp_path / "g").exists()
    assert "must add up" in refused(*words, "--validation", 0.9, "--output", tmp_path / "h")


# ---- fix -------------------------------------------------------------------------------------------------------------


def test_fix_writes_each_change_down(tmp_path):
    rows = [
        {"q": " what? ", "a": '{"b":1,  "c":"\\u00e9"}', "list": [{"x": "y\n"}]},
        {"q": "e\u0301", "a": '{"n": 1.10}', "list": []},
        {"q": "fine", "a": "fine", "list": [1, None]},
    ]
    file = put(tmp_path / "rows.jsonl", rows)
    done = data("fix", file, "--output", tmp_path / "out.jsonl")
    assert lines(tmp_path / "out.jsonl") == [{"q": "what?", "a": '{"b": 1, "c": "é"}', "list": [{"x": "y"}]}, {**rows[1], "q": "é"}, rows[2]]
    assert done["changed"] == 2
    assert [(entry["line"], entry["reason"]) for entry in lines(tmp_path / "out.jsonl.ledger.jsonl")] == [
        (1, "field 'q': white space around it stripped"),
        (1, "field 'a': JSON in one form"),
        (1, "field 'list[0].x': white space around it stripped"),
        (2, "field 'q': Unicode in NFC"),
    ]
    assert data("fix", tmp_path / "out.jsonl", "--output", tmp_path / "again.jsonl")["changed"] == 0
    data("fix", file, "--output", tmp_path / "one.jsonl", "--no-strip", "--no-nfc", "--column", "a")
    assert lines(tmp_path / "one.jsonl")[0] == {**rows[0], "a": '{"b": 1, "c": "é"}'}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(exclude_categories=("Cs",))),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=("Cs",)), max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(value=json_values, indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
def test_json_in_one_form_is_the_same_json(value, indent, ascii_only):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    made = unified(text)
    assert made == (json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else text)
    assert unified(made) == made


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[1e3]", "[1.10]", "[NaN]", "[-0]", "[01]", "{", "[" * 100_000 + "]", '["\\ud800"]', "plain", ""])
def test_json_that_would_change_stays(text):
    assert unified(text) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_fixed_text_is_fixed(text):
    from ftx_data_fix import _mended

    steps = [("nfc", lambda one: unicodedata.normalize("NFC", one)), ("strip", str.strip), ("json", unified)]
    once = _mended(text, "x", steps, [])
    again: list = []
    assert _mended(once, "x", steps, again) == once and not again


# ---- failures --------------------------------------------------------------------------------------------------------


def run_of(folder: Path, items: dict[str, list[dict]], base: list[dict] = (), formatter: dict | None = None, training: list[dict] | None = None) -> Path:
    """What a run's directory has of these things."""
    train = put(folder / "train.jsonl", training or [{"question": "x?", "answer": "y"}])
    (folder / "run").mkdir()
    (folder / "run" / "recipe.yaml").write_text(json.dumps({"data": str(train), "formatter": formatter or {"name": "auto"}}))
    for name, tuned in items.items():
        (folder / "run" / "eval" / name).mkdir(parents=True)
        put(folder / "run" / "eval" / name / "tuned.jsonl", tuned)
        put(folder / "run" / "eval" / name / "base.jsonl", list(base))
    return folder / "run"


def item(question: str, answer: str, reference: str, verdict: object) -> dict:
    return {"prompt": [{"role": "user", "content": question}], "answer": answer, "reference": reference, "verdict": verdict}


def test_failures_keep_the_tools_that_were_at_hand(tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    ask, answer = [{"role": "user", "content": "a?"}], {"role": "assistant", "content": "b"}
    failed = {**item("a?", "no", "b", "wrong"), "prompt": [{**ask[0], "tools": tools}]}
    run = run_of(tmp_path, {"exact-match": [failed]}, formatter={"name": "messages"}, training=[{"messages": [*ask, answer], "tools": tools}])
    data("failures", run, "--output", tmp_path / "out.jsonl")
    (row,) = lines(tmp_path / "out.jsonl")
    assert (row["messages"], row["tools"]) == ([*ask, answer], tools)


def test_failures_are_rows_in_the_form_of_the_training_data(tmp_path):
    items = [item("a?", "no", "b", "wrong"), item("c?", "d", "d", "correct"), item("e?", "", "", "unscored"), item("f?", "g", "h", "wrong")]
    base = [item("a?", "b", "b", "correct"), item("c?", "x", "d", "wrong"), item("e?", "", "", "unscored"), item("f?", "x", "h", "wrong")]
    run, out = run_of(tmp_path, {"exact-match": items}, base), tmp_path / "out.jsonl"
    done = data("failures", run, "--output", out)
    assert lines(out) == [
        {"question": "a?", "answer": "b", "model_answer": "no", "verdict": "wrong", "evaluator": "exact-match"},
        {"question": "f?", "answer": "h", "model_answer": "g", "verdict": "wrong", "evaluator": "exact-match"},
    ]
    assert (done["items"], done["written"], done["unscored"]) == (4, 2, 1)
    data("failures", run, "--output", out, "--broken", "--force")
    assert [row["question"] for row in lines(out)] == ["a?"]
    assert "has no evaluation by 'mt-bench'." in refused("failures", run, "--output", tmp_path / "x.jsonl", "--evaluator", "mt-bench")


def test_ratings_need_a_bar(tmp_path):
    rated = [item("a?", "bad", "", 2), item("b?", "good", "", 9)]
    run, out = run_of(tmp_path, {"llm-judge": rated}, formatter={"name": "messages"}), tmp_path / "out.jsonl"
    assert "'llm-judge' rates answers and calls none wrong." in refused("failures", run, "--output", out)
    done = data("failures", run, "--output", out, "--below", 5)
    assert [row["messages"][-1]["content"] for row in lines(out)] == ["bad"] and done["without_reference"] == 1


def test_what_the_formatter_cannot_hold_is_written_all_the_same(tmp_path):
    run, out = run_of(tmp_path, {"exact-match": [item("a?", "no", "b", "wrong")]}, formatter={"name": "text"}), tmp_path / "out.jsonl"
    done = data("failures", run, "--output", out)
    assert lines(out)[0]["completion"] == [{"role": "assistant", "content": "b"}] and done["ledger"][0]["reason"] == "written as prompt and completion"
    assert "has no evaluation." in refused("failures", run_of(tmp_path / "2", {}) if (tmp_path / "2").mkdir() is None else "", "--output", tmp_path / "y.jsonl")


# ---- Argilla ---------------------------------------------------------------------------------------------------------

USERS = [f"11111111-1111-1111-1111-11111111111{number}" for number in range(4)]


def record(value: str, responses: list[tuple[str, str | None]] = (), suggestion: str | None = None, status: str = "completed", **fields) -> dict:
    given = [{"value": said, "user_id": user, **({"status": state} if state else {})} for user, (said, state) in zip(USERS, responses, strict=False)]
    return {
        "id": value,
        "fields": {"prompt": value, **fields},
        "metadata": {},
        "suggestions": {"answer": {"value": suggestion, "score": 0.5, "agent": "m"}} if suggestion else {},
        "responses": {"answer": given} if given else {},
        "vectors": {},
        "status": status,
        "_server_id": None,
    }


@pytest.mark.parametrize(
    ("given", "options", "wanted"),
    [
        (record("a?", [("b", "submitted")], "s"), (), "b"),
        (record("a?", [("b", "draft")], "s"), (), "s"),
        (record("a?", [("b", "draft")], "s"), ("-o", "from.drafts=true"), "b"),
        (record("a?", [("b", "submitted")], "s"), ("-o", "from.take=suggestions"), "s"),
        (record("a?", [("b", None)], status="completed"), (), "b"),
        (record("a?", [("b", None)], "s", status="pending"), (), "s"),
        (record("a?", [("b", "submitted"), ("c", "discarded")]), (), "b"),
        (record("a?", [("b", "submitted"), ("c", "submitted"), ("b", "submitted")]), (), "b"),
        (record("a?", [("b", "submitted"), ("c", "submitted")]), (), "annotators disagree (2 responses, none has a majority)"),
        (record("a?", [("b", "discarded")]), (), "no response was submitted"),
        (record("a?", [("b", "draft")]), (), "has no response and no suggestion"),
        (record("a?", [], "s"), ("-o", "from.take=responses"), "has no response."),
        (record("a?", [("b", "submitted")], status="discarded"), (), "the record is discarded"),
    ],
)
def test_the_status_of_a_response_counts(tmp_path, given, options, wanted):
    file, out = put(tmp_path / "records.jsonl", [given]), tmp_path / "out.jsonl"
    words = ("convert", file, "--from", "argilla", "--to", "messages", "--output", out, *options)
    if " " in wanted:
        assert wanted in refused(*words)
    else:
        data(*words)
        assert [turn["content"] for turn in lines(out)[0]["messages"]] == ["a?", wanted]


def test_other_fields_and_questions_are_not_lost_in_silence(tmp_path):
    """Several fields are refused until one is named; then they, and further questions, are in the ledger."""
    given = {**record("a?", [("b", "submitted")]), "fields": {"instruction": "a?", "input": "x", "context": ""}}
    given["suggestions"] = {"quality": {"value": 5, "score": None, "agent": "m"}}
    file, out = put(tmp_path / "records.jsonl", [given]), tmp_path / "out.jsonl"
    words = ("convert", file, "--from", "argilla", "--to", "messages", "--output", out)
    assert "records.jsonl:1: the record has more fields than its prompt 'instruction': input." in refused(*words)
    done = data(*words, "-o", "from.field=instruction")
    said = [entry["reason"] for entry in done["ledger"]]
    assert "field 'input' is left out of every record" in said and "question 'quality' is left out of every record" in said
    assert [turn["content"] for turn in lines(out)[0]["messages"]] == ["a?", "b"]


def test_records_out_and_in(tmp_path):
    rows = [LONG[0], {"messages": [{"role": "system", "content": "s"}, *LONG[0]["messages"]]}]
    file, records, back = put(tmp_path / "rows.jsonl", rows), tmp_path / "records.jsonl", tmp_path / "back.jsonl"
    for how in ((), ("-o", "to.write=response", "-o", f"to.user_id={USERS[0]}")):
        data("convert", file, "--to", "argilla", "--output", records, "--force", *how)
        data("convert", records, "--from", "argilla", "--to", "messages", "--output", back, "--force")
        assert lines(back) == rows
    assert lines(records)[0]["responses"] == {"answer": [{"value": "b", "user_id": USERS[0], "status": "submitted"}]}
    assert "write=response needs user_id" in refused("convert", file, "--to", "argilla", "-o", "to.write=response", "--output", records, "--force")
    data("convert", put(tmp_path / "long.jsonl", LONG), "--to", "argilla", "--split-turns", "--output", records, "--force")
    assert lines(records)[2]["fields"]["chat"][-1] == {"role": "user", "content": "c?"}
    kept = put(tmp_path / "annotated.jsonl", [record("a?", [("b", "submitted"), ("b", "draft")], "s")])
    data("convert", kept, "--from", "argilla", "--to", "messages", "--keep", "responses", "--keep", "status", "--output", back, "--force")
    assert [one["status"] for one in lines(back)[0]["responses"]["answer"]] == ["submitted", "draft"] and lines(back)[0]["status"] == "completed"


def test_the_sdk_reads_what_is_written(tmp_path):
    """Argilla's own classes, no server: the JSON goes in, and comes out with the status that its own export drops."""
    pytest.importorskip("argilla", reason="pip install 'argilla>=2.8,<3' requests")
    from argilla.records import Record

    from ftx_data_server import as_json

    given = record("a?", [("b", "submitted"), ("c", "discarded")], "s", status="pending")
    assert as_json(Record.from_dict(given)) == given


def test_a_server_needs_the_sdk_and_its_address(monkeypatch, tmp_path):
    monkeypatch.delenv("ARGILLA_API_KEY", raising=False)
    said = refused("pull", "mine", "--output", tmp_path / "x.jsonl")
    assert "Argilla's SDK is not installed." in said or "Set ARGILLA_API_URL and ARGILLA_API_KEY." in said


# ---- files larger than memory ----------------------------------------------------------------------------------------

MEGABYTE = 1 << 20
GROWN = """
import sys, threading, time
from ftx.cli import main
peak, done = [0], []
def watch():
    while not done:
        lines = open("/proc/self/status").read().splitlines()
        peak[0] = max(peak[0], next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")))
        time.sleep(0.005)
thread = threading.Thread(target=watch)
thread.start()
try:
    main(sys.argv[1:], standalone_mode=False)
finally:
    done.append(1)
    thread.join()
    print("peak", peak[0], file=sys.stderr)
"""


def peak(*words: object) -> float:
    """MiB of memory of its own that `ftx data ...` held at most; pages of mapped files are not its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", GROWN, "data", *map(str, words)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.rpartition("peak ")[2]) / 1024


def big(file: Path, megabytes: int) -> Path:
    """Rows of 20 kB, each with words of its own; one in ten stands there twice."""
    import random

    dice = random.Random(0)
    words = [f"word{number}" for number in range(2000)]
    with open(file, "w") as stream:
        number = 0
        while stream.tell() < megabytes * MEGABYTE:
            row = json.dumps({"instruction": f"{number}: {dice.choice(words)}", "output": " ".join(dice.choices(words, k=2500))}) + "\n"
            stream.write(row * (2 if number % 10 == 0 else 1))
            number += 1
    return file


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
@pytest.mark.parametrize(
    ("command", "more"),
    [
        ("inspect", ()),
        pytest.param("sample", ("--output", "{out}/sample.jsonl"), marks=pytest.mark.full),
        pytest.param("fix", ("--output", "{out}/fix.jsonl"), marks=pytest.mark.full),
        ("dedupe", ("--output", "{out}/dedupe.jsonl")),
        pytest.param("split", ("--near", 0, "--output", "{out}/split"), marks=pytest.mark.full),
        ("convert", ("--to", "messages", "--output", "{out}/convert.jsonl")),
    ],
)
def test_memory_does_not_grow_with_the_file(tmp_path, command, more):
    """30 MB and 120 MB: more than the thousand rows of 20 kB that are worked on at once, so only bytes a row may be added."""
    small, large = (
        peak(command, big(tmp_path / f"{name}.jsonl", size), *(str(word).format(out=tmp_path / name) for word in more))
        for name, size in (("s", 30), ("l", 120))
    )
    assert large - small < 40, f"{small:.0f} MiB for 30 MB, {large:.0f} MiB for 120 MB"


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", ["inspect", "fix", "convert", "dedupe", "split"])
def test_three_gigabytes_under_a_limit_of_one(tmp_path, command):
    """With so much address space for data, what is not streamed ends in a MemoryError."""
    file = big(tmp_path / "huge.jsonl", 3000)
    more = {"inspect": (), "convert": ("--to", "messages"), "split": ("--near", "0")}.get(command, ())
    out = () if command == "inspect" else ("--output", str(tmp_path / ("out" if command == "split" else "out.jsonl")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    limit = 1 << 30
    done = subprocess.run(
        [sys.executable, "-m", "ftx", "data", command, str(file), *more, *out],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    assert done.returncode == 0, done.stderr
