"""What the plan predicts and what a step takes, to 5 %: smollm2 by adapter, trainer, checkpointing and length (tests/benchmarks/plan_grid.py)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from plan_grid import CELLS, HALF, cell, cells

#: Each adapter, trainer and kind of checkpointing at least once.
QUICK = [(*one, "float32") for one in [("lora", "sft", False, 256), ("full", "sft", True, 64), ("dora", "dpo", True, 64), ("qlora", "dpo", False, 64)]]
BOUND = 0.05


def check(one, **more):
    found = cell(*one, **more)
    predicted, measured = found["predicted"]["peak_memory"], found["measured"]["peak_memory"]
    assert abs(predicted / measured - 1) <= BOUND, found
    kinds = found["predicted"]["by_kind"], found["measured"]["by_kind"]
    for name in ("weights", "optimizer"):  # what stands all along is known exactly, but for step counts and the rotary table
        assert abs(kinds[0][name] / kinds[1][name] - 1) <= 0.01, found
    return found


@pytest.mark.parametrize("one", QUICK, ids=lambda one: "-".join(map(str, one)))
def test_four_cells(one):
    check(one)


@pytest.mark.full
def test_a_traced_cell():
    """The second predictor on the whole model, beside the closed form and the measurement."""
    found = check(("full", "sft", True, 64, "float32"), trace=True)
    assert abs(found["traced"] / found["measured"]["peak_memory"] - 1) <= BOUND, found


@pytest.mark.full
@pytest.mark.parametrize("one", [one for one in CELLS if one not in QUICK], ids=lambda one: "-".join(map(str, one)))
def test_all_cells(one):
    check(one)


@pytest.mark.full
@pytest.mark.parametrize("one", HALF, ids=lambda one: "-".join(map(str, one)))
def test_cells_in_bfloat16(one):
    if one not in cells():
        pytest.skip("this processor does not multiply bfloat16 in fact")
    check(one)
