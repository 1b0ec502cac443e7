"""Data files: JSON lines, a JSON list, CSV, Parquet, each plain or packed (.gz), read row by row with the line where a row begins."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import itertools
import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ftx.errors import DataError, first_line

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
#: What a .gz file may unpack to: bytes, or times its own size if that is more. Text shrinks to a tenth, seldom to a fiftieth.
UNPACKED, RATIO = 1 << 30, 100
#: Characters of a .json file that are read at once.
PIECE = 1 << 20


def suffix(file: Path) -> str:
    """What kind of file it is by its name, `.gz` aside."""
    return Path(file.stem).suffix.lower() if file.suffix.lower() == ".gz" else file.suffix.lower()


def data_files(path: Path) -> list[Path]:
    """The file itself, or the data files of a directory by name. DataError where there is none."""
    if not path.is_dir():
        return [path]
    files = sorted(f for f in path.iterdir() if suffix(f) in SUFFIXES and not f.name.startswith("."))
    if not files:
        raise DataError(f"{path}: the directory holds no data file.", f"Put {', '.join(SUFFIXES)} files there, or name one.")
    return files


def left_out(path: Path) -> list[str]:
    """What lies in a directory beside its data files, hidden files aside: none of it is read."""
    if not path.is_dir():
        return []
    return sorted(f"{one.name}{'/' if one.is_dir() else ''}" for one in path.iterdir() if suffix(one) not in SUFFIXES and not one.name.startswith("."))


def rows_of(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line, row) for each row of a file; in the place of a row that cannot be used stands what is wrong with it.

    DataError for a file of another kind, and where it cannot be read on.
    """
    kinds = {".jsonl": _json_lines, ".json": _json_array, ".csv": _csv_rows, ".parquet": _parquet_rows}
    kind = suffix(file)
    if kind not in kinds:
        raise DataError(f"{file}: cannot read a '{kind or file.name}' file.", f"Use one of {', '.join(SUFFIXES)} (.gz is read too).")
    try:
        last = 0
        for begins, row in kinds[kind](file):
            last = max(begins, last + 1)  # rows of a list may share a line: each has a number of its own
            yield last, row if isinstance(row, str) else _fault(row) or row
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({first_line(error)}).", "Check the file and its permissions.") from error


def _open(file: Path) -> Any:
    return io.BufferedReader(_Unpacked(file)) if file.suffix.lower() == ".gz" else file.open("rb")


class _Unpacked(io.RawIOBase):
    """The content of a .gz file, as long as it is no more than UNPACKED bytes or RATIO times the file: a bomb is 1,000 times."""

    def __init__(self, file: Path) -> None:
        self.file, self.inner, self.count = file, gzip.GzipFile(file), 0
        self.most = max(UNPACKED, RATIO * file.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self.inner.readinto(buffer)
        self.count += count
        if self.count > self.most:
            raise DataError(f"{self.file}: unpacks to more than {self.most:,} bytes, which no text does.", "Unpack it by hand, if you know what it is.")
        return count

    def close(self) -> None:
        self.inner.close()
        super().close()


def _whole_text(file: Path) -> str:
    with _open(file) as stream:
        raw = stream.read()
    try:
        return str(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file}:{line}: not valid UTF-8.", "Save the file as UTF-8.") from error


def _object(value: Any) -> dict[str, Any] | str:
    return value if isinstance(value, dict) else f"a row must be a JSON object, this is {_kind(value)}"


def _json_lines(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    with _open(file) as stream:
        for line, data in enumerate(stream, start=1):
            data = (data.removeprefix(b"\xef\xbb\xbf") if line == 1 else data).removesuffix(b"\n")
            if not data.strip():
                continue
            try:
                yield line, _object(json.loads(data.decode("utf-8")))
            except UnicodeDecodeError:
                yield line, "not valid UTF-8"
            except (ValueError, RecursionError) as error:
                yield line, f"not valid JSON ({_json_problem(error)})"


def _json_array(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """A list of objects; each row's line is where its object starts. Where the file is no such list, or ends otherwise,
    it is read again as a whole by the parser that can tell what is wrong and where."""
    with _open(file) as stream:
        first = next((line for line in stream if line.strip()), b"")
        more = any(line.strip() for line in stream) if first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{") else False
    if more and _is_object(first):
        yield from _json_lines(file)  # JSON lines under another name: a common habit
        return
    for given, row in enumerate(_json_pieces(file)):
        if row is None:
            yield from itertools.islice(_json_array_exactly(file), given, None)
        else:
            yield row


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False


def _json_pieces(file: Path) -> Iterator[tuple[int, dict[str, Any] | str] | None]:
    """The objects of a list, read a piece of the file at a time; None at the end where anything is not as it should be."""
    decoder, text, at, line, counted, ended, expected = json.JSONDecoder(), "", 0, 1, 0, False, "["
    with io.TextIOWrapper(_open(file), encoding="utf-8-sig", newline="") as stream:
        while True:
            at = _skip(text, at)
            value, end = None, at
            if at < len(text) and expected == "row" and text[at] != "]":
                try:
                    value, end = decoder.raw_decode(text, at)
                except (ValueError, RecursionError):
                    end = len(text)  # it may go on in the next piece
            if end >= len(text):
                if ended:
                    break
                line, counted = line + text.count("\n", counted, at), 0
                try:
                    piece = stream.read(max(PIECE, len(text) - at))
                except UnicodeDecodeError:
                    break
                text, at, ended = text[at:] + piece, 0, not piece
            elif expected == "end":
                break
            elif value is not None or (expected == "row" and text[at] != "]"):
                line, counted = line + text.count("\n", counted, at), at
                yield line, _object(value)
                at, expected = end, ","
            elif text[at] == "]" and expected != "[":
                at, expected = at + 1, "end"
            elif text[at] == expected:
                at, expected = at + 1, "row"
            else:
                break
    if expected != "end" or at < len(text):
        yield None


def _json_array_exactly(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    text = _whole_text(file)
    decoder, at = json.JSONDecoder(), _skip(text, 0)
    if at < len(text) and text[at] != "[":
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}:{_line_of(text, at, error)}: not valid JSON ({_json_problem(error)}).", "Mend the file.") from error
        if _skip(text, end) < len(text) and isinstance(value, dict):
            yield from _json_lines(file)
            return
        raise DataError(
            f"{file}: a .json data file must hold a list of rows, this holds {_kind(value)}.", "Wrap the rows in [ ], or write one row a line as .jsonl."
        )
    at, line, counted = _skip(text, at + 1), 1, 0
    while at < len(text) and text[at] != "]":
        line += text.count("\n", counted, at)
        counted = at
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{file}:{_line_of(text, at, error)}: not valid JSON ({_json_problem(error)}).", "Mend the file: what follows this place cannot be read."
            ) from error
        yield line, _object(value)
        at = _skip(text, at)
        if at < len(text) and text[at] == ",":
            at = _skip(text, at + 1)
        elif at < len(text) and text[at] != "]":
            raise DataError(f"{file}:{text.count(chr(10), 0, at) + 1}: not valid JSON (a comma is missing between rows).", "Mend the file.")
    end = _skip(text, at + 1)
    if end < len(text):
        raise DataError(f"{file}:{text.count(chr(10), 0, end) + 1}: not valid JSON (something follows the list).", "Put all rows into one list.")
    if text.strip() and at >= len(text):
        raise DataError(f"{file}:{text.count(chr(10)) + 1}: not valid JSON (the list is not closed).", "Mend the file: it seems to be cut off.")


def _csv_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Every cell is text, as it stands: no "NA" becomes a missing value, no "01" a number."""
    csv.field_size_limit(2**31 - 1)  # the default refuses a cell of more than 128 KiB; long documents are fine
    stream = io.TextIOWrapper(_open(file), encoding="utf-8-sig", newline="")
    reader = csv.reader(stream, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) < len(header):
            raise DataError(f"{file}:1: two columns have the same name.", "Give each column its own name.")
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                yield (
                    line,
                    dict(zip(header, cells, strict=True))
                    if len(cells) == len(header)
                    else f"{len(cells)} cell{'s'[: len(cells) != 1]} under {len(header)} columns",
                )
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}:{reader.line_num}: not valid CSV ({error}).", "Mend the file: quotes must be closed and doubled inside.") from error
    except UnicodeDecodeError:
        _whole_text(file)  # says where
        raise
    finally:
        stream.close()


def _parquet_rows(file: Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with _open(file) as stream:
            number = itertools.count(1)
            source = stream if stream.seekable() else pyarrow.BufferReader(stream.read())  # it begins at the end, where a packed one cannot
            for batch in pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    yield next(number), _as_json(row)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{file}: not a Parquet file that can be read ({first_line(error)}).", "Write it again.") from error


def _as_json(value: Any) -> Any:
    """Parquet's own types as JSON has them: dates in ISO form, decimals as their digits, maps and lists of them too."""
    if isinstance(value, dict):
        return {key: _as_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(one) for one in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    return str(value) if isinstance(value, decimal.Decimal) else value


def _fault(value: Any, field: str = "") -> str | None:
    """What a row holds that is no JSON, or that no file and no tokenizer can hold, and in which field."""
    if isinstance(value, dict):
        return next((fault for key, one in value.items() if (fault := _fault(key, "a key") or _fault(one, f"{field}.{key}" if field else str(key)))), None)
    if isinstance(value, list):
        return next((fault for at, one in enumerate(value) if (fault := _fault(one, f"{field}[{at}]"))), None)
    if isinstance(value, str):
        return None if value.isascii() or _encodes(value) else f"field '{field}' holds half a character (an unpaired surrogate)"
    if isinstance(value, float) and not math.isfinite(value):
        return f"field '{field}' is {value}"
    if not isinstance(value, int | float | None):
        return f"field '{field}' holds {type(value).__name__}, which is neither text, number, list nor object"
    return None


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _line_of(text: str, at: int, error: Exception) -> int:
    return error.lineno if isinstance(error, json.JSONDecodeError) else text.count("\n", 0, at) + 1


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number with thousands of digits"


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}.get(type(value), "a number")
