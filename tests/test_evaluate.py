"""A finished run evaluated again: what an evaluator gave before is replaced by scores only, and as a whole."""

from __future__ import annotations

import json

import pytest

from ftx import Evaluation, Score, hookimpl, option, plugin
from ftx.console import Console
from ftx.errors import RunError
from ftx.readback import evaluate_again
from ftx.recipe import Choice
from ftx.run import RunDir, write_lines
from ftx.testing.runs import catalogue, finished_run, train

ROWS = [{"prompt": f"{i} + {i} = ", "completion": f"{2 * i}."} for i in range(4)]


@plugin
class Fixed:
    """Gives `value` in each phase; `fails` in one, after `spends` calls; or only looks (`dry`)."""

    value: float = option(0.0, "The score.")
    fails: str = option("", "base, tuned or change.")
    dry: bool = option(False, "Give items and no score.")
    spends: int = option(1, "Calls in each phase.")

    def _phase(self, phase, run):
        run.notes.setdefault("phases", []).append(phase)
        counts = run.notes.setdefault("usage", {}).setdefault("fixed", {}).setdefault("judge", {"calls": 0})
        counts["calls"] += self.spends
        if phase == self.fails:
            raise RuntimeError("the judge is on holiday")
        return [] if self.dry else [Score(metric="value", value=self.value, n=1)]

    @hookimpl
    def evaluate_model(self, generate, dataset, run):
        scores = self._phase("tuned" if "base" in run.notes.get("phases", []) else "base", run)
        return Evaluation(scores, [{"prompt": "q", "answer": "a", "reference": "", "verdict": "dry run" if self.dry else self.value}])

    @hookimpl
    def compare_answers(self, base_items, tuned_items, run):
        assert base_items == tuned_items, "they are of two evaluations"
        return Evaluation(self._phase("change", run), [item | {"pair": True} for item in tuned_items])


PLUGINS = catalogue(evaluator={"fixed": Fixed})


def state(directory: RunDir):
    """All that an evaluation writes, without the manifest."""
    return {path.relative_to(directory.path): path.read_text() for path in [directory.scores, *sorted(directory.path.rglob("eval/*/*"))] if path.exists()}


def evaluate(directory, **options):
    assignments = tuple(f"fixed.{name}={value}" for name, value in options.items())
    return evaluate_again(str(directory), ("fixed",), None, assignments, PLUGINS, Console(quiet=True))


def values(directory):
    """Phase -> value, in scores.json and in the items."""
    scores = {score["phase"]: score["value"] for score in directory.read_json("scores.json", []) if score["evaluator"] == "fixed"}
    items = {phase: [item["verdict"] for item in directory.read_items("fixed", phase)] for phase in ("base", "tuned", "change")}
    return scores, {phase: verdicts[0] for phase, verdicts in items.items() if verdicts}


@pytest.fixture
def fresh(tmp_path):
    """A finished run that no evaluator has looked at."""
    return finished_run(tmp_path / "run", ROWS).directory


@pytest.fixture
def scored(fresh):
    evaluate(fresh, value=0.25)
    every = dict.fromkeys(("base", "tuned", "change"), 0.25)
    assert values(fresh) == (every, every)
    return fresh


def test_new_scores_replace_the_old_ones_of_the_same_evaluator(scored):
    others = [Score(metric="m", value=1.0, n=1).stamped("other", "base").as_dict()]
    scored.write_json("scores.json", others + scored.read_json("scores.json"))
    evaluate(scored, value=0.5)
    every = dict.fromkeys(("base", "tuned", "change"), 0.5)
    assert values(scored) == (every, every)
    assert scored.read_json("scores.json")[0] == others[0] and len(scored.read_json("scores.json")) == 4


def test_one_without_scores_replaces_nothing_and_may_still_compare(scored):
    before = state(scored)
    outcome = evaluate(scored, dry=True)
    assert state(scored) == before and outcome.scores == []
    assert outcome.notes["phases"] == ["base", "tuned", "change"]


@pytest.mark.parametrize("phase", ["base", "tuned", "change"])
def test_one_that_raises_in_any_phase_leaves_all_that_there_was(scored, phase):
    before = state(scored)
    with pytest.raises(RunError, match="evaluator 'fixed' failed: the judge is on holiday"):
        evaluate(scored, value=0.5, fails=phase)
    assert state(scored) == before


def test_where_there_was_nothing_what_came_before_the_failure_is_kept(fresh):
    with pytest.raises(RunError, match="the judge is on holiday"):
        evaluate(fresh, value=0.5, fails="change")
    assert values(fresh) == ({"base": 0.5, "tuned": 0.5}, {"base": 0.5, "tuned": 0.5})


def test_an_interrupted_evaluation_leaves_all_that_there_was(scored, monkeypatch):
    before = state(scored)

    def pressed(self, *_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ftx.readback.compare_phases", pressed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(scored, value=0.5)
    assert state(scored) == before


def test_the_notes_of_an_evaluation_stand_in_the_manifest_and_usage_adds_up(scored):
    before = scored.read_json("manifest.json")
    assert before["phases"] == ["base", "tuned", "change"] and before["usage"] == {"fixed": {"judge": {"calls": 3}}}
    with pytest.raises(RunError):
        evaluate(scored, spends=10, fails="tuned")
    after = scored.read_json("manifest.json")
    assert after["usage"] == {"fixed": {"judge": {"calls": 23}}}, "what failed was paid for too"
    assert {**after, "phases": 0, "usage": 0} == {**before, "phases": 0, "usage": 0}


def test_a_training_run_writes_the_items_of_those_that_gave_scores(tmp_path):
    given = {"adapter": "ftx.testing.own:Norms", "trainer": Choice("sft", {"max_steps": 1})}
    write_lines(tmp_path / "eval.jsonl", [{"prompt": "1 + 1 = ", "completion": "2."}])
    for dry in (False, True):
        choice = Choice("fixed", {"dry": dry, "value": 0.5})
        outcome = train(tmp_path / f"dry-{dry}", ROWS, PLUGINS, evaluators=(choice,), eval_data=str(tmp_path / "eval.jsonl"), allow_overlap=True, **given)
        assert outcome.notes["phases"] == ["base", "tuned", "change"]
        every = {} if dry else dict.fromkeys(("base", "tuned", "change"), 0.5)
        assert values(outcome.directory) == (every, every)
        assert json.loads(outcome.directory.manifest.read_text())["usage"] == {"fixed": {"judge": {"calls": 3}}}
