"""Rows grown together: the loss and the gradients of each row alone, fewer positions, and nothing of a row's neighbours."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

import ftx_fast_prefixes
from ftx.testing.tiny import tiny_model
from ftx_fast import PARTS, Fast, install
from ftx_fast_attention import ROWS, attention
from ftx_fast_prefixes import Tree, tree_of
from ftx_fast_rows import IGNORE
from ftx_fast_segments import Segments

LENGTHS = (60, 33, 60, 21, 47, 8)


def batch(prefix: int = 20, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Rows whose first `prefix` tokens are the same (the last row is a beginning of the others), and labels behind token 5."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 259, (len(LENGTHS), max(LENGTHS)), generator=generator)
    ids[:, :prefix] = ids[0, :prefix]
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.5, ids, IGNORE)
    labels[:, :5] = IGNORE
    for row, length in enumerate(LENGTHS):
        ids[row, length:], labels[row, length:] = 0, IGNORE
    return ids, labels


def targets(labels: Tensor) -> Tensor:
    return labels[:, 1:][labels[:, 1:] != IGNORE]


def losses(logits: Tensor, wanted: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), wanted, reduction="sum")


def grown(model: nn.Module, fast: Fast, ids: Tensor, labels: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """The summed loss through the tree."""
    tree = tree_of(ids, labels, lengths)
    given = fast.grown({"input_ids": ids}, tree, 0)
    assert given is not None
    if fast.head is None:
        return losses(model(**given).logits[0, tree.kept], targets(labels))
    with fast.head.left_out():
        hidden = model(**given).logits[0, tree.kept]
    return -fast.head.logps(hidden, targets(labels)).sum()


def alone(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """The summed loss of each row by itself."""
    each = zip(ids, labels, LENGTHS, strict=True)
    return sum(losses(model(row[None, :n]).logits[0, :-1][label[1:n] != IGNORE], targets(label[None, :n])) for row, label, n in each)


def test_a_tree_by_hand():
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 4, 0, 0], [5, 6, 7, 8, 3], [2, 2, 2, 2, 2]])
    labels = torch.tensor([[-100, -100, 7, 8, 9], [-100, -100, 4, 0, 0], [-100, 6, 7, 8, 3], [1, -100, -100, -100, -100]])
    labels[1, 3:] = IGNORE
    tree = tree_of(ids, labels, (5, 3, 5, 5))
    assert tree.lengths == (4, 2), "a row's last token predicts nothing; a row without labels is not there, nor one twice"
    assert ids.flatten()[tree.places].tolist() == [5, 6, 7, 8] and tree.positions.tolist() == [0, 1, 2, 3]
    assert tree.nodes.tolist() == [0, 1, 2, 3, 0, 1] and tree.starts == (2, 0)
    assert tree.kept.tolist() == [1, 2, 3, 1, 0, 1, 2, 3]
    assert tree.owners.tolist() == [4, 5, 2, 3] and tree.total == 18 and tree.pays
    nothing = tree_of(ids, torch.full_like(ids, IGNORE), (5, 3, 5, 5))
    assert not nothing.pays and not len(nothing.places) and not len(nothing.kept)
    assert not tree_of(ids[:, :1], labels[:, :1], (1,) * 4).pays


@pytest.mark.parametrize("seed", range(20))
def test_a_trees_branches_are_the_rows(seed: int):
    """Of tokens that are often alike: each row is found again on the way from the root, and no two nodes are the same beginning."""
    chosen = random.Random(seed)
    count, width = chosen.randint(1, 9), chosen.randint(2, 12)
    lengths = tuple(chosen.randint(2, width) for _ in range(count))
    ids = torch.tensor([[chosen.randint(1, 2) if place < length else 0 for place in range(width)] for length in lengths])
    labels = torch.tensor([[1 if place < length and chosen.random() < 0.4 else IGNORE for place in range(width)] for length in lengths])
    tree = tree_of(ids, labels, lengths)
    tokens, begins = ids.flatten()[tree.places], {}
    ends = {row: int((labels[row, 1:] != IGNORE).nonzero().max()) + 1 for row in range(count) if (labels[row, 1:] != IGNORE).any()}
    first: dict[tuple[int, ...], int] = {}
    for row, end in ends.items():
        first.setdefault(tuple(ids[row, :end].tolist()), row)
    of_row = dict(zip(first.values(), tree.nodes.split(list(tree.lengths)), strict=True))
    kept = []
    for row, end in ends.items():
        last, nodes = end - 1, of_row[first[tuple(ids[row, :end].tolist())]]
        assert tokens[nodes].tolist() == ids[row, : last + 1].tolist() and tree.positions[nodes].tolist() == list(range(last + 1))
        for place, node in enumerate(nodes.tolist()):
            assert begins.setdefault(tuple(ids[row, : place + 1].tolist()), node) == node
        kept += [int(nodes[place]) for place in range(last + 1) if labels[row, place + 1] != IGNORE]
    assert len(begins) == len(tree.places) == len(set(begins.values())) and tree.kept.tolist() == kept
    assert tree.nodes[tree.owners].tolist() == list(range(len(begins)))
    begin = [sum(tree.lengths[:row]) for row in range(len(tree.lengths))]
    owned = [place for start, row, length in zip(tree.starts, begin, tree.lengths, strict=True) for place in range(row + start, row + length)]
    assert sorted(tree.owners.tolist()) == owned


@pytest.mark.parametrize("parts", [["attention", "rows", "prefixes"], list(PARTS)], ids=["alone", "all"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_and_the_gradients_are_those_of_each_row(parts: list[str], checkpointing: bool):
    model = tiny_model().train()
    ids, labels = batch()
    wanted = alone(model, ids, labels)
    truth = torch.autograd.grad(wanted, list(model.parameters()))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    fast = install(model, parts)
    try:
        assert fast.shares and "what rows begin with alike computed once" in fast.on
        loss = grown(model, fast, ids, labels)
        found = torch.autograd.grad(loss, list(model.parameters()))
    finally:
        fast.undo()
    assert torch.allclose(loss, wanted, rtol=1e-6)
    for a, b in zip(found, truth, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_long_rows_go_through_sdpa_with_the_same_gradients(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ftx_fast_attention.PRODUCTS", 30)
    monkeypatch.setattr("ftx_fast_segments.PRODUCTS", 30)
    test_the_loss_and_the_gradients_are_those_of_each_row(["attention", "rows", "prefixes"], False)


def test_in_bf16_no_further_from_fp32_than_padded():
    model = tiny_model().bfloat16().train()
    exact = copy.deepcopy(model).float()
    ids, labels = batch()
    keep = labels[:, 1:] != IGNORE
    truth = torch.autograd.grad(alone(exact, ids, labels), list(exact.parameters()))
    padded = torch.autograd.grad(losses(model(ids).logits[:, :-1][keep], targets(labels)), list(model.parameters()))
    fast = install(model, ["attention", "rows", "prefixes"])
    ours = torch.autograd.grad(grown(model, fast, ids, labels), list(model.parameters()))
    fast.undo()
    away = [sum(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)) for found in (ours, padded)]
    assert away[0] <= 1.05 * away[1], away


def test_a_row_does_not_touch_those_that_begin_alike():
    model = tiny_model().train()
    fast = install(model, ["attention", "rows", "prefixes"])
    ids, labels = batch()

    def logits() -> list[Tensor]:
        tree = tree_of(ids, labels, LENGTHS)
        given = fast.grown({"input_ids": ids}, tree, 0)
        assert given is not None
        return list(model(**given).logits[0, tree.kept].split([int((row[1:] != IGNORE).sum()) for row in labels]))

    with torch.no_grad():
        before = logits()
        ids[1, 25] = (ids[1, 25] + 1) % 259  # behind what is shared
        after = logits()
    fast.undo()
    for row, (one, other) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(one, other) == (row != 1), row


def test_an_attention_that_sdpa_has_to_do_sees_the_rows():
    """What only transformers' own function knows (an argument of its own) goes there, under a mask of the rows."""
    generator = torch.Generator().manual_seed(0)
    ids, labels = batch()
    segments = tree_of(ids, labels, LENGTHS).arguments(ids, 0, 32)[ROWS]
    length = len(segments.owners)
    query, key, value = (torch.randn(1, count, length, 16, generator=generator, requires_grad=True) for count in (4, 2, 2))
    module = nn.Module()
    module.num_key_value_groups = 2
    outs = [attention(module, query, key, value, None, scaling=0.25, **{ROWS: segments}, **more)[0] for more in ({}, {"cache": object()})]
    torch.testing.assert_close(*outs)
    grads = [torch.autograd.grad(out.square().sum(), [query, key, value]) for out in outs]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def with_lora(dropout: float) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", lora_dropout=dropout))


def with_window() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "vocab_size": 300}
    return MistralForCausalLM(MistralConfig(**sizes, sliding_window=8, attn_implementation="sdpa"))


class DropsArguments(nn.Module):
    """A wrapper that hands on what it knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = tiny_model()

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool | None = None, **_: object) -> object:
        return self.inside(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: with_lora(0.1), "prefixes: dropout, which is each row's own"),
        (lambda: tiny_model(attention_dropout=0.1), "prefixes: dropout, which is each row's own"),
        (with_window, "prefixes: layers that attend to a window"),
        (DropsArguments, "prefixes: the model does not tell its attention what it is told"),
    ],
    ids=["lora-dropout", "attention-dropout", "window", "wrapper"],
)
def test_where_rows_share_nothing(make, why: str):
    fast = install(make().train(), ["attention", "rows", "prefixes"])
    ids, labels = batch()
    assert why in fast.off and not fast.shares and fast.joins
    assert fast.grown({"input_ids": ids}, tree_of(ids, labels, LENGTHS), 0) is None
    fast.undo()
    shares = install(with_lora(0.0).train(), ["attention", "rows", "prefixes"])
    assert shares.shares
    shares.undo()


def test_what_must_not_be_shared_is_asked_before_flash_attention_is_given_up(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr("ftx_fast_attention.install", lambda model, flash=True: asked.append(flash) or ftx_fast_prefixes.Installed(lambda: None, off=["x"]))
    for model, parts in ((tiny_model(), PARTS), (with_lora(0.1), PARTS), (tiny_model(), ["attention", "rows"]), (tiny_model(), [*PARTS, "graphs"])):
        install(model, list(parts)).undo()
    assert asked == [False, True, True, False]


def test_a_small_saving_does_not_pay():
    ids, labels = batch(prefix=0)
    tree = tree_of(ids, labels, LENGTHS)
    assert tree.total - len(tree.places) < 0.1 * tree.total
    assert Tree(tree.places, tree.positions, tree.nodes, tree.owners, tree.lengths, tree.starts, tree.kept, rows=6, total=len(tree.places) + 1).pays is False


def test_on_a_gpu_the_gradients_of_a_token_are_added_in_one_order():
    """What index_put_ adds is what index_add_ does; a GPU takes the first, for its index_add_ adds in any order."""
    ids, labels = batch()
    segments: Segments = tree_of(ids, labels, LENGTHS).arguments(ids, 0, 1)[ROWS]
    assert segments.whole is not None
    spread = segments.whole[1]
    assert spread.again is not None and spread.number is not None and spread.others is not None
    more = torch.randn(len(spread.others), 4)
    zeros = torch.zeros(len(spread.again), 4)
    torch.testing.assert_close(zeros.index_put((spread.number,), more, accumulate=True), zeros.index_add(0, spread.number, more))
    x = torch.randn(len(segments.owners), 4, dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad((x[segments.nodes] ** 2).sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad((spread.take(x) ** 2).sum(), x)[0], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_tree_is_no_further_from_fp32_than_padded_rows(dtype: torch.dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; torch finds none")
    exact = tiny_model().cuda().train()
    model = copy.deepcopy(exact).to(dtype)
    ids, labels = (x.cuda() for x in batch())
    keep = labels[:, 1:] != IGNORE
    truth = torch.autograd.grad(alone(exact, ids, labels), list(exact.parameters()))
    padded = torch.autograd.grad(losses(model(ids).logits[:, :-1][keep], targets(labels)), list(model.parameters()))
    fast = install(model, ["attention", "rows", "prefixes"])
    runs = [torch.autograd.grad(grown(model, fast, ids, labels), list(model.parameters())) for _ in range(2)]
    fast.undo()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), "the same every time"
    away = [sum(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)) for found in (runs[0], padded)]
    assert away[0] <= max(1.05 * away[1], 1e-5 * len(truth)), away
