"""Rows are encoded once: a second run takes them from the cache, says and writes the same, and takes nothing that is stale."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import write_rows

from ftx import cache, format_rows, hookimpl, option, plugin
from ftx.hooks import Hooks
from ftx.models import load_tokenizer
from ftx.prepare import prepare
from ftx.testing import make_run
from ftx.testing.tiny import tiny_model_dir
from ftx_sft import SFT

calls: list[str] = []


@plugin
class Pairs:
    """Questions and answers, with the longest answer noted."""

    produces = ("prompt-completion",)

    ending: str = option("", "What every answer ends with.")
    words: str = option("", "A file with a word that every answer begins with.")

    @hookimpl
    def format_dataset(self, dataset, run):
        calls.append("format")
        run.say("formatting")
        run.notes["seen"] = len(dataset)
        word = Path(self.words).read_text() if self.words else ""

        def convert(row):
            run.ledger.add("data", 3, "mended", "repaired")
            return {"prompt": row["q"], "completion": word + row["a"] + self.ending}

        return format_rows(dataset, convert, run)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("FTX_CACHE", str(tmp_path / "cache"))
    calls.clear()


@pytest.fixture
def data(tmp_path):
    return write_rows(tmp_path / "data.jsonl", [{"q": f"q{number}", "a": f"a{number}"} for number in range(cache.LEAST + 5)])


def prepared(data, *, formatter: dict | None = None, trainer: dict | None = None, model: Path | None = None, **recipe):
    """What a run gets: (token rows, ledger, what it said), and whether it had to format."""
    calls.clear()
    run = make_run(data=str(data), model=model, formatter="pairs", trainer="sft", **recipe)
    run.notes.pop("said")
    said: list[str] = []
    run.say = said.append
    hooks = Hooks()
    hooks.add(Pairs(**(formatter or {})), "formatter", "pairs")
    hooks.add(SFT(**(trainer or {})), "trainer", "sft")
    splits, _ = prepare(hooks, load_tokenizer(run.model_path), run)
    return [splits["train"].tokens.to_list(), splits["train"].rows.to_list(), run.ledger.as_rows(), said, run.notes], bool(calls)


def test_the_second_run_takes_what_the_first_made(data):
    first, formatted = prepared(data)
    assert formatted and first[4] == {"seen": cache.LEAST + 5} and first[3][0] == "formatting" and first[2]
    assert prepared(data) == (first, False)
    assert prepared(data, trainer={"learning_rate": 1e-3, "max_steps": 3}) == (first, False), "what does not shape the rows does not matter"


def test_it_is_never_stale(data, tmp_path):
    word = tmp_path / "word.txt"
    word.write_text("old")
    first, _ = prepared(data, formatter={"words": str(word)})
    assert prepared(data, formatter={"words": str(word)})[1] is False
    word.write_text("new")
    again, formatted = prepared(data, formatter={"words": str(word)})
    assert formatted and again[1] != first[1], "a file that an option names"
    first, _ = prepared(data)
    for changed in ({"formatter": {"ending": "!"}}, {"trainer": {"max_length": 64}}, {"skip_bad_rows": True}, {"seed": 7}):
        assert prepared(data, **changed)[1], changed
    text = data.read_text()
    data.write_text(text.replace("a7", "b7", 1))
    os.utime(data, (1, 1))
    again, formatted = prepared(data)
    assert formatted and again[0] != first[0], "the data's bytes, whatever their time"
    data.write_text(text)
    assert prepared(data) == (first, False)


def test_the_template_and_the_tokenizer_belong_to_it(data, tmp_path):
    from ftx.testing.tiny import tiny_model_dir

    model = tiny_model_dir(tmp_path / "model")
    prepared(data, model=model)
    assert prepared(data, model=model)[1] is False
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert prepared(data, model=model)[1]


def test_changed_code_is_another_origin(data, monkeypatch, tmp_path):
    helper = tmp_path / "beside.py"
    helper.write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    import beside  # noqa: F401 - as a plugin's helper would be

    prepared(data)
    assert prepared(data)[1] is False
    helper.write_text("changed = True")
    assert prepared(data)[1], "a module that was loaded when the rows were made has changed"
    assert prepared(data)[1] is False
    sys.modules.pop("beside")


def test_it_can_be_turned_off_and_small_data_is_not_kept(data, tmp_path):
    assert prepared(data, no_cache=True)[1] and prepared(data, no_cache=True)[1]
    assert not (tmp_path / "cache" / "encoded").exists()
    small = write_rows(tmp_path / "small.jsonl", [{"q": "a", "a": "b"}] * 3)
    assert prepared(small)[1] and prepared(small)[1]


def test_a_broken_entry_is_made_again_and_an_old_one_goes(data, tmp_path):
    first, _ = prepared(data)
    (entry,) = (tmp_path / "cache" / "encoded").iterdir()
    with open(entry / "tokens.arrow", "r+b") as stream:
        stream.truncate(1000)
    assert prepared(data) == (first, True)
    (entry / "about.json").write_text("{")
    assert prepared(data) == (first, True)
    past = time.time() - (cache.KEPT + 1) * 86400
    os.utime(entry / "about.json", (past, past))
    prepared(data, seed=2)
    assert not entry.exists(), "nobody asked for it in a month"


def test_where_the_cache_cannot_be_written_nothing_fails(data, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FTX_CACHE", str(tmp_path / "file" / "below"))
    first, _ = prepared(data)
    assert prepared(data) == (first, True)


MEMORY = """
import json, sys, threading, time
from pathlib import Path
from ftx.hooks import Hooks
from ftx.models import load_tokenizer
from ftx.prepare import prepare
from ftx.testing import make_run
from ftx_formats import Alpaca
from ftx_sft import SFT

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

def once(data, **more):
    run = make_run(data=data, formatter="alpaca", trainer="sft", skip_bad_rows=True, **more)
    hooks = Hooks()
    hooks.add(Alpaca(), "formatter", "alpaca")
    hooks.add(SFT(), "trainer", "sft")
    return prepare(hooks, load_tokenizer(run.model_path), run)

once(sys.argv[1])  # what is loaded once
before, peak, over = resident(), 0, False

def watch():
    global peak
    while not over:
        peak = max(peak, resident())
        time.sleep(0.01)

thread = threading.Thread(target=watch)
thread.start()
splits, _ = once(sys.argv[2])
over = True
thread.join()
print(json.dumps({"rows": len(splits["train"].tokens), "grew": (peak - before) / 1024}))
"""


def memory(tmp_path, rows: int) -> float:
    """MiB that reading, formatting, encoding and auditing `rows` rows takes at most, over what a process has anyway."""
    file, small = tmp_path / f"{rows}.jsonl", tmp_path / "few.jsonl"
    with file.open("w") as stream:
        for number in range(rows):
            stream.write(json.dumps({"instruction": f"say {number}", "input": "", "output": f"it is {number}"}) + "\n")
    small.write_text("".join(file.read_text().splitlines(keepends=True)[:2000]))
    (tmp_path / "memory.py").write_text(MEMORY)
    done = subprocess.run([sys.executable, tmp_path / "memory.py", small, file], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rows"] == rows
    return float(found["grew"])


@pytest.mark.full
def test_many_rows_need_no_more_memory_than_few(tmp_path):
    few, many = memory(tmp_path, 10_000), memory(tmp_path, 200_000)
    # 200,000 rows are 30 MB on disk twice over; what grows with them is some numbers of 8 bytes a row
    assert many < few + 40, (few, many)
    print(f"10,000 rows: {few:.0f} MiB; 200,000 rows: {many:.0f} MiB")


WHOLE = """
import runpy, sys, threading, time

def resident():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

peak = 0

def watch():
    global peak
    while True:
        peak = max(peak, resident())
        time.sleep(0.02)

threading.Thread(target=watch, daemon=True).start()
sys.argv[0] = "ftx"
try:
    runpy.run_module("ftx", run_name="__main__")
finally:
    print("peak", peak, file=sys.stderr)
"""


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_whole_run_over_many_rows_needs_little_more_memory(tmp_path):
    """Encoding, audit, plan, and the trainer's order: 100 to 500 bytes a row of memory that is no file's."""
    model, chosen = tiny_model_dir(tmp_path / "model"), random.Random(1)
    words = ["".join(chosen.choices("abcdefghij", k=6)) for _ in range(3000)]
    peaks = []
    for rows in (4_000, 100_000):
        file = tmp_path / f"{rows}.jsonl"
        with file.open("w") as stream:
            for number in range(rows):
                asked, answer = (" ".join(chosen.choices(words, k=8)) for _ in range(2))
                stream.write(json.dumps({"instruction": f"say {number} {asked}", "output": answer}) + "\n")
        given = ["run", "--model", model, "--data", file, "--formatter", "alpaca", "--adapter", "lora", "--trainer", "sft", "-o", "trainer.max_steps=2"]
        command = [sys.executable, "-c", WHOLE, *given, "--no-cache", "--output", tmp_path / f"run-{rows}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stderr.split()[-1]) / 1024)
    print(f"4,000 rows: {peaks[0]:.0f} MiB; 100,000 rows: {peaks[1]:.0f} MiB")
    assert peaks[1] < peaks[0] + 45, peaks


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_more_rows_need_no_more_memory(tmp_path):
    few, many = memory(tmp_path, 3_000), memory(tmp_path, 12_000)
    assert many < few + 15, (few, many)
