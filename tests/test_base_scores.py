"""What a resumed run takes over of the base's scores, and what it measures again."""

from __future__ import annotations

import json
import shutil

import pytest
from support import read_rows, write_rows

FLAKY = '''
from pathlib import Path
from toys import Equal
from ftx import hookimpl, option, plugin


@plugin
class Flaky(Equal):
    """Raises while the directory `broken` is there."""

    broken: str = option("", "A directory.")

    @hookimpl
    def evaluate_model(self, generate, dataset, run):
        if Path(self.broken).exists():
            raise RuntimeError("no connection")
        return Equal.evaluate_model(self, generate, dataset, run)
'''


@pytest.fixture
def stopped(cli, toy_run, small, tmp_path, monkeypatch):
    """A run that Ctrl-C ended behind step 3, whose second evaluator failed on the base, with evaluation data of its own."""
    (tmp_path / "flaky.py").write_text(FLAKY)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken").mkdir()
    shutil.copy(small["eval"], tmp_path / "eval.jsonl")
    evaluators = ("--evaluator", "toys:Equal", "--evaluator", "flaky:Flaky", "-o", f"flaky:Flaky.broken={tmp_path / 'broken'}")
    result = cli(*toy_run("--eval-data", tmp_path / "eval.jsonl", *evaluators, "--observer", "ftx.testing.own:CtrlC"))
    assert result.exit_code == 130 and "evaluator 'flaky:Flaky' failed on the base model" in result.stdout, result.output
    assert evaluated(tmp_path / "run") == [("toys:Equal", "base")]
    return tmp_path / "run"


def evaluated(run):
    return [(score["evaluator"], score["phase"]) for score in json.loads((run / "scores.json").read_text())]


def test_an_evaluator_that_failed_on_the_base_is_asked_again(cli, stopped, tmp_path):
    asked = (stopped / "eval" / "toys:Equal" / "base.jsonl").stat().st_mtime_ns
    still = cli("resume", stopped)
    assert still.exit_code == 1 and "evaluator 'flaky:Flaky' failed: no connection" in still.stderr, "no run is fine whose evaluator failed"
    manifest = json.loads((stopped / "manifest.json").read_text())
    (stopped / "manifest.json").write_text(json.dumps({key: value for key, value in manifest.items() if key != "finished"}))
    (tmp_path / "broken").rmdir()
    result = cli("resume", stopped)
    assert result.exit_code == 0, result.output
    names = ("toys:Equal", "flaky:Flaky")
    assert sorted(evaluated(stopped)) == sorted((name, phase) for name in names for phase in ("base", "tuned", "change"))
    assert (stopped / "eval" / "toys:Equal" / "base.jsonl").stat().st_mtime_ns == asked, "what is known is not asked again"


def test_base_scores_of_other_data_are_measured_again(cli, stopped, tmp_path):
    (tmp_path / "broken").rmdir()
    write_rows(tmp_path / "eval.jsonl", [{"q": "what is new?", "a": "it is this"}])
    before = (stopped / "scores.json").read_text()
    assert cli("resume", stopped).exit_code == 2 and (stopped / "scores.json").read_text() == before, "a refusal leaves all as it is"
    result = cli("resume", stopped, "--accept-drift")
    assert result.exit_code == 0, result.output
    assert {(score["phase"], score["n"]) for score in json.loads((stopped / "scores.json").read_text())} == {("base", 1), ("tuned", 1), ("change", 1)}
    for phase in ("base", "tuned"):
        assert ["what is new?" in str(row["prompt"]) for row in read_rows(stopped / "eval" / "toys:Equal" / f"{phase}.jsonl")] == [True]
