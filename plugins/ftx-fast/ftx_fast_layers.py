"""RMSNorm, rotary embedding and SwiGLU on a CPU, each as one function that saves little and makes few passes.

Forward and backward of 16 rows of 111 tokens at SmolLM2-135M's sizes, bf16, two Zen 4 cores, transformers' own -> here, alone:
RMSNorm 6.0 -> 1.0 ms, rotary embedding 2.6 -> 1.1 ms. Within a layer: RMSNorm 2 to 6 % of its time (6 where the allocator gives
memory back), rotary embedding 1 to 2 %. SwiGLU keeps one [tokens, intermediate] tensor less and costs about 1 %.
Tried and left: chunks of rows that fit the L2 cache (slower), `rms_norm` of torch (slower than transformers'), `glu` of torch
(backward twice as slow), complex numbers for the rotation (twice as slow).
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from collections.abc import Callable, Collection
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ftx.errors import first_line
from ftx_fast_installed import Installed

logger = logging.getLogger(f"ftx.{__name__}")

#: The name under which transformers' attention modules find their rotary embedding.
ROTARY = "apply_rotary_pos_emb"


class RMSNorm(torch.autograd.Function):
    """x [..., h] and weight [h] of one dtype -> weight * (x / rms(x)): statistics fp32, rounded once before the weight, as Llama does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(wide, inverse).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        normed = x.float() * inverse
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = (grad.float() * normed.to(x.dtype)).flatten(0, -2).sum(0).to(weight.dtype)
        if not ctx.needs_input_grad[0]:
            return None, dweight, None
        wide = torch.mul(grad.float(), weight.float())
        along = (wide * normed).mean(-1, keepdim=True)
        return wide.addcmul_(normed, along, value=-1).mul_(inverse).to(x.dtype), dweight, None


class Rotary(torch.autograd.Function):
    """query [batch, heads, length, size], key, and cos, sin [batch or 1, 1, length, size], not trained -> both turned, rounded once."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return turned(query, cos.float(), sin.float()), turned(key, cos.float(), sin.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dquery: Tensor, dkey: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = (x.float() for x in ctx.saved_tensors)
        back = -sin.roll(sin.shape[-1] // 2, -1)
        return turned(dquery, cos, back), turned(dkey, cos, back), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x * cos + [-second half, first half] * sin, in fp32, as x's dtype and in x's strides."""
    half, wide = x.shape[-1] // 2, x.float()
    out = wide * cos
    out[..., :half].addcmul_(wide[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(wide[..., :half], sin[..., half:])
    return out.to(x.dtype)


class SwiGLU(torch.autograd.Function):
    """gate, up [..., f] -> silu(gate) * up. Keeps the two and no more: the backward pass computes silu again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate = grad * up
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        return dgate, nn.functional.silu(gate).mul_(grad)


@functools.cache
def kernels(kind: str) -> Any:
    """What has RMSNorm, Rotary and SwiGLU for tensors on devices of this kind: this module, Triton's kernels, or None."""
    if kind == "cpu":
        return sys.modules[__name__]
    if kind != "cuda" or importlib.util.find_spec("triton") is None or torch.version.cuda is None or torch.cuda.get_device_capability() < (7, 0):
        return None
    try:
        import ftx_fast_triton

        ftx_fast_triton.logps_of(torch.zeros(1, 2, device=kind), torch.zeros(1, dtype=torch.long, device=kind), write=False)
    except Exception as error:  # Triton compiles its launcher in C when it is first used: a machine may have no compiler
        logger.info("not fast: no kernels of Triton's: %s: %s", type(error).__name__, first_line(error))
        return None
    return ftx_fast_triton


def fits(size: int) -> bool:
    """Whether rows of this size can be normalised; here all. Triton's kernels have a function of this name, too."""
    return True


def norm_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A forward for `module` if it is a Llama-like RMSNorm: if, for weights and inputs at random, it does what ours does."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, nn.Parameter) or not isinstance(eps, float) or weight.dim() != 1 or dict(module.named_children()):
        return None
    usual = module.forward
    size = weight.shape[0]
    probe, scale = (x.to(weight.dtype) for x in at_random((3, size), (size,)))
    with torch.no_grad():
        try:
            theirs = torch.func.functional_call(module, {"weight": scale}, (probe,))
        except Exception:
            return None
        if not torch.equal(theirs, RMSNorm.apply(probe, scale, eps)):
            return None

    def forward(hidden_states: Tensor) -> Tensor:
        weight = module.weight
        fits = hidden_states.dtype == weight.dtype and hidden_states.device == weight.device
        found = kernels(weight.device.type) if fits else None
        return found.RMSNorm.apply(hidden_states, weight, module.variance_epsilon) if found is not None else usual(hidden_states)

    return forward


def mlp_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """A forward for `module` if it is down(silu(gate(x)) * up(x)): if that is what its own does with stand-ins for the three."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    usual, (x, gate, up) = module.forward, at_random((2, 8), (2, 8), (2, 8))
    calls: list[tuple[str, Tensor]] = []

    def stand_in(name: str, out: Tensor | None) -> Callable[[Tensor], Tensor]:
        def stands_in(given: Tensor) -> Tensor:
            calls.append((name, given))
            return given if out is None else out

        return stands_in

    stand_ins = SimpleNamespace(gate_proj=stand_in("gate", gate), up_proj=stand_in("up", up), down_proj=stand_in("down", None), act_fn=module.act_fn)
    try:
        theirs = type(module).forward(stand_ins, x)
    except Exception:
        return None
    same = [name for name, _ in calls] == ["gate", "up", "down"] and calls[0][1] is x and calls[1][1] is x
    if not same or theirs is not calls[2][1] or not torch.equal(theirs, SwiGLU.apply(gate, up)):
        return None

    def forward(x: Tensor) -> Tensor:
        found = kernels(x.device.type)
        return usual(x) if found is None else module.down_proj(found.SwiGLU.apply(module.gate_proj(x), module.up_proj(x)))

    return forward


def rotary_forward(module: nn.Module) -> Callable[..., Any] | None:
    """The module's own forward, in which the rotary embedding's name means ours: if it calls one by that name, and it does what ours does.

    The name is a global one of transformers' file: to change it there would change every model of the process.
    """
    function = type(module).forward
    if not isinstance(function, FunctionType) or ROTARY not in function.__code__.co_names or ROTARY not in function.__globals__:
        return None
    usual = function.__globals__[ROTARY]
    query, key, cos, sin = at_random((2, 3, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8))
    try:
        theirs = usual(query, key, cos, sin)
    except Exception:
        return None
    ours = Rotary.apply(query, key, cos.unsqueeze(1), sin.unsqueeze(1))
    if not all(a.shape == b.shape and torch.allclose(a, b, atol=1e-6) for a, b in zip(theirs, ours, strict=True)):
        return None

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *rest: Any, **options: Any) -> tuple[Tensor, Tensor]:
        fits = q.dim() == k.dim() == 4 and cos.dim() == 3 and q.shape[-1] == k.shape[-1] == cos.shape[-1] and q.dtype == k.dtype == cos.dtype
        found = kernels(q.device.type) if fits and not rest and not options and not cos.requires_grad else None
        if found is None:
            return usual(q, k, cos, sin, *rest, **options)
        return found.Rotary.apply(q, k, cos.unsqueeze(1), sin.unsqueeze(1))

    names = function.__globals__ | {ROTARY: apply}
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return MethodType(copy, module)


def at_random(*shapes: tuple[int, ...]) -> list[Tensor]:
    """fp32, the same every time, and without touching the global generator."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


#: What each part is called, and what makes a forward for a module that it fits.
PARTS: dict[str, Callable[[nn.Module], Callable[..., Any] | None]] = {
    "RMSNorm": norm_forward,
    "rotary embedding": rotary_forward,
    "SwiGLU": mlp_forward,
}


def install(model: nn.Module, parts: Collection[str] = tuple(PARTS)) -> Installed:
    """Give each module that is known by what it does a forward of its own; `parts` are names of PARTS."""
    kinds = {parameter.device.type for parameter in model.parameters()}
    if any(kernels(kind) is None for kind in kinds):
        return Installed(lambda: None, off=["layers: these are for a CPU, and for a GPU of compute capability 7.0 with Triton and a C compiler"])
    put: list[nn.Module] = []
    counts = dict.fromkeys(parts, 0)
    wide: set[int] = set()
    for module in list(model.modules()):
        if "forward" in vars(module):
            continue  # another part's, or accelerate's
        for name in parts:
            forward = PARTS[name](module)
            if forward is not None and name == "RMSNorm" and not all(kernels(kind).fits(len(module.weight)) for kind in kinds):
                wide.add(len(module.weight))
            elif forward is not None:
                vars(module)["forward"] = forward
                put.append(module)
                counts[name] += 1
                break

    def undo() -> None:
        for module in put:
            vars(module).pop("forward", None)

    on = [f"{name} as one function: {count} modules" for name, count in counts.items() if count]
    off = [f"{name}: none that is known" for name, count in counts.items() if not count and not (name == "RMSNorm" and wide)]
    return Installed(undo, on, [*off, *(f"RMSNorm: rows of {size:,} are too wide for the kernel" for size in sorted(wide))])
