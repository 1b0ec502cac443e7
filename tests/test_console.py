"""What a person sees: a live panel on a real terminal, tables of at most 80 columns, and no escape from data."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from typing import Any

import pytest
from rich.console import Console as Rich

from ftx.console import Console, Progress, clock, score_table
from ftx.panel import TrainingPanel, sparkline
from ftx.run import Score


def on_a_terminal(arguments: list[str], columns: int = 100, stdout: Any = None, **environment: str) -> tuple[int, bytes]:
    """ftx on a real pseudo-terminal of that width: its status, and all the bytes that the terminal got. `stdout`: a file in its place."""
    path = os.pathsep.join([os.path.join(os.path.dirname(__file__), "toys"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    given = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "TERM": "xterm", "COLUMNS": str(columns), **environment}
    for name in {"NO_COLOR", "FORCE_COLOR"} - set(environment):
        given.pop(name, None)
    master, slave = pty.openpty()
    running = subprocess.Popen([sys.executable, "-m", "ftx", *arguments], env=given, stdout=stdout or slave, stderr=slave, stdin=slave)
    os.close(slave)
    seen = b""
    while True:
        try:
            piece = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        seen += piece
    os.close(master)
    return running.wait(60), seen


def screen_of(seen: bytes, columns: int) -> list[str]:
    """What stands on the screen at the end, with what has scrolled off above it."""
    pyte = pytest.importorskip("pyte", reason="needs pyte to read a terminal: pip install pyte")
    screen = pyte.HistoryScreen(columns, 60, history=2000)
    pyte.ByteStream(screen).feed(seen)
    above = ["".join(line[place].data for place in range(columns)) for line in screen.history.top]
    return [line.rstrip() for line in [*above, *screen.display] if line.strip()]


def test_on_a_terminal_there_is_a_live_panel(toy_run, tmp_path):
    """In a real pseudo-terminal: step, loss and its sparkline, tokens a second and memory, rewritten in place."""
    status, seen = on_a_terminal(toy_run("-o", "trainer.logging_steps=1"))
    text = seen.decode("utf-8", "replace")
    assert status == 0, text
    assert "━" in text and "loss " in text and "tokens/s" in text and "6/6" in text and "0:00:0" in text
    assert COLOUR.search(seen) and str(tmp_path / "run") in text
    lines = screen_of(seen, 100)
    drawn = [line for line in lines if line.startswith(("╭", "│", "╰"))]
    assert [line[0] for line in drawn] == ["╭", "│", "│", "│", "╰"], "one panel, drawn over itself, whose last state stays"
    assert {len(line) for line in drawn} == {80}
    title, step, loss, figures, _ = drawn
    assert title.startswith("╭─ trained 0:00:") and step.startswith("│ step 6/6 ━") and "left" not in step
    assert re.search(r"│ loss \d+\.\d{4}  [▁▂▃▄▅▆▇█]{6} ", loss)
    assert re.search(r"│ lr \S+  [\d,]+ tokens/s  resident \d+\.\d\d GiB( \(plan: \d+\.\d\d GiB of tensors\))? +│", figures)
    assert not any(line.startswith("step 1/6") for line in lines), "no plain lines beside the panel"
    assert seen.count(b"\x1b[?25l") == seen.count(b"\x1b[?25h"), "the cursor is hidden as often as it is shown again"


COLOUR = re.compile(rb"\x1b\[(?:[\d;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;[\d;]*)?m")


def test_without_colours_on_a_narrow_terminal(toy_run, tmp_path):
    status, seen = on_a_terminal(toy_run("-o", "trainer.logging_steps=1"), 44, NO_COLOR="1")
    assert status == 0, seen.decode("utf-8", "replace")
    assert not COLOUR.search(seen)
    drawn = [line for line in screen_of(seen, 44) if line.startswith(("╭", "│", "╰"))]
    assert {len(line) for line in drawn} == {44} and sum(line.startswith("╭") for line in drawn) == 1
    for figure in ("step 6/6", "loss ", "lr ", "tokens/s", "resident ", "GiB"):  # what does not fit stands on a line more
        assert any(figure in line for line in drawn), figure


def test_where_nothing_is_drawn(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def said(term: str, encoding: str = "utf-8", **options) -> str:
        monkeypatch.setenv("TERM", term)
        console = Console(**options)
        stream = io.TextIOWrapper(io.BytesIO(), encoding)
        console.rich = Rich(file=stream, force_terminal=True, width=80, highlight=False)
        watched = console.watch("step", 2)
        watched.update(1, "loss 1.0", always=True, loss=1.0)
        watched.end()
        stream.flush()
        return stream.buffer.getvalue().decode()

    assert "╭─ train" in said("xterm") and "loss 1.0000  ▁" in said("xterm")
    assert said("xterm", quiet=True) == ""
    for term, encoding in (("dumb", "utf-8"), ("xterm", "ascii")):
        plain = said(term, encoding)
        assert plain.startswith("step 1/2  loss 1.0  0:00 left") and "\x1b[?25" not in plain


def test_json_goes_to_standard_output_and_the_panel_to_the_terminal(toy_run, tmp_path):
    file = tmp_path / "out.json"
    with open(file, "wb") as stdout:
        status, seen = on_a_terminal(toy_run("--json", "-o", "trainer.logging_steps=1"), stdout=stdout)
    assert status == 0 and json.loads(file.read_text())["status"] == "done" and "╭─ train".encode() in seen


def test_a_training_that_fails_leaves_the_terminal_usable(toy_run, tmp_path):
    status, seen = on_a_terminal(toy_run("--observer", "toys:Falling", "-o", "trainer.logging_steps=1"))
    lines = screen_of(seen, 100)
    assert status == 1 and "Error: RuntimeError: the step fell over" in lines
    assert seen.count(b"\x1b[?25l") == seen.count(b"\x1b[?25h") == 1
    assert sum(line.startswith("╭") for line in lines) == 1


def test_what_did_not_end_is_drawn_no_more():
    """An evaluator that raises leaves its bar behind; the next one must be able to draw."""
    console = Console()
    console.rich = Rich(file=io.StringIO(), force_terminal=True, width=80)
    with console:
        console.begin("answers", 4).update(1)
        second = console.watch("step", 4)
        second.update(2, loss=1.0)
        assert console._live is second._bar
    assert console._live is None and console.rich.file.getvalue().count("\x1b[?25h") == 2


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([3.0, 2.0, 1.0], 10, "█▅▁"),
        ([1.0, 1.0], 10, "▁▁"),
        ([0.0, 7.0, float("nan"), 3.5], 10, "▁█ ▅"),
        (list(range(800)), 8, "▁▂▃▄▅▆▇█"),
        ([1.0], 0, "▁"),
    ],
)
def test_a_sparkline(values, width, expected):
    assert sparkline(values, width) == expected


def test_the_panel_says_how_long_it_will_take():
    """Drawn in the middle of a training; a short one may be over before it is drawn a second time."""
    console = Console()
    console.rich = Rich(file=io.StringIO(), force_terminal=True, width=80)
    panel = TrainingPanel(console, "step", 6, 0, None, resident=True)
    try:
        panel.started -= 20
        panel.update(2, loss=1.5)
        console.rich.print(panel.drawn())
    finally:
        panel.end()
    assert re.search(r"step 2/6 .* 0:00:4\d left", console.rich.file.getvalue())


def test_the_time_left_is_that_of_this_process():
    """A resumed run has steps behind it that this process did not make."""
    resumed = Progress(Console(quiet=True), "step", 1010, done=1000)
    resumed.update(1000)
    assert resumed.left() is None
    resumed.started -= 10
    resumed.update(1005)
    assert resumed.left() == pytest.approx(10, abs=0.5)
    assert (clock(125), clock(3725)) == ("2:05", "1:02:05")


def test_the_table_of_scores_fits_80_columns(capsys):
    scores = [
        Score(metric="exact_match", value=value, n=100, ci_low=0.0, ci_high=0.037, evaluator="exact-match", phase=phase)
        for phase, value in (("base", 0.0), ("tuned", 0.97))
    ]
    scores.append(Score(metric="p_value", value=1.262177448e-29, n=100, evaluator="exact-match", phase="change"))
    console = Console()
    console.rich.file = io.StringIO()
    console.table(*score_table(scores))
    lines = console.rich.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = [line for line in lines if "exact_match" in line]
    assert row.split() == ["exact-match", "exact_match", "0.000", "[0.00,", "0.04]", "0.970", "[0.00,", "0.04]", "+0.970"]


def test_text_from_data_cannot_reach_the_terminal():
    console = Console()
    console.rich.file = io.StringIO()
    console.say("a row says \x1b[2J\x07[red]boo[/red]")
    assert console.rich.file.getvalue() == "a row says \N{REPLACEMENT CHARACTER}[2J\N{REPLACEMENT CHARACTER}[red]boo[/red]\n"
    console.say("not used: x\nError: forged")
    console.table(["metric"], [["f1:x\nError: forged"]])
    assert [line.strip() for line in console.rich.file.getvalue().splitlines() if "Error" in line] == ["not used: x\\nError: forged", "f1:x\\nError: forged"]


@pytest.mark.parametrize(
    ("planned", "resident", "expected"),
    [
        (3 << 30, False, "memory 1.50 of 3.00 GiB planned"),
        (None, False, "memory 1.50 GiB"),
        (3 << 30, True, "resident 1.50 GiB (plan: 3.00 GiB of tensors)"),
        (None, True, "resident 1.50 GiB"),
    ],
)
def test_memory_beside_the_plans(planned, resident, expected):
    console = Console()
    console.rich = Rich(file=io.StringIO(), force_terminal=True, width=80)
    with console:
        watched = console.watch("step", 4, planned=planned, resident=resident)
        watched.update(2, peak_memory=3 << 29)
        watched.end()
    assert f"│ {expected} " in console.rich.file.getvalue()
