"""Bad input, as a person meets it: a line that says what is wrong and where, a line that says what to do, status 2, and
nothing written. With --skip-bad-rows the ledger says it instead."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from support import read_rows, write_rows


@pytest.fixture
def rows(small):
    return read_rows(small["train"])


def refused(result, *texts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) >= 2, f"no line says what to do: {result.stderr}"
    for text in texts:
        assert text in result.stderr, result.stderr


def bad_row_cases():
    good = {"q": "what?", "a": "that"}
    return [
        pytest.param("{not json", "not valid JSON", id="not-json"),
        pytest.param('{"q": "what?", "a": "th', "not valid JSON", id="cut-off"),
        pytest.param("[1, 2]", "a row must be a JSON object, this is a list", id="list"),
        pytest.param(json.dumps({**good, "weight": float("nan")}), "field 'weight' is nan", id="nan"),
        pytest.param('{"q": "what?", "a": "\xff'.encode("latin-1"), "not valid UTF-8", id="utf-8"),
    ]


@pytest.mark.parametrize(("line", "text"), bad_row_cases())
def test_a_bad_row_in_line_700_of_1000(cli, toy_run, tmp_path, line, text):
    lines = [json.dumps({"q": f"what is {i}?", "a": f"it is {i}"}).encode() for i in range(1000)]
    lines[699] = line if isinstance(line, bytes) else line.encode()
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"\n".join(lines) + b"\n")
    refused(cli(*toy_run("--data", file)), f"{file}:700: {text}", "--skip-bad-rows")
    assert not (tmp_path / "run").exists()
    assert cli(*toy_run("--data", file, "--skip-bad-rows", "-o", "trainer.max_steps=1")).exit_code == 0
    (entry,) = read_rows(tmp_path / "run" / "ledger.jsonl")
    assert (entry["file"], entry["line"], entry["action"]) == (str(file), 700, "dropped") and text in entry["reason"]
    assert json.loads((tmp_path / "run" / "audit.json").read_text())["train"]["rows"] == 999


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"instruction": "x", "input": "", "output": ""}, "output"),
        ({"instruction": "x", "input": "", "output": None}, "output"),
        ({"instruction": None, "input": None, "output": "y"}, "instruction"),
        ({"instruction": "x", "input": "", "output": ["y"]}, "output"),
    ],
)
def test_a_field_that_is_empty_null_or_of_another_kind(cli, toy_run, tmp_path, row, text):
    good = [{"instruction": f"say {i}", "input": "", "output": f"it is {i}"} for i in range(8)]
    file = write_rows(tmp_path / "data.jsonl", [*good, row])
    refused(cli(*toy_run("--data", file, formatter="alpaca")), f"{file}:9: ", text, "--skip-bad-rows")
    assert cli(*toy_run("--data", file, "--skip-bad-rows", "-o", "trainer.max_steps=1", formatter="alpaca")).exit_code == 0
    assert [entry["line"] for entry in read_rows(tmp_path / "run" / "ledger.jsonl")] == [9]


def test_an_answer_of_50000_characters(cli, toy_run, rows, tmp_path):
    file = write_rows(tmp_path / "data.jsonl", [*rows, {"q": "long?", "a": "word " * 10_000}])
    refused(cli(*toy_run("--data", file)), "an answer cut by truncation in 1 row", f"{file}:25", "--allow-truncation")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("empty.jsonl", "", "has no rows"),
        ("empty.json", "[]", "has no rows"),
        ("head.csv", "q,a\n", "has no rows"),
        ("data.txt", "hello", "cannot read a '.txt' file"),
    ],
)
def test_files_without_rows(cli, toy_run, tmp_path, name, content, text):
    file = tmp_path / name
    file.write_text(content)
    refused(cli(*toy_run("--data", file)), str(file), text)
    assert not (tmp_path / "run").exists()


def test_no_such_file_and_no_data(cli, toy_run, tmp_path):
    refused(cli(*toy_run("--data", tmp_path / "none.jsonl")), f"{tmp_path / 'none.jsonl'}: no such file")
    refused(cli("run"), "no training data is given", "--data FILE")


def test_data_named_twice_or_not_at_all(cli, toy_run, small, tmp_path, monkeypatch):
    monkeypatch.chdir(small["train"].parent)  # an empty name would be this directory
    result = cli(*toy_run(), "--data", small["eval"])
    assert result.exit_code == 2 and f"--data is given twice: {small['train']} and {small['eval']}. It takes one file, or a directory" in result.stderr
    refused(cli(*toy_run("--eval-data", "")), "eval_data is empty.", "a variable of the shell may not be set")
    assert not (tmp_path / "run").exists()


def test_what_is_not_read_of_a_directory_is_said(cli, toy_run, rows, tmp_path):
    folder = tmp_path / "folder"
    (folder / "more").mkdir(parents=True)
    for name in ("a.jsonl", "b.jsonl.zst", ".hidden"):
        write_rows(folder / name, rows)
    result = cli(*toy_run("--data", folder, "-o", "trainer.max_steps=1"))
    assert result.exit_code == 0 and f"{folder}: not read: b.jsonl.zst, more/" in result.output, result.output


def test_an_empty_name_is_no_data(cli, small, monkeypatch):
    monkeypatch.chdir(small["train"].parent)
    refused(cli("data", "inspect", ""), "the name of the data is empty.", "a variable of the shell may not be set")


def test_eval_data_without_a_run(cli, small):
    refused(cli("eval", "--evaluator", "toys:Equal", "--eval-data", small["eval"]), "--eval-data is given, and no run", "ftx eval RUN --eval-data FILE")


def test_a_wrong_column_names_those_that_are_there(cli, toy_run, small):
    refused(cli(*toy_run(formatter="alpaca")), "no column is called 'instruction'", "q, a")
    refused(cli(*toy_run(formatter="auto")), "q", "a")


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        (["-o", "adapter.r=-3"], ["r must be at least 1, got -3"]),
        (["-o", "adapter.r=2e-4"], ["adapter.r wants int, got '2e-4'"]),
        (["-o", "adapter.rank=3"], ["adapter 'lora' has no option 'rank'.", "r, alpha, dropout, target_modules"]),
        (["-o", "trainer.per_device_train_batch_size=0"], ["per_device_train_batch_size must be at least 1, got 0"]),
        (["-o", "trainer.learning_rate=fast"], ["trainer.learning_rate wants float, got 'fast'"]),
        (["-o", "trainer.args.learnin_rate=1"], ["learnin_rate"]),
        (["-o", "r=3"], ["not of the form STAGE.OPTION=VALUE"]),
        (["-o", "adaptor.r=3"], ["'adaptor' is neither a stage", "Did you mean 'adapter'?"]),
        (["--adapter", "qlroa"], ["no adapter is called 'qlroa'. Did you mean 'qlora'?", "Installed: "]),
        (["--quantizer", "int8", "--adapter", "qlora"], ["quantizer 'int8' and adapter 'qlora' both set quantization_config.", "drop --quantizer"]),
        (["--evaluator", "exact-match"], ["exact-match", "--eval-data"]),
    ],
)
def test_options_that_cannot_be(cli, toy_run, tmp_path, options, texts):
    arguments = toy_run(*options, adapter="lora")
    refused(cli(*arguments), *texts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        ({"modle": "smollm2"}, ["unknown key 'modle'. Did you mean 'model'?"]),
        ({"adapter": {"name": "lora", "rank": 3}}, ["adapter 'lora' has no option 'rank'"]),
        ({"adapter": {"r": 3}}, ["the key 'name'"]),
        ({"trainer": {"name": "sft", "args": {"nonsense": 1}}}, ["nonsense"]),
        ({"evaluators": "exact-match"}, ["'evaluators' must be a list"]),
        ({"output": "here"}, ["'output' does not belong into a recipe"]),
        ({"seed": "many"}, ["seed wants int, got 'many'"]),
        ({"trainer": {"name": "sft", "learning_rate": "fast"}}, ["trainer.learning_rate wants float, got 'fast'"]),
        ({"trainer": {"name": "sft", "max_steps": "12"}}, ["trainer.max_steps wants int, got '12'"]),
    ],
)
def test_recipes_that_cannot_be(cli, tiny, small, tmp_path, change, texts):
    recipe = {"model": str(tiny), "data": str(small["train"]), "formatter": "toys:Pairs", **change}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    refused(cli("run", tmp_path / "recipe.yaml", "--output", tmp_path / "run"), *texts)
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_no_yaml_names_the_line(cli, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: smollm2\ndata: [a\nseed: 3\n")
    refused(cli("run", file), f"{file}:3: not valid YAML")
    file.write_text("!!python/object/apply:os.system ['echo hello']\n")
    refused(cli("run", file), "not valid YAML")
    refused(cli("run", tmp_path / "none.yaml"), "no such recipe")


def test_numbers_that_yaml_reads_as_text_are_read_by_their_type(cli, tiny, small, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tiny}\ndata: {small['train']}\nformatter: toys:Pairs\nadapter: toys:Head\ntrainer: {{name: sft, learning_rate: 2e-4, max_steps: 1}}\n"
    )
    assert cli("run", tmp_path / "recipe.yaml", "--output", tmp_path / "run").exit_code == 0
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["trainer"]["learning_rate"] == 2e-4


def test_models_that_cannot_be(cli, toy_run, tiny, tmp_path):
    refused(cli(*toy_run("--model", "smolm2")), "no model is called 'smolm2'. Did you mean 'smollm2'?")
    refused(cli(*toy_run("--model", "nobody/nothing")), "nobody/nothing")
    refused(cli(*toy_run("--model", tmp_path)), "not a model directory")
    bare = tmp_path / "bare"
    shutil.copytree(tiny, bare, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    refused(cli(*toy_run("--model", bare)), "has no tokenizer")
    plain = tmp_path / "plain"
    shutil.copytree(tiny, plain, ignore=shutil.ignore_patterns("chat_template*"))
    config = json.loads((plain / "tokenizer_config.json").read_text())
    (plain / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "chat_template"}))
    refused(cli(*toy_run("--model", plain)), "no chat template", "style=instruction")
    assert not (tmp_path / "run").exists()


def test_data_cannot_write_to_the_terminal(cli, toy_run, tmp_path):
    file = write_rows(tmp_path / "data.jsonl", [{"q": "x", "\x1b[2Jcolumn": "y"}])
    result = cli(*toy_run("--data", file, formatter="alpaca"))
    refused(result)
    assert "\x1b" not in result.stderr
