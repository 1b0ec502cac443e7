"""A real offline run with the observer `wandb`, read back from the file that `wandb sync` would send."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest

from ftx import Score
from ftx.run import read_lines
from ftx.testing.own import ROWS
from ftx.testing.runs import catalogue, make_run, train
from ftx_wandb import WandB

needs_wandb = pytest.mark.skipif(not find_spec("wandb"), reason="needs wandb, which is no requirement because trl imports it in every run: pip install wandb")


def records_of(place):
    """Every record of the one run in a directory."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    (file,) = place.glob("wandb/offline-run-*/run-*.wandb")
    store, found = DataStore(), []
    store.open_for_scan(str(file))
    while data := store.scan_data():
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        found.append(record)
    return found


@needs_wandb
def test_figures_and_scores_are_in_the_offline_run(tmp_path, capsys):
    pytest.importorskip("ftx_sft")
    from ftx.recipe import Choice
    from ftx.testing.trainer import OWN

    plugins = catalogue(observer={"mine": WandB})
    trainer = Choice("sft", {"max_steps": 3, "logging_steps": 1})
    train(tmp_path / "run", ROWS["prompt-completion"], plugins, adapter=OWN, trainer=trainer, observers=(Choice("mine", {"mode": "offline"}),))
    assert capsys.readouterr().out == "", "standard output belongs to --json"
    records = records_of(tmp_path / "run")
    (begun,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (begun.project, begun.display_name, begun.run_group) == ("ftx", "run", "run")
    lines = [
        {item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    losses = [(line["train/global_step"], line["train/loss"]) for line in lines if "train/loss" in line]
    expected = [(line["step"], line["loss"]) for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert losses == [(step, pytest.approx(loss)) for step, loss in expected] and len(losses) == 3
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [0]


@needs_wandb
def test_scores_and_a_failed_run(tmp_path):
    run, observer = make_run(tmp_path / "run"), WandB(mode="offline")
    observer.run_failed(run=run)  # training never began
    observer.trainer_callbacks(run=run)
    observer.run_finished(run=run, scores=[Score(metric="exact_match", value=0.75, n=4, evaluator="exact-match", phase="tuned")])
    kept = {item.nested_key[0] if item.nested_key else item.key: item.value_json for record in records_of(tmp_path / "run") for item in record.summary.update}
    assert kept["tuned/exact-match/exact_match"] == "0.75"
    failed = make_run(tmp_path / "failed")
    observer.trainer_callbacks(run=failed)
    observer.run_failed(run=failed)
    assert [record.exit.exit_code for record in records_of(tmp_path / "failed") if record.WhichOneof("record_type") == "exit"] == [1]


@needs_wandb
def test_an_online_run_without_a_key_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    (reason,) = WandB().preflight(run=make_run())
    assert "set WANDB_API_KEY, or -o wandb.mode=offline" in reason
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert WandB().preflight(run=make_run()) == []


def test_without_the_library_the_run_is_refused(monkeypatch):
    monkeypatch.setattr("ftx_wandb.find_spec", lambda name: None)
    assert WandB().preflight(run=make_run()) == ["observer 'wandb' needs wandb: pip install wandb"]
