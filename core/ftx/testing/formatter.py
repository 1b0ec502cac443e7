"""The exam of formatters: the right row type, no row lost or invented, and bad rows named."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest

from ftx.authoring import declared
from ftx.data import row_type, to_dataset
from ftx.errors import DataError
from ftx.prepare import check_rows
from ftx.run import Run
from ftx.testing.common import Contract
from ftx.testing.runs import make_run

FILE = "exam.jsonl"


class FormatterContract(Contract):
    """For classes in the group ftx.formatter. `rows`: examples as they stand in a file, which every one of `options` can
    read; `bad_rows`: some that do not fit, each examined among the good ones."""

    stage = "formatter"
    needs = ("format_dataset",)
    rows: ClassVar[list[dict[str, Any]]] = []
    bad_rows: ClassVar[list[dict[str, Any]]] = []

    def format(self, given: dict[str, Any], rows: list[dict[str, Any]], **recipe: Any) -> tuple[Any, Run]:
        """`rows`, read as lines of a file and formatted; and the Run."""
        hooks, run = self.hooks(given), make_run(formatter=self.choice(given), **recipe)
        raw = to_dataset([{**row, "_file": FILE, "_line": line} for line, row in enumerate(rows, start=1)])
        formatted = hooks.call("format_dataset", dataset=raw, run=run)
        check_rows(raw, formatted, "formatter", hooks, run)  # the core's own check: lost or invented rows
        return formatted, run

    def good_rows(self) -> list[dict[str, Any]]:
        if not self.rows:
            pytest.skip("no example rows: set `rows`, or `exam = {'rows': [...]}` on the plugin")
        return [dict(row) for row in self.rows]

    def test_it_gives_one_row_type(self, given: dict[str, Any]) -> None:
        """The columns make a row type that `produces` names, every row is filled, and each says where it came from."""
        formatted, run = self.format(given, self.good_rows())
        kind, produces = row_type(formatted.column_names), declared(self.plugin, "produces")
        assert kind is not None, f"the columns {', '.join(formatted.column_names)} make no row type"
        assert not produces or kind in produces, f"it gives {kind} rows, and `produces` says {', '.join(produces)}"
        assert {"_file", "_line"} <= set(formatted.column_names), "_file and _line must be kept: use ftx.format_rows"
        assert set(formatted["_line"]) == set(range(1, len(self.rows) + 1)), "every example must give at least one row, and only examples do"
        assert not run.ledger.entries, f"the ledger says of an example: {run.ledger.entries[0].reason if run.ledger.entries else ''}"
        for row in formatted:
            _check_texts(row)

    def test_it_gives_the_same_rows_again(self, given: dict[str, Any]) -> None:
        """Twice the same rows, in content and in the fingerprint that datasets caches by."""
        first, second = (self.format(given, self.good_rows())[0] for _ in range(2))
        assert _content(first) == _content(second), "formatting the same rows again gives others"
        assert first.features == second.features, "formatting the same rows again gives other columns"
        assert _fingerprint(first) == _fingerprint(second), "formatting the same rows again gives another fingerprint"

    def test_it_writes_what_it_reads(self, given: dict[str, Any]) -> None:
        """With `unformat_row`, every formatted row goes back into a row of a file, and that is read as the same row."""
        hooks = self.hooks(given)
        if not hooks.owners("unformat_row"):
            pytest.skip("no unformat_row: `ftx data convert --to` cannot write this format")
        formatted, run = self.format(given, self.good_rows())
        written = [hooks.call("unformat_row", row={key: value for key, value in row.items() if not key.startswith("_")}, run=run) for row in formatted]
        assert all(isinstance(row, dict) for row in written), "unformat_row must give the row of a file, a dict"
        again, _ = self.format(given, written)
        first, second = ([{key: value for key, value in row.items() if not key.startswith("_")} for row in rows] for rows in (formatted, again))
        assert first == second, "a row that unformat_row wrote is read as another row"

    def test_it_names_bad_rows(self, given: dict[str, Any]) -> None:
        """A row that does not fit is an error that names file and line, and with skip_bad_rows an entry in the ledger."""
        good = self.good_rows()
        if not self.bad_rows:
            pytest.skip("no bad rows: set `bad_rows`")
        for bad in self.bad_rows:
            rows, line = [*good, bad], len(good) + 1
            shown = json.dumps(bad, ensure_ascii=False, default=str)[:80]
            with pytest.raises(DataError) as caught:
                self.format(given, rows)
                pytest.fail(f"it takes the bad row {shown}")
            assert f"{FILE}:{line}" in str(caught.value), f"for the bad row {shown} the error names no {FILE}:{line}: {caught.value}"
            formatted, run = self.format(given, rows, skip_bad_rows=True)
            assert (FILE, line) in run.ledger.dropped(), f"with skip_bad_rows, the bad row {shown} is not in the ledger"
            assert set(formatted["_line"]) == set(range(1, line)), f"with skip_bad_rows, the rows beside the bad row {shown} are not all there"


def _check_texts(row: dict[str, Any]) -> None:
    """The fields of a row type: texts, or message lists with roles; `label` is true or false."""
    where = f"line {row['_line']}"
    for field in ("prompt", "completion", "chosen", "rejected", "text", "messages"):
        value = row.get(field)
        if value is None or (isinstance(value, str) and field != "messages"):
            continue
        assert isinstance(value, list) and value, f"{where}: {field} is {value!r}, neither a text nor messages"
        for message in value:
            assert isinstance(message, dict) and isinstance(message.get("role"), str), f"{where}: {field} holds {message!r}, which is no message"
            assert isinstance(message.get("content"), str) or message.get("tool_calls"), f"{where}: a message in {field} has no text: {message!r}"
    assert "label" not in row or isinstance(row["label"], bool), f"{where}: label is {row['label']!r}, not true or false"


def _content(dataset: Any) -> str:
    return json.dumps([dataset.column_names, list(dataset)], ensure_ascii=False, default=str)


def _fingerprint(dataset: Any) -> str:
    from datasets.fingerprint import Hasher

    return str(Hasher.hash((dataset.column_names, dataset.to_list(), repr(dataset.features))))
