"""A real run with the observer `tensorboard`, read back with TensorBoard's own reader."""

from __future__ import annotations

import pytest

from ftx.run import RunDir, read_lines
from ftx.testing.own import ROWS
from ftx.testing.runs import catalogue, make_run, train
from ftx_tensorboard import TensorBoard


def test_figures_and_scores_are_in_the_event_files(tmp_path):
    pytest.importorskip("ftx_sft")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from ftx import Score
    from ftx.recipe import Choice
    from ftx.testing.trainer import OWN

    choice = Choice("mine", {})
    trainer = Choice("sft", {"max_steps": 3, "logging_steps": 1})
    train(
        tmp_path / "run",
        ROWS["prompt-completion"],
        catalogue(observer={"mine": TensorBoard}),
        adapter=OWN,
        trainer=trainer,
        observers=(choice,),
    )
    run = make_run()
    run.directory = RunDir(tmp_path / "run")
    TensorBoard().run_finished(run=run, scores=[Score(metric="exact_match", value=0.75, n=4, evaluator="exact-match", phase="tuned")])

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(line["step"], line["loss"]) for line in read_lines(tmp_path / "run" / "metrics.jsonl")]
    assert losses == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in expected] and len(losses) == 3
    assert [event.value for event in events.Scalars("tuned/exact-match/exact_match")] == [0.75]


def test_a_directory_of_ones_own(tmp_path):
    run = make_run(tmp_path / "run")
    (callback,) = TensorBoard(directory=str(tmp_path / "elsewhere")).trainer_callbacks(run=run)
    callback.tb_writer.close()
    assert list((tmp_path / "elsewhere").glob("events.*")) and not (tmp_path / "run" / "tensorboard").exists()


def test_without_the_library_the_run_is_refused(monkeypatch):
    monkeypatch.setattr("ftx_tensorboard.find_spec", lambda name: None)
    assert TensorBoard().preflight(run=make_run()) == ["observer 'tensorboard' needs tensorboard: pip install tensorboard"]


def test_only_the_main_process_writes(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    run = make_run(tmp_path / "run")
    assert TensorBoard().trainer_callbacks(run=run) == []
