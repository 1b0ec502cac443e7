"""The ledger: what comes in is used or written down, to the row, whatever is in the file."""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import re

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from support import read_rows, write_rows

from ftx.catalogue import Catalogue
from ftx.data import read_dataset, to_dataset
from ftx.errors import FtxError, PluginError
from ftx.hooks import Hooks
from ftx.ledger import Ledger
from ftx.prepare import _formatted, account, check_rows
from ftx.testing import make_run

# ---- corrupted files -----------------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue."}]
SHARED = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Blue."}]
TREE = {
    "role": "prompter", "text": "Why?",
    "replies": [
        {"role": "assistant", "text": "So.", "rank": 0, "replies": [{"role": "prompter", "text": "And?", "replies": []}]},
        {"role": "assistant", "text": "No.", "rank": 1, "replies": []},
    ],
}  # fmt: skip
#: formatter, its options, and a row that it reads
FORMS = [
    ("alpaca", {}, {"instruction": "Translate.", "input": "Haus", "output": "house"}),
    ("alpaca", {"style": "instruction"}, {"instruction": "Translate.", "input": None, "output": "house", "history": [["a", "b"]]}),
    ("alpaca", {}, {"instruction": "Say.", "instances": [{"input": "", "output": "a"}, {"input": "x", "output": "b"}]}),
    ("sharegpt", {"trim": True}, {"conversations": SHARED, "system": "Be short."}),
    ("sharegpt", {}, {"conversations": SHARED, "tools": '[{"name": "f", "description": "", "parameters": {}}]'}),
    ("messages", {}, {"messages": TURNS, "tools": None}),
    ("messages", {"trees": "all"}, {"prompt": TREE}),
    ("completion", {}, {"prompt": "2 + 2 =", "completion": " 4"}),
    ("completion", {"style": "chat"}, {"prompt": TURNS[:1], "completion": "Blue."}),
    ("preference", {}, {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}),
    ("preference", {}, {"messages": TURNS, "label": True}),
    ("preference", {"pairs": "all"}, {"prompt": TREE}),
    ("text", {}, {"text": "Once upon a time."}),
    ("auto", {}, {"instruction": "Translate.", "input": "Haus", "output": "house"}),
    ("auto", {}, {"messages": TURNS}),
]
#: What a file may hold that is whole and no row of a kind: what formatters must say of each is their own tests' matter.
ODD = st.sampled_from(
    [None, True, 7, -0.5, 1e308, 10**30, "", " ", "x", "\ud800", "\x00\x1b[2J", [], {}, [None], [[]], [{}], {"role": 1}, {"": {"": []}},
     [{"role": "user"}], [{"role": "user", "content": None}, {"role": "assistant", "content": ["x"]}], [{"from": "gpt", "value": {}}], {"replies": 3}]
).map(copy.deepcopy)  # fmt: skip


@st.composite
def corrupted(draw) -> tuple[str, dict, str, bytes, bool]:
    """A formatter with its options, a file's name and bytes, and whether bad rows are skipped."""
    formatter, options, good = draw(st.sampled_from(FORMS))
    rows = [copy.deepcopy(good) for _ in range(draw(st.integers(1, 6)))]
    for _ in range(draw(st.integers(0, 3))):
        _spoil(draw, rows)
    suffix = draw(st.sampled_from([".jsonl", ".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz"]))
    data = _written(rows, suffix, draw)
    for _ in range(draw(st.integers(0, 2))):
        data = _damaged(draw, data)
    return formatter, options, f"rows{suffix}", data, draw(st.booleans())


def _spoil(draw, rows: list) -> None:
    """Put something odd somewhere into a row: a field, a key, a place deep inside, or the whole row."""
    at = draw(st.integers(0, len(rows) - 1))
    how = draw(st.sampled_from(["field", "drop", "inside", "row", "extra"]))
    if how == "row" or not isinstance(rows[at], dict) or not rows[at]:
        rows[at] = draw(ODD)
        return
    key = draw(st.sampled_from(sorted(rows[at])))
    if how == "drop":
        del rows[at][key]
    elif how == "extra":
        rows[at][draw(st.sampled_from(["x", "_file", "_line", "_part", "label", "text", ""]))] = draw(ODD)
    elif how == "inside" and isinstance(rows[at][key], list | dict) and rows[at][key]:
        inner = rows[at][key]
        place = draw(st.sampled_from(sorted(inner) if isinstance(inner, dict) else list(range(len(inner)))))
        if isinstance(inner[place], dict) and inner[place]:
            inner, place = inner[place], draw(st.sampled_from(sorted(inner[place])))
        inner[place] = draw(ODD)
    else:
        rows[at][key] = draw(ODD)


def _written(rows: list, suffix: str, draw) -> bytes:
    kind = suffix.removesuffix(".gz")
    lines = [json.dumps(row) for row in rows]
    if kind == ".json":
        data = draw(st.sampled_from(["[%s]", "[\n%s\n]", "[%s"])) % draw(st.sampled_from([", ", ",\n"])).join(lines)
    elif kind == ".csv":
        cells = [row if isinstance(row, dict) else {"x": row} for row in rows]
        columns = list(dict.fromkeys(str(key) for row in cells for key in row))
        quoted = [["" if row.get(c) is None else str(row.get(c)).encode("utf-8", "replace").decode().replace('"', '""') for c in columns] for row in cells]
        data = "\n".join(",".join(f'"{cell}"' for cell in line) for line in [columns, *quoted]) + "\n"
    elif kind == ".parquet":
        return _parquet(rows)
    else:
        data = "\n".join(lines) + "\n"
    raw = data.encode()
    return gzip.compress(raw, mtime=0) if suffix.endswith(".gz") else raw


def _parquet(rows: list) -> bytes:
    import pyarrow
    import pyarrow.parquet

    for some in ([row for row in rows if isinstance(row, dict)], [{"x": 1}]):
        stream = io.BytesIO()
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some), stream)
            break
        except (pyarrow.ArrowException, OverflowError, UnicodeEncodeError):  # mixed types and empty objects, which Parquet cannot hold
            continue
    return stream.getvalue()


def _damaged(draw, data: bytes) -> bytes:
    if not data:
        return data
    at = draw(st.integers(0, len(data) - 1))
    how = draw(st.sampled_from(["flip", "cut", "insert", "delete", "repeat"]))
    if how == "flip":
        return data[:at] + bytes([data[at] ^ draw(st.integers(1, 255))]) + data[at + 1 :]
    if how == "cut":
        return data[:at]
    if how == "delete":
        return data[:at] + data[at + draw(st.integers(1, 8)) :]
    if how == "repeat":
        return data[:at] + data[max(0, at - 20) :]
    junk = draw(st.sampled_from([b"\xff", b"\x00", b'"', b"{", b"]", b"\n", b"\r", b"\\ud800", b"NaN", b",", b"[" * 2000, b"1" * 5000, b"\xef\xbb\xbf"]))
    return data[:at] + junk + data[at:]


#: Errors about a file as a whole, or about its columns, have no line of their own.
WHOLE_FILE = (
    "has no rows", "cannot be read", "not a Parquet file", "no row can be used; all", "must hold a list of rows",
    "the formatter used no row", "no formatter fits", "fit alike", "no column is called",
)  # fmt: skip


CATALOGUE = Catalogue()


def attempt(case, folder) -> str:
    """What became of a corrupted file; an AssertionError if anything is lost, or said without its place."""
    formatter, options, name, data, skip = case
    file = folder / name
    file.write_bytes(data)
    run = make_run(data=str(file), skip_bad_rows=skip)
    run.ledger.begin("train")
    hooks = Hooks()
    hooks.add(CATALOGUE.load("formatter", formatter)(**options), "formatter", formatter)
    try:
        raw = read_dataset(str(file), run.ledger)
        rows = _formatted(str(file), raw, hooks, run)
        check_rows(raw, rows, "formatter", hooks, run)
    except FtxError as error:
        assert not isinstance(error, PluginError), error
        assert error.problem and error.remedy
        if re.search(re.escape(str(file)) + r":\d+: ", error.problem):
            return "refused with its line"
        assert error.problem.startswith(f"{file}: "), f"no file: {error.problem}"
        assert any(text in error.problem for text in WHOLE_FILE), f"no line: {error.problem}"
        return "refused as a whole"
    counts = account("train", rows, run)
    # counted anew, not by what is tested
    came = set(zip(raw["_file"], raw["_line"], strict=True)) | run.ledger.dropped()
    used = set(zip(rows["_file"], rows["_line"], strict=True))
    assert len(came) == counts["in"] and came == used | run.ledger.dropped() and not used & run.ledger.dropped()
    assert counts["in"] == counts["as_they_came"] + counts["changed"] + counts["dropped"]
    assert {(entry.file, entry.line) for entry in run.ledger.entries} <= came
    assert skip or not counts["dropped"]
    return "read, with entries" if run.ledger.entries else "read"


def throw(count: int, folder, number: int = 0) -> dict[str, int]:
    """So many corrupted files, always the same ones for a number: what became of them."""
    seen: dict[str, int] = {}

    @seed(20261123 + number)
    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck))
    @given(corrupted())
    def one(case):
        kind = attempt(case, folder)
        seen[kind] = seen.get(kind, 0) + 1

    one()
    return seen


def test_sixty_corrupted_files(tmp_path):
    seen = throw(60, tmp_path)
    assert sum(seen.values()) >= 60 and len(seen) == 4, seen


@pytest.mark.full
@pytest.mark.parametrize("quarter", range(1, 5))
def test_1000_corrupted_files(tmp_path, quarter):
    seen = throw(250, tmp_path, quarter)
    print(seen)
    assert sum(seen.values()) >= 250 and min(seen.values()) > 5 and len(seen) == 4, seen


# ---- the sum -------------------------------------------------------------------------------------------------------


def tokens(lines: list[int], file: str = "d.jsonl"):
    return to_dataset([{"input_ids": [1, 2], "labels": [-100, 2], "_file": file, "_line": line} for line in lines])


def ledger_of(came: int, *entries: tuple[int, str]):
    run = make_run()
    run.ledger.begin("train")
    run.ledger.count(came)
    for line, action in entries:
        run.ledger.add("d.jsonl", line, "why", action)
    return run


def test_rows_in_are_those_used_and_those_dropped():
    run = ledger_of(5, (2, "dropped"), (3, "cut"), (3, "repaired"))
    assert account("train", tokens([1, 3, 4, 5, 5]), run) == {"in": 5, "used": 4, "as_they_came": 3, "changed": 1, "dropped": 1}


@pytest.mark.parametrize(
    ("came", "entries", "lines", "problem"),
    [
        (5, [(2, "dropped")], [1, 3, 4], "5 rows came in, 3 are used and 1 are in the ledger as dropped; 1 are not accounted for."),
        (2, [], [1, 2, 3], "2 rows came in, 3 are used and 0 are in the ledger as dropped; 1 are not accounted for."),
        (3, [(2, "dropped")], [1, 2, 3], "3 rows came in, 3 are used and 1 are in the ledger as dropped; 1 of them are both."),
    ],
)
def test_a_sum_that_is_not_right_is_refused(came, entries, lines, problem):
    with pytest.raises(PluginError) as error:
        account("train", tokens(lines), ledger_of(came, *entries))
    assert error.value.problem == f"train data: {problem}"


def test_one_file_for_two_splits():
    ledger = Ledger()
    for split, action in (("train", "dropped"), ("eval", "cut")):
        ledger.begin(split)
        ledger.count(3)
        ledger.add("d.jsonl", 1, "why", action)
    assert ledger.came == {"train": 3, "eval": 3} and ledger.dropped() == set() and ledger.changed() == {("d.jsonl", 1)}
    ledger.split = "train"
    assert ledger.dropped() == {("d.jsonl", 1)} and [entry.action for entry in ledger.entries] == ["dropped", "cut"]


@pytest.mark.parametrize("text", ["[%s, %s, %s]", "[\n%s, %s,\n%s]"])
def test_rows_that_share_a_line_are_told_apart(tmp_path, text):
    """A .json list in one line: each row has a line of its own, or a lost one would not be missed."""
    file = tmp_path / "rows.json"
    file.write_text(text % ('{"a": 1}', "7", '{"a": 3}'))
    ledger = Ledger(skip_bad_rows=True)
    lines = read_dataset(str(file), ledger)["_line"][:]
    first = 1 if text.startswith("[%") else 2
    assert lines == [first, first + 2] and [entry.line for entry in ledger.entries] == [first + 1] and ledger.came[""] == 3


def test_a_source_of_several_rows_keeps_those_that_can_be_used():
    from ftx import RowError, format_rows

    def encode(row):
        if row["n"] == 2:
            raise RowError("no two")
        return {"n": row["n"]}

    rows = to_dataset([{"n": [1, 2], "_file": "d.jsonl", "_line": 1}, {"n": [2], "_file": "d.jsonl", "_line": 2}])
    run = ledger_of(2)
    run.ledger.skip_bad_rows = True
    parts = format_rows(rows, lambda row: [{"n": n} for n in row["n"]], run)
    kept = format_rows(parts, encode, run)
    assert kept["n"][:] == [1] and sorted((entry.line, entry.action) for entry in run.ledger.entries) == [(1, "cut"), (2, "dropped")]
    assert account("train", kept, run) == {"in": 2, "used": 1, "as_they_came": 0, "changed": 1, "dropped": 1}


def test_a_run_ends_with_its_sum_and_its_ledger(cli, toy_run, tmp_path):
    good = [{"q": f"what is {i}?", "a": f"it is {i}"} for i in range(12)]
    file = write_rows(tmp_path / "data.jsonl", [*good, {"q": 7, "a": "x"}, {"q": "long?", "a": "x" * 300}])
    file.write_text(file.read_text() + "{broken\n")
    result = cli(*toy_run("--data", file, "--skip-bad-rows", "--allow-truncation", "-o", "trainer.max_length=100", "-o", "trainer.max_steps=1"))
    assert result.exit_code == 0, result.output
    expected = {"in": 15, "used": 13, "as_they_came": 12, "changed": 1, "dropped": 2}
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["source_rows"] == {"train": expected} and json.loads((tmp_path / "run" / "audit.json").read_text())["train"]["source_rows"] == expected
    entries = read_rows(tmp_path / "run" / "ledger.jsonl")
    assert sorted((entry["line"], entry["action"]) for entry in entries) == [(13, "dropped"), (14, "cut"), (15, "dropped")]
    assert {os.path.basename(entry["file"]) for entry in entries} == {"data.jsonl"}
