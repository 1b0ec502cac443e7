"""Rows that share what they begin with: the loss and the gradients of each row alone, fewer positions, and nothing of a row's neighbours."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import MistralConfig, MistralForCausalLM

import ftx_fast_attention
from ftx.testing.tiny import tiny_model
from ftx_fast import PARTS, Fast, install
from ftx_fast_attention import ROWS, attention
from ftx_fast_prefixes import tree_of
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


def shared(model: nn.Module, fast: Fast, ids: Tensor, labels: Tensor, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """The summed loss through the tree."""
    tree = tree_of(ids, labels, lengths)
    given = fast.shared({"input_ids": ids}, tree, 0)
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
    assert tree.kept[tree.first].tolist() == [0, 1, 1, 2, 3, 3], "the first three labels behind 5 6 7, twice each, once"
    assert torch.equal(tree.wanted, targets(labels))
    assert targets(labels)[tree.first].tolist() == [6, 4, 7, 8, 3, 9] and tree.again.tolist() == [2, 3, 5, 1, 0, 2, 3, 4]
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
    pairs = list(zip(kept, targets(labels).tolist(), strict=True))
    assert [pairs[place] for place in tree.first[tree.again].tolist()] == pairs and len(tree.first) == len(set(pairs))
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
        loss = shared(model, fast, ids, labels)
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
    ours = torch.autograd.grad(shared(model, fast, ids, labels), list(model.parameters()))
    fast.undo()
    away = [sum(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)) for found in (ours, padded)]
    assert away[0] <= 1.05 * away[1], away


def test_a_row_does_not_touch_those_that_begin_alike():
    model = tiny_model().train()
    fast = install(model, ["attention", "rows", "prefixes"])
    ids, labels = batch()

    def logits() -> list[Tensor]:
        tree = tree_of(ids, labels, LENGTHS)
        given = fast.shared({"input_ids": ids}, tree, 0)
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


def with_alora() -> nn.Module:
    """peft looks for the invocation through each row of a batch."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", alora_invocation_tokens=[5, 6]))


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


class BringsItsMask(DropsArguments):
    """A model whose attention is told more than the segments: here by a mask that is always there."""

    def forward(self, input_ids: Tensor, **more: object) -> object:
        length = input_ids.shape[1]
        return self.inside(input_ids=input_ids, attention_mask=torch.ones(1, 1, length, length, dtype=torch.bool).tril_(), **more)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: with_lora(0.1), "prefixes: dropout, which is each row's own"),
        (lambda: tiny_model(attention_dropout=0.1), "prefixes: dropout, which is each row's own"),
        (with_window, "prefixes: layers that attend to a window"),
        (lambda: tiny_model(jitter_noise=0.1), "prefixes: dropout, which is each row's own"),
        (DropsArguments, "prefixes: the model does not tell its attention what it is told"),
        (lambda: BringsItsMask(), "prefixes: the model does not tell its attention what it is told"),
    ],
    ids=["lora-dropout", "attention-dropout", "window", "jitter", "wrapper", "mask"],
)
def test_where_rows_share_nothing(make, why: str):
    fast = install(make().train(), ["attention", "rows", "prefixes"])
    ids, labels = batch()
    assert why in fast.off and not fast.shares and fast.joins
    assert fast.shared({"input_ids": ids}, tree_of(ids, labels, LENGTHS), 0) is None
    fast.undo()
    shares = install(with_lora(0.0).train(), ["attention", "rows", "prefixes"])
    assert shares.shares
    shares.undo()


def test_rows_of_an_alora_are_neither_joined_nor_shared():
    fast = install(with_alora().train(), ["attention", "rows", "prefixes"])
    assert not fast.joins and not fast.shares
    fast.undo()


def test_flash_attention_is_given_up_only_for_rows_that_share(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU that has the library: it is asked for where rows share nothing, in the end too."""
    asked, real = [], ftx_fast_attention.install
    monkeypatch.setattr(ftx_fast_attention, "install", lambda model, flash=True: asked.append(flash) or real(model))
    for model, parts, noise, wanted in (
        (tiny_model(), PARTS, False, [False]),
        (with_lora(0.1), PARTS, False, [False, True]),
        (DropsArguments(), PARTS, False, [False, True]),
        (tiny_model(), PARTS, True, [True]),
        (tiny_model(), ["attention", "rows"], False, [True]),
    ):
        before = {name: dict(vars(module)) for name, module in model.named_modules()}
        fast = install(model.train(), list(parts), noise=noise)
        assert asked == wanted and "attention without a mask, segment by segment" in fast.on
        fast.undo()
        assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
        asked.clear()


def test_what_is_asked_for_and_left_out_is_said():
    for parts, noise, why in (
        (["prefixes"], False, "prefixes: they want attention and rows"),
        (["attention", "prefixes"], False, "prefixes: rows are not joined"),
        (["attention", "rows", "prefixes"], True, "prefixes: noise on the embeddings, which is each row's own"),
    ):
        fast = install(tiny_model(), parts, noise=noise)
        assert why in fast.off and not fast.shares
        fast.undo()


def test_a_small_saving_does_not_pay():
    ids, labels = batch(prefix=0)
    tree = tree_of(ids, labels, LENGTHS)
    assert tree.total - len(tree.places) < 0.1 * tree.total
    assert not replace(tree, total=len(tree.places) + 1).pays


def test_the_gradient_of_a_token_is_the_sum_over_its_rows():
    ids, labels = batch()
    segments: Segments = tree_of(ids, labels, LENGTHS).arguments(ids, 0, 1)[ROWS]
    assert segments.whole is not None and segments.nodes is not None and segments.owners is not None
    x = torch.randn(len(segments.owners), 4, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(segments.nodes), 4, dtype=torch.float64)
    wanted = torch.autograd.grad((x[segments.nodes] * weights).sum(), x)[0]
    for spread, given in ((segments.whole[1], weights), (segments.spread[1], None)):
        if given is None:  # the same tokens at the places of the batches, padding with no weight
            given = torch.zeros(len(spread.tokens), 4, dtype=torch.float64)
            given[segments._places(skip=False)[1]] = weights
        torch.testing.assert_close(torch.autograd.grad((spread.take(x) * given).sum(), x)[0], wanted, rtol=1e-6, atol=1e-6)


def test_no_device_is_asked_where_the_tokens_of_a_tree_stand():
    """A meta tensor has no numbers: whoever asked one for them would fail."""
    ids, labels = batch()
    tree = tree_of(ids, labels, LENGTHS)
    given, apart = tree.arguments(ids, 0, 32), tree.arguments(ids.to("meta"), 0, 32)
    assert apart["input_ids"].is_meta and apart["position_ids"].is_meta and apart["input_ids"].shape == given["input_ids"].shape
    ours, theirs = apart[ROWS], given[ROWS]
    assert ours.longest == theirs.longest and ours.placed_offsets.is_meta
    for one, other in zip((*ours.spread, *ours.whole), (*theirs.spread, *theirs.whole), strict=True):
        for name in vars(one):
            made, wanted = getattr(one, name), getattr(other, name)
            assert (made is None) == (wanted is None) and (made is None or made.is_meta)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_tree_is_no_further_from_fp32_than_padded_rows(dtype: torch.dtype):
    exact = tiny_model().cuda().train()
    model = copy.deepcopy(exact).to(dtype)
    ids, labels = (x.cuda() for x in batch())
    keep = labels[:, 1:] != IGNORE
    truth = torch.autograd.grad(alone(exact, ids, labels), list(exact.parameters()))
    padded = torch.autograd.grad(losses(model(ids).logits[:, :-1][keep], targets(labels)), list(model.parameters()))
    fast = install(model, ["attention", "rows", "prefixes"])
    runs = [torch.autograd.grad(shared(model, fast, ids, labels), list(model.parameters())) for _ in range(2)]
    fast.undo()
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True)), "the same every time"
    away = [sum(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)) for found in (runs[0], padded)]
    assert away[0] <= max(1.05 * away[1], 1e-5 * len(truth)), away
