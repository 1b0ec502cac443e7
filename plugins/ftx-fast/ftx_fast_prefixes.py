"""What rows of a batch begin with alike, computed once: their tokens as a tree, whose branches attend to the way back to the root.

A decoder's state at a token hangs on the tokens before it and on nothing behind, so rows with the same template, instruction or
prompt have the same states there; their gradients add up. (For pairs of DPO: Wang and Hegde, arXiv 2410.20305.) Left out as well is
what stands behind a row's last label, on which no loss hangs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from ftx_fast_attention import NAME, OTHERS, ROWS, attention
from ftx_fast_head import of_two_tokens
from ftx_fast_installed import Installed
from ftx_fast_rows import IGNORE, PAYS
from ftx_fast_segments import Segments

#: Words in the names of a config's values that are above 0 where each row draws numbers of its own.
NOISY = ("dropout", "pdrop", "jitter", "noise")


@dataclass(frozen=True)
class Tree:
    """The tokens of a batch's rows as the nodes of a tree. Tensors are int64, on the CPU."""

    places: Tensor
    """[nodes]: where in the flattened batch a token stands that the node is made from."""
    positions: Tensor
    """[nodes]: from 0 at the beginning of a row."""
    nodes: Tensor
    """[tokens]: the node of each token, rows one after another, each up to its last token that predicts a label."""
    owners: Tensor
    """[nodes]: the token that the node is made from, counted as in `nodes`."""
    lengths: tuple[int, ...]
    """Tokens of each row there; a row without a label is not, nor is the same one twice."""
    starts: tuple[int, ...]
    """Of each row there, the first token that makes a node."""
    kept: Tensor
    """[supervised]: the node that predicts each label, in the order of rows and tokens."""
    first: Tensor
    """[distinct]: of those that are the same label of the same node, the first, as a place in `kept`."""
    again: Tensor
    """[supervised]: which of `first` each one repeats."""
    wanted: Tensor
    """[supervised]: the labels."""
    rows: int
    """Rows of the batch."""
    total: int
    """Their tokens, whole."""

    @property
    def pays(self) -> bool:
        """Whether the tree is so much smaller than the rows that its gathering is worth it."""
        return self.rows > 1 and len(self.places) > 0 and self.total - len(self.places) > PAYS * self.total

    def arguments(self, input_ids: Tensor, fill: int, multiple: int = 1) -> dict[str, Any]:
        """What a transformers model gets for the batch [batch, length] that the tree was made from: one sequence, filled up with `fill`."""
        device, count = input_ids.device, len(self.places)
        rest = torch.arange(-count % multiple)
        filled = [len(rest)] if len(rest) else []
        segments = Segments(
            offsets=torch.tensor([0, *self.lengths, *filled]).cumsum(0).int(),
            starts=(*self.starts, *(0 for _ in filled)),
            nodes=torch.cat([self.nodes, rest + count]),
            owners=torch.cat([self.owners, rest + len(self.nodes)]),
            device=device,
        )
        ids = torch.cat([input_ids.flatten()[self.places.to(device, non_blocking=True)], input_ids.new_full((len(rest),), fill)])
        positions = torch.cat([self.positions, rest]).to(device, non_blocking=True)
        return {"input_ids": ids.unsqueeze(0), "position_ids": positions.unsqueeze(0), "use_cache": False, ROWS: segments}


def tree_of(input_ids: Tensor, labels: Tensor, lengths: Sequence[int]) -> Tree:
    """The tree of a batch [batch, length], padded right, whose rows have `lengths` tokens. A row's first label follows nothing and does not count."""
    ids, counts = input_ids.cpu().numpy(), labels[:, 1:].ne(IGNORE).cpu().numpy()
    width = ids.shape[1]
    needed = np.where(counts.any(1), width - 1 - counts[:, ::-1].argmax(1), 0) if width > 1 else np.zeros(len(ids), dtype=np.int64)
    numbers, starts = np.full(ids.shape, -1), needed.copy()
    places, previous, count = [], None, 0
    for row in sorted(np.flatnonzero(needed).tolist(), key=lambda row: ids[row, : needed[row]].tolist()):  # rows that begin alike are neighbours
        length = int(needed[row])
        alike = common(ids[previous, : needed[previous]], ids[row, :length]) if previous is not None else 0
        if previous is not None:
            numbers[row, :alike] = numbers[previous, :alike]
        numbers[row, alike:length] = np.arange(count, count + length - alike)
        places.append(row * width + np.arange(alike, length))
        previous, count, starts[row] = row, count + length - alike, alike
    there = starts < needed
    flat, tokens = np.concatenate([*places, np.empty(0, dtype=np.int64)]), np.where(there, needed, 0)
    nodes, kept = numbers[np.arange(width) < tokens[:, None]], numbers[:, :-1][counts]
    owners = flat % width + (tokens.cumsum() - tokens)[flat // width]
    wanted = labels[:, 1:].cpu().numpy()[counts]
    _, first, again = np.unique(kept << 32 | wanted, return_index=True, return_inverse=True)
    arrays = [torch.from_numpy(np.ascontiguousarray(one)) for one in (flat, flat % width, nodes, owners, kept, first, again, wanted)]
    return Tree(*arrays[:4], tuple(needed[there].tolist()), tuple(starts[there].tolist()), *arrays[4:], rows=len(lengths), total=sum(lengths))


def common(one: Any, other: Any) -> int:
    """With how many equal numbers two arrays begin."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length


def unfit(model: nn.Module) -> str:
    """Why rows must not share what they begin with on this model, or ""."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None:
        return "no transformers model"
    config = inner.config.get_text_config()
    if set(getattr(config, "layer_types", None) or []) - {"full_attention"} or getattr(config, "sliding_window", None):
        return "layers that attend to a window"
    drops = [name for name, value in vars(config).items() if any(word in name for word in NOISY) and isinstance(value, float) and value]
    if drops or any(isinstance(module, nn.Dropout) and module.p for module in model.modules()):
        return "dropout, which is each row's own"
    return ""


def install(model: nn.Module) -> Installed:
    """Nothing to put on: whether what the trainer hands to the model with a tree's tokens comes to every layer's attention."""
    why = unfit(model) or ("" if reaches_attention(model) else "the model does not tell its attention what it is told")
    return Installed(lambda: None, off=[f"prefixes: {why}"]) if why else Installed(lambda: None, on=["what rows begin with alike computed once"])


def reaches_attention(model: nn.Module) -> bool:
    """Whether an argument of the model comes to each layer's attention, once, and nothing else that says who sees whom: two tokens
    are sent through it to see."""
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    if inner.config.get_text_config()._attn_implementation != NAME:
        return False
    found: list[Any] = []

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        given = kwargs.pop(ROWS, None)
        own = attention_mask is not None or any(kwargs.get(name) is not None for name in (*OTHERS, "sliding_window"))
        found.append(None if own else given)
        return attention(module, query, key, value, attention_mask, **kwargs)

    mark, device = object(), next(inner.parameters()).device
    AttentionInterface.register(NAME, spy)
    try:
        through = of_two_tokens(model, device, **{ROWS: mark}) is not None
    finally:
        AttentionInterface.register(NAME, attention)
    return through and len(found) == inner.config.get_text_config().num_hidden_layers and all(one is mark for one in found)
