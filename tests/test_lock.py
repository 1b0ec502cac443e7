"""One process at a time writes a run directory, and a crash leaves no lock behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from support import write_rows

from ftx.errors import RecipeError
from ftx.lock import LOCK, locked
from ftx.run import RunDir

HOLD = """
import os, sys, time
from ftx.lock import locked
from ftx.run import RunDir
with locked(RunDir(sys.argv[1]), make=True):
    if sys.argv[2] == "fork" and os.fork() == 0:  # as a data worker is
        print(os.getpid(), flush=True)
        time.sleep(60)
    if sys.argv[2] != "fork":
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def holding(directory, how: str = "plain"):
    """A process that holds the lock, and the number that it prints: its own, or that of its fork."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(directory), how], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


def test_the_second_is_refused_and_told_who_is_the_first(tmp_path):
    process, number = holding(tmp_path)
    try:
        with pytest.raises(RecipeError, match=f"is being written by another process \\(process {number}\\)"), locked(RunDir(tmp_path)):
            pass
    finally:
        process.kill()
        process.wait()
    assert (tmp_path / LOCK).exists(), "kill -9 leaves the file"
    with locked(RunDir(tmp_path)):
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_fork_that_outlives_a_killed_run_holds_no_lock(tmp_path):
    process, worker = holding(tmp_path, "fork")
    process.kill()
    process.wait()
    try:
        os.kill(worker, 0)
        with locked(RunDir(tmp_path)):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_directory_that_nothing_stays_in_is_taken_away(tmp_path):
    with locked(RunDir(tmp_path / "a" / "run"), make=True):
        assert (tmp_path / "a" / "run" / LOCK).exists()
    assert not (tmp_path / "a" / "run").exists()
    with locked(RunDir(tmp_path / "a"), make=True):
        (tmp_path / "a" / "file").write_text("")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["file"]


def test_two_runs_and_a_resume_in_one_directory(cli, toy_run, tmp_path):
    process, number = holding(tmp_path / "run")
    try:
        second = cli(*toy_run())
        assert second.exit_code == 2 and f"another process (process {number})" in second.stderr, second.output
        assert [file.name for file in (tmp_path / "run").iterdir()] == [LOCK], "it must leave the first one's directory alone"
    finally:
        process.kill()
        process.wait()
    assert cli(*toy_run()).exit_code == 0, "what a crash left before the recipe was written is in nobody's way"
    assert not (tmp_path / "run" / LOCK).exists()
    (tmp_path / "run" / "manifest.json").write_text((tmp_path / "run" / "manifest.json").read_text().replace('"finished": true', '"finished": false'))
    process, number = holding(tmp_path / "run")
    try:
        for command in (["resume", tmp_path / "run"], ["eval", tmp_path / "run", "--evaluator", "toys:Equal"]):
            refused = cli(*command)
            assert refused.exit_code == 2 and f"another process (process {number})" in refused.stderr, refused.output
    finally:
        process.kill()
        process.wait()


@pytest.mark.full
def test_a_live_run_refuses_a_second_one(process, toy_run, tmp_path):
    """The same with a real first run, which goes on as if nothing had been."""
    running = process(*toy_run("-o", "trainer.max_steps=300", "-o", "trainer.save_steps=50", "-o", "trainer.logging_steps=1"), start=True)
    deadline = time.monotonic() + 300
    while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    refused = process("resume", tmp_path / "run")
    assert refused.returncode == 2 and f"another process (process {running.pid})" in refused.stderr
    running.communicate(timeout=300)
    assert running.returncode == 0


def test_what_a_killed_write_left_is_swept_up(cli, toy_run, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"q": f"q{i}", "a": "a"} for i in range(8)])
    assert cli(*toy_run("--data", rows, "-o", "trainer.max_steps=1")).exit_code == 0
    run = tmp_path / "run"
    (run / "manifest.json").write_text((run / "manifest.json").read_text().replace('"finished": true', '"finished": false'))
    (run / ".scores.json.123.tmp").write_text("{")
    (run / ".model.123.tmp").mkdir()
    (run / "eval" / "toys:Equal").mkdir(parents=True)
    (run / "eval" / "toys:Equal" / ".base.jsonl.123.tmp").write_text("{")
    assert cli("resume", run).exit_code == 0
    assert not list(run.rglob("*.tmp"))


def test_a_directory_that_became_read_only_is_refused_at_resume(cli, toy_run, tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    mounted = os.geteuid() == 0  # root writes everywhere but on a read-only mount
    if mounted and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", place], capture_output=True, check=False).returncode:
        pytest.skip("root, and no right to mount: no directory is read-only here")
    try:
        assert cli(*toy_run("-o", "trainer.max_steps=1", output=place / "run")).exit_code == 0
        manifest = place / "run" / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"finished": true', '"finished": false'))
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        else:
            (place / "run").chmod(0o555)
        result = cli("resume", place / "run")
        assert result.exit_code == 2 and "cannot be written" in result.stderr and "Make the directory writable." in result.stderr, result.output
    finally:
        if mounted:
            subprocess.run(["umount", place], check=False)
        else:
            (place / "run").chmod(0o755)
