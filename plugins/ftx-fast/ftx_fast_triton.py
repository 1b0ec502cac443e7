"""RMSNorm, rotary embedding, SwiGLU and the softmax of the head on a GPU, each as one kernel a pass; what is saved and rounded is as on a CPU.

Statistics and everything within a kernel are fp32; a result is rounded where transformers' own rounds it. With TRITON_INTERPRET=1 the
kernels run on a CPU, for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Elements of one program of an elementwise kernel.
ELEMENTS = 1024
#: The widest row that one program holds in its registers.
WIDEST = 65536
#: Logits of a row that one program of the head reads at once.
PIECE = 4096


def fits(size: int) -> bool:
    """Whether the norm's kernel takes rows of this size: one program holds a whole row."""
    return size <= WIDEST


@triton.jit
def norm_forward(x, weight, out, inverse, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(x + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / size + eps)
    tl.store(inverse + row, scale)
    factor = tl.load(weight + columns, mask=inside, other=0.0)
    tl.store(out + row * size + columns, (values * scale).to(factor.dtype) * factor, mask=inside)


@triton.jit
def norm_backward(grad, x, weight, inverse, out, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    scale = tl.load(inverse + row)
    normed = tl.load(x + row * size + columns, mask=inside, other=0.0).to(tl.float32) * scale
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    wide = tl.load(grad + row * size + columns, mask=inside, other=0.0).to(tl.float32) * factor
    along = tl.sum(wide * normed, 0) / size
    tl.store(out + row * size + columns, ((wide - normed * along) * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def turn(x, cos, sin, out, heads, length, batch_stride, head_stride, place_stride, turns_stride, HALF: tl.constexpr, BLOCK: tl.constexpr, BACK: tl.constexpr):
    """One place of one head: [size] as two halves. BACK turns a gradient the other way."""
    number = tl.program_id(0).to(tl.int64)
    place, head, batch = number % length, (number // length) % heads, number // (length * heads)
    at = batch * batch_stride + head * head_stride + place * place_stride
    angle = batch * turns_stride + place * 2 * HALF
    columns = tl.arange(0, BLOCK)
    inside = columns < HALF
    first = tl.load(x + at + columns, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + at + HALF + columns, mask=inside, other=0.0).to(tl.float32)
    cos1 = tl.load(cos + angle + columns, mask=inside, other=0.0).to(tl.float32)
    cos2 = tl.load(cos + angle + HALF + columns, mask=inside, other=0.0).to(tl.float32)
    sin1 = tl.load(sin + angle + columns, mask=inside, other=0.0).to(tl.float32)
    sin2 = tl.load(sin + angle + HALF + columns, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        upper = first * cos1 + second * sin2
        lower = second * cos2 - first * sin1
    else:
        upper = first * cos1 - second * sin1
        lower = second * cos2 + first * sin2
    tl.store(out + at + columns, upper.to(out.dtype.element_ty), mask=inside)
    tl.store(out + at + HALF + columns, lower.to(out.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_forward(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + at, mask=inside, other=0.0)
    tl.store(out + at, (value * tl.sigmoid(value)).to(other.dtype) * other, mask=inside)


@triton.jit
def swiglu_backward(grad, gate, up, dgate, dup, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    slope = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(value)
    tl.store(dgate + at, (slope * other * sigmoid * (1.0 + value * (1.0 - sigmoid))).to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + at, (slope * value * sigmoid).to(dup.dtype.element_ty), mask=inside)


@triton.jit
def head_row(logits, targets, logps, size, BLOCK: tl.constexpr, WRITE: tl.constexpr):
    """One row: its log-sum-exp in one pass (Milakov and Gimelshein, 2018, arXiv 1805.02867), in a second one its softmax over its logits."""
    row = tl.program_id(0).to(tl.int64)
    first = logits + row * size
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for at in range(0, size, BLOCK):
        columns = at + tl.arange(0, BLOCK)
        values = tl.load(first + columns, mask=columns < size, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(values, 0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(values - higher), 0)
        highest = higher
    chosen = tl.load(first + tl.load(targets + row)).to(tl.float32)
    tl.store(logps + row, chosen - highest - tl.log(total))
    if WRITE:
        tl.debug_barrier()  # every thread has read the target's logit before it is written over
        for at in range(0, size, BLOCK):
            columns = at + tl.arange(0, BLOCK)
            inside = columns < size
            values = tl.load(first + columns, mask=inside, other=float("-inf")).to(tl.float32)
            tl.store(first + columns, (tl.exp(values - highest) / total).to(logits.dtype.element_ty), mask=inside)


def logps_of(logits: Tensor, targets: Tensor, *, write: bool) -> Tensor:
    """logits [n, vocabulary], contiguous, targets int64 [n] -> fp32 [n], log p(target); `write`: the logits become their softmax."""
    logps = logits.new_empty(len(logits), dtype=torch.float32)
    if len(logits):
        head_row[(len(logits),)](logits, targets.contiguous(), logps, logits.shape[1], BLOCK=PIECE, WRITE=write)
    return logps


def blocks(size: int) -> dict[str, int]:
    """A row at once, and so many warps that none of them spills its registers: at most 32 numbers a thread up to 16,384."""
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(16, max(4, block // 1024))}


class RMSNorm(torch.autograd.Function):
    """x [..., h] and weight [h] of one dtype -> weight * (x / rms(x)); `fits` says whether the kernel takes h."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        size = x.shape[-1]
        out, inverse = torch.empty_like(x), x.new_empty(x.numel() // size, dtype=torch.float32)
        norm_forward[(len(inverse),)](x, weight, out, inverse, size, eps, **blocks(size))
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        size, grad = x.shape[-1], grad.contiguous()
        dweight = None
        if ctx.needs_input_grad[1]:
            normed = (x.reshape(-1, size).float() * inverse[:, None]).to(x.dtype)
            dweight = (grad.reshape(-1, size).float() * normed).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, dweight, None
        dx = torch.empty_like(x)
        norm_backward[(len(inverse),)](grad, x, weight, inverse, dx, size, **blocks(size))
        return dx, dweight, None


class Rotary(torch.autograd.Function):
    """query [batch, heads, length, size], key, and cos, sin [batch or 1, 1, length, size], not trained -> both turned, rounded once."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return turned(query, cos, sin, False), turned(key, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dquery: Tensor, dkey: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return turned(dquery, cos, sin, True), turned(dkey, cos, sin, True), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    """In x's dtype and, unless it is expanded or not dense along a place, in its strides."""
    x = x if x.stride(-1) == 1 and 0 not in x.stride() else x.contiguous()
    batch, heads, length, size = x.shape
    out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    turns = length * size if cos.shape[0] > 1 else 0
    half = size // 2
    block = triton.next_power_of_2(half)
    turn[(batch * heads * length,)](x, cos, sin, out, heads, length, *x.stride()[:3], turns, HALF=half, BLOCK=block, BACK=back, num_warps=1)
    return out


class SwiGLU(torch.autograd.Function):
    """gate, up [..., f] -> silu(gate) * up. Keeps the two and no more."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        swiglu_forward[(triton.cdiv(gate.numel(), ELEMENTS),)](gate, up, out, gate.numel(), BLOCK=ELEMENTS)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        grad = grad.contiguous()
        swiglu_backward[(triton.cdiv(gate.numel(), ELEMENTS),)](grad, gate, up, dgate, dup, gate.numel(), BLOCK=ELEMENTS)
        return dgate, dup
