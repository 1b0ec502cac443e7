"""The example data is what its generator writes and cannot be answered by copying a number; the recipes resolve."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from ftx.catalogue import Catalogue
from ftx.recipe import merge, read_recipe, resolve

REPO = Path(__file__).resolve().parent.parent
EXAMPLES = REPO / "examples"
SNIPS = REPO.parent / "shared" / "data" / "snips"
AMOUNT = re.compile(r"\d+(?:\.\d+)?")
PRICE = re.compile(r"(€|\$|£|EUR |CHF )?(\d+(?:\.\d+)?)( EUR| USD| GBP)?")


def rows(split: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (EXAMPLES / "data" / f"products-{split}.jsonl").read_text("utf-8").splitlines()]


def amount(row: dict[str, str]) -> str:
    return json.loads(row["output"])["price"].split()[0]


def test_generator_writes_the_committed_files_byte_for_byte(tmp_path):
    subprocess.run([sys.executable, str(EXAMPLES / "make_products.py"), str(tmp_path)], check=True)
    for split in ("train", "test"):
        name = f"products-{split}.jsonl"
        assert (tmp_path / name).read_bytes() == (EXAMPLES / "data" / name).read_bytes()


def test_sizes_and_no_product_in_both():
    train, test = rows("train"), rows("test")
    assert (len(train), len(test)) == (500, 100)
    names = [json.loads(row["output"])["name"] for row in train + test]
    assert len(set(names)) == 600
    assert len({row["input"] for row in train + test}) == 600
    assert len({row["instruction"] for row in train + test}) == 1
    assert len(runpy.run_path(str(EXAMPLES / "make_products.py"))["TEMPLATES"]) >= 20


def test_answers_stand_in_the_input_in_one_form():
    codes = set()
    for row in rows("train") + rows("test"):
        answer = json.loads(row["output"])
        assert json.dumps(answer) == row["output"]
        assert list(answer) == ["name", "price"]
        assert answer["name"] in row["input"]
        number, code = answer["price"].split()
        assert number in AMOUNT.findall(row["input"])
        codes.add(code)
    assert codes == {"EUR", "USD", "GBP", "CHF"}


@pytest.mark.parametrize("split", ["train", "test"])
def test_copying_is_no_answer(split):
    """The first number is mostly not the price, and neither the last nor the first that looks like one comes near the demo's mark of 0.95."""
    data = rows(split)

    def share(pick) -> float:
        return sum(pick(row["input"]) == amount(row) for row in data) / len(data)

    assert share(lambda text: AMOUNT.findall(text)[0]) < 0.45
    assert share(lambda text: AMOUNT.findall(text)[-1]) < 0.85
    assert share(lambda text: next(number for before, number, after in PRICE.findall(text) if before or after)) < 0.9


@pytest.mark.parametrize("recipe", sorted(path.name for path in (EXAMPLES / "recipes").glob("*.yaml")))
def test_recipes_resolve(recipe):
    file = EXAMPLES / "recipes" / recipe
    resolved, _ = resolve(merge(read_recipe(file), {}), Catalogue())
    assert resolved.data and resolved.eval_data
    assert file.read_text().startswith("# ")
    if recipe == "quickstart.yaml":
        assert Path(resolved.data) == EXAMPLES / "data" / "products-train.jsonl"
        assert Path(resolved.eval_data) == EXAMPLES / "data" / "products-test.jsonl"


def snips(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(EXAMPLES / "snips.py"), str(source), str(target)], capture_output=True, text=True, check=False)


def test_snips_slots(tmp_path):
    request = [{"text": "play\n "}, {"text": "Ça ira ", "entity": "track"}, {"text": " on "}, {"text": "itunes", "entity": "service"}]
    request += [{"text": " or "}, {"text": "Vimeo", "entity": "service"}, {"text": " or "}, {"text": "Deezer", "entity": "service"}]
    for split in ("train", "validate"):
        (tmp_path / f"{split}_PlayMusic.json").write_text(json.dumps({"PlayMusic": [{"data": request}, {"data": request}]}))
    done = snips(tmp_path, tmp_path / "out")
    assert done.stdout.splitlines() == [
        "snips-train.jsonl: 2 rows, 1 of them repeat an earlier request",
        "snips-validation.jsonl: 2 rows, 1 of them repeat an earlier request",
        "2 validation requests stand in the training rows too",
    ]
    row = json.loads((tmp_path / "out" / "snips-train.jsonl").read_text("utf-8").splitlines()[0])
    assert row == {
        "instruction": "Give the intent and the slots of the request as JSON.",
        "input": "play Ça ira on itunes or Vimeo or Deezer",
        "output": '{"intent": "PlayMusic", "slots": {"track": "Ça ira", "service": ["itunes", "Vimeo", "Deezer"]}}',
    }


def test_snips_without_files(tmp_path):
    done = snips(tmp_path, tmp_path / "out")
    assert (done.returncode, done.stderr) == (1, f"{tmp_path}: no train_*.json and validate_*.json there\n")


@pytest.mark.skipif(not SNIPS.is_dir(), reason="the SNIPS data is not beside the repository")
def test_snips_data(tmp_path):
    done = snips(SNIPS, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "snips-train.jsonl: 2100 rows, 12 of them repeat an earlier request",
        "snips-validation.jsonl: 700 rows, 5 of them repeat an earlier request",
        "9 validation requests stand in the training rows too",
    ]
    intents: dict[str, int] = {}
    for line in (tmp_path / "snips-train.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        answer = json.loads(row["output"])
        intents[answer["intent"]] = intents.get(answer["intent"], 0) + 1
        for value in answer["slots"].values():
            assert all(one in row["input"] for one in (value if isinstance(value, list) else [value]))
    assert set(intents.values()) == {300} and len(intents) == 7


def test_the_demos_data_give_the_audit_nothing_to_warn_of(cli):
    planned = cli("plan", EXAMPLES / "recipes" / "quickstart.yaml", "--force")
    assert planned.exit_code == 0 and "warning" not in planned.output, planned.output
