"""The gate before training: each finding refuses with file, line and remedy, or says what it lets through."""

from __future__ import annotations

import json

import pytest

from ftx.audit import Finding, audit_tokens, described, gate, overlap
from ftx.data import to_dataset
from ftx.encode import IGNORE, encode_row
from ftx.errors import DataError
from ftx.testing import make_run, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def chat(question: str, answer: str) -> dict:
    return {"prompt": [{"role": "user", "content": question}], "completion": [{"role": "assistant", "content": answer}]}


def encoded(tokenizer, rows: list[dict], max_length: int | None = None):
    """Rows as the trainer sft encodes them, of data.jsonl from line 1."""
    made = []
    for line, row in enumerate(rows, start=1):
        one = encode_row(row, tokenizer).truncated(max_length)
        made.append({"input_ids": one.input_ids, "labels": one.labels, "cut": one.cut, "_file": "data.jsonl", "_line": line})
    return to_dataset(made)


GOOD = [chat(f"what is {i}?", f"it is {i}") for i in range(6)]


def through(dataset, tokenizer, split: str = "train", **recipe):
    """What the gate lets through, the run, and the figures."""
    run = make_run(**recipe)
    findings, figures = audit_tokens(dataset, tokenizer, run)
    return gate(dataset, split, [("core", finding) for finding in findings], run), run, figures


def refusal(dataset, tokenizer, **recipe) -> DataError:
    with pytest.raises(DataError) as error:
        through(dataset, tokenizer, **recipe)
    assert error.value.status == 2
    return error.value


# ---- nothing to find -----------------------------------------------------------------------------------------------


def test_good_rows_pass_and_are_counted(tokenizer):
    dataset = encoded(tokenizer, GOOD)
    kept, run, figures = through(dataset, tokenizer)
    assert len(kept) == 6 and run.ledger.entries == [] and run.notes["said"] == []
    length, answer = len(dataset[0]["input_ids"]), len("it is 0") + 2
    assert figures == {
        "rows": 6,
        "tokens": 6 * length,
        "supervised_tokens": 6 * answer,
        "supervised_share": round(answer / length, 4),
        "length": dict.fromkeys(("p5", "p50", "p95", "p99", "max"), length),
        "rows_without_supervised_token": 0,
        "empty_answers": 0,
        "cut_answers": 0,
        "missing_eos": 0,
        "double_bos": 0,
        "boundary_mismatches": 0,
        "identical_answers": 0,
        "duplicates": 0,
    }


def test_short_answers_are_no_empty_ones(tokenizer):
    kept, _, _ = through(encoded(tokenizer, [chat("q", "a"), chat("q", "."), chat("r", "é"), {"prompt": "2+2=", "completion": "4"}]), tokenizer)
    assert len(kept) == 4


def test_a_template_whose_bos_is_also_its_turn_marker_is_not_doubled(tokenizer):
    assert tokenizer.bos_token == "<|im_start|>" and through(encoded(tokenizer, GOOD), tokenizer)[2]["double_bos"] == 0


# ---- each refusal --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["", " ", "\n"])
def test_an_empty_answer(tokenizer, answer):
    error = refusal(encoded(tokenizer, [*GOOD, chat("q", answer), chat("r", answer)]), tokenizer)
    assert error.problem == "train data has an empty answer in 2 rows: data.jsonl:7, data.jsonl:8"
    assert error.remedy == "Mend them, or drop them with --skip-bad-rows."
    assert refusal(encoded(tokenizer, [{"prompt": "q", "completion": ""}]), tokenizer).problem.startswith("train data has an empty answer in 1 row: ")


def test_an_empty_turn_in_the_middle_of_a_conversation(tokenizer):
    turns = [("user", "a"), ("assistant", ""), ("user", "b"), ("assistant", "fine")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    assert refusal(encoded(tokenizer, [*GOOD, row]), tokenizer).problem == "train data has an empty answer in 1 row: data.jsonl:7"


def test_no_supervised_token(tokenizer):
    row = {"messages": [{"role": "user", "content": "a"}]}
    error = refusal(encoded(tokenizer, [row, *GOOD]), tokenizer)
    assert error.problem == "train data has no supervised token in 1 row: data.jsonl:1"
    assert error.remedy == "Mend them, raise -o trainer.max_length=N, or drop them with --skip-bad-rows."


def test_a_label_at_the_first_position_supervises_nothing(tokenizer):
    ids = tokenizer("ab<|im_end|>")["input_ids"]
    rows = [{"input_ids": ids, "labels": [ids[0], IGNORE, IGNORE], "cut": 0, "_file": "d", "_line": 1}]
    assert "no supervised token" in refusal(to_dataset(rows), tokenizer).problem, "the loss shifts labels by one"


def test_an_answer_cut_by_truncation(tokenizer):
    long = chat("q", "x" * 100)
    dataset = encoded(tokenizer, [*GOOD, long], max_length=60)
    error = refusal(dataset, tokenizer)
    assert error.problem == "train data has an answer cut by truncation in 1 row: data.jsonl:7"
    assert error.remedy == "Raise -o trainer.max_length=N, or let answers be cut with --allow-truncation."
    assert refusal(dataset, tokenizer, skip_bad_rows=True).problem == error.problem, "a good row is not dropped for being long"
    kept, run, figures = through(dataset, tokenizer, allow_truncation=True)
    assert len(kept) == 7 and figures["cut_answers"] == 1
    assert run.notes["said"] == ["warning: train data: an answer cut by truncation in 1 row (data.jsonl:7)"]
    assert run.ledger.as_rows() == [{"file": "data.jsonl", "line": 7, "reason": "an answer cut by truncation", "action": "cut"}]


def test_a_row_whose_answer_is_cut_off_whole(tokenizer):
    dataset = encoded(tokenizer, [*GOOD, chat("x" * 100, "answer")], max_length=60)
    assert "train data has no supervised token in 1 row: data.jsonl:7" in refusal(dataset, tokenizer).problem
    kept, run, figures = through(dataset, tokenizer, allow_truncation=True)
    assert len(kept) == 6 and figures["rows_without_supervised_token"] == figures["cut_answers"] == 1
    assert run.notes["said"] == ["warning: train data: an answer wholly lost to truncation in 1 row (data.jsonl:7), left out"]
    assert run.ledger.as_rows() == [{"file": "data.jsonl", "line": 7, "reason": "an answer wholly lost to truncation", "action": "dropped"}]


def test_a_missing_end_token(tokenizer):
    bare = tiny_tokenizer()
    bare.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    error = refusal(encoded(bare, GOOD[:2]), bare)
    assert error.problem == "train data has an answer without its end token in 2 rows: data.jsonl:1, data.jsonl:2"
    assert error.remedy == "The model would never learn to stop: use a chat template or formatter that ends answers."
    assert refusal(encoded(bare, GOOD), bare, skip_bad_rows=True, allow_truncation=True).problem.endswith("data.jsonl:1, data.jsonl:2, data.jsonl:3 and 3 more")


def test_an_end_token_that_is_there_but_not_supervised(tokenizer):
    one = encode_row({"prompt": "question", "completion": "a long enough answer"}, tokenizer)
    rows = [{"input_ids": one.input_ids, "labels": [*one.labels[:-1], IGNORE], "cut": 0, "_file": "d", "_line": 1}]
    assert "without its end token" in refusal(to_dataset(rows), tokenizer).problem


def test_a_doubled_bos(tokenizer):
    one = encode_row(GOOD[0], tokenizer)
    rows = [{"input_ids": [1, *one.input_ids], "labels": [IGNORE, *one.labels], "cut": 0, "_file": "data.jsonl", "_line": 1}]
    error = refusal(to_dataset(rows), tokenizer)
    assert error.problem == "train data has a doubled BOS token in 1 row: data.jsonl:1"
    assert error.remedy == "The template writes one and the tokenizer adds another: drop one of them."


def test_all_refusals_are_listed_at_once(tokenizer):
    error = refusal(encoded(tokenizer, [chat("q", ""), {"messages": [{"role": "user", "content": "a"}]}, *GOOD]), tokenizer)
    first, second = error.problem.splitlines()
    assert first == "train data has no supervised token in 1 row: data.jsonl:2" and second.strip() == "train data has an empty answer in 1 row: data.jsonl:1"
    assert len(error.remedy.splitlines()) == 2


def test_pairs_are_looked_at_on_both_sides(tokenizer):
    good, other, bad = (encode_row({"prompt": "q", "completion": answer}, tokenizer) for answer in ("a good answer", "a bad answers", ""))
    row = {"chosen_input_ids": good.input_ids, "chosen_labels": good.labels, "_file": "p.jsonl"}
    rows = [
        {**row, "rejected_input_ids": other.input_ids, "rejected_labels": other.labels, "_line": 1},
        {**row, "rejected_input_ids": bad.input_ids, "rejected_labels": bad.labels, "_line": 2},
    ]
    assert refusal(to_dataset(rows), tokenizer).problem == "train data has an empty answer in 1 row: p.jsonl:2"
    figures = through(to_dataset(rows[:1]), tokenizer)[2]
    assert figures["tokens"] == 2 * len(good.input_ids) and figures["rows"] == 1


def test_a_pair_of_equal_answers(tokenizer):
    """A formatter may let one through, and truncation may make one."""
    one = encode_row({"prompt": "q", "completion": "a good answer"}, tokenizer)
    row = {f"{side}_{what}": getattr(one, what) for side in ("chosen", "rejected") for what in ("input_ids", "labels")}
    error = refusal(to_dataset([{**row, "_file": "p.jsonl", "_line": 3}]), tokenizer)
    assert error.problem == "train data has a chosen answer equal to the rejected one in 1 row: p.jsonl:3"


def test_a_token_across_the_border_of_an_answer():
    """A byte-pair tokenizer joins the space that ends a prompt with the answer's first word: asked alone, it never does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    space = "\u0120"
    vocabulary = {token: i for i, token in enumerate(["<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), f"{space}y"])}
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=[(space, "y")]))
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    pairs = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<|im_end|>")
    rows = [("is it? ", "yes"), ("is it?", " yes"), ("is it? ", "no")]
    made = [encode_row({"prompt": prompt, "completion": answer}, pairs) for prompt, answer in rows]
    assert [one.crossed for one in made] == [1, 0, 0]
    dataset = to_dataset([{**vars(one), "_file": "d.jsonl", "_line": line} for line, one in enumerate(made, start=1)])
    kept, run, figures = through(dataset, pairs)
    assert len(kept) == 3 and figures["boundary_mismatches"] == 1
    assert run.notes["said"][0] == "warning: train data: a token across the border of an answer in 1 row (d.jsonl:1)"


# ---- into the ledger, or with a warning ----------------------------------------------------------------------------


def test_skip_bad_rows_drops_them_into_the_ledger(tokenizer):
    dataset = encoded(tokenizer, [GOOD[0], chat("q", ""), {"messages": [{"role": "user", "content": "a"}]}, GOOD[1]])
    kept, run, figures = through(dataset, tokenizer, skip_bad_rows=True)
    assert list(kept["_line"]) == [1, 4] and figures["rows"] == 4
    assert {(entry.line, entry.reason, entry.action) for entry in run.ledger.entries} == {
        (2, "an empty answer", "dropped"),
        (3, "no supervised token", "dropped"),
    }


def test_no_row_left(tokenizer):
    assert refusal(encoded(tokenizer, [chat("q", "")]), tokenizer, skip_bad_rows=True).problem == "train data: no row is left; all are in the ledger."


def test_duplicates_warn(tokenizer):
    kept, run, figures = through(encoded(tokenizer, [*GOOD, GOOD[0], GOOD[0], GOOD[1]]), tokenizer)
    assert len(kept) == 9 and figures["duplicates"] == 3
    assert run.notes["said"] == ["warning: train data: exact duplicates of other rows in 3 rows (data.jsonl:7, data.jsonl:8, data.jsonl:9)"]


def test_a_plugins_findings_count_as_the_cores(tokenizer):
    dataset, run = encoded(tokenizer, GOOD), make_run()
    with pytest.raises(DataError) as error:
        gate(dataset, "eval", [("observer:x", Finding("a phone number", [2], True, "Take it out."))], run)
    assert str(error.value).splitlines() == ["eval data has a phone number in 1 row: data.jsonl:3", "Take it out."]
    assert len(gate(dataset, "eval", [("observer:x", Finding("a phone number", [2, 4]))], run)) == 6
    assert run.notes["said"] == ["warning: eval data: a phone number in 2 rows (data.jsonl:3, data.jsonl:5)"] and run.ledger.entries == []


def test_rows_without_a_source_are_named_by_their_number(tokenizer):
    dataset = encoded(tokenizer, [*GOOD, chat("q", "")]).remove_columns(["_file", "_line"])
    assert refusal(dataset, tokenizer).problem == "train data has an empty answer in 1 row: row:7"


def test_a_quiet_finding_is_for_audit_json_only(tokenizer):
    dataset, run = encoded(tokenizer, GOOD), make_run()
    finding = Finding("labels", [1], quiet=True, details={"labels": {"a": 6}})
    gate(dataset, "train", [("observer:x", finding)], run)
    assert run.notes["said"] == []
    assert described("observer:x", finding, dataset) == {
        "by": "observer:x",
        "what": "labels",
        "rows": 1,
        "refuses": False,
        "places": ["data.jsonl:2"],
        "details": {"labels": {"a": 6}},
    }


def test_a_finding_without_rows_may_refuse(tokenizer):
    with pytest.raises(DataError) as error:
        gate(encoded(tokenizer, GOOD), "train", [("observer:x", Finding("too few rows: 6", [], True, "Add some."))], make_run(skip_bad_rows=True))
    assert str(error.value).splitlines() == ["train data has too few rows: 6", "Add some."]


def test_a_source_that_keeps_some_of_its_rows_is_cut_not_dropped(tokenizer):
    rows = [{**row, "_line": line, "_part": part} for row, line, part in zip(encoded(tokenizer, GOOD[:4]), (1, 1, 2, 3), (0, 1, 0, 0), strict=True)]
    run = make_run(skip_bad_rows=True)
    kept = gate(to_dataset(rows), "train", [("x", Finding("bad", [0, 2], True))], run)
    assert kept["_line"][:] == [1, 3]
    assert [(entry.line, entry.action) for entry in run.ledger.entries] == [(1, "cut"), (2, "dropped")]


# ---- overlap -------------------------------------------------------------------------------------------------------


def test_overlap_folds_case_and_white_space():
    train = to_dataset([{**chat("What  is\n2?", "Four"), "_file": "a", "_line": 1}, {**chat("other", "x"), "_file": "a", "_line": 2}])
    evaluation = to_dataset([{**row, "_file": "b", "_line": 1} for row in (chat("what is 2?", "four "), chat("what is 2?", "five"), chat("Other", "X"))])
    assert overlap(train, evaluation) == [0, 2]
    assert overlap(train, to_dataset([chat("new", "row")])) == []
    assert overlap(train, to_dataset([{**chat("other", "x"), "tools": None}, {**chat("new", "x"), "tools": "t"}])) == [0], "an empty column is no difference"


@pytest.fixture
def mixed(toy_run, small, tmp_path):
    """A run whose evaluation data holds one row of the training data."""
    file = tmp_path / "eval.jsonl"
    file.write_text(small["eval"].read_text() + small["train"].read_text().splitlines()[3].replace("it is", "It  IS") + "\n")
    return toy_run("--eval-data", file), file


def test_a_run_refuses_overlap_unless_told(cli, mixed, tmp_path):
    arguments, file = mixed
    result = cli(*arguments)
    assert result.exit_code == 2 and not (tmp_path / "run").exists()
    assert result.stderr.splitlines()[-2:] == [
        f"Error: eval data has rows that stand in the training data in 1 row: {file}:7",
        "       Take them out of one of the two, or go on with --allow-overlap.",
    ]
    result = cli(*arguments, "--allow-overlap", "-o", "trainer.max_steps=1")
    assert result.exit_code == 0 and f"warning: eval data: rows that stand in the training data in 1 row ({file}:7)" in result.output
    kept = json.loads((tmp_path / "run" / "audit.json").read_text())
    expected = {"by": "core", "what": "rows that stand in the training data", "rows": 1, "refuses": False, "places": [f"{file}:7"]}
    assert expected in kept["eval"]["findings"] and kept["overlap"] == {"eval_rows_in_train": 1}
