"""Rows of any JSON values as Arrow on disk: they come back exactly as they went in, and memory holds a few of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy
import pyarrow
from datasets.features.features import register_feature

from ftx.models import cache_directory

#: Rows that are held and written at once. A dataset of no more stays in memory.
CHUNK = 1000
#: Kinds of values that have an Arrow type of their own; whatever is nested or mixed is kept as JSON.
PLAIN = {"str": "string", "bool": "bool", "float": "float64", "int": "int64"}


@dataclass
class ExactJson(datasets.Json):  # type: ignore[misc]
    """`datasets.Json` over the standard library's json: its own codec writes 10 digits of a number, reads 0.3 as
    0.30000000000000004, and takes a text such as "1" or "[a]" in a mixed column for JSON."""

    _type: str = field(default="ExactJson", init=False, repr=False)

    def encode_example(self, example_data: Any) -> str | None:
        return None if example_data is None else json.dumps(example_data, ensure_ascii=False)

    def decode_example(self, example_data: str | None, token_per_repo_id: Any = None) -> Any:
        return None if example_data is None else json.loads(example_data)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it calls itself experimental; a change there shows in the tests
    register_feature(ExactJson, ExactJson.__name__)


class Rows:
    """Rows come in one by one, and `dataset()` is a Dataset of the union of their keys.

    Every thousand go to an Arrow file in the cache directory, under the types that fit all values so far; what was written under
    other types is written again at the end. The files are mapped into memory and have no name any more: they go with
    the dataset, however the process ends.
    """

    def __init__(self) -> None:
        self.pending: list[dict[str, Any]] = []
        self.kinds: dict[str, set[str]] = {}
        self.parts: list[_File] = []

    def add(self, row: dict[str, Any]) -> None:
        self.pending.append(row)
        if len(self.pending) >= CHUNK:
            self._flush()

    def __len__(self) -> int:
        return len(self.pending) + sum(part.rows for part in self.parts)

    def dataset(self) -> datasets.Dataset:
        if not self.parts:
            self._see(self.pending)
            features = self._features()
            return as_dataset(pyarrow.Table.from_batches([_batch(self.pending, features)], features.arrow_schema), features)
        if self.pending:
            self._flush()
        features = self._features()
        if len(self.parts) > 1:
            whole = _File(features)
            for part in self.parts:
                for rows in chunks(part.dataset()):
                    whole.write(_batch(rows, features))
            self.parts = [whole]
        return self.parts[0].dataset()

    def _flush(self) -> None:
        self._see(self.pending)
        features = self._features()
        if not self.parts or self.parts[-1].features != features:
            self.parts.append(_File(features))
        self.parts[-1].write(_batch(self.pending, features))
        self.pending = []

    def _see(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            for name, value in row.items():
                kinds = self.kinds.setdefault(name, set())
                if value is not None:
                    kinds.add(_kind(value))

    def _features(self) -> datasets.Features:
        return datasets.Features({name: _feature(kinds) for name, kinds in self.kinds.items()})


class _File:
    """One Arrow file without a name, written batch by batch and then mapped."""

    def __init__(self, features: datasets.Features) -> None:
        self.features, self.rows = features, 0
        self.path: Path | None = None
        descriptor, name = _temporary()
        self.path = Path(name)
        self.sink = os.fdopen(descriptor, "wb")
        self.writer = pyarrow.ipc.new_stream(self.sink, features.arrow_schema)

    def write(self, batch: pyarrow.RecordBatch) -> None:
        self.writer.write_batch(batch)
        self.rows += batch.num_rows

    def dataset(self) -> datasets.Dataset:
        assert self.path is not None
        self.writer.close()
        self.sink.close()
        dataset = read(self.path, self.features)
        self.path.unlink()
        self.path = None
        return dataset

    def __del__(self) -> None:
        path = getattr(self, "path", None)
        if path is not None:
            with contextlib.suppress(OSError):
                self.sink.close()
                os.unlink(path)


def _temporary() -> tuple[int, str]:
    """In the cache directory, or where that cannot be written, where the system keeps temporary files (which may be in memory)."""
    with contextlib.suppress(OSError):
        folder = cache_directory() / "rows"
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.mkstemp(dir=folder, suffix=".arrow")
    return tempfile.mkstemp(prefix="ftx-rows-", suffix=".arrow")


def read(path: Path, features: datasets.Features | None = None, fingerprint: str | None = None) -> datasets.Dataset:
    """An Arrow file that was written here, mapped into memory. Without a fingerprint it is one of the file's bytes."""
    table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
    features = features or datasets.Features.from_arrow_schema(table.schema)
    if fingerprint is None:
        with open(path, "rb") as stream:
            fingerprint = hashlib.file_digest(stream, "blake2b").hexdigest()[:16]
    return as_dataset(table, features, fingerprint)


def write(dataset: datasets.Dataset, path: Path) -> None:
    """A dataset as one Arrow file, record batch by record batch."""
    features = dataset.features
    with open(path, "wb") as sink, pyarrow.ipc.new_stream(sink, features.arrow_schema) as writer:
        for batch in _batches(dataset):
            writer.write_batch(batch)


def as_dataset(table: pyarrow.Table, features: datasets.Features, fingerprint: str | None = None) -> datasets.Dataset:
    """A Dataset over a table. With a fingerprint `datasets` need not read all of it to make one."""
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=features), fingerprint=fingerprint)


def without(dataset: datasets.Dataset, numbers: Iterable[int]) -> datasets.Dataset:
    """The dataset less the rows of these numbers, written anew: an index of the others would be in memory."""
    dropped = numpy.zeros(len(dataset), dtype=bool)
    dropped[list(numbers)] = True
    return kept(dataset, ~dropped)


def kept(dataset: datasets.Dataset, mask: numpy.ndarray[Any, Any]) -> datasets.Dataset:
    """The rows where `mask` (bool, one a row) is true."""
    if len(dataset) <= CHUNK:
        return dataset.select(numpy.flatnonzero(mask))
    file, at = _File(dataset.features), 0
    for batch in _batches(dataset):
        file.write(batch.filter(pyarrow.array(mask[at : at + batch.num_rows])))
        at += batch.num_rows
    return file.dataset()


def chunks(dataset: datasets.Dataset, size: int = CHUNK) -> Iterator[list[dict[str, Any]]]:
    """The rows of a dataset, `size` at a time."""
    decoded = [(name, kind) for name, kind in dataset.features.items() if isinstance(kind, ExactJson)]
    if dataset._format_type is not None or not all(_is_ours(kind) for kind in dataset.features.values()):
        for start in range(0, len(dataset), size):
            yield [dataset[number] for number in range(start, min(start + size, len(dataset)))]
        return
    for batch in _batches(dataset, size):
        rows = batch.to_pylist()
        for name, kind in decoded:
            for row in rows:
                row[name] = kind.decode_example(row[name])
        yield rows


def arrays(dataset: datasets.Dataset, column: str) -> Iterator[pyarrow.Array]:
    """A column in pieces, as Arrow has it."""
    for batch in _batches(dataset.select_columns([column])):
        yield batch.column(0)


def lengths(dataset: datasets.Dataset, column: str) -> numpy.ndarray[Any, Any]:
    """int64, one a row: how many items the lists of a column have."""
    import pyarrow.compute

    pieces = [pyarrow.compute.list_value_length(piece).to_numpy(zero_copy_only=False).astype(numpy.int64) for piece in arrays(dataset, column)]
    return numpy.concatenate(pieces) if pieces else numpy.zeros(0, dtype=numpy.int64)


def sources(dataset: datasets.Dataset, files: list[str]) -> numpy.ndarray[Any, Any]:
    """int64, one a row: where it came from (`_file`, `_line`) as one number; `files` collects the names behind it."""
    known = {name: number for number, name in enumerate(files)}
    pieces = []
    for batch in _batches(dataset.select_columns(["_file", "_line"])):
        names = batch.column(batch.schema.get_field_index("_file")).dictionary_encode()
        for name in names.dictionary.to_pylist():
            if name not in known:
                known[name] = len(files)
                files.append(name)
        codes = numpy.array([known[name] for name in names.dictionary.to_pylist()], dtype=numpy.int64)
        lines = batch.column(batch.schema.get_field_index("_line")).to_numpy(zero_copy_only=False).astype(numpy.int64)
        pieces.append((codes[names.indices.to_numpy()] << 40) | lines)
    return numpy.concatenate(pieces) if pieces else numpy.zeros(0, dtype=numpy.int64)


def source(key: int, files: Sequence[str]) -> tuple[str, int]:
    """A number of `sources` -> file and line."""
    return files[int(key) >> 40], int(key) & ((1 << 40) - 1)


def _batches(dataset: datasets.Dataset, size: int = CHUNK) -> Iterator[pyarrow.RecordBatch]:
    """The dataset's own Arrow, at most `size` rows at a time; with an index, what it points at."""
    if dataset._indices is None:
        yield from dataset.data.table.to_batches(max_chunksize=size)
        return
    arrow = dataset.with_format("arrow")
    for start in range(0, len(dataset), size):
        table = arrow[start : start + size]
        yield pyarrow.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], schema=dataset.features.arrow_schema)


def _batch(rows: list[dict[str, Any]], features: datasets.Features) -> pyarrow.RecordBatch:
    columns = []
    for name, kind in features.items():
        values: list[Any] = [row.get(name) for row in rows]
        if isinstance(kind, ExactJson):  # built here: `datasets` encodes JSON columns by its own codec
            values = [kind.encode_example(one) for one in values]
        columns.append(pyarrow.array(values, features.arrow_schema.field(name).type))
    return pyarrow.RecordBatch.from_arrays(columns, schema=features.arrow_schema)


def _is_ours(kind: Any) -> bool:
    """Whether Arrow's own Python values are those that were written."""
    if isinstance(kind, datasets.List):
        return isinstance(kind.feature, datasets.Value) and kind.feature.dtype in ("int32", "int64")
    return isinstance(kind, ExactJson) or (isinstance(kind, datasets.Value) and kind.dtype in ("int32", *PLAIN.values()))


def _kind(value: Any) -> str:
    kind = type(value)
    if kind is int:
        return "int" if -(2**63) <= value < 2**63 else "other"
    if kind is list:
        if not value:
            return "empty"
        return "tokens" if set(map(type, value)) == {int} and min(value) >= -(2**31) and max(value) < 2**31 else "other"
    return kind.__name__ if kind in (str, bool, float) else "other"


def _feature(kinds: set[str]) -> Any:
    if not kinds:
        return datasets.Value("string")
    if len(kinds) == 1 and (dtype := PLAIN.get(next(iter(kinds)))):
        return datasets.Value(dtype)
    if "tokens" in kinds and kinds <= {"tokens", "empty"}:
        return datasets.List(datasets.Value("int32"))  # token ids and labels: JSON would be slow
    return ExactJson()
