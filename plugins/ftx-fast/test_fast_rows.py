"""Joined rows: the same tokens and labels, the loss of each row, and nothing of its neighbours."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from ftx.testing.tiny import tiny_model
from ftx_fast_attention import install
from ftx_fast_rows import IGNORE, join, lengths_of, part, pays

LENGTHS = (7, 60, 3, 22, 21)


def batch(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 259, (len(lengths), max(lengths)), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids, IGNORE)
    for row, length in enumerate(lengths):
        ids[row, length:], labels[row, length:] = 0, IGNORE
    return ids, labels


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


def test_rows_come_back_as_they_were() -> None:
    ids, labels = batch()
    joined = join(ids, labels, LENGTHS, fill=0, multiple=32)
    assert joined.input_ids.shape == (1, 128) and joined.offsets.tolist() == [0, 7, 67, 70, 92, 113, 128]
    assert torch.equal(part(joined.input_ids, LENGTHS), ids)
    wanted = labels.clone()
    wanted[:, 0] = IGNORE
    assert torch.equal(part(joined.labels, LENGTHS, IGNORE), wanted)
    assert joined.labels[0, 113:].eq(IGNORE).all() and joined.position_ids[0, [0, 6, 7, 66, 113]].tolist() == [0, 6, 0, 59, 0]
    assert joined.arguments().keys() == {"input_ids", "position_ids", "use_cache"}


def test_lengths_are_those_of_right_padding() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert lengths_of(mask) == (2, 3)
    with pytest.raises(ValueError, match="pad right"):
        lengths_of(mask.flip(1))
    with pytest.raises(ValueError, match="cannot have the lengths"):
        join(*batch((3, 2)), (3, 0), fill=0)


def test_joining_pays_where_there_is_padding() -> None:
    assert pays((10, 90)) and not pays((90, 90)) and not pays((90, 89, 90)) and not pays((5,)) and not pays(())


@pytest.mark.parametrize("installed", [False, True])
def test_the_joined_loss_is_that_of_the_rows(installed: bool) -> None:
    model = tiny_model().train()
    ids, labels = batch()
    alone = sum(losses(model(row[None, :n]).logits, label[None, :n]) for row, label, n in zip(ids, labels, LENGTHS, strict=True))
    wanted = torch.autograd.grad(alone, list(model.parameters()))
    if installed:
        assert install(model).on
    joined = join(ids, labels, LENGTHS, fill=0, multiple=32)
    loss = losses(model(**joined.arguments()).logits, joined.labels)
    assert torch.allclose(loss, alone, rtol=1e-6)
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_joined_in_bf16_no_further_from_fp32_than_padded() -> None:
    model = tiny_model().bfloat16().train()
    exact = copy.deepcopy(model).float()
    ids, labels = batch()
    joined = join(ids, labels, LENGTHS, fill=0, multiple=32)

    def gradients(one: nn.Module, given: dict[str, Tensor], wanted: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(losses(one(**given).logits, wanted), list(one.parameters()))

    truth, padded = (gradients(one, {"input_ids": ids}, labels) for one in (exact, model))
    assert install(model).on
    ours = gradients(model, joined.arguments(), joined.labels)
    away = [sum(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)) for found in (ours, padded)]
    assert away[0] <= 1.05 * away[1]


def test_one_row_does_not_touch_another() -> None:
    model = tiny_model().train()
    install(model)
    ids, labels = batch()
    with torch.no_grad():
        before = part(model(**join(ids, labels, LENGTHS, 0, 32).arguments()).logits, LENGTHS)
        ids[1, :60] = 9
        after = part(model(**join(ids, labels, LENGTHS, 0, 32).arguments()).logits, LENGTHS)
    for row in (0, 2, 3, 4):
        assert torch.equal(before[row], after[row])
    assert not torch.equal(before[1], after[1])
