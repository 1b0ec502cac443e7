"""Layers through torch's compiler: the gradients of the plain path, whatever else is on, and the way back."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import ftx_fast_compile
from ftx.testing.tiny import tiny_model
from ftx_fast import PARTS, install
from ftx_fast_prefixes import tree_of

ALL = [*PARTS, "compile"]


@pytest.fixture
def compiler():
    """What the compiler wants of a machine."""
    if why := ftx_fast_compile.unfit(adapted()):
        pytest.skip(why)


def adapted(**settings):
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(tiny_model(), config).train()


def batch(seed):
    lengths = [[3, 9, 5], [12, 4, 7]][seed]
    ids = torch.randint(1, 60, (3, max(lengths)), generator=torch.Generator().manual_seed(seed))
    ids[:, :3] = ids[0, :3]
    return ids, torch.where(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None], ids, -100), lengths


def gradients(model, fast, seed):
    ids, labels, lengths = batch(seed)
    model.zero_grad()
    tree = tree_of(ids, labels, lengths)
    shared = fast.shared({"input_ids": ids}, tree, 0)
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = labels[:, 1:] != -100
    logits = model(**(shared or {"input_ids": ids, "use_cache": False})).logits[(0, tree.kept) if shared else keep]
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][keep[:, :-1]])
    loss.backward()
    return loss.item(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_gradients_are_those_of_the_plain_path(settings, compiler):
    """Beside all other parts, over batches of two shapes: one program serves both."""
    if not settings:
        torch._dynamo.reset()  # what is left of it serves the other case, too: adapted layers are not looked into
    model = adapted(**settings)
    wanted = [gradients(model, install(model, []), seed) for seed in (0, 1)]
    fast = install(model, [part for part in ALL if part != "head"])
    assert "2 layers compiled" in fast.on and fast.shares and not any("RMSNorm" in line for line in fast.on)
    torch._dynamo.utils.counters.clear()
    found = [gradients(model, fast, seed) for seed in (0, 1)]
    assert settings or torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    layers = [module for module in model.modules() if isinstance(vars(module).get("forward"), ftx_fast_compile.Compiled)]
    assert len(layers) == 2 and not any(vars(layer)["forward"].model.failed for layer in layers)
    fast.undo()
    for (loss, ours), (wanted_loss, theirs) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-6) and ours.keys() == theirs.keys() and len(ours) > 8
        for name, gradient in ours.items():
            assert (gradient - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


def test_taken_off_without_a_trace(compiler):
    model = adapted()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    attention = model.config._attn_implementation
    fast = install(model, ALL)
    assert model.config._attn_implementation == ftx_fast_compile.NAME
    fast.undo()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == attention


def test_what_does_not_train_is_not_compiled(compiler):
    model = adapted()
    fast = install(model, ["compile"])
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        model(input_ids=batch(0)[0])
    assert not torch._dynamo.utils.counters["stats"]["unique_graphs"]
    fast.undo()


def test_without_a_compiler_the_parts_that_need_none_are_on():
    from torch._inductor.cpp_builder import cpp_compiler_search

    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)}):
        fast = install(adapted(), ALL)
    cpp_compiler_search.cache_clear()
    assert "compile: no C++ compiler is installed" in fast.off and any("RMSNorm" in line for line in fast.on)
    fast.undo()


def test_what_the_compiler_cannot_do_runs_as_ever_and_is_said(monkeypatch, caplog, compiler):
    def refuses(*args, **kwargs):
        raise torch._dynamo.exc.Unsupported("no way to do this\nand more")

    model = adapted()
    _, wanted = gradients(model, install(model, []), 0)
    monkeypatch.setattr(torch, "compile", lambda forward, **options: refuses)
    fast = install(model, ["compile"])
    with caplog.at_level("INFO", logger="ftx_fast_compile"):
        _, found = gradients(model, fast, 0)
    fast.undo()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert caplog.messages == ["not fast: compile: no way to do this"]


def test_beside_graphs():
    fast = install(adapted(), [*PARTS, "graphs", "compile"])
    assert "compile: beside graphs" in fast.off
    fast.undo()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_in_bfloat16_no_further_from_float32_than_the_plain_path(device, compiler):
    def step(dtype, parts):
        model = adapted().to(device, dtype)
        fast = install(model, parts)
        ids = torch.randint(1, 60, (2, 12), generator=torch.Generator().manual_seed(0)).to(device)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        fast.undo()
        return torch.cat([one.grad.float().flatten() for one in model.parameters() if one.grad is not None])

    exact = step(torch.float32, [])
    plain, ours = (step(torch.bfloat16, parts) for parts in ([], ["compile"]))
    assert 0 < (ours - exact).norm() <= 1.1 * (plain - exact).norm()
