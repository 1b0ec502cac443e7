"""What a person sees: a live bar on a real terminal, tables of at most 80 columns, and no escape from data."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys

from ftx.console import Console, score_table
from ftx.run import Score


def test_on_a_terminal_there_is_a_live_bar_with_figures(toy_run, tmp_path):
    """In a real pseudo-terminal: step, loss, tokens a second and the time left, rewritten in place."""
    toys = os.path.join(os.path.dirname(__file__), "toys")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": toys, "TERM": "xterm", "COLUMNS": "100"}
    environment.pop("NO_COLOR", None)
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "ftx", *toy_run("-o", "trainer.logging_steps=1")]
    running = subprocess.Popen(command, env=environment, stdout=slave, stderr=slave, stdin=slave)
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
    text = seen.decode("utf-8", "replace")
    assert running.wait(60) == 0, text
    assert "━" in text and "loss " in text and "tokens/s" in text and "6/6" in text and "0:00:0" in text
    assert "\x1b[" in text and str(tmp_path / "run") in text


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
