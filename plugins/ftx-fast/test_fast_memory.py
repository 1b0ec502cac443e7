"""What ftx-fast says to a plan: its constants are those of its parts, and it applies what they apply."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import ftx_fast_attention as attention
import ftx_fast_head as head
import ftx_fast_memory as memory
import ftx_fast_prefixes as prefixes
import ftx_fast_rows as rows
import ftx_fast_segments as segments
from ftx.shape import Shape

SHAPE = Shape(trained=1, hidden=48, intermediate=80, layers=2, heads=6, kv_heads=2, head_dim=8, vocabulary=1000)


def test_constants_are_those_of_the_parts():
    assert (memory.BLOCK, memory.PRODUCTS, memory.NEAR, memory.APART) == (attention.BLOCK, segments.PRODUCTS, segments.NEAR, segments.APART)
    assert memory.ELEMENTS == head.ELEMENTS
    assert (memory.PAYS, memory.MULTIPLE) == (rows.PAYS, rows.MULTIPLE)


def test_rows_are_joined_where_the_trainer_joins_them():
    for lengths in ((100, 100), (100, 97), (100, 94), (100, 50, 20), (7,)):
        shape = memory.shaped(replace(SHAPE, lengths=lengths), ["rows", "attention"])
        assert shape.joined == rows.pays(lengths)
        if shape.joined:
            joined = rows.join(
                torch.zeros(len(lengths), max(lengths), dtype=torch.long), torch.zeros(len(lengths), max(lengths), dtype=torch.long), lengths, 0, rows.MULTIPLE
            )
            assert shape.tokens == joined.input_ids.numel()
            assert memory.batches(shape) == segments.Segments(joined.offsets).batches
    assert not memory.shaped(replace(SHAPE, lengths=(100, 50)), ["rows"]).joined


@pytest.mark.parametrize(("length", "alike"), [(90, 40), (60, 0), (20, 0), (600, 500), (90, 90)])
def test_rows_grow_together_where_the_trainer_has_them_grown(length, alike):
    """Rows of one length that begin alike: the same positions, and the same batches for attention but for what is filled up."""
    ids = torch.arange(4)[:, None] * 1000 + torch.arange(length).expand(4, length)
    ids[:, :alike] = torch.arange(alike)
    tree = prefixes.tree_of(ids, ids, [length] * 4)
    shape = memory.shaped(replace(SHAPE, lengths=(length,) * 4, alike=3 * alike), ["rows", "attention", "prefixes"])
    assert shape.joined == tree.pays
    if tree.pays:
        given = tree.arguments(ids, 0, rows.MULTIPLE)
        assert shape.tokens == given["input_ids"].numel()
        if alike < length:
            theirs, ours = given[attention.ROWS].batches, memory.batches(shape)
            assert sum(count * longest for count, longest, _ in theirs) == sum(count * longest for count, longest, _ in ours)
            ours, theirs = (sum(count * (longest - first) for count, longest, first in batches) for batches in (ours, theirs))
            assert theirs <= ours <= 1.2 * theirs
    for without in (["rows", "attention"], ["prefixes"], ["rows", "attention", "prefixes", "graphs"]):
        assert memory.shaped(replace(SHAPE, lengths=(length,) * 4, alike=3 * alike), without).shared == 0
    for more in ({"dropout": True}, {"window": 64}, {"trained": 0}, {"model_type": "mixtral"}):
        assert not memory.shaped(replace(SHAPE, lengths=(length,) * 4, alike=3 * alike, **more), ["rows", "attention", "prefixes"]).joined


def test_pairs_of_unequal_length_share_what_their_two_sides_begin_with():
    shape = memory.shaped(replace(SHAPE, lengths=(1000, 1000, 10, 10), alike=905), ["rows", "attention", "prefixes"])
    assert shape.shared == 905 and shape.tokens == -(-(2016 - 905) // 32) * 32
    assert memory.shaped(replace(SHAPE, lengths=(50, 50), alike=50), ["rows", "attention", "prefixes"]).shared == 49


def test_on_a_gpu_attention_has_the_rows_whole():
    asked = replace(SHAPE, device="cuda", lengths=(100,) * 4, alike=240)
    shared, apart = (memory.shaped(asked, parts) for parts in (["rows", "attention", "prefixes"], ["rows", "attention"]))
    assert shared.tokens == 4 * 99 - 240 and apart.tokens == 400
    per_token = 4 * (2 * 48 + 2 * 16) + 4 * 6
    assert memory.changes(shared)["activations"] == SHAPE.layers * (per_token * 240 + 4 * 48 * shared.tokens)
    assert memory.changes(apart)["activations"] == 0


def test_packed_rows_cost_a_mask_only_without_this_attention():
    for device in ("cpu", "cuda"):
        masked, free = (memory.shaped(replace(SHAPE, device=device, lengths=(100, 50)), parts, packed=True) for parts in ([], ["attention"]))
        assert masked.tokens == free.tokens == 150, "nothing is filled up"
        assert memory.changes(masked)["activations"] == SHAPE.layers * 4 * (150 + 2 * (48 - 16)) * 150
        assert device == "cpu" or memory.changes(free)["activations"] == 0


def test_the_head_takes_as_many_rows_at_once():
    for vocabulary in (1000, 49152, 256000):
        shape = replace(SHAPE, vocabulary=vocabulary, supervised=10**6)
        assert memory.chunk(shape) == head.chunk_of(torch.empty(vocabulary, 1))


def test_what_is_compiled_saves_nothing_that_layers_would():
    """Where it is compiled: the same two exceptions as when the parts are put on."""
    for parts, shape, layers in (
        (["layers", "compile"], SHAPE, False),
        (["layers", "compile", "graphs"], SHAPE, True),
        (["layers", "compile"], replace(SHAPE, checkpointing=True), True),
    ):
        assert ("layers" in memory.shaped(shape, parts).fused) == layers


def test_what_does_not_apply_is_left_out():
    on = memory.shaped(replace(SHAPE, device="cuda", softcap=True), ["head", "attention", "layers", "lora", "products", "memory"]).fused
    assert on == {"attention", "layers", "lora"}
