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
#: More layers than dynamo keeps programs of one function: they have to share theirs.
LAYERS = 10
#: Rows of two batches; their tokens are filled up to 128 and 192, which are no other size of the model.
LENGTHS = [20, 60, 33], [70, 41, 65]


def plain():
    torch.manual_seed(0)
    return tiny_model(hidden_size=48, num_hidden_layers=LAYERS, initializer_range=0.1).train()


def adapted(**settings):
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(plain(), config).train()


@pytest.fixture
def compiler():
    """What the compiler wants of a machine."""
    if why := ftx_fast_compile.unfit(adapted()):
        pytest.skip(why)


def gradients(model, fast, lengths):
    ids = torch.randint(1, 60, (3, max(lengths)), generator=torch.Generator().manual_seed(sum(lengths)))
    ids[:, :8] = ids[0, :8]
    labels = torch.where(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None], ids, -100)
    model.zero_grad()
    tree = tree_of(ids, labels, lengths)
    shared = fast.shared({"input_ids": ids}, tree, 0)
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = labels[:, 1:] != -100
    logits = model(**(shared or {"input_ids": ids, "use_cache": False})).logits[(0, tree.kept) if shared else keep]
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][keep[:, :-1]])
    loss.backward()
    return loss.item(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize(
    ("make", "without"), [(adapted, ["head"]), (adapted, ["head", "lora"]), (plain, ["head"])], ids=["lora", "lora as peft has it", "full training"]
)
def test_gradients_are_those_of_the_plain_path(make, without, compiler):
    """Beside the other parts, over batches of two shapes: one program serves both, and all layers."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make()
    wanted = [gradients(model, install(model, []), lengths) for lengths in LENGTHS]
    fast = install(model, [part for part in ALL if part not in without])
    assert f"{LAYERS} layers compiled" in fast.on and fast.shares and not any("RMSNorm" in line for line in fast.on)
    found, graphs = [], []
    for lengths in LENGTHS:
        found.append(gradients(model, fast, lengths))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1] < 2 * LAYERS, graphs
    layers = [module for module in model.modules() if isinstance(vars(module).get("forward"), ftx_fast_compile.Compiled)]
    assert len(layers) == LAYERS and not any(vars(layer)["forward"].model.failed for layer in layers)
    fast.undo()
    for (loss, ours), (wanted_loss, theirs) in zip(found, wanted, strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-5) and ours.keys() == theirs.keys() and len(ours) > 8
        for name, gradient in ours.items():
            assert (gradient - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


def test_taken_off_without_a_trace(compiler):
    model = adapted()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    attention = model.config._attn_implementation
    fast = install(model, ALL)
    assert model.config._attn_implementation == ftx_fast_compile.NAME
    assert torch._functorch.config.force_non_lazy_backward_lowering
    fast.undo()
    assert not torch._functorch.config.force_non_lazy_backward_lowering
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == attention


def test_what_does_not_train_is_not_compiled(compiler):
    model = adapted()
    fast = install(model, ["compile"])
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        model(input_ids=torch.ones(1, 12, dtype=torch.long))
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
    _, wanted = gradients(model, install(model, []), LENGTHS[0])
    monkeypatch.setattr(torch, "compile", lambda forward, **options: refuses)
    fast = install(model, ["compile"])
    with caplog.at_level("INFO", logger="ftx"):
        _, found = gradients(model, fast, LENGTHS[0])
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


def test_what_fails_in_the_backward_pass_runs_as_ever(compiler, monkeypatch, caplog):
    """The compiler makes both passes at once: else it would fail in `backward()`, where nobody can go on."""
    from torch._inductor.graph import GraphLowering

    torch._dynamo.reset()
    model = adapted()
    _, wanted = gradients(model, install(model, []), LENGTHS[0])
    usual = GraphLowering.run

    def refuses(graph, *args):
        if graph.is_backward:
            raise RuntimeError("no way back")
        return usual(graph, *args)

    monkeypatch.setattr(GraphLowering, "run", refuses)
    with torch._inductor.config.patch(force_disable_caches=True), caplog.at_level("INFO", logger="ftx"):
        fast = install(model, ["compile"])
        _, found = gradients(model, fast, LENGTHS[0])
    fast.undo()
    torch._dynamo.reset()
    assert any("no way back" in line for line in caplog.messages)
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


@pytest.mark.parametrize(
    ("make", "options", "why"),
    [
        (adapted, {"recomputed": True}, "activations are recomputed"),
        (lambda: plain().requires_grad_(False), {}, "no layer trains"),
        (lambda: torch.nn.Linear(2, 2), {}, "no layers that it knows"),
    ],
)
def test_where_nothing_is_compiled_the_other_parts_are_on(make, options, why):
    fast = install(make(), ALL, **options)
    assert any(line.startswith(f"compile: {why}") for line in fast.off)
    assert any("RMSNorm" in line for line in [*fast.on, *fast.off])
    fast.undo()
