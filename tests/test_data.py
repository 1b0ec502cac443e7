"""Reading files into rows: what stays as it is, what is refused with file and line, and that no row is lost unseen."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import os
import random

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftx import RowError, format_rows
from ftx.data import ROW_TYPES, read_dataset, row_type, to_dataset
from ftx.errors import DataError
from ftx.ledger import Ledger
from ftx.testing import make_run

SKIP = "Mend the row, or drop such rows into the ledger with --skip-bad-rows."


@pytest.fixture
def put(tmp_path):
    """Write bytes, text or JSON lines; the path."""

    def written(name: str, content: bytes | str | list) -> str:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return str(tmp_path / name)

    return written


def read(file: str, ledger: Ledger | None = None) -> list[dict]:
    """The rows without where they came from."""
    return [{key: value for key, value in row.items() if not key.startswith("_")} for row in read_dataset(file, ledger or Ledger())]


def lines_of(file: str) -> list[int]:
    return list(read_dataset(file, Ledger())["_line"])


def refusal(file: str, skip: bool = False) -> DataError:
    with pytest.raises(DataError) as error:
        read_dataset(file, Ledger(skip_bad_rows=skip))
    assert error.value.status == 2 and error.value.remedy and error.value.problem.startswith(file)
    return error.value


# ---- values stay what they are -------------------------------------------------------------------------------------

ROWS = [
    {"q": "2024-01-31", "a": "None", "n": 1},
    {"q": "NA", "a": "null", "n": 2},
    {"q": "01", "a": "1e5", "n": 3},
    {"q": " spaces ", "a": "é\u2028\u0085😀\x0b\x1c", "n": 4},
    {"q": "line\nbreak", "a": 'quote " comma ,', "n": 5},
]


def test_jsonl_gives_what_it_holds(put):
    assert read(put("rows.jsonl", ROWS)) == ROWS
    assert lines_of(put("rows.jsonl", ROWS)) == [1, 2, 3, 4, 5]


def test_json_gives_what_it_holds(put):
    assert read(put("rows.json", json.dumps(ROWS, indent=2))) == ROWS
    assert lines_of(put("rows.json", json.dumps(ROWS, indent=2))) == [2, 7, 12, 17, 22], "the line where each object starts"
    assert read(put("flat.json", json.dumps(ROWS, ensure_ascii=False))) == ROWS


def test_csv_cells_stay_text(put):
    stream = io.StringIO()
    writer = csv.DictWriter(stream, ["q", "a", "n"])
    writer.writeheader()
    writer.writerows(ROWS)
    assert read(put("rows.csv", stream.getvalue())) == [{key: str(value) for key, value in row.items()} for row in ROWS]
    assert lines_of(put("rows.csv", stream.getvalue())) == [2, 3, 4, 5, 6], "the line where each record starts"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_a_byte_order_mark_and_windows_line_ends(put, name):
    text = {"rows.jsonl": '{"q": "a"}\r\n\r\n{"q": "b"}\r\n', "rows.json": '[{"q": "a"},\r\n\r\n{"q": "b"}]\r\n', "rows.csv": "q\r\na\r\n\r\nb\r\n"}[name]
    file = put(name, b"\xef\xbb\xbf" + text.encode())
    assert read(file) == [{"q": "a"}, {"q": "b"}]
    assert lines_of(file) == {"rows.jsonl": [1, 3], "rows.json": [1, 3], "rows.csv": [2, 4]}[name]


def test_a_long_cell_in_csv(put):
    long = "word " * 100_000
    assert read(put("rows.csv", f"q,a\nx,{long}\n")) == [{"q": "x", "a": long}]


def test_keys_that_the_first_row_lacks(put):
    rows = [{"q": "a"}, {"q": "b", "system": "be kind"}, {"tools": [{"name": "f"}]}]
    assert read(put("rows.jsonl", rows)) == [
        {"q": "a", "system": None, "tools": None},
        {"q": "b", "system": "be kind", "tools": None},
        {"q": None, "system": None, "tools": [{"name": "f"}]},
    ]


MIXED = [1, "1", "true", True, None, "null", "[1]", [1, "2"], {"a": {"b": None}}, 0.5, "x", "", 2**60 + 1, 2**70, -(2**70), {}, []]


def test_mixed_types_come_back_as_they_were(put):
    got = [row["x"] for row in read(put("rows.jsonl", [{"x": value} for value in MIXED]))]
    assert got == MIXED and [type(one) for one in got] == [type(one) for one in MIXED]


@pytest.mark.parametrize("values", [[1, 2.5], [2**53 + 1, 0.5], [2**64], [True, 1], [[1, 2], []], [[1], [None]], [[2**40]], [None, None], [0.1, 1e-300]])
def test_columns_of_numbers_come_back_as_they_were(values):
    got = [row["x"] for row in to_dataset([{"x": value} for value in values])]
    assert got == values and [type(one) for one in got] == [type(one) for one in values]


def test_nested_numbers_keep_every_digit():
    """`datasets.Json` reads 0.3 as 0.30000000000000004, which a tool call would teach."""
    values = [0.3, 0.35, 0.57, 1 / 3, 0.7707674862150042, 1e22, 5e-324, 123456789012345678901234567890]
    assert to_dataset([{"x": {"arguments": values}}])[0]["x"] == {"arguments": values}
    again = to_dataset([{"x": {"arguments": values}, "n": n} for n in range(4)]).select([1, 3]).map(lambda row: {"m": row["n"] + 1})
    assert [row["x"] for row in again] == [{"arguments": values}] * 2 and again["m"] == [2, 4]


def test_nested_rows_keep_their_keys_and_no_other():
    messages = [[{"role": "user", "content": "a"}], [{"role": "tool", "content": "b", "name": "f"}, {"role": "assistant", "tool_calls": [{"x": 1}]}]]
    assert [row["messages"] for row in to_dataset([{"messages": one} for one in messages])] == messages


def test_parquet(put, tmp_path):
    stream = io.BytesIO()
    rows = [{"q": "2024-01-31", "m": [{"role": "user", "content": "NA"}], "n": 1}, {"q": "None", "m": [{"role": "user", "content": "x"}], "n": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    file = put("rows.parquet", stream.getvalue())
    assert read(file) == rows and lines_of(file) == [1, 2]
    assert read(put("packed.parquet.gz", gzip.compress(stream.getvalue()))) == read(file)


def test_parquets_own_types_become_what_json_would_hold(put):
    stream = io.BytesIO()
    row = {
        "day": datetime.date(2024, 1, 31),
        "at": datetime.datetime(2024, 1, 31, 12),
        "price": decimal.Decimal("1.10"),
        "in": [{"d": datetime.date(2024, 2, 1)}],
    }
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), stream)
    assert read(put("rows.parquet", stream.getvalue())) == [{"day": "2024-01-31", "at": "2024-01-31T12:00:00", "price": "1.10", "in": [{"d": "2024-02-01"}]}]
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"image": b"\x89PNG"}]), stream)
    file = put("raw.parquet", stream.getvalue())
    assert refusal(file).problem == f"{file}:1: field 'image' holds bytes, which is neither text, number, list nor object."


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.json.gz", "rows.csv.gz", "rows.JSONL"])
def test_compressed_files_and_upper_case_names(put, name):
    text = {"rows.jsonl.gz": '{"q": "a"}', "rows.json.gz": '[{"q": "a"}]', "rows.csv.gz": "q\na", "rows.JSONL": '{"q": "a"}'}[name].encode()
    assert read(put(name, gzip.compress(text) if name.endswith("gz") else text)) == [{"q": "a"}]


def test_a_directory_is_all_its_files_in_order(put, tmp_path):
    put("b.jsonl", [{"q": "b1"}, {"q": "b2"}])
    put("a.csv", "q\na1\n")
    put("c.json.gz", gzip.compress(b'[{"q": "c1", "extra": 1}]'))
    put(".hidden.jsonl", "not json")
    put("README.md", "not data")
    dataset = read_dataset(str(tmp_path), Ledger())
    assert [row["q"] for row in dataset] == ["a1", "b1", "b2", "c1"]
    assert list(dataset["_file"]) == [str(tmp_path / name) for name in ("a.csv", "b.jsonl", "b.jsonl", "c.json.gz")]
    assert list(dataset["_line"]) == [2, 1, 2, 1] and list(dataset["extra"]) == [None, None, None, 1]


def test_json_lines_under_another_name(put):
    assert read(put("rows.json", [{"q": "a"}, {"q": "b"}])) == [{"q": "a"}, {"q": "b"}]


# ---- what cannot be read -------------------------------------------------------------------------------------------

BAD_LINES = [
    (b"{not json", "not valid JSON (Expecting property name enclosed in double quotes at column 2)"),
    (b'{"q": "cut of', "not valid JSON (Unterminated string starting at column 7)"),
    (b'{"q": 1} {"q": 2}', "not valid JSON (Extra data at column 10)"),
    (b"[1, 2]", "a row must be a JSON object, this is a list"),
    (b'"text"', "a row must be a JSON object, this is a text"),
    (b"null", "a row must be a JSON object, this is null"),
    (b"7", "a row must be a JSON object, this is a number"),
    (b'{"q": NaN}', "field 'q' is nan"),
    (b'{"q": -Infinity}', "field 'q' is -inf"),
    (b'{"q": 1e999}', "field 'q' is inf"),
    (b'{"q": {"a": [1, {"b": NaN}]}}', "field 'q.a[1].b' is nan"),
    (b'{"q": [[0.5], [NaN]]}', "field 'q[1][0]' is nan"),
    (b'{"q": "\xff\xfe"}', "not valid UTF-8"),
    (b'{"q": "\\ud800"}', "field 'q' holds half a character (an unpaired surrogate)"),
    (b'{"m": [{"content": "a\\udfffb"}]}', "field 'm[0].content' holds half a character (an unpaired surrogate)"),
    (b"[" * 100_000, "not valid JSON (nested too deeply)"),
    (b'{"q": ' + b"9" * 5000 + b"}", "not valid JSON (a number with thousands of digits)"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES, ids=[reason[:40] for _, reason in BAD_LINES])
def test_a_bad_line_700_of_1000(put, line, reason):
    lines = [json.dumps({"q": f"row {i}"}).encode() for i in range(1, 1001)]
    lines[699] = line
    file = put("rows.jsonl", b"\n".join(lines))
    error = refusal(file)
    assert error.problem == f"{file}:700: {reason}." and error.remedy == SKIP
    ledger = Ledger(skip_bad_rows=True)
    kept = read(file, ledger)
    assert len(kept) == 999 and kept[699] == {"q": "row 701"}
    assert ledger.as_rows() == [{"file": file, "line": 700, "reason": reason, "action": "dropped"}]


def test_null_fields_are_values_for_the_formatter_to_judge(put):
    assert read(put("rows.jsonl", [{"q": None, "a": "x"}])) == [{"q": None, "a": "x"}]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.csv.gz"])
@pytest.mark.parametrize("content", [b"", b"\n\n", b"  "])
def test_an_empty_file(put, name, content):
    file = put(name, gzip.compress(content) if name.endswith("gz") else content)
    assert refusal(file).problem == f"{file}: the file has no rows."


def test_a_header_or_a_list_without_rows(put):
    for name, content in (("rows.csv", "q,a\n"), ("rows.json", "[]"), ("more.json", " [ ] \n")):
        file = put(name, content)
        assert refusal(file).problem == f"{file}: the file has no rows."


def test_no_row_that_can_be_used(put):
    file = put("rows.jsonl", "{\n{\n")
    assert refusal(file, skip=True).problem == f"{file}: no row can be used; all 2 are in the ledger."


def test_no_such_file(tmp_path):
    for name in ("none.jsonl", "sub/none.csv", "none"):
        file = str(tmp_path / name)
        assert refusal(file).problem == f"{file}: no such file or directory."
        assert refusal(file).remedy == "Check the path, or give a dataset's hub id as owner/name."


def test_a_hub_id_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DataError) as error:
        read_dataset("nobody-at-all/nothing-here", Ledger())
    assert error.value.problem.startswith("nobody-at-all/nothing-here: neither a file here nor a dataset on the hub (")
    assert error.value.remedy == "Check the path or the id, and the network." and "\n" not in error.value.problem


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ('[{"q": 1},\n{"q": ', 2, "not valid JSON (Expecting value at column 7)"),
        ('[{"q": 1},\n{"q": 2}\n', 3, "not valid JSON (the list is not closed)"),
        ('[{"q": 1}\n{"q": 2}]', 2, "not valid JSON (a comma is missing between rows)"),
        ('[{"q": 1}]\n[{"q": 2}]', 2, "not valid JSON (something follows the list)"),
        ('[{"q": 1}] x', 1, "not valid JSON (something follows the list)"),
        ('[{"q": 1},\n\n{"q": oops}]', 3, "not valid JSON (Expecting value at column 7)"),
        ("{oops", 1, "not valid JSON (Expecting property name enclosed in double quotes at column 2)"),
        ('[{"q": 1},\n' + "[" * 100_000, 2, "not valid JSON (nested too deeply)"),
        ('[{"q": 1},\n{"q": ' + "9" * 5000 + "}]", 2, "not valid JSON (a number with thousands of digits)"),
    ],
)
def test_json_that_is_broken_or_cut_off(put, content, line, reason):
    file = put("rows.json", content)
    assert refusal(file).problem == f"{file}:{line}: {reason}."
    assert refusal(file, skip=True).problem == refusal(file).problem, "what follows cannot be read, so nothing can be skipped"


@pytest.mark.parametrize(("content", "kind"), [('{"q": [1]}', "an object"), ('"x"', "a text"), ("null", "null"), ("3", "a number"), ("true", "true or false")])
def test_json_that_is_no_list(put, content, kind):
    file = put("rows.json", content)
    assert refusal(file).problem == f"{file}: a .json data file must hold a list of rows, this holds {kind}."


def test_bad_rows_in_a_json_list(put):
    file = put("rows.json", '[{"q": "a"},\n 7,\n {"q": [NaN]},\n {"q": "b"}]')
    assert refusal(file).problem == f"{file}:2: a row must be a JSON object, this is a number."
    ledger = Ledger(skip_bad_rows=True)
    assert read(file, ledger) == [{"q": "a"}, {"q": "b"}]
    assert [(entry.line, entry.reason) for entry in ledger.entries] == [(2, "a row must be a JSON object, this is a number"), (3, "field 'q[0]' is nan")]


@pytest.mark.parametrize("name", ["rows.json", "rows.csv"])
def test_bytes_that_are_no_utf8(put, name):
    text = {"rows.json": b'[{"q": "a"},\n{"q": "caf\xe9"}]', "rows.csv": b"q\na\ncaf\xe9\n"}[name]
    file = put(name, text)
    assert refusal(file).problem == f"{file}:{2 if name == 'rows.json' else 3}: not valid UTF-8." and refusal(file).remedy == "Save the file as UTF-8."


def test_ragged_rows_of_csv(put):
    file = put("rows.csv", 'q,a\n1,2\n"two\nlines",2,3\n4\n5,6\n')
    assert refusal(file).problem == f"{file}:3: 3 cells under 2 columns."
    ledger = Ledger(skip_bad_rows=True)
    assert read(file, ledger) == [{"q": "1", "a": "2"}, {"q": "5", "a": "6"}]
    assert [(entry.line, entry.reason) for entry in ledger.entries] == [(3, "3 cells under 2 columns"), (5, "1 cell under 2 columns")]


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ('q,a\n1,2\n3,"never closed\n5,6\n', 4, "not valid CSV (unexpected end of data)"),
        ('q,a\n1,"2"3\n', 2, "not valid CSV (',' expected after '\"')"),
        ("q,q\n1,2\n", 1, "two columns have the same name"),
    ],
)
def test_csv_that_is_broken(put, content, line, reason):
    file = put("rows.csv", content)
    assert refusal(file).problem == f"{file}:{line}: {reason}."


def test_broken_parquet(put):
    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"q": f"row {i} " * 50} for i in range(2000)]), stream, compression="snappy")
    whole = stream.getvalue()
    torn = bytearray(whole)
    torn[200:3000] = random.Random(0).randbytes(2800)
    for content in (b"PAR1", b"not parquet", whole[: len(whole) // 2], bytes(torn)):
        file = put("rows.parquet", content)
        assert refusal(file).problem.startswith(f"{file}: not a Parquet file that can be read (")


def test_broken_gzip(put):
    whole = gzip.compress(random.Random(0).randbytes(20_000).hex().encode())
    torn = bytearray(whole)
    torn[30:2000] = bytes(1970)
    for content in (b"not gzip at all", whole[:-20], whole[:5000], bytes(torn)):
        file = put("rows.jsonl.gz", content)
        assert refusal(file).problem.startswith(f"{file}: cannot be read (")


def test_files_of_another_kind(put, tmp_path):
    for name, suffix in (("rows.txt", ".txt"), ("rows.tar.gz", ".tar"), ("rows", "rows")):
        file = put(name, "x")
        assert refusal(file).problem == f"{file}: cannot read a '{suffix}' file."
        assert refusal(file).remedy == "Use one of .jsonl, .json, .csv, .parquet (.gz is read too)."
    os.mkfifo(tmp_path / "pipe")
    assert "cannot read a 'pipe' file" in refusal(str(tmp_path / "pipe")).problem
    (tmp_path / "empty").mkdir()
    assert refusal(str(tmp_path / "empty")).problem.endswith(": the directory holds no data file.")


def test_one_bad_file_in_a_directory_is_named(put, tmp_path):
    put("a.jsonl", [{"q": "a"}])
    put("b.jsonl", "")
    with pytest.raises(DataError, match=r"b\.jsonl: the file has no rows\."):
        read_dataset(str(tmp_path), Ledger())


# ---- formatting ----------------------------------------------------------------------------------------------------


def test_format_rows_names_file_and_line_or_fills_the_ledger(put):
    file = put("rows.jsonl", [{"n": n} for n in range(5)])

    def convert(row):
        assert set(row) == {"n"}, "where it came from is not the formatter's business"
        if row["n"] == 2:
            raise RowError("two is bad")
        return [] if row["n"] == 3 else None if row["n"] == 4 else [{"text": "a"}, {"text": "b"}] if row["n"] else {"text": "c"}

    with pytest.raises(DataError) as error:
        format_rows(read_dataset(file, Ledger()), convert, make_run())
    assert error.value.problem == f"{file}:3: two is bad." and error.value.remedy == SKIP
    run = make_run(skip_bad_rows=True)
    made = format_rows(read_dataset(file, run.ledger), convert, run)
    assert [(row["text"], row["_line"]) for row in made] == [("c", 1), ("a", 2), ("b", 2)] and set(made["_file"]) == {file}
    assert [(entry.line, entry.reason) for entry in run.ledger.entries] == [
        (3, "two is bad"),
        (4, "the row gives nothing to train on"),
        (5, "the row gives nothing to train on"),
    ]


def test_format_rows_that_uses_none(put):
    def refuse(row):
        raise RowError("no")

    run = make_run(skip_bad_rows=True)
    with pytest.raises(DataError, match=r"the formatter used no row; all are in the ledger\."):
        format_rows(read_dataset(put("rows.jsonl", [{"n": 1}]), run.ledger), refuse, run)


def test_row_types_by_their_columns():
    for name, columns in ROW_TYPES.items():
        assert row_type([*columns, "_file", "extra"]) == name
    assert row_type(["prompt", "chosen", "rejected"]) == "preference" and row_type(["prompt"]) is None


# ---- no row is lost ------------------------------------------------------------------------------------------------

good_rows = st.dictionaries(
    st.sampled_from(["q", "a", "x"]), st.none() | st.text(max_size=5) | st.integers() | st.floats() | st.lists(st.floats(), max_size=2), min_size=1
)
file_lines = st.lists(
    st.one_of(
        good_rows.map(lambda row: json.dumps(row).encode()),
        st.sampled_from([b"{", b"[]", b"null", b'{"q": "\xff"}', b'{"q": "\\udc00"}', b"", b"   "]),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=100, deadline=None)
@given(file_lines)
def test_every_row_is_used_or_in_the_ledger(tmp_path_factory, lines):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_bytes(b"\n".join(lines))
    ledger = Ledger(skip_bad_rows=True)
    rows_in = {number for number, line in enumerate(lines, start=1) if line.strip()}
    try:
        used = list(read_dataset(str(file), ledger)["_line"])
    except DataError:
        used = []
    dropped = [entry.line for entry in ledger.entries]
    assert sorted(used + dropped) == sorted(rows_in) and not set(used) & set(dropped)
    for number in used:
        json.loads(lines[number - 1])
