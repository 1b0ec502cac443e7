"""A real offline run with the observer `wandb`, read back from the file that `wandb sync` would send."""

from __future__ import annotations

import json
import struct
import time
from importlib.util import find_spec

import pytest

from ftx import Score
from ftx.run import read_lines
from ftx.testing.own import ROWS
from ftx.testing.runs import catalogue, make_run, train
from ftx_wandb import WandB

needs_wandb = pytest.mark.skipif(not find_spec("wandb"), reason="needs wandb, which is no requirement because trl imports it in every run: pip install wandb")


def records_of(place):
    """Every record of the one run in a directory. wandb itself reads these files in Go only: a header of 7 bytes, then blocks of 32 KiB of
    chunks as in LevelDB's log (checksum, length, kind; kinds 1 and 4 end a record), each record a protobuf."""
    from wandb.proto import wandb_internal_pb2

    (file,) = place.glob("wandb/offline-run-*/run-*.wandb")
    data, at, whole, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


def ended(place, seconds=30.0):
    """The records of a run that has ended, and its exit status. wandb's own process may still be writing when finish() has returned."""
    end = time.monotonic() + seconds
    while True:
        records = records_of(place)
        exits = [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"]
        if exits or time.monotonic() > end:
            return records, exits
        time.sleep(0.2)


@needs_wandb
def test_figures_and_scores_are_in_the_offline_run(tmp_path, capsys):
    pytest.importorskip("ftx_sft")
    from ftx.recipe import Choice
    from ftx.testing.trainer import OWN

    plugins = catalogue(observer={"mine": WandB})
    trainer = Choice("sft", {"max_steps": 3, "logging_steps": 1})
    train(tmp_path / "run", ROWS["prompt-completion"], plugins, adapter=OWN, trainer=trainer, observers=(Choice("mine", {"mode": "offline"}),))
    assert capsys.readouterr().out == "", "standard output belongs to --json"
    records, exits = ended(tmp_path / "run")
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
    assert exits == [0]


@needs_wandb
def test_scores_and_a_failed_run(tmp_path):
    run, observer = make_run(tmp_path / "run"), WandB(mode="offline")
    observer.run_failed(run=run)  # training never began
    observer.trainer_callbacks(run=run)
    observer.run_finished(run=run, scores=[Score(metric="exact_match", value=0.75, n=4, evaluator="exact-match", phase="tuned")])
    kept = {item.nested_key[0] if item.nested_key else item.key: item.value_json for record in ended(tmp_path / "run")[0] for item in record.summary.update}
    assert kept["tuned/exact-match/exact_match"] == "0.75"
    failed = make_run(tmp_path / "failed")
    observer.trainer_callbacks(run=failed)
    observer.run_failed(run=failed)
    assert ended(tmp_path / "failed")[1] == [1]


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
