"""Attention without masks: the same numbers as SDPA, one segment at a time, and SDPA itself where it does not apply."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import ftx_fast_attention
from ftx.testing.tiny import tiny_model
from ftx_fast_attention import NAME, CausalProducts, attention, causal, install, segment_by_segment
from ftx_fast_segments import Segments

#: One layer of SmolLM2-135M.
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 1, "vocab_size": 64}


def away(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm())


def sdpa(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=scale).transpose(1, 2)


def heads(length: int, batch: int = 2, kept: int = 3, group: int = 3, size: int = 64, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key, value as a model hands them on: transposed views."""
    generator = torch.Generator().manual_seed(length)
    counts = (kept * group, kept, kept)
    return [torch.randn(batch, length, n, size, generator=generator).to(dtype).transpose(1, 2).requires_grad_() for n in counts]


def with_gradients(function, inputs: list[Tensor], *rest) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs, *rest)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def ids(model: nn.Module, *shape: int) -> Tensor:
    return torch.randint(3, model.config.vocab_size, shape, generator=torch.Generator().manual_seed(5))


def gradients(model: nn.Module, dtype: torch.dtype, **inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits
    logits.backward(torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).to(dtype))
    return {"logits": logits.detach()} | {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("length", [1, 2, 47, 48, 49, 111, 200])
@pytest.mark.parametrize("group", [1, 3])
def test_the_products_are_sdpa_in_fp32(length: int, group: int) -> None:
    inputs = heads(length, group=group)
    for got, wanted in zip(with_gradients(CausalProducts.apply, inputs, 0.1), with_gradients(sdpa, inputs, 0.1), strict=True):
        assert got.shape == wanted.shape
        assert (got - wanted).norm() <= 1e-5 * wanted.norm() + 1e-5  # a row of one token has no gradient but rounding


@pytest.mark.parametrize("first", [1, 30, 48, 90, 110])
def test_queries_of_the_last_positions_have_what_they_have_among_all(first: int) -> None:
    query, key, value = heads(111)
    for got, wanted in zip(
        with_gradients(lambda q, k, v: CausalProducts.apply(q[:, :, first:], k, v, 0.1), [query, key, value]),
        with_gradients(lambda q, k, v: sdpa(q, k, v, 0.1)[:, first:], [query, key, value]),
        strict=True,
    ):
        assert got.shape == wanted.shape and (got - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize("length", [70, 111, 256])
def test_the_products_in_bf16_are_as_near_to_fp32_as_sdpa(length: int) -> None:
    inputs = heads(length, batch=4, dtype=torch.bfloat16)
    exact = with_gradients(sdpa, [x.double() for x in inputs], 0.125)
    ours, plain = (with_gradients(one, inputs, 0.125) for one in (CausalProducts.apply, sdpa))
    errors = [(away(a, x), away(b, x)) for a, b, x in zip(ours, plain, exact, strict=True)]
    assert all(a <= 1.25 * b for a, b in errors), errors  # one of them rounds once more than SDPA, the others less often
    assert sum(a for a, _ in errors) <= 0.9 * sum(b for _, b in errors), errors


@pytest.mark.parametrize("lengths", [(111,), (60, 51)])
def test_under_autocast_they_are_no_further_from_fp64_than_sdpa(lengths: tuple[int, ...]) -> None:
    """As full fine-tuning in bf16 calls it: queries and keys come in fp32 from the rotary embedding, values in bf16."""
    query, key, value = heads(111, batch=1)
    query, key = (3 * x.detach() for x in (query, key))  # scores that tell what they are rounded to
    inputs = [query, key, value.detach().bfloat16()]
    segments = Segments(offsets(*lengths))
    module = nn.Module()
    module.num_key_value_groups = 3

    def through(function, mask: Tensor | Segments | None):
        with torch.autocast("cpu", torch.bfloat16):
            return with_gradients(lambda *x: function(module, *x, mask, scaling=0.125)[0], inputs)

    keep = segments.mask(1)
    exact = with_gradients(lambda *x: sdpa_attention_forward(module, *x, keep, scaling=0.125)[0], [x.double() for x in inputs])
    ours = through(attention, segments if len(lengths) > 1 else None)
    plain = through(sdpa_attention_forward, keep if len(lengths) > 1 else None)
    errors = [(away(a, x), away(b, x)) for a, b, x in zip(ours, plain, exact, strict=True)]
    assert [x.dtype for x in ours] == [x.dtype for x in plain]
    assert all(a <= 1.25 * b for a, b in errors) and sum(a for a, _ in errors) <= sum(b for _, b in errors), errors


def test_nothing_is_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    inputs = heads(60)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with torch.no_grad():
            CausalProducts.apply(*inputs, 0.1)
        assert not saved
        CausalProducts.apply(*inputs, 0.1)
    assert saved


def offsets(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_near_segments_are_batched_and_padding_gets_no_gradient() -> None:
    segments = Segments(offsets(10, 40, 9, 39, 8, 2))
    assert segments.batches == [(2, 40, 0), (3, 10, 0), (1, 2, 0)]
    spread, _ = segments.spread
    assert spread.tokens[spread.own].tolist() == list(range(108))


@pytest.mark.parametrize("lengths", [(5,), (3, 1, 60, 55, 7, 58), (30, 30), (1, 1, 1)])
def test_segments_are_separate_rows(lengths: tuple[int, ...]) -> None:
    inputs = heads(sum(lengths), batch=1)
    got = with_gradients(segment_by_segment, inputs, 0.1, Segments(offsets(*lengths)))

    def alone(*rows: Tensor) -> Tensor:
        return torch.cat([sdpa(*parts, 0.1) for parts in zip(*(x.split(lengths, 2) for x in rows), strict=True)], 1)

    for a, b in zip(got, with_gradients(alone, inputs), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-5


class SaysCuda(Tensor):
    """In torch's eyes no flash-attention is for it, as on a GPU before Ampere."""

    is_cuda = True


@pytest.mark.parametrize("size", [12, 16])
def test_without_flash_attention_segments_are_batched_on_a_gpu_too(size: int) -> None:
    rows = [x.detach() for x in heads(20, batch=1, size=size, dtype=torch.float16)]
    segments = Segments(offsets(12, 8))
    wanted = segment_by_segment(*rows, 0.1, segments)
    got = segment_by_segment(*(x.as_subclass(SaysCuda) for x in rows), 0.1, segments)
    assert torch.equal(got.as_subclass(Tensor), wanted)


def test_long_rows_go_through_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ftx_fast_attention, "PRODUCTS", 20)
    inputs = heads(30, batch=1)
    assert torch.equal(causal(*inputs, 0.1), sdpa(*inputs, 0.1))
    mixed = with_gradients(segment_by_segment, inputs, 0.1, Segments(offsets(25, 5)))
    monkeypatch.undo()
    for a, b in zip(mixed, with_gradients(segment_by_segment, inputs, 0.1, Segments(offsets(25, 5))), strict=True):
        assert away(a, b) <= 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_has_the_same_logits_and_gradients(checkpointing: bool) -> None:
    model = tiny_model().train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = {"input_ids": ids(model, 3, 70)}
    packed = {"input_ids": ids(model, 1, 90), "position_ids": torch.cat([torch.arange(n) for n in (40, 11, 39)])[None]}
    for inputs in (batch, packed):
        wanted = gradients(model, torch.float32, **inputs)
        installed = install(model)
        got = gradients(model, torch.float32, **inputs)
        installed.undo()
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert (got[name] - value).norm() <= 1e-5 * value.norm(), name


def test_a_layer_of_smollm2_in_bf16_is_no_further_from_fp32() -> None:
    torch.manual_seed(0)
    exact = LlamaForCausalLM(LlamaConfig(**SMOLLM2, attn_implementation="sdpa"))
    plain = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict({name: value.float() for name, value in plain.state_dict().items()})
    errors: dict[str, list[tuple[float, float]]] = {}
    for rows in range(2, 6):
        inputs = {"input_ids": ids(exact, rows, 111)}
        wanted, usual = gradients(exact, torch.float32, **inputs), gradients(plain, torch.bfloat16, **inputs)
        installed = install(plain)
        ours = gradients(plain, torch.bfloat16, **inputs)
        installed.undo()
        for name, value in wanted.items():
            errors.setdefault(name, []).append((away(ours[name], value), away(usual[name], value)))
    for name, pairs in errors.items():
        assert sum(a for a, _ in pairs) <= 1.05 * sum(b for _, b in pairs), name


def test_one_segment_does_not_touch_another() -> None:
    model = tiny_model().eval()
    install(model)
    tokens, positions = ids(model, 1, 60), torch.cat([torch.arange(n) for n in (20, 25, 15)])[None]
    with torch.no_grad():
        before = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        tokens[0, 20:45] = 5
        after = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    assert torch.equal(before[:, :20], after[:, :20]) and torch.equal(before[:, 45:], after[:, 45:])
    assert not torch.allclose(before[:, 20:45], after[:, 20:45])


def test_rows_of_several_segments() -> None:
    model = tiny_model().eval()
    tokens, positions = ids(model, 2, 30), torch.stack([torch.cat([torch.arange(n) for n in (10, 20)]), torch.arange(30)])
    with torch.no_grad():
        wanted = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
        install(model)
        assert torch.allclose(model(input_ids=tokens, position_ids=positions, use_cache=False).logits, wanted, atol=1e-5)


def test_masks_and_generation_are_as_before() -> None:
    model = tiny_model().eval()
    tokens, mask = ids(model, 2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        wanted, generated = model(input_ids=tokens, attention_mask=mask).logits, model.generate(tokens, **options)
        installed = install(model)
        assert torch.equal(model(input_ids=tokens, attention_mask=mask).logits, wanted)
        again = model.generate(tokens, **options)
        static = model.generate(tokens, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(again.sequences, generated.sequences) and torch.equal(static.sequences, generated.sequences)
    for a, b in zip(again.logits, generated.logits, strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    installed.undo()
    assert model.config._attn_implementation == "sdpa"


def test_dropout_in_segments_is_masked() -> None:
    model = tiny_model(attention_dropout=0.5).train()
    install(model)
    tokens, positions = ids(model, 1, 20), torch.cat([torch.arange(10), torch.arange(10)])[None]
    torch.manual_seed(0)
    before = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    tokens[0, :10] = 7
    torch.manual_seed(0)
    assert torch.allclose(model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, 10:], before[:, 10:], atol=1e-6)


def test_a_sliding_window_holds() -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**shape, sliding_window=8)).eval()
    tokens, positions = ids(model, 1, 40), torch.cat([torch.arange(22), torch.arange(18)])[None]
    with torch.no_grad():
        wanted = [model(input_ids=tokens).logits, model(input_ids=tokens, position_ids=positions, use_cache=False).logits]
        assert install(model).on
        got = [model(input_ids=tokens).logits, model(input_ids=tokens, position_ids=positions, use_cache=False).logits]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted, strict=True))


def test_other_attention_is_left_alone() -> None:
    model = tiny_model()
    model.set_attn_implementation("eager")
    assert install(model).off == ["attention: the model's own, eager"]
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sinks = GptOssForCausalLM(GptOssConfig(**shape, vocab_size=50, num_local_experts=2, num_experts_per_tok=1))
    assert install(sinks).off and not install(sinks).on
    assert install(nn.Linear(2, 2)).off == ["attention: no transformers model"]


def test_where_flash_attention_is_refused_it_is_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers refuses it on a GPU before Ampere, where it is installed all the same."""
    monkeypatch.setattr(ftx_fast_attention, "is_flash_attn_2_available", lambda: True)
    model = tiny_model().half()
    model.model.embed_tokens.weight = nn.Parameter(model.model.embed_tokens.weight.detach().as_subclass(SaysCuda))
    installed = install(model)
    assert installed.on == ["attention without a mask, segment by segment"] and not installed.off
    installed.undo()
    assert model.config._attn_implementation == "sdpa"


def test_a_copy_after_undo_has_nothing_of_it() -> None:
    model = tiny_model()
    installed = install(model)
    assert installed.on == ["attention without a mask, segment by segment"] and not installed.off
    assert model.config._attn_implementation == ftx_fast_attention.NAME
    installed.undo()
    assert copy.deepcopy(model).config._attn_implementation == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_varlen_on_a_gpu(autocast: bool) -> None:
    """bf16 weights, or fp32 ones under autocast, where the rotary embedding leaves queries and keys in fp32."""
    exact = tiny_model(hidden_size=256).cuda()
    model = copy.deepcopy(exact) if autocast else copy.deepcopy(exact).bfloat16()
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    no_further_on_a_gpu(exact, model, autocast)
    model.config._attn_implementation = NAME  # varlen where flash-attention is installed, too
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, ftx_fast_attention.mask)
    called: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        usual = varlen.varlen_attn
        patch.setattr(varlen, "varlen_attn", lambda *given, **options: called.append(1) or usual(*given, **options))
        gradients_on_gpu(model, *on_gpu(model)[0], autocast)
    assert called


@pytest.mark.gpu
@pytest.mark.parametrize(("hidden", "flash"), [(48, True), (256, False)])
def test_where_varlen_does_not_apply_on_a_gpu(hidden: int, flash: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads of 12, and flash-attention that is not to be had, as on a GPU before Ampere."""
    called: list[int] = []
    monkeypatch.setattr(varlen, "varlen_attn", lambda *_, **__: called.append(1))
    monkeypatch.setattr(ftx_fast_attention, "is_flash_attn_2_available", lambda: False)
    backends = [SDPBackend.MATH, *([SDPBackend.FLASH_ATTENTION] if flash else [])]
    model = tiny_model(hidden_size=hidden).cuda().bfloat16()
    with sdpa_kernel(backends):
        no_further_on_a_gpu(copy.deepcopy(model).float(), model, False)
    assert not called


@pytest.mark.gpu
def test_flash_attention_on_a_gpu() -> None:
    pytest.importorskip("flash_attn")
    model = tiny_model(hidden_size=256).cuda().bfloat16()
    installed = install(model)
    assert installed.on == ["attention by flash-attention"] and model.config._attn_implementation == "flash_attention_2"
    installed.undo()
    assert model.config._attn_implementation == "sdpa"
    no_further_on_a_gpu(copy.deepcopy(model).float(), model, False)


def on_gpu(model: nn.Module, rows: int = 1) -> list[tuple[Tensor, Tensor]]:
    positions = torch.cat([torch.arange(n) for n in (20, 25, 15)])[None].cuda()
    return [(row[None].cuda(), positions) for row in ids(model, rows, 60)]


def no_further_on_a_gpu(exact: nn.Module, model: nn.Module, autocast: bool) -> None:
    """Three segments in one sequence: in sum over four of them the gradients with this attention are no further from fp32's than
    with SDPA under a mask; each gradient on its own is a matter of luck."""
    far = {"usual": 0.0, "ours": 0.0}
    for given in on_gpu(model, 4):
        wanted = gradients_on_gpu(exact, *given)
        for side in far:
            installed = install(model) if side == "ours" else None
            found = gradients_on_gpu(model, *given, autocast)
            if installed is not None:
                assert installed.on
                installed.undo()
            far[side] += sum(away(found[name], value) for name, value in wanted.items())
    assert far["ours"] <= 1.1 * far["usual"], far


def gradients_on_gpu(model: nn.Module, tokens: Tensor, positions: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    (logits.float() * torch.linspace(-1, 1, logits.shape[-1], device=logits.device)).sum().backward()
    return {"logits": logits.detach()} | {name: parameter.grad for name, parameter in model.named_parameters()}
