"""ftx export: what it refuses, what disagrees, what is written beside the model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from support import REPO, write_rows

from ftx.recipe import read_recipe
from ftx.run import RunDir
from ftx.testing import finished_run

ROWS = [{"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]} for i in range(12)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on the tiny model, with scores and one row in the ledger."""
    made = finished_run(tmp_path_factory.mktemp("export") / "my-run", ROWS, adapter="lora").directory
    made.write_json("audit.json", {"train": {"rows": 12, "tokens": 345, "supervised_share": 0.4, "length": {"max": 33}}})
    score = {"evaluator": "exact-match", "metric": "exact_match", "value": 0.5, "ci_low": 0.4, "ci_high": 0.6, "n": 40, "unscored": 0}
    made.write_json("scores.json", [{**score, "phase": "base", "value": 0.1, "ci_low": None, "ci_high": None}, {**score, "phase": "tuned"}])
    (made / "ledger.jsonl").write_text('{"file": "a", "line": 1, "reason": "x", "action": "dropped"}\n')
    return made


def export(cli, run, *arguments):
    return cli("export", run, "--to", *arguments, "--prompts", "3")


def test_the_probe_asks_without_tools():
    from datasets import Dataset

    from ftx.parity import questions

    tools = [{"type": "function", "function": {"name": "add", "description": "adds"}}]
    rows = Dataset.from_list([{**row, "tools": tools} for row in ROWS[:2]])
    assert questions(rows, 5) == [[{"role": "user", "content": "What is 0?"}], [{"role": "user", "content": "What is 1?"}]]


def test_an_export_and_what_lies_beside_it(cli, run):
    result = export(cli, run, "merged", "--json", "--data-licence", "CC0-1.0")
    assert result.exit_code == 0, result.stderr
    out = run / "export" / "merged"
    said, report = json.loads(result.stdout), json.loads((out / "export.json").read_text())
    assert said == {"status": "done", "export": str(out), **report}
    assert report["agrees"] is True and report["parity"]["prompts"] == 3 and report["parity"]["wrong"] == []
    assert report["parity"]["token_agreement"] == 1 and report["parity"]["reader"].startswith("transformers ")
    assert sorted([*report["files"], "README.md", "export.json"]) == sorted(file.name for file in out.iterdir())
    assert "parity: read back by transformers" in result.stderr and f"Export: {out}" in result.stderr
    assert not list(out.parent.glob(".*"))


def test_the_model_card(cli, run, tmp_path):
    result = export(cli, run, "merged", "--output", tmp_path / "out", "--base-licence", "Apache-2.0")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {"license": "apache-2.0", "pipeline_tag": "text-generation", "tags": ["ftx", "lora", "sft"]}
    assert "| exact-match | exact\\_match | base | 0.1 | - | 40 |" in text and "| tuned | 0.5 | [0.400, 0.600] | 40 |" in text
    for words in (
        "- trained on `my-run.jsonl` (sha256 `",
        ": 12 rows, 345 tokens, 40% of them supervised",
        "- rows dropped, cut or repaired: 1",
        "Licence of the base: Apache-2.0.",
        "Licence of the data: not stated: find out before you pass this on.",
        "```python\nfrom transformers import",
        "- The scores come from at most 40 items",
        "- The longest training row has 33 tokens",
        "100.00% of",
        "name: lora",
    ):
        assert words in text, words
    for name in ("README.md", "export.json"):  # nothing of this machine
        found = (tmp_path / "out" / name).read_text()
        assert str(tmp_path.parent) not in found and str(run.path.parent) not in found and not re.search(r"(?<![\w.])/(home|root|tmp|Users)/", found)


def test_prompts_come_from_where_it_is_said(cli, run, tmp_path):
    data = write_rows(tmp_path / "other.jsonl", ROWS[:2])
    result = cli("export", run, "--to", "merged", "--output", tmp_path / "out", "--eval-data", data, "--prompts", "50", "--json")
    assert json.loads(result.stdout)["parity"]["prompts"] == 12  # two of its own, filled up from the training data


def test_a_run_whose_data_are_gone_is_checked_with_other_prompts(cli, tmp_path):
    made = finished_run(tmp_path / "run", ROWS, adapter="lora").directory
    Path(read_recipe(made.recipe)["data"]).unlink()
    result = export(cli, made, "merged", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "no such file" in result.stderr and "Or give other prompts to check the export with: --eval-data FILE" in result.stderr
    result = export(cli, made, "merged", "--output", tmp_path / "out", "--eval-data", write_rows(tmp_path / "other.jsonl", ROWS[:2]), "--json")
    assert json.loads(result.stdout)["parity"]["prompts"] == 2 and "checked with 2 prompts: " in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mergd"], "no exporter is called 'mergd'. Did you mean 'merged'?"),
        (["merged", "-o", "exporter.bse=original"], "exporter 'merged' has no option 'bse'. Did you mean 'base'?"),
        (["merged", "-o", "adapter.r=8"], "-o adapter.r=8: not of the form exporter.OPTION=VALUE."),
        (["merged", "-o", "exporter.base=original"], "this run's base is not quantised"),
        (["merged", "--output", "{full}"], "exists and is not an empty directory."),
        (["merged", "--dtype", "float8"], "Invalid value for '--dtype'"),
        (["hub"], "exporter 'hub' needs the option 'repo'."),
        (["wrong:Ftx"], "exporter 'wrong:Ftx'"),
    ],
)
def test_what_is_refused(cli, run, tmp_path, arguments, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    result = export(cli, run, *(one.format(full=tmp_path / "full") for one in arguments), *(() if "--output" in arguments else ("--output", tmp_path / "out")))
    assert result.exit_code == 2 and words in result.output, result.output
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["mine.txt"]


def test_a_run_without_a_model_is_refused(cli, tmp_path):
    directory = RunDir(tmp_path / "run")
    result = export(cli, directory, "merged")
    assert result.exit_code == 2 and "not a run (it has no recipe.yaml)" in result.output
    directory.path.mkdir()
    directory.recipe.write_text("data: x.jsonl\n")
    result = export(cli, directory, "merged")
    assert result.exit_code == 2 and "has no trained model yet." in result.output


def test_an_export_that_disagrees_is_not_put_in_its_place(cli, run, tmp_path):
    """An error, with what differs; what was written can be looked at; --least is for those who know better."""
    result = export(cli, run, "wrong:ExportsTheBase", "--output", tmp_path / "out")
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    assert re.search(
        r"Error: the export does not agree with the run: \d+ of \d+ tokens agree \(\d+\.\d\d%\), at least 100% are wanted, first in prompt \d at token \d",
        result.output,
    )
    assert f"to look at it: {tmp_path / 'out.disagrees'}" in result.output
    report = json.loads((tmp_path / "out.disagrees" / "export.json").read_text())
    assert report["agrees"] is False and report["parity"]["token_agreement"] == report["base_token_agreement"] < 1
    result = export(cli, run, "wrong:ForgetsTheTemplate", "--output", tmp_path / "out", "--least", "0")
    assert result.exit_code == 1 and "the chat template gives '" in result.output


def test_an_exporter_that_writes_nothing(cli, run, tmp_path):
    result = export(cli, run, "wrong:ExportsNothing", "--output", tmp_path / "out")
    assert result.exit_code == 2 and "the exporter wrote nothing." in result.output and list(tmp_path.iterdir()) == []


def test_nothing_is_sent_before_it_is_checked(cli, run, tmp_path, monkeypatch):
    """export_checked: after an agreement, with the files in their place; not after a disagreement."""
    (tmp_path / "sends.py").write_text(
        "from ftx import hookimpl, plugin\nfrom wrong import ExportsTheBase\nfrom ftx_export import Merged\n\n"
        "class Send:\n    @hookimpl\n    def export_checked(self, path, report, run):\n"
        "        run.say(f'sent {sorted(f.name for f in path.iterdir())[:2]}')\n\n"
        "@plugin\nclass Good(Merged, Send):\n    'Sends.'\n\n@plugin\nclass Bad(ExportsTheBase, Send):\n    'Sends too.'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "sent ['README.md', 'chat_template.jinja']" in export(cli, run, "sends:Good", "--output", tmp_path / "good").stdout
    assert "sent" not in export(cli, run, "sends:Bad", "--output", tmp_path / "bad").stdout


def test_a_vacuous_probe_is_said(cli, tmp_path):
    """An adapter that does nothing: the base says the same, so agreement proves nothing."""
    idle = finished_run(tmp_path / "idle", ROWS, adapter="lora", amount=0.0).directory
    result = export(cli, idle, "merged")
    assert result.exit_code == 0 and "note: these prompts do not tell the tuned model from its base" in result.output


def test_the_docs_name_every_field_of_export_json(cli, run, tmp_path):
    assert export(cli, run, "merged", "--output", tmp_path / "out").exit_code == 0
    text = (REPO / "docs" / "export.md").read_text().partition("## export.json")[2].partition("\n## ")[0]
    report = json.loads((tmp_path / "out" / "export.json").read_text())
    assert set(report) | set(report["parity"]) <= set(re.findall(r"`(\w+)`", text))


def test_bf16_products_on_a_processor_without_them_are_its_own():
    """tests/toys/rounded_bf16.py gives what torch's emulation gives, to a last bit where sums are in another order, and sees a weight change."""
    import torch
    from rounded_bf16 import Rounded

    torch.manual_seed(0)
    x, weight = torch.randn(3, 32, dtype=torch.bfloat16), torch.nn.Parameter(torch.randn(8, 32, dtype=torch.bfloat16), requires_grad=False)
    for _ in range(2):
        plain = torch.nn.functional.linear(x, weight)
        with Rounded():
            ours = [torch.nn.functional.linear(x, weight), x @ weight.T, torch.matmul(x, weight.T)]
        assert all(one.dtype == torch.bfloat16 and torch.allclose(one, plain, rtol=2**-7, atol=1e-2) for one in ours)
        with torch.no_grad():
            weight.mul_(2)


def test_a_shift_that_no_softmax_sees_is_not_held_against_an_export():
    import torch

    from ftx.parity import Agreement, Probe, agreement

    said = torch.randn(5, 60, generator=torch.Generator().manual_seed(0))

    class Says:
        def __init__(self, logits):
            self.given = logits

        def logits(self, ids):
            return self.given

    def against(logits) -> Agreement:
        return agreement(Says(logits), Probe([""], [""], [[1]], answers=[[2, 3, 4, 5, 6]], logits=[said]))

    shifted = against(said + torch.tensor([3.0, -2.0, 0.0, 1.0, 7.0])[:, None])
    assert shifted.share == 1 and shifted.largest_difference == pytest.approx(7) and shifted.largest_centred < 1e-5
    one = said.clone()
    one[2, 7] += 4
    assert against(one).largest_centred == pytest.approx(4 * 59 / 60)
