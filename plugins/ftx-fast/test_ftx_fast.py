"""The parts together: asked for by name, put on, taken off; and a batch joined or not, the same loss."""

from __future__ import annotations

import pytest
import torch

from ftx.testing.tiny import tiny_model
from ftx_fast import PARTS, install, parts_of


@pytest.mark.parametrize(("asked", "parts"), [("auto", list(PARTS)), (True, list(PARTS)), ("off", []), (False, []), ("head", ["head"]), (["rows"], ["rows"])])
def test_what_is_asked_for(asked, parts):
    assert parts_of(asked) == parts


def test_a_part_that_there_is_not():
    with pytest.raises(ValueError, match="Did you mean head"):
        parts_of(["haed"])


def test_on_and_off_again():
    model = tiny_model()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    attention, precision = model.config._attn_implementation, torch.backends.mkldnn.matmul.fp32_precision
    fast = install(model, list(PARTS))
    assert fast.head is not None and fast.joins and fast.on
    fast.undo()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert (model.config._attn_implementation, torch.backends.mkldnn.matmul.fp32_precision) == (attention, precision)


def test_nothing_asked_for_changes_nothing():
    fast = install(tiny_model(), [])
    assert fast.head is None and not fast.joins and not fast.on and not fast.off


@pytest.mark.parametrize("part", ["products", "memory"])
def test_settings_of_the_process_leave_numbers_as_they_are(part):
    torch.manual_seed(0)
    x, y = torch.randn(300, 576), torch.randn(576, 576)
    wanted = x.double() @ y.double()
    usual = float((x @ y - wanted).norm())
    fast = install(torch.nn.Linear(8, 8), [part])
    try:
        assert float((x @ y - wanted).norm()) <= 2 * usual
    finally:
        fast.undo()


def test_joined_rows_have_the_loss_of_padded_ones():
    model = tiny_model()
    fast = install(model, ["attention", "rows"])
    lengths = [3, 9, 5]
    ids = torch.randint(1, 60, (3, 9))
    labels = torch.where(torch.arange(9) < torch.tensor(lengths)[:, None], ids, -100)
    given, joined = fast.joined({"input_ids": ids, "use_cache": False}, labels, lengths, 0)
    assert joined.shape[0] == 1
    sums = []
    for arguments, wanted in ((given, joined), ({"input_ids": ids, "use_cache": False}, labels)):
        logits = model(**arguments).logits[:, :-1].flatten(0, 1)
        sums.append(torch.nn.functional.cross_entropy(logits.float(), wanted[:, 1:].flatten(), reduction="sum"))
    fast.undo()
    torch.testing.assert_close(*sums)
