"""For every test of the workspace: no hub, and a reason for each test that is not run."""

from __future__ import annotations

import os

import pytest

# before anything imports huggingface_hub, which reads it once
os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked full (make full)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    full, cuda = config.getoption("--full"), None
    for item in items:
        if item.get_closest_marker("full") and not full:
            item.add_marker(pytest.mark.skip(reason="a heavy test: give --full, or `make full`"))
        if item.get_closest_marker("gpu"):
            cuda = _has_cuda() if cuda is None else cuda
            if not cuda:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch finds none"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
