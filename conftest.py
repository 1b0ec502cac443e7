"""For every test of the workspace: no hub, and a reason for each test that is not run."""

from __future__ import annotations

import os

import pytest

# before anything imports huggingface_hub, which reads it once
os.environ["HF_HUB_OFFLINE"] = "1"
# before anything imports torch, which reads it once: workers beside each other share the cores, and so do the processes that they start
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked full (make full)")


def pytest_configure(config: pytest.Config) -> None:
    """The tests that are not marked gpu compare to the bit with what a CPU computes: they, and the processes that they start, see no GPU."""
    if not _wants_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    full, without = config.getoption("--full"), None
    for item in items:
        if item.get_closest_marker("full") and not full:
            item.add_marker(pytest.mark.skip(reason="a heavy test: give --full, or `make full`"))
        if item.get_closest_marker("gpu"):
            without = _why_no_gpu(config) if without is None else without
            if without:
                item.add_marker(pytest.mark.skip(reason=without))


def _wants_gpu(config: pytest.Config) -> bool:
    """Whether every test that is selected is marked gpu."""
    return config.getoption("markexpr").partition(" and ")[0].strip() == "gpu"


def _why_no_gpu(config: pytest.Config) -> str:
    """Why a test marked gpu is skipped; empty where it is run."""
    if not _wants_gpu(config):
        return "needs a CUDA device: run `pytest -m gpu`"
    import torch

    return "" if torch.cuda.is_available() else "needs a CUDA device; torch finds none"
