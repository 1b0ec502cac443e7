"""Layers recorded by shape: the numbers and gradients of the plain path, the ordinary path for whatever a graph is not for."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import ftx_fast_attention
import ftx_fast_graphs
from ftx.testing.tiny import tiny_model
from ftx_fast import install
from ftx_fast_graphs import SEGMENTS, TOKENS, filled_up
from ftx_fast_rows import join
from ftx_fast_segments import Segments


class Recorder:
    """Stands in for CUDA's graphs: says which shapes were recorded and how often each ran."""

    def __init__(self):
        self.recorded, self.runs = [], []

    def __call__(self, body, given):
        shape = [tuple(tensor.shape) for tensor in given]
        self.recorded.append(shape)

        def run(*tensors):
            assert [tuple(tensor.shape) for tensor in tensors] == shape, "a graph holds for one shape"
            self.runs.append(shape)
            return body(*tensors)

        return run


def adapted(**settings):
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **settings)
    return get_peft_model(tiny_model(), config).train()


def batch(*lengths, seed=0):
    ids = torch.randint(1, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    labels = torch.where(torch.arange(max(lengths)) < torch.tensor(lengths)[:, None], ids, -100)
    return join(ids, labels, lengths, 0, TOKENS)


def gradients(model, *batches):
    """Loss and gradients over several batches, as accumulation sums them."""
    model.zero_grad()
    losses = []
    for one in batches:
        loss = model(**one.arguments(), labels=one.labels).loss
        loss.backward()
        losses.append(loss.item())
    return losses, {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def recorded():
    """A model with attention and graphs on, and what was recorded."""
    model, recorder = adapted(), Recorder()
    installed = [ftx_fast_attention.install(model), ftx_fast_graphs.install(model, recorder)]
    assert all(one.on for one in installed)
    yield model, recorder
    for one in reversed(installed):
        one.undo()


def test_loss_and_gradients_are_those_of_the_plain_path(recorded):
    model, recorder = recorded
    batches = [batch(3, 9, 5), batch(30, 4, seed=1), batch(200, 90, seed=2), batch(8, 8, 2, seed=3)]
    losses, found = gradients(model, *batches)
    plain = adapted()
    wanted_losses, wanted = gradients(plain, *batches)
    assert losses == pytest.approx(wanted_losses, rel=1e-6)
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name
    assert len(recorder.runs) == 4 and len(recorder.recorded) == 2, "three of them have one shape"
    assert recorder.recorded[0] == [(1, TOKENS, 32), (1, TOKENS, 8), (1, TOKENS, 8), (SEGMENTS + 1,)]


def test_gradients_that_lie_in_a_graphs_memory_are_not_written_over():
    """A graph writes each replay's gradients where the last one's lay; autograd would take them for a parameter's own, and sum them twice."""

    def capture(body, given):
        trained = [parameter for parameter in body.parameters() if parameter.requires_grad]
        memory = [torch.zeros_like(parameter) for parameter in trained]

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *tensors):
                with torch.enable_grad():
                    ctx.out = body(*tensors[: len(given)])
                return ctx.out.detach()

            @staticmethod
            def backward(ctx, grad):
                for kept, found in zip(memory, torch.autograd.grad(ctx.out, trained, grad), strict=True):
                    kept.copy_(found)
                return *(None for _ in given), *(kept.detach() for kept in memory)

        return lambda *tensors: Replay.apply(*tensors, *trained)

    batches = [batch(3, 9, 5), batch(4, 6, seed=1)]
    model = adapted()
    installed = [ftx_fast_attention.install(model), ftx_fast_graphs.install(model, capture)]
    _, found = gradients(model, *batches)
    for one in reversed(installed):
        one.undo()
    _, wanted = gradients(adapted(), *batches)
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name


def test_empty_segments_are_nothing():
    offsets = torch.tensor([0, 3, 12, 17, 256], dtype=torch.int32)
    padded = filled_up(offsets)
    assert padded.tolist() == [0, 3, 12, 17, 256, 256, 256, 256, 256]
    assert torch.equal(filled_up(padded), padded) and padded.dtype == torch.int32
    segments, empty = Segments(offsets), Segments(padded, 384)
    assert empty.lengths == segments.lengths == [3, 9, 5, 239] and (segments.longest, empty.longest) == (239, 384)
    for spread, other in zip(empty.spread, segments.spread, strict=True):
        assert torch.equal(spread.tokens, other.tokens) and torch.equal(spread.own, other.own)
    assert torch.equal(empty.mask(1), segments.mask(1))


def test_what_is_no_training_pass_over_a_joined_batch_runs_as_ever(recorded, caplog):
    model, recorder = recorded
    one = batch(3, 9, 5)
    with torch.no_grad():
        model(**one.arguments())
    model.eval()
    model(**one.arguments())
    model.train()
    padded = torch.randint(1, 60, (2, 9))
    model(input_ids=padded, attention_mask=torch.ones_like(padded)).logits.sum().backward()
    model(**(one.arguments() | {"use_cache": True}))
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    with caplog.at_level("INFO", logger="ftx"):
        gradients(model, one, one)
    assert caplog.messages == ["not fast: graphs: activations are recomputed"]
    model.base_model.model.gradient_checkpointing_disable()
    assert not recorder.recorded
    gradients(model, one)
    assert len(recorder.runs) == 1


def test_a_second_pass_before_the_first_ones_gradient_does_not_write_over_it(recorded):
    model, recorder = recorded
    one, other = batch(3, 9, 5), batch(4, 6, seed=1)
    first = model(**one.arguments(), labels=one.labels).loss
    second = model(**other.arguments(), labels=other.labels).loss
    assert len(recorder.runs) == 1
    (first + second).backward()
    third = model(**one.arguments(), labels=one.labels).loss
    assert len(recorder.runs) == 2
    del third  # nobody asks for its gradient
    model(**one.arguments(), labels=one.labels).loss.backward()
    assert len(recorder.runs) == 3


def test_what_cannot_be_recorded_runs_as_ever_and_is_said(caplog):
    def refuses(body, given):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    model = adapted()
    one = batch(3, 9, 5)
    attention = ftx_fast_attention.install(model)
    _, wanted = gradients(model, one)
    graphs = ftx_fast_graphs.install(model, refuses)
    with caplog.at_level("INFO", logger="ftx"):
        _, found = gradients(model, one)
        gradients(model, one)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert caplog.messages == ["not fast: graphs: operation not permitted when stream is capturing"]
    graphs.undo()
    attention.undo()


@pytest.mark.parametrize("bound", ["GRAPHS", "GRADIENTS"])
def test_no_more_graphs_than_are_kept(monkeypatch, recorded, caplog, bound):
    model, recorder = recorded
    monkeypatch.setattr(ftx_fast_graphs, bound, 1)
    with caplog.at_level("INFO", logger="ftx"):
        gradients(model, batch(3, 9), batch(200, 90), batch(3, 9), batch(200, 90))
    assert len(recorder.recorded) == 1 and len(recorder.runs) == 2
    assert caplog.messages == ["not fast: graphs: more than 1 shapes; the further ones run as without"]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: adapted(use_dora=True), "the norms of DoRA"),
        (lambda: adapted(lora_dropout=0.1), "dropout"),
        (lambda: tiny_model().requires_grad_(False), "no layer trains"),
        (lambda: torch.nn.Linear(2, 2), "not one stack of layers"),
    ],
)
def test_models_whose_layers_are_not_recorded(make, why):
    installed = ftx_fast_graphs.install(make())
    assert not installed.on and why in installed.off[0]


def test_a_large_model_is_left_alone(monkeypatch):
    monkeypatch.setattr(ftx_fast_graphs, "SMALL", 1000)
    assert ftx_fast_graphs.install(adapted()).off == ["graphs: from 1,000 weights on a GPU has enough to do"]


def test_asked_for_on_a_cpu():
    fast = install(adapted(), ["graphs"])
    assert fast.off == ["graphs: these are for a GPU"] and not fast.on
    fast.undo()


def test_taken_off_without_a_trace():
    model = adapted()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    ftx_fast_graphs.install(model, Recorder()).undo()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert not any(parameter._backward_hooks for parameter in model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_graphs_of_a_gpu_train_as_without_them(autocast):
    """Several shapes, each more than once, gradients accumulated over two batches: an alias of a graph's memory would double one of them."""
    model = adapted().bfloat16().cuda()
    batches = [batch(3, 9, 5), batch(30, 4, seed=1), batch(200, 90, seed=2), batch(8, 8, 2, seed=3)] * 2

    def on_gpu(one):
        return type(one)(*(part.cuda() if isinstance(part, torch.Tensor) else part for part in vars(one).values()))

    def steps(parts):
        fast = install(model, parts)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            found = [gradients(model, *map(on_gpu, batches[start : start + 2])) for start in range(0, len(batches), 2)]
        on = fast.on
        fast.undo()
        return found, on

    usual = ["attention", "rows", "layers", "lora"]
    wanted, _ = steps(usual)
    found, on = steps([*usual, "graphs"])
    assert "2 layers as one CUDA graph a shape" in on
    for (losses, gradient), (wanted_losses, wanted_gradient) in zip(found, wanted, strict=True):
        assert losses == pytest.approx(wanted_losses, rel=1e-3)
        for name in gradient:
            assert (gradient[name] - wanted_gradient[name]).norm() <= 1e-2 * wanted_gradient[name].norm(), name
