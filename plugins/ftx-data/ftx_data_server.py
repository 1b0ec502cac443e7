"""Argilla's server: records down into its JSON with the status of each response kept, and JSON up. Needs the SDK (ftx-data[argilla])."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from typing import Any

from ftx.errors import DataError, FtxError, first_line

BATCH = 256


def client(url: str | None) -> Any:
    """The SDK's client. The key comes from ARGILLA_API_KEY, the address from there (ARGILLA_API_URL) or from `url`."""
    try:
        import argilla
    except ImportError as error:
        raise FtxError("Argilla's SDK is not installed.", "pip install 'argilla>=2.8,<3' requests") from error
    key, url = os.environ.get("ARGILLA_API_KEY"), url or os.environ.get("ARGILLA_API_URL")
    if not key or not url:
        raise FtxError("the server's address or key is not known.", "Set ARGILLA_API_URL and ARGILLA_API_KEY.")
    try:
        return argilla.Argilla(api_url=url, api_key=key)
    except Exception as error:
        raise FtxError(f"{url}: Argilla cannot be reached ({first_line(error)}).", "Check the address, the key and the network.") from error


def dataset_of(argilla: Any, name: str, workspace: str | None) -> Any:
    dataset = argilla.datasets(name=name, workspace=workspace)
    if dataset is None:
        raise DataError(f"the server has no data set '{name}'.", "Check the name and --workspace.")
    return dataset


def pull(dataset: Any) -> Iterator[dict[str, Any]]:
    """The records of a data set as JSON, each response with its status, which the SDK's own export drops."""
    for record in dataset.records(with_responses=True, with_suggestions=True):
        yield as_json(record)


def as_json(record: Any) -> dict[str, Any]:
    """One of the SDK's records -> the JSON that its from_json reads, and `status` beside each response."""
    made: dict[str, Any] = record.to_dict()
    made["responses"] = {}
    for response in record.responses:
        status = getattr(response.status, "value", response.status)
        user = str(response.user_id) if response.user_id is not None else None
        made["responses"].setdefault(response.question_name, []).append({"value": response.value, "user_id": user, "status": status})
    return made


def push(dataset: Any, rows: Iterable[dict[str, Any]]) -> int:
    """Log records in batches; how many."""
    from argilla.records import Record

    count, waiting = 0, iter(rows)
    while batch := [Record.from_dict(row, dataset=dataset) for row in itertools.islice(waiting, BATCH)]:
        dataset.records.log(batch)
        count += len(batch)
    return count
