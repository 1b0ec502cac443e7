"""What stands between a layer's matrix products, made by torch's compiler in place of `layers`: residuals, norms, rotary embedding and
activation in few passes over the tokens, whatever the model calls them. Attention and adapted layers stay the functions that they are.

On a CPU a step takes as long as with `layers` (tests/benchmarks/levers.py) and the first one up to 45 s more: that is why `auto` leaves it out.
What it keeps for the backward pass is the compiler's choice.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

import ftx_fast_attention
from ftx_fast_installed import Installed

logger = logging.getLogger(f"ftx.{__name__}")

#: The name under which transformers knows ftx_fast_attention as a function that the compiler does not look into.
NAME = "ftx_fast_whole"
#: A repeat of a run must come to the same program: nothing that is measured on the device, no sum cut by the first shape that came.
OPTIONS = {"deterministic": True, "split_reductions": False}


class Failed:
    """Whether the compiler could not do a layer of one model."""

    failed = False


class Compiled:
    """One layer's forward, compiled where it has gradients; as it was everywhere else, and from the first thing on that the compiler cannot do."""

    def __init__(self, usual: Callable[..., Tensor], model: Failed) -> None:
        self.usual, self.model = usual, model
        self.made = torch.compile(usual, dynamic=True, options=OPTIONS)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.model.failed or not torch.is_grad_enabled():
            return self.usual(*args, **kwargs)
        try:
            found: Tensor = self.made(*args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            self.model.failed = True
            logger.info("not fast: compile: %s", str(error).strip().splitlines()[0])
            return self.usual(*args, **kwargs)
        return found


def unfit(model: nn.Module, *, recomputed: bool = False) -> str:
    """Why the layers of this model are not compiled, or "". `recomputed`: their activations are."""
    layers = layers_of(model)
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    if not layers:
        return "no layers that it knows, or something else acts on them"
    if recomputed:
        return "activations are recomputed"
    if not any(parameter.requires_grad for parameter in parameters):
        return "no layer trains"
    kinds = {parameter.device.type for parameter in parameters}
    if kinds == {"cpu"}:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "no C++ compiler is installed"
        return ""
    if kinds != {"cuda"} or importlib.util.find_spec("triton") is None:
        return "it is for one CPU, or for GPUs with Triton"
    return ""


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers; none where one has a forward of another's."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [] if any("forward" in vars(layer) for layer in layers) else layers


def install(model: nn.Module) -> Installed:
    """Compile each layer of a model that is not `unfit` when it first trains. To be put on behind the other parts: what they put on stays
    out of it."""
    layers = layers_of(model)
    apart = {module: vars(module)["forward"] for layer in layers for module in layer.modules() if "forward" in vars(module)}
    failed = Failed()
    compiled = [Compiled(layer.forward, failed) for layer in layers]
    closed = {module: torch.compiler.disable(forward) for module, forward in apart.items()}
    restore = leave_attention_out(model)
    both = functorch_config.patch(force_non_lazy_backward_lowering=True)  # what fails fails in the forward pass, and not in the backward one
    both.__enter__()
    for module, forward in [*closed.items(), *zip(layers, compiled, strict=True)]:
        vars(module)["forward"] = forward

    def undo() -> None:
        for layer in layers:
            vars(layer).pop("forward", None)
        for module, forward in apart.items():
            vars(module)["forward"] = forward
        both.__exit__(None, None, None)
        restore()

    return Installed(undo, on=[f"{len(layers)} layers compiled"])


def leave_attention_out(model: nn.Module) -> Callable[[], None]:
    """Put ftx_fast_attention, where the model has it, under a name by which the compiler calls it whole; -> what undoes that."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None or inner.config.get_text_config()._attn_implementation != ftx_fast_attention.NAME:
        return lambda: None
    AttentionInterface.register(NAME, torch.compiler.disable(ftx_fast_attention.attention))
    AttentionMaskInterface.register(NAME, ftx_fast_attention.mask)
    inner.set_attn_implementation(NAME)
    return lambda: inner.set_attn_implementation(ftx_fast_attention.NAME)
