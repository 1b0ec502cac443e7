"""The layers of a joined batch as one CUDA graph forward and one backward, for models whose kernels end before the next is launched.

A graph repeats the kernels of one shape, so batches are brought to few: their tokens are filled up to a multiple of TOKENS, their
segments to a multiple of SEGMENTS with empty ones. What stands around the layers (embedding, mask, head) stays as it is.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ftx_fast_attention import takes_varlen
from ftx_fast_installed import Installed
from ftx_fast_segments import Segments

logger = logging.getLogger(f"ftx.{__name__}")

#: The tokens of a joined batch are filled up to a multiple of this: half of it is computed in vain on average.
TOKENS = 256
#: So are its segments, and the longest of them counts as a multiple of LONGEST, which only bounds attention's blocks.
SEGMENTS = 8
LONGEST = 128
#: Above so many weights a launch is short beside its kernel.
SMALL = 1_000_000_000
#: Graphs that are kept; a further shape runs as without them.
GRAPHS = 32
#: Each has gradients of its own for whatever trains: bytes that all together may take.
GRADIENTS = 4 << 30

#: What a layer is given that it can do without, or that a graph is made for.
KNOWN = ("attention_mask", "position_embeddings", "position_ids", "cache_position", "use_cache")

#: Makes of a module and sample arguments a function that does the same, forward and backward, for tensors of those shapes.
Capture = Callable[[nn.Module, tuple[Tensor, ...]], Callable[..., Tensor]]


class Body(nn.Module):
    """Layers one after the other, as a function of tensors alone: hidden [batch, length, h], cos and sin [batch, length, size], offsets
    int32 [segments + 1] of the flattened batch -> hidden [batch, length, h]. No segment is longer than `longest`."""

    def __init__(self, layers: list[nn.Module], forwards: list[Callable[..., Tensor]], longest: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)  # whose parameters get gradients
        self.forwards = forwards
        self.longest = longest

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor) -> Tensor:
        segments = Segments(offsets, self.longest)
        for forward in self.forwards:
            hidden = forward(hidden, attention_mask=segments, position_embeddings=(cos, sin), past_key_values=None, use_cache=False)
        return hidden


class CudaGraphs:
    """Records a Body as two CUDA graphs, through `torch.cuda.make_graphed_callables`: RuntimeError for what cannot be recorded.

    All have one pool of memory: what one leaves free between its kernels the next one takes, for no two passes are under way at once.
    """

    def __init__(self) -> None:
        self.pool: Any = None

    def __call__(self, body: nn.Module, given: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        stream = torch.cuda.current_stream()
        try:
            return cuda_graph(body, given, self.pool)
        except BaseException:  # a capture that fails may leave its stream, and its pool open
            self.pool = None
            torch.cuda.set_stream(stream)
            raise


def cuda_graph(body: nn.Module, given: tuple[Tensor, ...], pool: Any) -> Callable[..., Tensor]:
    hidden, cos, *_ = given
    kind, autocast = hidden.device.type, torch.is_autocast_enabled(hidden.device.type)
    head = torch.empty(1, 1, 8, cos.shape[-1], dtype=torch.get_autocast_dtype(kind) if autocast else hidden.dtype, device=hidden.device)
    if not takes_varlen(head, head, head):
        raise RuntimeError("attention goes through flash-attention only: half precision, a GPU since Ampere, heads of 8 to 256 in eights")
    with torch.autocast(kind, torch.get_autocast_dtype(kind), autocast, cache_enabled=False):
        samples = tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in given)
        return torch.cuda.make_graphed_callables(body, samples, allow_unused_input=True, pool=pool)


@dataclass(eq=False)
class Awaited:
    """A hook that notes that its gradient has come."""

    come: bool = False

    def __call__(self, grad: Tensor) -> None:
        self.come = True


@dataclass(eq=False)
class Graphs:
    """The layers of one model, and the graphs of the shapes that came. The first layer runs all, the others hand on what it found."""

    layers: list[nn.Module]
    forwards: list[Callable[..., Tensor]]
    capture: Capture
    known: dict[tuple[Any, ...], Callable[..., Tensor] | None] = field(default_factory=dict)
    """By shape; None where it could not be recorded."""
    done: bool = False
    """Whether the first layer ran all of this pass."""
    said: set[str] = field(default_factory=set)
    awaited: Callable[[], Awaited | None] = lambda: None
    """What waits for the gradient of the last pass, whose tensors lie where another replay would write."""

    def forward(self, number: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if number:
            if self.done:
                return hidden
            return self.forwards[number](hidden, *args, **kwargs)
        given = None if args else self.tensors_of(hidden, kwargs)
        graph = self.graph_of(given, kwargs["attention_mask"]) if given is not None else None
        self.done = graph is not None
        if given is None or graph is None:
            return self.forwards[0](hidden, *args, **kwargs)
        out = graph(*given)
        hook = Awaited()
        out.register_hook(hook)  # who lives as long as the pass's part of the autograd graph
        self.awaited = weakref.ref(hook)
        return out

    def tensors_of(self, hidden: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, ...] | None:
        """What a Body is given for this pass; None where it is not a training pass over a joined batch."""
        segments, turns = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        training = torch.is_grad_enabled() and all(layer.training for layer in self.layers)
        if training and any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers):
            self.say("activations are recomputed")
            return None
        pending = (hook := self.awaited()) is not None and not hook.come
        more = any(value is not None for name, value in kwargs.items() if name not in KNOWN)
        if not training or pending or more or not isinstance(segments, Segments) or not isinstance(turns, tuple):
            return None
        return hidden, *turns, filled_up(segments.offsets)

    def graph_of(self, given: tuple[Tensor, ...], segments: Segments) -> Callable[..., Tensor] | None:
        """The graph for tensors of these shapes; None where there is none."""
        hidden, cos, _, offsets = given
        longest = -(-max(segments.lengths) // LONGEST) * LONGEST
        autocast = torch.is_autocast_enabled(hidden.device.type)
        key = (*hidden.shape, hidden.dtype, hidden.requires_grad, cos.dtype, len(offsets), longest, autocast)
        if key not in self.known:
            most = min(GRAPHS, max(1, GRADIENTS // sum(one.nbytes for layer in self.layers for one in layer.parameters() if one.requires_grad)))
            if len(self.known) >= most:
                self.say(f"more than {most} shapes; the further ones run as without")
                return None
            self.known[key] = self.recorded(Body(self.layers, self.forwards, longest), given)
        return self.known[key]

    def recorded(self, body: Body, given: tuple[Tensor, ...]) -> Callable[..., Tensor] | None:
        try:
            return self.capture(body, given)
        except RuntimeError as error:  # torch's, for whatever waits for the GPU or has gone out of memory
            self.say(str(error).splitlines()[0])
            return None

    def say(self, why: str) -> None:
        """What shows only in a forward pass, once."""
        if why not in self.said:
            self.said.add(why)
            logger.info("not fast: graphs: %s", why)


def filled_up(offsets: Tensor) -> Tensor:
    """int32 [segments + 1] -> [n + 1] with n a multiple of SEGMENTS: empty segments behind the last."""
    return torch.cat([offsets, offsets[-1:].expand(-(len(offsets) - 1) % SEGMENTS)])


def unfit(model: nn.Module) -> str:
    """Why the layers of this model are not recorded, or ""."""
    layers = layers_of(model)
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    if not layers:
        return "not one stack of layers that attend alike"
    if sum(parameter.numel() for parameter in model.parameters()) >= SMALL:
        return f"from {SMALL:,} weights on a GPU has enough to do"
    if any(hasattr(module, "lora_magnitude_vector") and len(module.lora_magnitude_vector) for module in model.modules()):
        return "the norms of DoRA are kept for a step"
    if any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        return "dropout"
    if any(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks for layer in layers for module in layer.modules()):
        return "something else acts on the layers"
    if not any(parameter.requires_grad for parameter in parameters):
        return "no layer trains"
    return ""


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder's layers, in order; none where the model has two stacks, or layers that attend to different things."""
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and any(isinstance(one, GradientCheckpointingLayer) for one in module)]
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    kinds = set(getattr(inner.config.get_text_config(), "layer_types", None) or []) if inner is not None else set()
    return list(stacks[0]) if len(stacks) == 1 and kinds <= {"full_attention"} else []


def install(model: nn.Module, capture: Capture | None = None) -> Installed:
    """Record the layers of each shape that comes, and from then on replay them. To be put on last: it holds the other parts' forwards."""
    if why := unfit(model):
        return Installed(lambda: None, off=[f"graphs: {why}"])
    layers = layers_of(model)
    before = [vars(layer).get("forward") for layer in layers]
    graphs = Graphs(layers, [layer.forward for layer in layers], capture or CudaGraphs())
    copies = [parameter.register_hook(torch.clone) for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
    # torch takes a gradient that nobody else holds for its own, and the next replay would write into it
    for number, layer in enumerate(layers):
        vars(layer)["forward"] = numbered(graphs, number)

    def undo() -> None:
        for copy in copies:
            copy.remove()
        for layer, forward in zip(layers, before, strict=True):
            vars(layer).pop("forward")
            if forward is not None:
                vars(layer)["forward"] = forward
        graphs.known.clear()

    return Installed(undo, on=[f"{len(layers)} layers as one CUDA graph a shape"])


def numbered(graphs: Graphs, number: int) -> Callable[..., Tensor]:
    return lambda hidden_states, *args, **kwargs: graphs.forward(number, hidden_states, *args, **kwargs)
