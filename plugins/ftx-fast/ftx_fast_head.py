"""The head only where there is a label: log-probabilities in chunks, their gradient found in the forward pass.

The gradient of log p(target) with respect to its hidden state is W[target] - p W, whatever the loss makes of it later, so
a frozen head costs two matrix products for any loss of log-probabilities, and one [chunk, vocabulary] buffer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from ftx.errors import first_line
from ftx_fast_installed import Installed
from ftx_fast_layers import kernels

logger = logging.getLogger(f"ftx.{__name__}")

#: Logits computed at once. On a CPU some 128 rows of 49,152 (25 MB in fp32: the last cache); a GPU wants larger products.
ELEMENTS = {"cpu": 6 << 20, "cuda": 1 << 28}


def chunk_of(weight: Tensor) -> int:
    """Rows of hidden states that go through the head at once."""
    return max(32, ELEMENTS.get(weight.device.type, ELEMENTS["cuda"]) // weight.shape[0])


class TokenLogps(torch.autograd.Function):
    """hidden [n, h], weight [vocabulary, h], targets int64 [n], bias [vocabulary] or None -> fp32 [n], log p(target) in nats.

    The products are of hidden's dtype, everything over the vocabulary is fp32. A weight that trains has its gradient
    computed in the backward pass, which costs the logits once more.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        ctx.dtype, ctx.trains = weight.dtype, ctx.needs_input_grad[1]
        used = weight.to(hidden.dtype)
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        along = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size = chunk_of(weight)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            logps[rows], probabilities = softmax_of(hidden[rows], used, targets[rows], bias, write=along is not None)
            if along is not None:
                along[rows] = used[targets[rows]] - probabilities @ used
            del probabilities  # else they stand beside the next chunk's
        ctx.save_for_backward(*((hidden, weight, targets, bias, logps) if ctx.trains else ()), along)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *others, along = ctx.saved_tensors
        dhidden = (along * grad[:, None]).to(along.dtype) if along is not None else None
        if not ctx.trains:
            return dhidden, None, None, None
        hidden, weight, targets, bias, _ = others
        used = weight.to(hidden.dtype)
        dweight = torch.zeros_like(weight, dtype=torch.float32)
        size = chunk_of(weight)
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            inner = logits_of(hidden[rows], used, bias).softmax(-1).neg_()
            inner[torch.arange(len(inner), device=inner.device), targets[rows]] += 1
            inner *= grad[rows, None]
            dweight += (inner.to(hidden.dtype).mT @ hidden[rows]).float()
            del inner
        return dhidden, dweight.to(ctx.dtype), None, None


def softmax_of(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *, write: bool) -> tuple[Tensor, Tensor]:
    """fp32 [n], log p(target), and with `write` the probabilities [n, vocabulary] in the dtype of the products."""
    if bias is None and hidden.is_cuda and (found := kernels("cuda")) is not None:
        logits = hidden @ weight.mT
        return found.logps_of(logits, targets, write=write), logits
    logits = logits_of(hidden, weight, bias)
    highest = logits.amax(-1, keepdim=True)
    chosen = logits.gather(-1, targets[:, None])
    total = logits.sub_(highest).exp_().sum(-1, keepdim=True)  # in place: a pass over the logits is not cheap beside a product
    logps = (chosen - total.log().add_(highest))[:, 0]  # the log-sum-exp first, as torch rounds it
    return logps, logits.mul_(total.reciprocal_()).to(weight.dtype) if write else logits  # into a half `out` torch would go through one in fp32


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """fp32 [rows, vocabulary]."""
    logits = (hidden @ weight.mT).float()
    return logits if bias is None else logits.add_(bias.float())


class Head:
    """The head of a transformers model, which can be left out of its forward pass: a plain linear layer, and nothing after it."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """In here the model's `logits` are the hidden states that the head would have been given."""
        vars(self.layer)["forward"] = lambda hidden: hidden
        try:
            yield
        finally:
            vars(self.layer).pop("forward", None)

    def logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """hidden [n, h], targets [n] -> fp32 [n], log p(target); under autocast the products are of its dtype."""
        kind = hidden.device.type
        if torch.is_autocast_enabled(kind):
            hidden = hidden.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            return TokenLogps.apply(hidden, self.layer.weight, targets, self.layer.bias)

    @torch.no_grad()
    def divergence(self, hidden: Tensor, other: Head, theirs: Tensor) -> Tensor:
        """KL(p || q) of each row, fp32 [n], over the whole vocabulary: p from `hidden` [n, h] here, q from `theirs` [n, h] and the head `other`."""
        size = chunk_of(self.layer.weight)
        parts = []
        for p, q in zip(hidden.split(size), theirs.split(size), strict=True):
            ours, at_other = (logits_of(x, head.layer.weight.to(x.dtype), head.layer.bias).log_softmax(-1) for x, head in ((p, self), (q, other)))
            parts.append((ours.exp() * (ours - at_other)).sum(-1))
        return torch.cat(parts)


def install(model: nn.Module) -> tuple[Head | None, Installed]:
    """The model's head, if leaving it out leaves the hidden states themselves; None with the reason otherwise."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    layer = inner.get_output_embeddings() if inner is not None else None
    if inner is None or type(layer) is not nn.Linear:
        return None, off(f"the model's own is {'adapted' if layer is not None else 'missing'}")
    if "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks:
        return None, off("something else acts on it")
    if layer.bias is not None and layer.bias.requires_grad:
        return None, off("its bias trains")
    if not layer.weight.is_floating_point():
        return None, off("it is quantised")
    head = Head(layer)
    if not passes_through(model, head):
        return None, off("its logits are changed (soft-capping, scaling, a wrapper) or it cannot be left out")
    return head, Installed(lambda: None, on=["head only where there is a label, its gradient found in the forward pass"])


def passes_through(model: nn.Module, head: Head) -> bool:
    """Whether what the head is given comes out of the model as its logits, unchanged: two tokens are sent through it to see."""
    given: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        given.append(hidden)
        return hidden

    vars(head.layer)["forward"] = forward
    try:
        logits = getattr(of_two_tokens(model, head.layer.weight.device), "logits", None)
    finally:
        vars(head.layer).pop("forward", None)
    return len(given) == 1 and logits is given[0]


@torch.no_grad()
def of_two_tokens(model: nn.Module, device: torch.device, **more: Any) -> Any:
    """What the model gives for two tokens, without dropout; it is left in the modes that it was in. None, and a line in the log, if it fails."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False, **more)
    except Exception as error:  # a wrapper that takes no such argument, a kernel that this device does not have
        logger.info("two tokens did not go through the model: %s: %s", type(error).__name__, first_line(error))
        return None
    finally:
        for module, training in modes:
            module.training = training


def off(why: str) -> Installed:
    return Installed(lambda: None, off=[f"head: {why}"])
