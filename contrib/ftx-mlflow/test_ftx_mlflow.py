"""A real run with the observer `mlflow` into a store of files, read back with MLflow's own client."""

from __future__ import annotations

import os

import pytest

from ftx import Score
from ftx.run import RunDir, read_lines
from ftx.testing.own import ROWS
from ftx.testing.runs import catalogue, make_run, train
from ftx_mlflow import MLflow

SCORES = [Score(metric="category:math", value=0.75, n=4, evaluator="mt-bench", phase="tuned")]


@pytest.fixture(autouse=True)
def _own_store(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_ALLOW_FILE_STORE"):
        monkeypatch.delenv(name, raising=False)


def runs_of(place):
    from mlflow import MlflowClient

    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    client = MlflowClient(place.as_uri())
    return client, client.search_runs([client.get_experiment_by_name("ftx").experiment_id])


def test_figures_and_scores_are_in_the_store(tmp_path):
    pytest.importorskip("ftx_sft")
    from ftx.recipe import Choice
    from ftx.testing.trainer import OWN

    plugins = catalogue(observer={"mine": MLflow})
    trainer = Choice("sft", {"max_steps": 3, "logging_steps": 1})
    train(tmp_path / "run", ROWS["prompt-completion"], plugins, adapter=OWN, trainer=trainer, observers=(Choice("mine", {}),))
    client, (kept,) = runs_of(tmp_path / "mlruns")
    assert (kept.info.run_name, kept.info.status) == ("run", "FINISHED")
    assert kept.data.params["max_steps"] == "3"
    losses = sorted((metric.step, metric.value) for metric in client.get_metric_history(kept.info.run_id, "loss"))
    expected = [(line["step"], line["loss"]) for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert losses == [(step, pytest.approx(loss)) for step, loss in expected] and len(losses) == 3


@pytest.mark.parametrize(("ends", "status"), [("run_finished", "FINISHED"), ("run_failed", "FAILED")])
def test_how_it_ended(tmp_path, ends, status):
    run, observer = make_run(tmp_path / "run"), MLflow()
    observer.trainer_callbacks(run=run)
    other = make_run()
    other.directory = RunDir(tmp_path / "other")
    observer.run_failed(run=other)  # the open run is not its own
    getattr(observer, ends)(run=run, **({"scores": SCORES} if ends == "run_finished" else {}))
    _, (kept,) = runs_of(tmp_path / "mlruns")
    assert kept.info.status == status
    assert kept.data.metrics == ({"tuned/mt-bench/category/math": 0.75} if ends == "run_finished" else {})


def test_a_run_that_never_trained_is_none_of_its_business(tmp_path):
    run = make_run(tmp_path / "run")
    MLflow().run_failed(run=run)
    MLflow().run_finished(run=run, scores=SCORES)
    assert not (tmp_path / "mlruns").exists()


def test_without_the_library_the_run_is_refused(monkeypatch):
    monkeypatch.setattr("ftx_mlflow.find_spec", lambda name: None)
    assert MLflow().preflight(run=make_run()) == ["observer 'mlflow' needs mlflow: pip install mlflow-skinny"]
