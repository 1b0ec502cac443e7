"""`ftx rerun` and `ftx compare`: what is equal is called equal, and what differs is found and said."""

from __future__ import annotations

import json
import shutil

import numpy
import pytest
import scipy.stats
from support import write_rows

from ftx.compare import compare_runs, numbers_of, paired_bootstrap
from ftx.errors import RecipeError
from ftx.machine import Machine
from ftx.testing import ftx

MORE = ("-o", "trainer.max_steps=4", "-o", "trainer.per_device_train_batch_size=4", "--dtype", "float32", "--device", "cpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny, small):
    """Three runs: `a`, `b` with another rate and seed, `c` as `a` with other evaluation data."""
    folder = tmp_path_factory.mktemp("compare")
    other = write_rows(folder / "other.jsonl", [{"q": f"what is {i}?", "a": f"it is {i}" + " and more" * (i % 3)} for i in range(26, 34)])
    made = {}
    for name, more in {"a": (), "b": ("-o", "trainer.learning_rate=0.01", "--seed", "7"), "c": ()}.items():
        made[name] = folder / name
        answer = ftx(
            *("run", "--model", tiny, "--data", small["train"], "--eval-data", other if name == "c" else small["eval"]),
            *("--formatter", "toys:Pairs", "--adapter", "toys:Head"),
            *("--evaluator", "toys:Equal", *MORE, *more, "--output", made[name]),
        )
        assert answer.exit_code == 0, answer.output
    return made


def test_a_rerun_is_equal_and_says_so(cli, runs):
    again = cli("rerun", runs["a"])
    assert again.exit_code == 0, again.output
    assert f"Equal to {runs['a']}: the weights and all scores, to the bit." in again.stdout
    assert (runs["a"].with_name("a-rerun") / "recipe.yaml").read_text() == (runs["a"] / "recipe.yaml").read_text()
    second = cli("rerun", runs["a"], "--json")
    said = json.loads(second.stdout)
    assert said["equal"] is True and said["differs"] == [] and said["run"] == str(runs["a"].with_name("a-rerun-2"))


def test_a_rerun_that_is_not_equal_says_what_differs_and_what_changed(cli, runs, tmp_path):
    old = shutil.copytree(runs["a"], tmp_path / "old")
    scores = json.loads((old / "scores.json").read_text())
    (old / "scores.json").write_text(json.dumps([{**score, "value": score["value"] + 0.25} for score in scores]))
    (old / "model" / "head.safetensors").write_bytes((runs["b"] / "model" / "head.safetensors").read_bytes())
    manifest = json.loads((old / "manifest.json").read_text())
    manifest["libraries"]["torch"] = "2.0.0"
    (old / "manifest.json").write_text(json.dumps(manifest))
    again = cli("rerun", old, "--output", tmp_path / "new", "--json")
    said = json.loads(again.stdout)
    assert again.exit_code == 1 and said["equal"] is False and said["status"] == "failed"
    assert "model/head.safetensors" in said["differs"] and any(line.startswith("toys:Equal equal (tuned): 0.25 and ") for line in said["differs"])
    assert len(said["changed"]) == 1 and said["changed"][0].startswith("the library torch was 2.0.0 and is ")
    assert "the result is not equal" in again.stderr and f"ftx compare {old} {tmp_path / 'new'}" in again.stderr


def test_a_run_that_memory_will_not_do_for_is_repeated_by_force_too(cli, runs, tmp_path, monkeypatch):
    monkeypatch.setattr("ftx.foresight.this_machine", lambda device: Machine("cpu", 10 << 10, True))
    refused = cli("rerun", runs["a"], "--output", tmp_path / "again")
    assert refused.exit_code == 2 and "--force" in refused.stderr and not (tmp_path / "again").exists()
    forced = cli("rerun", runs["a"], "--output", tmp_path / "again", "--force")
    assert forced.exit_code == 0 and "tried all the same" in forced.stdout and f"Equal to {runs['a']}" in forced.stdout


def test_compare_finds_what_differs_and_nothing_else(cli, runs):
    found = compare_runs([str(runs["a"]), str(runs["b"]), str(runs["c"])])
    assert found["recipe"]["trainer.learning_rate"] == [5e-3, 1e-2, 5e-3], "a suggested value is compared with one that was given"
    assert found["recipe"].keys() == {"seed", "trainer.learning_rate", "eval_data"} and found["recipe"]["seed"] == [42, 7, 42]
    assert found["versions"] == {} and found["equal_weights"] == [True, False, True]
    assert found["data"].keys() >= {"eval_data", "eval rows"} and found["data"]["eval rows"] == [6, 6, 8] and "data" not in found["data"]
    paired = {(one["run"], one["figure"]): one["n"] for one in found["pairs"]}
    assert paired[str(runs["b"]), "verdict"] == 6 and paired[str(runs["c"]), "verdict"] == 4, "only what both evaluated"
    shown = cli("compare", runs["a"], runs["b"])
    assert shown.exit_code == 0 and "trainer.learning_rate" in shown.stdout and "weights: B differs from A" in shown.stdout
    assert "versions: no difference" in shown.stdout and "B - A" in shown.stdout
    assert "recipe: no difference" in cli("compare", runs["a"], runs["a"]).stdout
    assert json.loads(cli("compare", runs["a"], runs["b"], "--json").stdout)["scores"][0]["values"] == found["scores"][0]["values"][:2]


def test_compare_refuses_what_it_cannot_compare(cli, runs, tmp_path):
    assert "one run cannot be compared" in cli("compare", runs["a"]).stderr
    assert "not a run (it has no recipe.yaml)" in cli("compare", runs["a"], tmp_path).stderr
    with pytest.raises(RecipeError):
        compare_runs([])


def test_figures_of_items():
    assert numbers_of({"verdict": "correct", "f1": 0.5, "answer": "3", "fields": {"matched": 1}}) == {"verdict": 1.0, "f1": 0.5}
    assert numbers_of({"verdict": "wrong", "margin": -2}) == {"verdict": 0.0, "margin": -2.0}
    assert numbers_of({"verdict": {"helpfulness": 4, "accuracy": 3.5}, "rating": 3.75}) == {"rating": 3.75, "verdict.helpfulness": 4.0, "verdict.accuracy": 3.5}
    assert numbers_of({"verdict": "unscored", "f1": 0.0}) == {}
    assert numbers_of({"verdict": 7}) == {"verdict": 7.0}


def test_the_bootstrap_is_scipys_and_its_p_is_fair():
    generator = numpy.random.default_rng(1)
    differences = generator.normal(0.2, 1.0, 80)
    mean, low, high, p = paired_bootstrap(differences)
    theirs = scipy.stats.bootstrap((differences,), numpy.mean, n_resamples=20_000, method="percentile", rng=2).confidence_interval
    assert mean == pytest.approx(differences.mean()) and (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.01)
    assert p == pytest.approx(scipy.stats.ttest_1samp(differences, 0).pvalue, abs=0.03)
    assert paired_bootstrap(differences) == (mean, low, high, p), "the same items give the same interval"
    assert paired_bootstrap([1.0] * 5) == (1.0, 1.0, 1.0, 1e-4) and paired_bootstrap([0.0] * 5)[3] == 1.0
    rejected = sum(paired_bootstrap(generator.normal(0, 1, 60), seed)[3] < 0.05 for seed in range(200))
    assert 2 <= rejected <= 22, f"of 200 comparisons of equals {rejected} are called different at 5 %"
