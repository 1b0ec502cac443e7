"""The head where there is a label: the numbers of the plain path, for frozen, trained, biased and capped heads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

import ftx_fast_head
from ftx_fast_head import Head, install

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 60}


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(ftx_fast_head, "chunk_of", lambda weight: 7)


def parts(dtype=torch.float32, bias=False, trains=False):
    torch.manual_seed(0)
    layer = nn.Linear(16, 50, bias=bias).to(dtype).requires_grad_(trains)
    return layer, torch.randn(23, 16).to(dtype).requires_grad_(), torch.randint(50, (23,)), torch.randn(23)


def plain(layer, hidden, targets):
    return layer(hidden).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_values_and_gradients_for_any_loss_of_the_logps(bias, trains, small_chunks):
    layer, hidden, targets, weights = parts(bias=bias, trains=trains)
    if bias:
        layer.bias.requires_grad_(False)
    inputs = [hidden, layer.weight] if trains else [hidden]
    logps = [Head(layer).logps(hidden, targets), plain(layer, hidden, targets)]
    torch.testing.assert_close(*logps)
    ours, theirs = (torch.autograd.grad((one.sigmoid() * weights).sum(), inputs) for one in logps)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_in_bf16_no_further_from_fp32_than_the_plain_path(small_chunks):
    layer, hidden, targets, weights = parts(torch.bfloat16)
    wide = nn.Linear(16, 50, bias=False)
    wide.weight.data = layer.weight.data.float()
    truth_in = hidden.detach().float().requires_grad_()
    truth = torch.autograd.grad((plain(wide, truth_in, targets) * weights).sum(), truth_in)[0]
    ours = torch.autograd.grad((Head(layer).logps(hidden, targets) * weights).sum(), hidden)[0]
    theirs = torch.autograd.grad((plain(layer, hidden, targets) * weights).sum(), hidden)[0]
    assert (ours - truth).norm() <= 1.1 * (theirs - truth).norm()


@pytest.mark.parametrize(("trains", "products"), [(False, 2), (True, 4)])
def test_how_many_products_a_head_costs(trains, products, small_chunks):
    """Of a frozen one the logits and the gradient, both in the forward pass; of one that trains also the logits again and its own gradient."""
    layer, hidden, targets, _ = parts(trains=trains)
    one = 2 * len(hidden) * layer.in_features * layer.out_features
    with FlopCounterMode(display=False) as forward:
        logps = Head(layer).logps(hidden, targets)
    with FlopCounterMode(display=False) as backward:
        logps.sum().backward()
    assert (forward.get_total_flops(), backward.get_total_flops()) == (2 * one, (products - 2) * one)


def test_nothing_supervised():
    layer, hidden, _, _ = parts()
    loss = Head(layer).logps(hidden[:0], torch.empty(0, dtype=torch.long)).sum()
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


def test_divergence(small_chunks):
    (layer, hidden, _, _), (other, *_) = parts(), parts(bias=True)
    theirs = hidden.detach().flip(0)
    p, q = layer(hidden).log_softmax(-1), other(theirs).log_softmax(-1)
    torch.testing.assert_close(Head(layer).divergence(hidden, Head(other), theirs), (p.exp() * (p - q)).sum(-1).detach())


def test_a_model_whose_head_is_left_out_gives_its_hidden_states():
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))
    head, installed = install(model)
    assert installed.on and not installed.off
    ids = torch.arange(6).view(1, 6)
    with head.left_out():
        hidden = model(input_ids=ids).logits
    assert hidden.shape == (1, 6, 32)
    torch.testing.assert_close(model.lm_head(hidden), model(input_ids=ids).logits)
    assert model.training and "forward" not in vars(model.lm_head)


def tied(dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, tie_word_embeddings=True)).to(dtype)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def gradients_of_tied(model, seed, fast):
    """Of all weights, by the head that is left out or by the plain path."""
    ids = torch.randint(60, (2, 12), generator=torch.Generator().manual_seed(seed))
    targets = ids[:, 1:].flatten()
    if fast:
        head, _ = install(model)
        with head.left_out():
            hidden = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        logps = head.logps(hidden, targets)
    else:
        logps = plain(model.lm_head, model.model(ids).last_hidden_state[:, :-1].flatten(0, 1), targets)
    return torch.autograd.grad(logps.sum(), list(model.parameters()))


def test_a_tied_head_that_trains_has_one_gradient_of_both_uses(small_chunks):
    model = tied()
    for a, b in zip(gradients_of_tied(model, 0, True), gradients_of_tied(model, 0, False), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_tied_head_in_bf16_is_no_further_from_fp32_than_the_plain_path(small_chunks):
    model = tied(torch.bfloat16)
    wide, away = copy.deepcopy(model).float(), {True: 0.0, False: 0.0}
    for seed in range(6):
        truth = gradients_of_tied(wide, seed, False)
        for fast in away:
            away[fast] += sum(float((a - b).norm() / b.norm()) for a, b in zip(gradients_of_tied(model, seed, fast), truth, strict=True))
    assert away[True] <= 1.05 * away[False]


@pytest.mark.parametrize(("config", "scale"), [(CohereConfig, {"logit_scale": 0.25}), (GraniteConfig, {"logits_scaling": 4.0})])
def test_scaled_logits_keep_the_ordinary_path(config, scale):
    head, installed = install(AutoModelForCausalLM.from_config(config(**SMALL, **scale, pad_token_id=0)))
    assert head is None and "scaling" in installed.off[0]


@pytest.mark.gpu
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_cuda_no_further_from_fp64_than_the_plain_path(dtype, trains, small_chunks):
    layer, hidden, targets, weights = parts(dtype, trains=trains)
    layer, targets, weights = layer.cuda(), targets.cuda(), weights.cuda()
    hidden = hidden.detach().cuda().requires_grad_()
    wide = nn.Linear(16, 50, bias=False).cuda().double()
    wide.weight.data = layer.weight.data.double()
    exact = hidden.detach().double().requires_grad_()

    def gradients(logps, *inputs):
        return torch.autograd.grad((logps.sigmoid() * weights).sum(), inputs[: 1 + trains])

    truth = gradients(wide(exact).log_softmax(-1).gather(-1, targets[:, None])[:, 0], exact, wide.weight)
    ours, theirs = (gradients(logps, hidden, layer.weight) for logps in (Head(layer).logps(hidden, targets), plain(layer, hidden, targets)))
    for a, b, x in zip(ours, theirs, truth, strict=True):
        assert a.is_cuda and (a - x).norm() <= 1.1 * (b - x).norm() + 1e-6 * x.norm()


def test_soft_capping_keeps_the_ordinary_path():
    model = AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=30.0))
    head, installed = install(model)
    assert head is None and "soft-capping" in installed.off[0]


def test_an_adapted_head_keeps_the_ordinary_path():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)), LoraConfig(target_modules=["lm_head"]))
    head, installed = install(model)
    assert head is None and "adapted" in installed.off[0]
