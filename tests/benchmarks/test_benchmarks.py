"""The benchmark's own parts: its clock, and what it asks of each side."""

from __future__ import annotations

import functools
import json
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "toys")]

import abreast  # noqa: E402
import peers  # noqa: E402
import run  # noqa: E402


def test_a_step_is_timed_with_all_that_lies_between_it_and_the_next(tmp_path):
    """Each part of a step sleeps: the batch, the step itself, the log line, another callback."""
    from clock import Watch
    from torch import nn

    watch, model = Watch(str(tmp_path / "noted.json")), nn.Embedding(4, 2)
    model.get_input_embeddings = lambda: model
    watch.on_train_begin(None, None, None, model=model)
    for step in range(4):
        time.sleep(0.02)  # what fetches the batch
        watch.on_step_begin(None, None, None)
        time.sleep(0.01)
        watch.on_step_end(None, None, None)
        time.sleep(0.02)  # what writes metrics
        watch.on_log(None, None, None, logs={"loss": 1.0 / (1 + step), "grad_norm": 2.0})
    watch.on_train_end(None, None, None)
    noted = json.loads((tmp_path / "noted.json").read_text())
    assert len(noted["seconds"]) == 3 and min(noted["seconds"]) >= 0.05
    assert len(noted["losses"]) == 4 and run.step_of({"seconds": [9, 9, *noted["seconds"]]}) >= 0.05


def test_every_bar_has_its_workload_and_its_side():
    for title, name, side, what, _ in run.BARS:
        kind, adapter, sides = run.WORKLOADS[name]
        assert side in sides or (side == "LLaMA-Factory" and adapter == "lora" and kind != "pairs"), title
        assert what in ("step", "peak"), title


def test_trainers_of_one_process_take_their_steps_in_turn():
    """Each is timed for its own steps alone: the second sleeps five times as long as the others."""
    from turns import in_turns

    order = []

    def train(name, pause, turn):
        for _ in range(5):
            turn.on_step_begin(None, None, None)
            order.append(name)
            time.sleep(pause)
        turn.on_train_end(None, None, None)

    pauses = {"a": 0.02, "b": 0.1, "c": 0.02}
    found = in_turns({name: functools.partial(train, name, pause) for name, pause in pauses.items()})
    assert order == ["a", "b", "c"] * 5
    assert [len(turn.seconds) for turn in found.values()] == [4, 4, 4]
    assert min(found["b"].seconds) >= 0.1 > max(found["a"].seconds + found["c"].seconds)
    times, doubt = abreast.slower(found["b"].seconds, found["a"].seconds)
    assert 3 < times < 6 and doubt < 1


@pytest.mark.parametrize("name", ["snips, LoRA", "alpaca, LoRA"])
def test_both_kinds_of_rows_are_compared_with_llama_factory(name):
    assert any(bar[1:3] == (name, "LLaMA-Factory") for bar in run.BARS)


def test_llama_factory_gets_the_models_own_chat_template(tmp_path):
    asked = peers.settings("model", "lora", 6, 16, 2e-4, tmp_path)
    assert asked["template"] == "smollm2" and asked["max_steps"] == 6
    compile(peers.TRAIN, "train", "exec")


def test_the_clock_needs_no_ftx():
    """It is imported in environments of other programs."""
    source = (HERE.parent / "toys" / "clock.py").read_text()
    assert "import ftx" not in source and "from ftx" not in source
