"""The rules: what is advised follows from the rows and the memory, fits by the plan, and is a recipe that ftx takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from ftx.catalogue import Catalogue
from ftx.cli import main
from ftx.errors import DataError
from ftx.machine import parse_size
from ftx.recipe import merge, read_recipe, resolve
from ftx.recommended import recommended
from ftx_advise_rules import CUT, advise, most_tokens, written

REPO = Path(__file__).resolve().parents[2]
PRODUCTS = str(REPO / "examples" / "data" / "products-train.jsonl")


def rows_file(folder: Path, rows: list[dict]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def labels(count: int) -> list[dict]:
    return [{"instruction": f"Is comment number {i} praise or blame?", "input": f"words {i * 7}", "output": ("praise", "blame")[i % 2]} for i in range(count)]


def texts(count: int) -> list[dict]:
    return [{"instruction": f"Tell me about thing {i}.", "input": "", "output": f"Thing {i} is one of many. " * 5 + f"It has {i} sides."} for i in range(count)]


def test_extraction_on_a_gpu():
    advice = advise(PRODUCTS, None, "auto", "24GB")
    assert advice.recipe["model"] in [about["hub"] for about in recommended().values()]
    assert advice.recipe["adapter"] == {"name": "dora", "r": 16, "alpha": 32}  # 500 rows are few, the rank is small
    trainer = advice.recipe["trainer"]
    assert trainer["name"] == "sft" and trainer["num_train_epochs"] == 3.0
    assert trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"] == 16
    assert any("ftx data split" in note for note in advice.notes)
    assert advice.needs.endswith("of 24.0 GB")


def test_more_memory_never_advises_a_smaller_model():
    sizes = []
    order = list(recommended())
    for memory in ("8GB", "16GB", "24GB", "80GB"):
        advice = advise(PRODUCTS, None, "auto", memory)
        hub = advice.recipe["model"]
        sizes.append(next((order.index(name) for name, about in recommended().items() if about["hub"] == hub), -1))
    assert sizes == sorted(sizes) and sizes[-1] > sizes[0]


def test_what_is_advised_fits_by_the_plan(tmp_path):
    """The written recipe, planned as a person would: the same verdict."""
    recipe = tmp_path / "recipe.yaml"
    result = CliRunner().invoke(main, ["advise", "--data", PRODUCTS, "--device-memory", "16GB", "--output", str(recipe)])
    assert result.exit_code == 0, result.output
    hub = yaml.safe_load(recipe.read_text())["model"]
    name = next(name for name, about in recommended().items() if about["hub"] == hub)
    planned = CliRunner().invoke(main, ["plan", str(recipe), "--model", name, "--device-memory", "16GB", "--json"])
    told = json.loads(planned.stdout)
    assert planned.exit_code == 0 and told["fits"] and told["predicted"]["peak_memory"] < parse_size("16GB")


def test_a_cpu_gets_the_small_model():
    advice = advise(PRODUCTS, None, "auto", None)
    from ftx.machine import this_machine

    if this_machine().device == "cpu":
        assert advice.recipe["model"] == "smollm2" and "CPU" in advice.reasons["model"]
    else:
        assert advice.recipe["model"] != "smollm2"


@pytest.mark.parametrize(
    ("make", "count", "rank", "evaluator", "few"),
    [(labels, 60, 8, "exact-match", True), (labels, 300, 8, "exact-match", False), (texts, 400, 32, "exact-match", True)],
)
def test_the_kind_of_task_and_the_number_of_rows(tmp_path, make, count, rank, evaluator, few):
    advice = advise(rows_file(tmp_path, make(count)), "held-out.jsonl", "auto", "24GB")
    assert advice.recipe["adapter"]["r"] == rank and advice.recipe["evaluators"] == [evaluator]
    assert any("few rows" in note for note in advice.notes) is few
    assert not any("ftx data split" in note for note in advice.notes)


def test_free_text_takes_four_bits_for_a_larger_model(tmp_path):
    advice = advise(rows_file(tmp_path, texts(400)), None, "auto", "16GB")
    assert advice.recipe["adapter"]["name"] == "qlora" and "4 bits" in advice.reasons["adapter"]


def test_pairs_get_dpo(tmp_path):
    pairs = [{"prompt": f"What is {i}?", "chosen": f"It is {i}, a number.", "rejected": "I do not know."} for i in range(40)]
    advice = advise(rows_file(tmp_path, pairs), "held-out.jsonl", "auto", "48GB")
    assert advice.recipe["trainer"]["name"] == "dpo" and advice.recipe["trainer"]["num_train_epochs"] == 1.0
    assert advice.recipe["evaluators"] == ["reward-accuracy"]


def test_many_rows_get_fewer_passes(tmp_path):
    assert advise(rows_file(tmp_path, labels(2500)), None, "auto", "24GB").recipe["trainer"]["num_train_epochs"] == 2.0


def test_every_choice_has_its_reason_in_the_recipe(tmp_path):
    advice = advise(PRODUCTS, PRODUCTS, "auto", "24GB")
    text = written(advice)
    content = yaml.safe_load(text)
    assert content == advice.recipe
    for key in ("model", "trainer", "trainer.num_train_epochs", "trainer.max_length", "adapter", "adapter.r", "evaluators"):
        assert f"# {key}: " in text
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    resolve(merge(read_recipe(file), {}), Catalogue())


@pytest.mark.parametrize(
    ("text", "tokens"),
    [  # as SmolLM2's vocabulary of 49,152 parts them; larger ones need fewer
        ("Artificial intelligence is a branch of computer science that studies machines.", 12),
        ("Die künstliche Intelligenz ist ein Teilgebiet der Informatik, Änderungsvorschläge müssen überprüft werden.", 47),
        ("人工智能是计算机科学的一个分支、旨在研究如何让机器模拟人类的智能行为、例如学习、推理和语言理解。", 77),
        ("人工知能は、人間の知的な振る舞いを機械で再現しようとする計算機科学の一分野である。", 71),
        ("인공지능은 인간의 지능을 기계로 모방하려는 컴퓨터 과학의 한 분야이다.", 81),
        ("ปัญญาประดิษฐ์เป็นสาขาหนึ่งของวิทยาการคอมพิวเตอร์", 88),
        ("Искусственный интеллект — это раздел информатики, изучающий возможность моделирования разума.", 72),
        ("3.14159, 2718281828 4999.95 2024-11-05", 38),
        ("def f(x):\n    return {k: v for k, v in x.items() if v[0] != '_'}\n", 29),
        ("THE QUICK BROWN FOX JUMPS OVER", 13),
        ("😀😃🎉🚀", 12),
    ],
)
def test_a_text_has_no_more_tokens_than_are_counted(text, tokens):
    assert tokens <= most_tokens(text) <= 3 * tokens


def test_long_rows_pass(tmp_path):
    """The length is that of the longest row where a model has room for it; else rows are cut, and the recipe says so."""
    long = rows_file(tmp_path, [*texts(40), {"instruction": "Tell it all.", "input": "", "output": "It is a long story. " * 1400}])
    passes = advise(long, None, "auto", "80GB")
    assert passes.recipe["trainer"]["max_length"] > 9000 and "allow_truncation" not in passes.recipe
    cut = advise(rows_file(tmp_path, [*texts(40), {"instruction": "?", "input": "", "output": "很长的故事。" * 9000}]), None, "auto", "8GB")
    assert cut.recipe["trainer"]["max_length"] == CUT and cut.recipe["allow_truncation"] is True
    assert "up to 1 of 41 rows are cut at 4,096 tokens" in cut.reasons["allow_truncation"] and "# allow_truncation: " in written(cut)


def test_labelled_answers_have_no_trainer(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "label": True}] * 5
    with pytest.raises(DataError, match="no trainer is installed"):
        advise(rows_file(tmp_path, rows), None, "auto", "24GB")


def test_a_file_is_not_written_over(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("mine")
    result = CliRunner().invoke(main, ["advise", "--data", PRODUCTS, "--device-memory", "24GB", "--output", str(file)])
    assert result.exit_code == 2 and file.read_text() == "mine"
