"""LLaMA-Factory's dataset_info.json, read as it is: `--data dir/dataset_info.json:NAME`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ftx.data import read_dataset, read_rows
from ftx.errors import DataError
from ftx.ledger import Ledger
from ftx.manifest import data_fingerprint
from ftx.recipe import merge, read_recipe, to_yaml
from ftx.run import Run
from ftx.testing import ftx
from ftx_formats_auto import Auto

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not there")


def written(folder: Path, entry: dict, rows: list[dict], name: str = "mine") -> str:
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text(json.dumps({name: {"file_name": "rows.json", **entry}}))
    return f"{folder / 'dataset_info.json'}:{name}"


def formatted(reference: str) -> tuple[list[dict], list[str]]:
    said: list[str] = []
    run = Run(recipe=None, ledger=Ledger(), say=said.append)
    rows = Auto().format_dataset(read_dataset(reference, run.ledger), run)
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows], said


def asked(text: str, answer: str, *before: dict) -> list[dict]:
    return [*before, {"role": "user", "content": text}, {"role": "assistant", "content": answer}]


@real
@pytest.mark.parametrize(
    ("name", "count", "columns"),
    [
        ("identity", 91, {"prompt", "completion"}),
        ("alpaca_en_demo", 999, {"prompt", "completion"}),
        ("dpo_en_demo", 300, {"prompt", "chosen", "rejected"}),
        ("kto_en_demo", 300, {"prompt", "completion", "label"}),
        ("glaive_toolcall_en_demo", 300, {"messages", "tools"}),
        ("identity,alpaca_en_demo", 1090, {"prompt", "completion"}),
    ],
)
def test_its_own_data_sets(tmp_path, name, count, columns):
    """The real registry beside the real files, as in LLaMA-Factory's data folder."""
    shutil.copy(SHARED / "llamafactory_meta" / "dataset_info.json", tmp_path)
    for one in name.split(","):
        shutil.copy(SHARED / one / f"{one}.json", tmp_path)
    rows, _ = formatted(f"{tmp_path}/dataset_info.json:{name}")
    assert len(rows) == count and set(rows[0]) == columns


@real
def test_fastchats_conversations():
    rows, said = formatted(str(SHARED / "fastchat_dummy" / "dummy_conversation.json"))
    assert len(rows) == 500 and rows[0]["messages"][0] == {"role": "user", "content": "Who are you?"}
    assert said[0].startswith("formatter auto: sharegpt") and said[1] == "formatter sharegpt: not used: id"


@pytest.mark.parametrize(
    ("entry", "row", "wanted"),
    [
        ({}, {"instruction": "a", "input": "b", "output": "c"}, {"prompt": [{"role": "user", "content": "a\nb"}], "completion": asked("", "c")[1:]}),
        (
            {"columns": {"prompt": "q", "response": "r", "system": "s", "history": "h"}},
            {"q": "a", "r": "c", "s": "sys", "h": [["x", "y"]]},
            {"prompt": [{"role": "system", "content": "sys"}, *asked("x", "y"), {"role": "user", "content": "a"}], "completion": asked("", "c")[1:]},
        ),
        ({"columns": {"prompt": "content"}}, {"content": "all of it"}, {"text": "all of it"}),
        (
            {"ranking": True, "columns": {"prompt": "q", "chosen": "good", "rejected": "bad"}},
            {"q": "a", "good": "c", "bad": "d"},
            {"prompt": [{"role": "user", "content": "a"}], "chosen": asked("", "c")[1:], "rejected": asked("", "d")[1:]},
        ),
        (
            {"formatting": "sharegpt", "columns": {"messages": "talk", "system": "s"}, "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me"}},
            {"talk": [{"who": "me", "what": "a"}, {"who": "gpt", "what": "c"}], "s": "sys"},
            {"messages": asked("a", "c", {"role": "system", "content": "sys"})},
        ),
        (
            {
                "formatting": "sharegpt",
                "columns": {"messages": "messages"},
                "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
            },
            {"messages": asked("a", "c")},
            {"messages": asked("a", "c")},
        ),
        ({"formatting": "openai", "columns": {"messages": "talk"}}, {"talk": asked("a", "c")}, {"messages": asked("a", "c")}),
        (
            {"formatting": "sharegpt", "ranking": True},
            {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt", "value": "c"}, "rejected": {"from": "gpt", "value": "d"}},
            {"prompt": [{"role": "user", "content": "a"}], "chosen": asked("", "c")[1:], "rejected": asked("", "d")[1:]},
        ),
        (
            {"formatting": "sharegpt", "columns": {"messages": "messages", "kto_tag": "good"}},
            {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "c"}], "good": False},
            {"prompt": [{"role": "user", "content": "a"}], "completion": asked("", "c")[1:], "label": False},
        ),
    ],
)
def test_columns_tags_and_ranking(tmp_path, entry, row, wanted):
    (given,), _ = formatted(written(tmp_path, entry, [row]))
    assert given == wanted


def test_what_an_entry_does_not_name_is_not_read_and_not_lost(tmp_path):
    """LLaMA-Factory does not read an undeclared system column: here it is there under another name, and said to be unused."""
    (given,), said = formatted(written(tmp_path, {}, [{"instruction": "a", "output": "c", "system": "no", "id": 7}]))
    assert given["prompt"] == [{"role": "user", "content": "a"}]
    assert "not used: undeclared_system, id" in said[-1]


@pytest.mark.parametrize(
    ("name", "entry", "problem"),
    [
        ("", {}, "lists 1 data sets: mine."),
        ("mien", {}, "has no data set 'mien'. Did you mean 'mine'?"),
        ("mine", {"formating": "alpaca"}, "has an unknown key 'formating'. Did you mean 'formatting'?"),
        ("mine", {"formatting": "vicuna"}, "formatting 'vicuna' is not known."),
        ("mine", {"columns": {"promt": "q"}}, "columns has an unknown key 'promt'. Did you mean 'prompt'?"),
        ("mine", {"tags": {"rol_tag": "q"}}, "tags has an unknown key 'rol_tag'."),
        ("mine", {"columns": {"images": "i"}}, "has images."),
        ("mine", {"num_samples": 10}, "takes a part of the data (num_samples: 10)."),
        ("mine", {"file_name": ""}, "lies neither in a file nor on the hub"),
        ("mine", {"file_name": "gone.json"}, "gone.json: no such file or directory."),
    ],
)
def test_what_is_refused(tmp_path, name, entry, problem):
    reference = written(tmp_path, entry, [{"instruction": "a", "output": "c"}]).rpartition(":")[0] + (f":{name}" if name else "")
    with pytest.raises(DataError) as error:
        list(read_rows(reference, Ledger()))
    assert problem in error.value.problem


def test_a_row_that_does_not_fit_is_named(tmp_path):
    reference = written(tmp_path, {"formatting": "sharegpt"}, [{"conversations": [{"from": "human", "value": "a", "weight": 0}]}])
    with pytest.raises(DataError, match=r"rows.json:1: field 'conversations', message 1 has weight beside 'from' and 'value'."):
        list(read_rows(reference, Ledger()))
    ledger = Ledger(skip_bad_rows=True)
    with pytest.raises(DataError, match=r"no row can be used; all 1 are in the ledger."):
        list(read_rows(reference, ledger))
    assert ledger.entries[0].action == "dropped"


def test_recipe_and_manifest_follow_it(tmp_path, monkeypatch):
    """A relative reference becomes absolute in the written recipe, and both files are fingerprinted."""
    reference = written(tmp_path, {}, [{"instruction": "a", "output": "c"}])
    (tmp_path / "recipe.yaml").write_text("data: dataset_info.json:mine\n")
    assert read_recipe(tmp_path / "recipe.yaml")["data"] == reference
    monkeypatch.chdir(tmp_path)
    assert f"data: {reference}" in to_yaml(merge({}, {"data": "dataset_info.json:mine"}))
    assert set(data_fingerprint(reference)["files"]) == {str(tmp_path / "dataset_info.json"), str(tmp_path / "rows.json")}


def test_a_run_trains_on_it(tmp_path):
    from ftx.testing import tiny_model_dir

    reference = written(tmp_path, {"columns": {"prompt": "q", "response": "a"}}, [{"q": f"what is {i}?", "a": f"it is {i}"} for i in range(8)])
    answer = ftx(
        *("run", "--model", tiny_model_dir(tmp_path / "tiny"), "--data", reference, "--dtype", "float32", "--output", tmp_path / "run"),
        *("-o", "trainer.max_steps=1", "--observer", "none"),
    )
    assert answer.exit_code == 0, answer.output
    assert "train: 8 rows of 8" in answer.output
