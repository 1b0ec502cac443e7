"""Causal attention without a mask: grouped products for short rows on a CPU, each segment of a flattened batch by itself."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask
from transformers.utils import is_flash_attn_2_available

from ftx_fast_installed import Installed
from ftx_fast_segments import PRODUCTS, Segments

#: The name under which transformers knows this attention.
NAME = "ftx_fast"
#: The argument of a model in which its attention gets the Segments of a tree of rows (ftx_fast_prefixes).
ROWS = "ftx_fast_segments"
#: Queries that are multiplied with their keys at once: shorter blocks skip more of what causality hides, longer ones
#: need fewer calls. Forward and backward of 1776 tokens, 9 heads of 64 on 3 key heads, one Zen 4 core, bf16, in ms:
#:      length   SDPA   32   48   64   96
#:          70     57   15   14   14   16
#:         111     58   18   16   22   20
#:         256     49   22   22   22   24
#:         512     83   39   44   45   61
#:        1024     76   48   46   51   45
BLOCK = 48
#: Arguments of an attention call that only transformers' own functions know; None is the same as not given.
OTHERS = ("softcap", "s_aux", "position_bias", "cache", "head_mask")


class CausalProducts(torch.autograd.Function):
    """Causal attention with the queries of a group of heads stacked on their one key head.

    `query` [batch, heads, asked, size] of the last positions, `key` and `value` [batch, key heads, length, size], any strides ->
    [batch, asked, heads, size]. Scores, softmax and its gradient are fp32, as SDPA's are; the other products are of the inputs' dtype.
    """

    @staticmethod
    @torch.autocast("cpu", enabled=False)  # else it would make bf16 of the scores
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        (batch, heads, asked, size), (_, kept, length, _) = query.shape, key.shape
        group, first = heads // kept, length - asked
        ctx.shape, ctx.scale = (batch, asked, kept, group, size), scale
        q, k, v = stacked(query.transpose(1, 2), kept), key.reshape(-1, length, size), value.reshape(-1, length, size)
        queries, keys, out = q.float() * scale, k.float(), torch.empty_like(q)
        future = future_of(min(BLOCK, asked), group, q.device)
        blocks = []
        for start, end, rows in blocks_of(first, length, group):
            scores = torch.bmm(queries[:, rows], keys[:, :end].mT)
            scores[:, :, start:] += future[: (end - start) * group, : end - start]
            probabilities = torch.softmax(scores, -1).to(q.dtype)
            out[:, rows] = torch.bmm(probabilities, v[:, :end])
            if any(ctx.needs_input_grad):
                blocks.append(probabilities)
        ctx.save_for_backward(q, k, v, *blocks)
        return unstacked(out, ctx.shape)

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *blocks = ctx.saved_tensors
        batch, asked, kept, group, size = ctx.shape
        length = k.shape[1]
        grad = stacked(grad, kept)
        grads, values = grad.float(), v.float()
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for (_, end, rows), probabilities in zip(blocks_of(length - asked, length, group), blocks, strict=True):
            wide = torch.bmm(grads[:, rows], values[:, :end].mT)  # fp32: softmax takes nearly all of it away again
            inner = torch._softmax_backward_data(wide, probabilities.float(), -1, torch.float32).mul_(ctx.scale).to(q.dtype)
            dq[:, rows] = torch.bmm(inner, k[:, :end])
            dk[:, :end] += torch.bmm(inner.mT, q[:, rows])
            dv[:, :end] += torch.bmm(probabilities.mT, grad[:, rows])
        shape = batch, kept, length, size
        return unstacked(dq, ctx.shape).transpose(1, 2), dk.to(q.dtype).view(shape), dv.to(q.dtype).view(shape), None


def blocks_of(first: int, length: int, group: int) -> list[tuple[int, int, slice]]:
    """(first position, end, its stacked queries) of each block of the queries from position `first` on."""
    starts = range(first, length, BLOCK)
    ends = [min(start + BLOCK, length) for start in starts]
    return [(start, end, slice((start - first) * group, (end - first) * group)) for start, end in zip(starts, ends, strict=True)]


def future_of(block: int, group: int, device: torch.device) -> Tensor:
    """fp32 [block * group, block]: minus infinity where a query's position is before the key's, else 0."""
    return torch.full((block, block), float("-inf"), device=device).triu_(1).repeat_interleave(group, 0)


def stacked(x: Tensor, kept: int) -> Tensor:
    """[batch, length, heads, size] -> [batch * key heads, length * group, size], a position's group side by side."""
    batch, length, heads, size = x.shape
    return x.reshape(batch, length, kept, heads // kept, size).transpose(1, 2).reshape(batch * kept, -1, size)


def unstacked(x: Tensor, shape: tuple[int, int, int, int, int]) -> Tensor:
    """What `stacked` did, undone, for (batch, length, key heads, group, size)."""
    batch, length, kept, group, size = shape
    return x.view(batch, kept, length, group, size).transpose(1, 2).reshape(batch, length, kept * group, size)


def causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of rows that stand alone -> [batch, length, heads, size]; on a CPU queries of short rows may be the last ones only."""
    if query.device.type == "cpu" and key.shape[2] <= PRODUCTS:
        return CausalProducts.apply(query, key, value, scale)
    grouped = query.shape[1] != key.shape[1]
    return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped).transpose(1, 2)


def takes_varlen(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether torch's flash-attention takes these as they are: in half precision, on a GPU since Ampere, heads of 8 to 256 in eights.

    SDPA pads other heads itself; `varlen_attn` raises, as it does on an older GPU.
    """
    if not query.is_cuda or query.shape[3] % 8:
        return False
    given = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, True, query.shape[1] != key.shape[1])
    return torch.backends.cuda.can_use_flash_attention(given)


def segment_by_segment(query: Tensor, key: Tensor, value: Tensor, scale: float, segments: Segments) -> Tensor:
    """Causal attention within each segment of a flattened batch; shapes as in `causal`."""
    batch, heads, length, size = query.shape
    flat = [x.transpose(1, 2).reshape(batch * length, -1, size) for x in (query, key, value)]
    if takes_varlen(query, key, value):
        from torch.nn.attention.varlen import varlen_attn

        whole = segments.whole
        q, k, v = flat if whole is None else (whole[0].take(flat[0]), whole[1].take(flat[1]), whole[1].take(flat[2]))
        longest = segments.longest
        window = (-1, 0)  # causal: everything to the left, nothing to the right
        ends = segments.placed_offsets
        out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, window_size=window, enable_gqa=heads != key.shape[1])
        return (out if whole is None else whole[0].back(out)).view(batch, length, heads, size)
    queries, keys = segments.spread
    asked = [rows * (longest - first) for rows, longest, first in segments.batches]
    seen = [rows * longest for rows, longest, _ in segments.batches]
    outs = []
    for (rows, longest, first), q, k, v in zip(
        segments.batches, queries.take(flat[0]).split(asked), keys.take(flat[1]).split(seen), keys.take(flat[2]).split(seen), strict=True
    ):
        if rows == 1 < len(seen):
            q, k, v = q.clone(), k.clone(), v.clone()  # a view of one segment would keep all of them
        q, k, v = (x.view(rows, -1, x.shape[1], size).transpose(1, 2) for x in (q, k, v))
        outs.append(causal(q, k, v, scale).reshape(rows * (longest - first), heads, size))
    return queries.back(torch.cat(outs)).view(batch, length, heads, size)


def through_sdpa(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, segments: Segments, **kwargs: Any) -> Tensor:
    """Attention within the segments of a tree, each whole and under a mask of all of them; shapes as in `causal`."""
    assert segments.whole is not None
    queries, keys = segments.whole
    rows = [spread.take(x[0].transpose(0, 1)).transpose(0, 1).unsqueeze(0) for spread, x in ((queries, query), (keys, key), (keys, value))]
    out, _ = sdpa_attention_forward(module, *rows, segments.mask(1), **kwargs)
    return queries.back(out[0]).unsqueeze(0)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Segments | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; -> ([batch, length, heads, size], None). SDPA wherever this is no plain causal attention."""
    attention_mask = kwargs.pop(ROWS, attention_mask)  # transformers makes its mask from position ids, which do not tell a tree
    plain = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    same = query.shape[2] == key.shape[2] > 1 and query.shape[3] == key.shape[3] == value.shape[3] and query.shape[1] % key.shape[1] == 0
    known = not dropout and all(kwargs.get(name) is None for name in OTHERS)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    kind = query.device.type
    if torch.is_autocast_enabled(kind):  # as SDPA has it; the rotary embedding leaves queries and keys in fp32
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    if plain and same and known and attention_mask is None and kind == "cpu":
        return causal(query, key, value, scale), None
    if isinstance(attention_mask, Segments):
        if plain and same and known:
            return segment_by_segment(query, key, value, scale, attention_mask), None
        if attention_mask.whole is not None:
            return through_sdpa(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs), None
        attention_mask = attention_mask.mask(query.shape[0])
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs)


def mask(*args: Any, **kwargs: Any) -> Tensor | Segments | None:
    """SDPA's mask, which is none wherever causality is enough, and for a flattened batch the segments instead of [length, length]."""
    numbers = segment_numbers(kwargs.get("mask_function"))
    if numbers is None or kwargs.get("attention_mask") is not None or kwargs["q_length"] != kwargs["kv_length"]:
        return sdpa_mask(*args, **kwargs)
    first = torch.ones_like(numbers[:, :1], dtype=torch.bool)  # a row of the batch ends a segment too
    starts = torch.cat([first, numbers.diff(dim=-1) != 0], 1).flatten().nonzero().flatten()
    return Segments(torch.cat([starts, starts.new_tensor([numbers.numel()])]).int())


def segment_numbers(function: Any) -> Tensor | None:
    """[batch, length] of the segment that each token is in, if that and causality are all that this mask function asks for.

    transformers finds segments from `position_ids` that start anew and hands on a nest of functions; there is no other
    way to them that holds for every model. A nest of any other form is not known here, and its mask is written out.
    """
    parts = inspect.getclosurevars(function).nonlocals.get("mask_functions", ()) if inspect.isfunction(function) else ()
    names = [part.__qualname__.split(".")[0] for part in parts if inspect.isfunction(part)]
    if names != ["packed_sequence_mask_function", "remap_positions_for_packed_sequence"]:
        return None
    same, order = (inspect.getclosurevars(part).nonlocals for part in parts)
    return same.get("packed_sequence_mask") if order.get("mask_function") is causal_mask_function else None


def install(model: nn.Module, flash: bool = True) -> Installed:
    """Let the transformers model in `model` use this attention, or, with `flash`, flash-attention on a GPU that has it."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        return Installed(lambda: None, off=["attention: no transformers model"])
    config = inner.config.get_text_config()
    if config._attn_implementation != "sdpa":
        return Installed(lambda: None, off=[f"attention: the model's own, {config._attn_implementation}"])
    parameter = next(inner.parameters())
    flash = flash and parameter.is_cuda and parameter.dtype in (torch.float16, torch.bfloat16) and is_flash_attn_2_available()
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
    configs = {id(one): one for module in inner.modules() for one in (getattr(module, "config", None),) if hasattr(one, "_attn_implementation")}
    configs |= {id(config): config, id(inner.config): inner.config}
    before = [(one, one._attn_implementation) for one in configs.values()]
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()

    def undo() -> None:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for one, implementation in before:
            one._attn_implementation_internal = implementation

    why = ""
    for name in ("flash_attention_2", NAME) if flash else (NAME,):
        try:
            inner.set_attn_implementation(name)
        except (ValueError, ImportError) as error:  # flash-attention is not for every GPU, nor for every model
            why = str(error).splitlines()[0]
        else:
            if config._attn_implementation == name:
                if parameter.is_cuda:  # it makes a plan for each new length, and padded batches have many
                    torch.backends.cuda.enable_cudnn_sdp(False)
                return Installed(undo, on=["attention by flash-attention" if name != NAME else "attention without a mask, segment by segment"])
            why = "the model does not go through transformers' AttentionInterface"
        undo()
    return Installed(lambda: None, off=[f"attention: {why}"])
