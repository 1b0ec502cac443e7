"""The benchmark's own parts: its clock, and what it asks of each side."""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "toys")]

import abreast  # noqa: E402
import gpu  # noqa: E402
import peers  # noqa: E402
import picture  # noqa: E402
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
    assert noted["held"] > 2**26 and noted["peak"] < noted["held"]  # an interpreter with torch
    assert len(noted["losses"]) == 4 and run.step_of({"seconds": [9, 9, *noted["seconds"]]}) >= 0.05


def test_every_bar_has_its_workload_and_its_side():
    for title, name, side, what, _ in run.BARS:
        kind, adapter, sides = run.WORKLOADS[name]
        assert side in sides or (side == "LLaMA-Factory" and adapter == "lora" and kind != "pairs"), title
        assert what in ("step", "peak"), title


def invented(seconds, peak, tokens=None):
    """What a side's run notes: six steps of so many seconds behind two slow ones."""
    times = [9 * seconds, 5 * seconds, *[seconds] * 5]
    return {"seconds": times, "losses": [2.0] * 7 + [1.5], "grad_norms": [1.0] * 8, "positions": 16000, "held": 2 * peak, "peak": peak} | (
        {"tokens": tokens} if tokens else {}
    )


def test_the_page_says_what_was_measured(monkeypatch):
    """On invented runs of two turns: the ratio is the median of the turns' own, a bar that was missed is named, and each side has its length in the picture."""
    monkeypatch.setattr(run, "speeds", lambda: {"bfloat16": 400.0})
    sides = {"ftx": [invented(1.0, 1 << 30, 12000), invented(2.0, 1 << 30, 12000)], "TRL": [invented(3.0, 1 << 31), invented(9.0, 1 << 31)]}
    text = "\n".join(run.page_of({"snips, LoRA": sides}, argparse.Namespace(steps=8, repeats=2, began=time.monotonic() - 125)))
    assert "runs of 8 steps, 2 of each side, in turns, all in 2 minutes." in text
    assert "| snips, LoRA | ftx | 1.50 | 1000 | 75% |  | 2048 | 1024 | 1.5000 | 1.000 |" in text
    assert "| snips, LoRA | TRL | 6.00 | 250 | 75% | 3.75 times | 4096 | 2048 | 1.5000 | 1.000 |" in text
    assert "| tokens/s, LoRA on snips, ftx / TRL | at least 3.5 | 3.750 | yes |" in text
    assert "| memory above load, LoRA on snips, ftx / TRL | at most 0.7 | 0.500 | yes |" in text
    slower = {"ftx": [invented(2.0, 1 << 31, 12000)], "TRL": [invented(3.0, 1 << 31)]}
    missed = run.bar_rows({"snips, LoRA": slower})
    assert [line.endswith("| no |") for line in missed] == [True, True]
    drawn = picture.bars(run.useful({"snips, LoRA": sides}), "a second")
    widths = [float(width) for width in re.findall(r'<rect x="\d+" y="\d+" width="([\d.]+)"', drawn)]
    assert len(widths) == 2 and widths[0] == pytest.approx(4 * widths[1], abs=0.2)
    assert "1,000 ftx" in drawn and "250 TRL" in drawn


def test_a_side_that_fails_leaves_the_others(monkeypatch, tmp_path, capsys):
    """As one that needs more memory than there is."""

    def measure(side, *given):
        return sys.exit("killed") if side == "TRL tuned" else invented(1.0 if side == "ftx" else 3.0, 1 << 30, 12000)

    monkeypatch.setattr(run, "measure", measure)
    found, lost = run.in_turns("gsm8k, DoRA", run.ALL, tmp_path, tmp_path, argparse.Namespace(steps=8, repeats=2))
    assert lost == ["TRL tuned"] and {side: len(runs) for side, runs in found.items()} == {"ftx": 2, "TRL": 2}
    assert capsys.readouterr().err == "gsm8k, DoRA: TRL tuned: not measured: killed\n", "once is enough"


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


def test_llama_factory_is_given_what_it_can_read_and_its_failure_is_told(tmp_path):
    """A stand-in for its interpreter: it gets a file that its reader takes (0.9.5 cannot read .json), and what it fails of is told."""
    started = tmp_path / "bin" / "python"
    started.parent.mkdir()
    started.write_text('#!/bin/sh\necho "$3 $4" >&2; echo "no such thing" >&2; exit 3\n')
    started.chmod(0o755)
    rows, work = tmp_path / "rows.jsonl", tmp_path / "work"
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    work.mkdir()
    with pytest.raises(SystemExit, match=r"settings\.yaml .*noted\.json\nno such thing"):
        peers.llama_factory(tmp_path, "lora", rows, 2, 1, 1e-4, work)
    assert json.loads((work / "settings.yaml").read_text())["max_steps"] == 2


def test_a_page_without_the_marks_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "PAGE", tmp_path / "page.md")
    run.PAGE.write_text("one\n<!-- a -->\nold\n<!-- b -->\ntwo\n")
    run.replace(("<!-- a -->", "<!-- b -->"), ["new"])
    assert run.PAGE.read_text() == "one\n<!-- a -->\n\nnew\n\n<!-- b -->\ntwo\n"
    with pytest.raises(SystemExit, match="has no <!-- c -->"):
        run.replace(("<!-- c -->", "<!-- d -->"), ["new"])
    page = (HERE.parent.parent / "docs" / "benchmarks.md").read_text("utf-8")
    for name in ("abreast", "allocators", "choices", "dora", "floor", "generation", "gpu", "learned", "levers", "rounding", "run", "startup"):
        source = (HERE / f"{name}.py").read_text("utf-8")
        marks = [mark for mark in page.splitlines() if mark.startswith("<!-- ") and f'"{mark}"' in source]
        assert len(marks) in (2, 4) and len(marks) == len(set(marks)), name


def test_a_worker_on_a_gpu_that_fails_is_a_line_of_the_table(monkeypatch, capsys):
    """And what came before it, and what it said, is kept."""
    found = {"ftx": {"side": "ftx", "rate": 200.0, "peak": 1 << 30, "held": 2 << 30, "mfu": 0.5, "loss": 1.0}}
    good = found["ftx"] | {"side": "TRL", "rate": 100.0}
    assert (
        gpu.row(gpu.run([sys.executable, "-c", f"print({json.dumps(json.dumps(good))})"], found, "TRL"), found)
        == "100 | 1.0 | 2.0 | 50% | 2.00 times | 1.000 |"
    )
    assert found["TRL"] == good
    failed = gpu.row(gpu.run([sys.executable, "-c", "raise MemoryError('all of it')"], found, "TRL tuned"), found)
    assert failed.startswith("failed: MemoryError: all of it |") and failed.count("|") == 6
    assert "Traceback" in capsys.readouterr().err and "TRL tuned" not in found
    monkeypatch.setattr(gpu, "LIMIT", 0.2)
    assert gpu.row(gpu.run([sys.executable, "-c", "import time; time.sleep(60)"], found, "x"), found).startswith("failed: more than 0.2 s |")


def test_the_clock_needs_no_ftx():
    """It is imported in environments of other programs."""
    source = (HERE.parent / "toys" / "clock.py").read_text()
    assert "import ftx" not in source and "from ftx" not in source
