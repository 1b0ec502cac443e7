"""A dataset column of any JSON values that come back exactly as they went in."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from typing import Any

import datasets
import pyarrow
from datasets.features.features import register_feature


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


def dataset_of(columns: dict[str, list[Any]], features: dict[str, Any]) -> datasets.Dataset:
    """Columns of equal length -> a Dataset. Built from Arrow: `from_dict` encodes JSON columns by its own codec."""
    kinds = datasets.Features(features)
    ready = {name: [kinds[name].encode_example(one) for one in values] if isinstance(kinds[name], ExactJson) else values for name, values in columns.items()}
    table = pyarrow.table({name: pyarrow.array(values, kinds.arrow_schema.field(name).type) for name, values in ready.items()}, schema=kinds.arrow_schema)
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=kinds))
