"""Layers as one function each: the numbers of transformers' own modules, put on and taken off without a trace."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, PhiConfig, Qwen2Config, Qwen3Config, SmolLM3Config
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

import ftx_fast_layers
from ftx.testing.tiny import tiny_model
from ftx_fast_layers import RMSNorm, SwiGLU, install, turned

SMOLLM2 = LlamaConfig(hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, attn_implementation="sdpa")
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "pad_token_id": 0,
}
ALL = ["RMSNorm as one function: 5 modules", "rotary embedding as one function: 2 modules", "SwiGLU as one function: 2 modules"]


def away(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(module: nn.Module, *inputs: Tensor, **options: object) -> dict[str, Tensor]:
    module.zero_grad()
    inputs = tuple(x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs)
    out = module(*inputs, **options)
    out = out.logits if hasattr(out, "logits") else out
    out.backward(normal(*out.shape, seed=9).to(out.dtype))
    found = {"out": out.detach()} | {f"input {n}": x.grad for n, x in enumerate(inputs) if x.grad is not None}
    return found | {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(50, 576), (2, 30, 576), (2, 7, 3, 64)])
def test_the_norm_is_llamas_to_the_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    theirs = LlamaRMSNorm(shape[-1], 1e-5)
    theirs.weight.data = normal(shape[-1], seed=1)
    theirs = theirs.to(dtype)
    x = (3 * normal(*shape)).to(dtype)
    wanted, exact = gradients(theirs, x), gradients(copy.deepcopy(theirs).double(), x.double())
    ours = copy.deepcopy(theirs)
    assert install(ours).on == ["RMSNorm as one function: 1 modules"]
    got = gradients(ours, x)
    assert torch.equal(got["out"], wanted["out"])
    for name, value in exact.items():
        if dtype == torch.float32:
            assert away(got[name], wanted[name]) <= 1e-5, name
        else:
            assert away(got[name], value) <= 1.05 * away(wanted[name], value), name


def test_a_frozen_norm_gets_no_gradient() -> None:
    x, weight = normal(4, 8).requires_grad_(), normal(8, seed=1)
    RMSNorm.apply(x, weight, 1e-6).sum().backward()
    assert x.grad is not None and weight.grad is None
    weight.requires_grad_()
    RMSNorm.apply(x.detach(), weight, 1e-6).sum().backward()
    assert weight.grad is not None


def test_a_turn_is_transformers_and_rounds_once() -> None:
    positions = torch.arange(30)[None]
    x = normal(2, 30, 9, 64).transpose(1, 2)
    cos, sin = LlamaRotaryEmbedding(SMOLLM2)(x, positions)
    wanted, _ = apply_rotary_pos_emb(x, x[:, :3], cos, sin)
    got = turned(x, cos[:, None], sin[:, None])
    assert torch.allclose(got, wanted, atol=1e-6) and got.stride() == x.stride()
    half = [y.bfloat16() for y in (x, cos, sin)]
    exact, _ = apply_rotary_pos_emb(*(y.double() for y in (half[0], half[0], *half[1:])))
    usual, _ = apply_rotary_pos_emb(half[0], half[0], *half[1:])
    assert away(turned(half[0], half[1][:, None], half[2][:, None]), exact) < 0.8 * away(usual, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype: torch.dtype) -> None:
    class Usual(nn.Module):
        def forward(self, gate: Tensor, up: Tensor) -> Tensor:
            return nn.functional.silu(gate) * up

    class Ours(nn.Module):
        def forward(self, gate: Tensor, up: Tensor) -> Tensor:
            return SwiGLU.apply(gate, up)

    inputs = normal(3, 20, 1536).to(dtype), normal(3, 20, 1536, seed=1).to(dtype)
    for (name, a), b in zip(gradients(Ours(), *inputs).items(), gradients(Usual(), *inputs).values(), strict=True):
        assert torch.equal(a, b), name


def test_swiglu_keeps_two_tensors() -> None:
    saved: list[Tensor] = []
    mlp = LlamaMLP(SMOLLM2).requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        install(mlp).on and mlp(normal(5, 576).requires_grad_())
    assert len({x.data_ptr() for x in saved if x.shape == (5, 1536)}) == 2


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_has_the_same_logits_and_gradients(checkpointing: bool) -> None:
    model = tiny_model().train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 259, (3, 40), generator=torch.Generator().manual_seed(0))
    wanted = gradients(model, ids, use_cache=False)
    installed = install(model)
    assert installed.on == ALL and not installed.off
    got = gradients(model, ids, use_cache=False)
    installed.undo()
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (got[name] - value).norm() <= 1e-5 * value.norm(), name
    assert all("forward" not in vars(module) for module in model.modules())
    for name, value in gradients(copy.deepcopy(model), ids, use_cache=False).items():
        assert torch.equal(value, wanted[name]), name


def test_a_layer_of_smollm2_in_bf16_is_no_further_from_fp32() -> None:
    torch.manual_seed(0)
    layer = LlamaDecoderLayer(SMOLLM2, 0).bfloat16()
    exact = copy.deepcopy(layer).float()
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(4):
        x = normal(4, 111, 576, seed=seed).bfloat16()
        tables = LlamaRotaryEmbedding(SMOLLM2)(x, torch.arange(111)[None])
        wanted = gradients(exact, x.float(), position_embeddings=tuple(table.float() for table in tables))
        usual = gradients(layer, x, position_embeddings=tables)
        installed = install(layer)
        ours = gradients(layer, x, position_embeddings=tables)
        installed.undo()
        for name, value in wanted.items():
            errors.setdefault(name, []).append((away(ours[name], value), away(usual[name], value)))
    for name, pairs in errors.items():
        assert sum(a for a, _ in pairs) <= 1.05 * sum(b for _, b in pairs), name


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config, MistralConfig, SmolLM3Config])
def test_models_alike_are_known_by_what_they_do(config: type) -> None:
    model = AutoModelForCausalLM.from_config(config(**SMALL)).train()
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    wanted = gradients(model, ids, use_cache=False)
    installed = install(model)
    assert not installed.off and installed.on[1:] == ALL[1:]
    for name, value in gradients(model, ids, use_cache=False).items():
        assert (value - wanted[name]).norm() <= 1e-5 * wanted[name].norm() + 1e-6, name


def test_other_models_are_left_alone() -> None:
    gemma = AutoModelForCausalLM.from_config(Gemma2Config(**SMALL, head_dim=8))
    assert [line.split(":")[0] for line in install(gemma).off] == ["RMSNorm", "SwiGLU"]  # (1 + w) * x, gelu
    shape = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
    phi = AutoModelForCausalLM.from_config(PhiConfig(**shape))  # LayerNorm, no gate; a part of each head is turned
    ids = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    phi.eval()
    wanted = phi(ids).logits
    assert install(phi).on == ["rotary embedding as one function: 2 modules"]
    assert torch.allclose(phi(ids).logits, wanted, atol=1e-6)


def test_generation_is_as_before() -> None:
    model = tiny_model().eval()
    ids = torch.randint(3, 259, (2, 10), generator=torch.Generator().manual_seed(0))
    wanted = model.generate(ids, max_new_tokens=8, do_sample=False)
    install(model)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), wanted)


def test_mixed_dtypes_take_the_usual_way() -> None:
    norm = LlamaRMSNorm(8)
    install(norm)
    assert norm(normal(2, 8).bfloat16()).dtype == torch.float32  # fp32 weight times bf16, as transformers has it


def test_a_forward_of_someone_else_stays() -> None:
    model = tiny_model()
    mine = model.model.norm.forward
    vars(model.model.norm)["forward"] = mine
    installed = install(model)
    assert installed.on[0] == "RMSNorm as one function: 4 modules"
    installed.undo()
    assert vars(model.model.norm)["forward"] is mine


def test_a_norm_too_wide_for_the_kernel_stays_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program of Triton's kernel holds a whole row, of a width that has a bound."""
    monkeypatch.setattr(ftx_fast_layers, "kernels", lambda kind: SimpleNamespace(fits=lambda size: size <= 16))
    narrow, wide = LlamaRMSNorm(16), LlamaRMSNorm(17)
    installed = install(nn.ModuleList([narrow, wide]), parts=["RMSNorm"])
    assert installed.on == ["RMSNorm as one function: 1 modules"] and "forward" in vars(narrow) and "forward" not in vars(wide)
    assert installed.off == ["RMSNorm: rows of 17 are too wide for the kernel"] == install(wide, parts=["RMSNorm"]).off


def test_parts_are_chosen_by_name() -> None:
    installed = install(tiny_model(), parts=["RMSNorm"])
    assert installed.on == ["RMSNorm as one function: 5 modules"] and not installed.off
