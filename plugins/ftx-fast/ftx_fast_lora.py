"""LoRA, DoRA and their 4-bit forms as one function a group of layers: the input saved once, rank-r products first, no fp32 copies.

q, k and v (gate and up) get the same input, so the first of them computes all: their A's multiply it as one matrix, and the
input's gradient is summed in place. Formulas: Hu et al., 2021 (arXiv 2106.09685); Liu et al., 2024 (arXiv 2402.09353).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from ftx_fast_installed import Installed

logger = logging.getLogger(f"ftx.{__name__}")

#: How finely a rate of dropout is kept.
DRAWS = 2**16
#: Rows that bitsandbytes multiplies with a 4-bit weight as it is, on a GPU.
FEW = 4
#: Siblings that are called with one input.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(eq=False)
class Frozen:
    """A frozen weight [out, in] and bias, plain or in 4 bits."""

    layer: nn.Module
    buffers: dict[tuple[torch.dtype, torch.device], Tensor] = field(default_factory=dict)
    """Shared by all layers: where a GPU unpacks 4-bit weights, one at a time."""

    def weight(self, dtype: torch.dtype) -> Tensor:
        """[out, in]; on a GPU one that was unpacked stands until the next one is."""
        weight = self.layer.weight
        if not hasattr(weight, "quant_state"):
            return weight.to(dtype)
        from bitsandbytes.functional import dequantize_4bit

        state = weight.quant_state
        if not weight.is_cuda:  # bitsandbytes has no `out` there
            return dequantize_4bit(weight.data, state).to(dtype)
        key = state.dtype, weight.device
        size = state.shape.numel()
        if key not in self.buffers or self.buffers[key].numel() < size:
            self.buffers[key] = torch.empty(size, dtype=state.dtype, device=weight.device)
        return dequantize_4bit(weight.data, state, out=self.buffers[key][:size].view(state.shape)).to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight; of one in 4 bits, what it is unpacked to."""
        weight = self.layer.weight
        return weight.quant_state.dtype if hasattr(weight, "quant_state") else weight.dtype

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        return None if self.layer.bias is None else self.layer.bias.to(dtype)

    def square_norms(self) -> Tensor:
        """fp32 [out]: squared norms of the rows; computed once, the weight is frozen."""
        if not hasattr(self, "_square_norms"):
            self._square_norms = self.weight(torch.float32).square().sum(1)
        return self._square_norms


class Adapted(torch.autograd.Function):
    """x [..., in] and n frozen layers, each with A [r, in], B [out, r], s and (DoRA) m [out] -> n outputs [..., out].

    LoRA: x W^T + s (d(x) A^T) B^T + b; d drops the share `rate` of each layer's inputs, for each anew. DoRA, with c = m / |W + s B A|,
    whose norm counts as a constant: c (x W^T + s (x A^T) B^T) + b; with dropout, as in peft, x W^T + (c - 1) d(x) W^T + c s (d(x) A^T) B^T + b.

    The update comes first, and the large product is added to it before it is rounded (`addmm_` sums in fp32), forward and backward.
    The other way round, an update smaller than half of bf16's spacing there would be added to a rounded number and lost: so are
    the first steps of a run, in peft.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: Sequence[Frozen], scales: Sequence[float], rate: float, *trained: Tensor | None) -> tuple[Tensor, ...]:
        n = len(frozen)
        downs, ups, sizes = trained[:n], trained[n : 2 * n], trained[2 * n :]
        rate = round(rate * DRAWS) / DRAWS
        grown = 1 / (1 - rate)
        scales = [scale * grown for scale in scales]
        ctx.frozen, ctx.scales, ctx.shape = frozen, scales, x.shape
        x = x.reshape(-1, x.shape[-1])
        down = torch.cat([a.to(x.dtype) for a in downs]) if n > 1 else downs[0].to(x.dtype)
        ranks = [len(a) for a in downs]
        masks = [dropped(x, rate) if rate else None for _ in frozen]
        low = torch.cat([x.masked_fill(mask, 0) @ a.mT for mask, a in zip(masks, down.split(ranks), strict=True)], 1) if rate else x @ down.mT
        outs, kept = [], []
        for layer, scale, mask, a, b, size, part in zip(frozen, scales, masks, downs, ups, sizes, low.split(ranks, 1), strict=True):
            update = part @ b.mul(scale).to(x.dtype).mT
            if size is None:
                out = added(update, x, layer)
            else:
                norm = norms(layer, a, b, scale / grown)
                by = size / norm
                if mask is None:
                    through = added(update, x, layer)
                    out = scaled(through, by)
                else:
                    through = added(update.clone(), x.masked_fill(mask, 0), layer, grown)
                    out = added(update.add_(scaled(through, by - 1)), x, layer)
                kept += [through, norm]
            if (bias := layer.bias(x.dtype)) is not None:
                out += bias
            outs.append(out.view(*ctx.shape[:-1], -1))
        ctx.ranks, ctx.grown = ranks, grown
        ctx.save_for_backward(x, low, down, *ups, *sizes, *masks, *kept)
        return tuple(outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, low, down, *rest = ctx.saved_tensors
        n = len(ctx.frozen)
        ups, sizes, masks, kept = rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n], iter(rest[3 * n :])
        lows = torch.empty_like(low)
        low_parts = lows.split(ctx.ranks, 1)
        dups: list[Tensor] = []
        dsizes: list[Tensor | None] = []
        whole_grads: list[Tensor] = []  # of x W^T
        more_grads: list[Tensor | None] = []  # of d(x) W^T
        for scale, mask, b, size, grad, part, into in zip(ctx.scales, masks, ups, sizes, grads, low.split(ctx.ranks, 1), low_parts, strict=True):
            whole = grad = grad.reshape(len(x), -1)
            dsize = more = None
            if size is not None:
                through, norm = next(kept), next(kept)
                by = size / norm
                grad, along = scaled_back(whole, through, by)
                dsize = (along / norm).to(size.dtype)
                if mask is None:
                    whole = grad
                else:
                    more = scaled(whole, by - 1)
            dsizes.append(dsize)
            whole_grads.append(whole)
            more_grads.append(more)
            torch.mm(grad, b.mul(scale).to(x.dtype), out=into) if into.is_contiguous() else into.copy_(grad @ b.mul(scale).to(x.dtype))
            dups.append((grad.mT @ part).to(b.dtype).mul_(scale))
        dx: Tensor | None = None
        drops = masks[0] is not None
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(x) if drops else lows @ down
            for layer, mask, part, a, more in zip(ctx.frozen, masks, low_parts, down.split(ctx.ranks), more_grads, strict=True):
                if mask is not None:
                    kept_part = part @ a
                    if more is not None:
                        kept_part.addmm_(more, layer.weight(x.dtype), alpha=ctx.grown)
                    dx += kept_part.masked_fill_(mask, 0)
            for layer, grad in zip(ctx.frozen, whole_grads, strict=True):
                dx.addmm_(grad, layer.weight(x.dtype))
            dx = dx.view(ctx.shape)
        ddowns = [part.mT @ x.masked_fill(mask, 0) for part, mask in zip(low_parts, masks, strict=True)] if drops else (lows.mT @ x).split(ctx.ranks)
        return dx, None, None, None, *(ddown.to(ups[0].dtype) for ddown in ddowns), *dups, *dsizes


def dropped(x: Tensor, rate: float) -> Tensor:
    """bool, as x: what of it is dropped, each number by itself with the probability `rate`, a multiple of 1 / DRAWS.

    What is drawn hangs on torch's generator alone. On a CPU that gives a seed only: 16 bits a number from it take a tenth of the time of
    `bernoulli_`, which is a quarter of a step with peft's dropout.
    """
    mask = torch.empty_like(x, dtype=torch.bool)
    if x.device.type != "cpu":
        return mask.bernoulli_(rate)
    seed = int(torch.randint(2**62, ()))
    bits = numpy.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(numpy.int16)[: x.numel()]
    return mask.copy_(torch.from_numpy(bits < round(rate * DRAWS) - DRAWS // 2).view(x.shape))


def added(update: Tensor, x: Tensor, layer: Frozen, times: float = 1.0) -> Tensor:
    """`update` [n, out], written over, and `times` x [n, in] W^T in one sum, rounded once."""
    return update.addmm_(x, layer.weight(x.dtype).mT, alpha=times)


def scaled(x: Tensor, by: Tensor) -> Tensor:
    """x [n, out] times `by` [out], in fp32 and rounded once.

    On a CPU as a batch norm of mean 0 and variance 1, which is that product in one pass: mul of two dtypes makes copies in fp32.
    """
    if not one_pass(x, by):
        return torch.mul(x, by, out=torch.empty_like(x))
    return nn.functional.batch_norm(x, torch.zeros_like(by), torch.ones_like(by), by, eps=0.0)


def scaled_back(grad: Tensor, x: Tensor, by: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `scaled`: grad times `by`, and fp32 [out], the sum over n of grad times x."""
    if not one_pass(x, by):
        return torch.mul(grad, by, out=torch.empty_like(grad)), (grad * x.float()).sum(0)
    zeros, ones = torch.zeros_like(by), torch.ones_like(by)
    dx, dby, _ = torch.ops.aten.native_batch_norm_backward(grad.contiguous(), x, by, zeros, ones, None, None, False, 0.0, [True, True, False])
    return dx, dby


def one_pass(x: Tensor, by: Tensor) -> bool:
    return x.device.type == "cpu" and by.dtype is torch.float32 and x.dtype in (torch.bfloat16, torch.float32)


class Steps:
    """Optimizer steps of this process, counted while something is installed: a fused optimizer (`torch._fused_adamw_`, those of
    bitsandbytes) writes a parameter and leaves its version as it was."""

    count = 0

    @classmethod
    def step(cls, *given: Any) -> None:
        cls.count += 1


@torch.no_grad()
def norms(layer: Frozen, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """fp32 [out]: |W + s B A| of each row as |W|^2 + 2 s (W A^T) . B + s^2 (B A A^T) . B, kept until A or B changes or an optimizer
    steps.

    No [out, in] sum is formed. What cancels is small beside |W|^2 unless an update undoes its weight: then the plain norm is taken.
    """
    now = (Steps.count, id(a), a._version, id(b), b._version)
    known = getattr(layer, "_norms", None)
    if known is not None and known[0] == now:
        return known[1]
    wide_a, wide_b = a.float(), b.float()
    weight = layer.weight(layer.dtype)
    cross = (weight @ wide_a.to(weight.dtype).mT).float()
    square = layer.square_norms() + 2 * scale * (cross * wide_b).sum(1) + scale**2 * ((wide_b @ (wide_a @ wide_a.mT)) * wide_b).sum(1)
    if (square < 0.01 * layer.square_norms()).any():
        square = (layer.weight(torch.float32) + scale * (wide_b @ wide_a)).square().sum(1)
    found = square.sqrt()
    layer._norms = (now, found)
    return found


@dataclass(eq=False)
class One:
    """One adapted layer of peft's, and its own forward for whatever ours is not for."""

    module: Any
    frozen: Frozen
    usual: Callable[..., Any]

    def applies(self, x: Tensor) -> bool:
        """Whether in this moment it is one plain active adapter, and computes in its base's dtype."""
        layer = self.module
        if layer.disable_adapters or layer.merged or list(layer.active_adapters) != [self.name]:
            say_once("layers whose adapter is merged, switched off or another one stay peft's for that time")
            return False
        if computed_in(x) is not self.frozen.dtype:
            say_once(f"layers of {self.frozen.dtype} stay peft's where {computed_in(x)} is computed".replace("torch.", ""))
            return False
        return True

    def is_few(self, x: Tensor) -> bool:
        """Whether bitsandbytes multiplies these rows without unpacking the weight, on a GPU and without gradients: as answers are made."""
        packed = x.is_cuda and hasattr(self.frozen.layer.weight, "quant_state")
        return packed and x.numel() <= FEW * x.shape[-1] and not torch.is_grad_enabled()

    def base(self, x: Tensor) -> Tensor:
        """x [..., in] -> what the layer gives while its update is 0, to the bit: the order of sums is the same."""
        layer, rows = self.frozen, x.reshape(-1, x.shape[-1])
        out = added(rows.new_zeros(len(rows), self.module.out_features), rows, layer)
        if (bias := layer.bias(x.dtype)) is not None:
            out += bias
        return out.view(*x.shape[:-1], -1)

    def is_off(self, x: Tensor) -> bool:
        """Whether the adapter is switched off and the layer only asked for numbers, as DPO asks for its reference."""
        return self.module.disable_adapters and not self.module.merged and not torch.is_grad_enabled() and computed_in(x) is self.frozen.dtype

    @property
    def name(self) -> str:
        return next(iter(self.module.lora_A))

    @property
    def rate(self) -> float:
        """The share of its inputs that is dropped at the moment."""
        drop = self.module.lora_dropout[self.name]
        return drop.p if isinstance(drop, nn.Dropout) and drop.training else 0.0

    def parameters(self) -> tuple[Tensor, Tensor, float, Tensor | None]:
        layer, name = self.module, self.name
        vectors = layer.lora_magnitude_vector
        size = vectors[name].weight if name in vectors else None
        return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], size


def computed_in(x: Tensor) -> torch.dtype:
    """What a product of x is computed in: under autocast its dtype."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@functools.cache
def say_once(what: str) -> None:
    """What shows only in a forward pass, after the log has said which layers are on."""
    logger.info("not fast: lora: %s", what)


class Group:
    """Layers called one after the other with the same input: the first computes all, the others find theirs."""

    def __init__(self, ones: Sequence[One]) -> None:
        self.ones = list(ones)
        self.ready: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, number: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given, out = self.ready.pop(number, (None, None))
        if given is x and out is not None:
            return out
        one = self.ones[number]
        if one.is_few(x):
            return one.usual(x, *args, **kwargs)
        if not args and not kwargs and one.is_off(x):
            with torch.autocast(x.device.type, enabled=False):
                return one.base(x.to(one.frozen.dtype))
        if args or kwargs or not one.applies(x):
            if args or kwargs:
                say_once("layers that are given more than their input stay peft's")
            return one.usual(x, *args, **kwargs)
        self.ready.clear()  # of an input that came to nothing
        rate = one.rate
        together = [i for i, other in enumerate(self.ones) if i == number or (number == 0 and other.rate == rate and other.applies(x))]
        found = [self.ones[i].parameters() for i in together]
        downs, ups, scales, sizes = zip(*found, strict=True)
        computed = computed_in(x)
        with torch.autocast(x.device.type, enabled=False):  # all is of the base's dtype, the norms of DoRA fp32
            outs = Adapted.apply(x.to(computed), [self.ones[i].frozen for i in together], scales, rate, *downs, *ups, *sizes)
        for i, out in zip(together, outs, strict=True):
            if i != number:
                self.ready[i] = (x, out)
        return outs[together.index(number)]


def install(model: nn.Module) -> Installed:
    """Every layer of peft's that is plain LoRA or DoRA on a frozen linear layer, in full precision or 4 bits; the rest stays peft's."""
    from peft.tuners.lora.layer import Linear, LoraLayer

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers:
        return Installed(lambda: None, off=["lora: no layer of peft's LoRA"])
    kinds: tuple[type, ...] = (Linear,)
    if any(type(layer).__name__ == "Linear4bit" for layer in layers):
        from peft.tuners.lora.bnb import Linear4bit

        kinds = (Linear, Linear4bit)
    buffers: dict[Any, Tensor] = {}
    known: dict[int, One] = {}
    reasons: dict[str, int] = {}
    for layer in layers:
        if why := unfit(layer, kinds):
            reasons[why] = reasons.get(why, 0) + 1
        else:
            known[id(layer)] = One(layer, Frozen(layer.base_layer, buffers), layer.forward)
    groups: list[Group] = []
    for parent in model.modules():
        for names in GROUPS:
            ones = [known.pop(id(getattr(parent, name, None)), None) for name in names]
            if present := [one for one in ones if one is not None]:
                groups.append(Group(present))
    groups += [Group([one]) for one in known.values()]
    put = [one.module for group in groups for one in group.ones]
    for group in groups:
        for number, one in enumerate(group.ones):
            vars(one.module)["forward"] = bound(group, number)

    counting = register_optimizer_step_post_hook(Steps.step)

    say_once.cache_clear()

    def undo() -> None:
        counting.remove()
        for module in put:
            vars(module).pop("forward", None)

    on = [f"{len(put)} adapted layers as {len(groups)} functions"] if put else []
    return Installed(undo, on, [f"lora: {count} layers stay peft's: {why}" for why, count in reasons.items()])


def bound(group: Group, number: int) -> Callable[..., Tensor]:
    return lambda x, *args, **kwargs: group.forward(number, x, *args, **kwargs)


def unfit(layer: Any, kinds: tuple[type, ...]) -> str:
    """Why this layer cannot be computed here, or ""."""
    from peft.tuners.lora.variants import DoraLinearVariant

    base = layer.base_layer
    names = list(layer.lora_A)
    if type(layer) not in kinds:
        return f"a {type(layer).__name__} is adapted"
    if not (type(base) is nn.Linear or type(base).__name__ == "Linear4bit"):
        return f"the base layer is a {type(base).__name__}"
    if len(names) != 1:
        return "more than one adapter"
    if any(parameter.requires_grad for parameter in base.parameters()):
        return "the base layer trains"
    drop = layer.lora_dropout[names[0]]
    if type(drop) not in (nn.Identity, nn.Dropout) or getattr(drop, "p", 0) >= 1:
        return "a dropout of another kind"
    if layer.lora_B[names[0]].bias is not None:
        return "B has a bias"
    if getattr(layer, "fan_in_fan_out", False) or "forward" in vars(layer):
        return "its forward is another's"
    variant = layer.lora_variant.get(names[0])
    if variant is not None and not isinstance(variant, DoraLinearVariant):
        return f"the variant {type(variant).__name__}"
    return ""
