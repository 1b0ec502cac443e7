"""Many answers at once: what all prompts begin with is read once, and a finished row leaves its slot to the next prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

#: Tokens from which a common beginning is worth a forward pass of its own.
SHARED = 8
#: Share of the rows that has to be finished before the others are moved together: moving costs about what a step costs.
GONE = 0.125
#: Prompts that are read together: those that are at least this share of the longest in length, and never fewer than FEW.
NEAR, FEW = 0.8, 8
#: Columns that are laid out at once for tokens to come.
ROOM = 64
#: What the forward pass of a model must take to be driven from here.
ARGUMENTS = {"input_ids", "attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
#: Rotary embeddings that depend on the longest row of a batch.
UNSTEADY = ("dynamic", "longrope")


class Unfit(Exception):
    """The model cannot be driven from here: transformers' own `generate` must."""


@dataclass
class Slot:
    """One answer in the making."""

    number: int
    position: int
    """Of the next token."""
    generator: torch.Generator | None
    made: list[int] = field(default_factory=list)
    ended: bool = False


class Laid(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values [rows, heads, columns, size] with room behind them: a step writes one column, and copies none."""

    used = 0

    def lay(self, keys: Tensor, values: Tensor, used: int) -> None:
        self.wide, self.used = (keys, values), used
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        self.keys, self.values = keys[:, :, :used], values[:, :, :used]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        more = key_states.shape[-2]
        if not self.is_initialized:
            self.lay(key_states, value_states, more)
        else:
            assert self.used + more <= self.wide[0].shape[-2]
            end = self.used + more
            for wide, new in zip(self.wide, (key_states, value_states), strict=True):
                wide[:, :, self.used : end] = new
            self.lay(*self.wide, end)
        return self.keys, self.values


@dataclass
class Block:
    """The cache of some rows: which columns of it each row has, and the rows' slots."""

    cache: Cache
    mask: Tensor
    """bool [rows, columns]"""
    slots: list[Slot]


def driven(model: Any) -> PreTrainedModel:
    """The transformers model in `model`, if its cache is plain keys and values of every token; Unfit otherwise."""
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None or inner.config.is_encoder_decoder or not set(inspect.signature(inner.forward).parameters) >= ARGUMENTS:
        raise Unfit("the model is no decoder that takes a mask, positions and a cache")
    config = inner.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    layers = DynamicCache(config=config).layers
    if not layers or any(type(layer) is not DynamicLayer for layer in layers) or rope.get("rope_type") in UNSTEADY:
        raise Unfit("its cache is no plain keys and values, or its rotary embedding depends on the longest row")
    return inner


class Decoder:
    """Greedy, or with `temperature` by the noise of each row's own generator; rows end at a token of `ends`, at `most` tokens, or
    where `stopped(made)` says so."""

    def __init__(self, model: Any, *, ends: set[int], most: int, temperature: float = 0.0, stopped: Callable[[list[int]], bool] | None = None) -> None:
        self.model, self.inner = model, driven(model)
        self.device = self.inner.get_input_embeddings().weight.device
        self.layers = len(DynamicCache(config=self.inner.config.get_text_config()).layers)
        self.ends, self.most, self.temperature, self.stopped = ends, most, temperature, stopped

    def answers(self, rows: Sequence[list[int]], seeds: Sequence[int] | None, size: int) -> Iterator[tuple[int, list[int]]]:
        """(number of the prompt, its answer's tokens without the end token) as they come; at most `size` rows at once."""
        waiting = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
        prefix = self.read(rows)
        shared = prefix.get_seq_length() if prefix is not None else 0
        live: Block | None = None
        while live is not None or waiting:
            kept = [at for at, slot in enumerate(live.slots) if not slot.ended] if live is not None else []
            free = size - len(kept)
            if waiting and (not kept or free >= GONE * size):
                new, waiting = waiting[:free], waiting[free:]
                parts = [(live, kept)] if live is not None and kept else []
                for near in _alike(new, [len(rows[i]) - shared for i in new]):
                    block, logits = self.prefill([Slot(i, len(rows[i]), _generator(seeds, i)) for i in near], [rows[i] for i in near], prefix)
                    yield from self.take(block.slots, logits)
                    fresh = [at for at, slot in enumerate(block.slots) if not slot.ended]
                    parts += [(block, fresh)] if fresh else []
                live = together(parts)
                continue
            if not kept:
                return
            assert live is not None
            if len(kept) <= (1 - GONE) * len(live.slots) or _full(live.cache):
                live = together([(live, kept)])
                continue
            yield from self.take(live.slots, self.step(live))

    def read(self, rows: Sequence[list[int]]) -> Cache | None:
        """The cache of what all rows begin with, of one row; None where that is little."""
        first, last = min(rows), max(rows)
        same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
        same = min(same, min(map(len, rows)) - 1)
        if len(rows) < 2 or same < SHARED:
            return None
        cache = self.cache()
        self.forward(torch.tensor([first[:same]], device=self.device), torch.ones(1, same, dtype=torch.bool, device=self.device), None, cache)
        return cache

    def prefill(self, slots: list[Slot], rows: list[list[int]], prefix: Cache | None) -> tuple[Block, Tensor]:
        """Read the prompts, padded left behind what they share: their cache, and the logits of each one's next token."""
        shared = prefix.get_seq_length() if prefix is not None else 0
        width = max(map(len, rows)) - shared
        ids = torch.tensor([[0] * (width + shared - len(row)) + row[shared:] for row in rows], device=self.device)
        real = torch.tensor([[False] * (width + shared - len(row)) + [True] * (len(row) - shared) for row in rows], device=self.device)
        mask = torch.cat([real.new_ones(len(rows), shared), real], 1)
        cache = self.cache()
        if prefix is not None:
            for layer, common in zip(cache.layers, prefix.layers, strict=True):
                keys, values = (
                    torch.cat([x.expand(len(rows), -1, -1, -1), x.new_zeros(len(rows), x.shape[1], width, x.shape[3])], 2) for x in (common.keys, common.values)
                )
                layer.lay(keys, values, shared)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, shared:]
        logits = self.forward(ids, mask, positions, cache)
        return Block(cache, mask, slots), logits

    def step(self, live: Block) -> Tensor:
        """One more token of every row; a finished one's is thrown away."""
        ids = torch.tensor([[slot.made[-1]] for slot in live.slots], device=self.device)
        positions = torch.tensor([[slot.position - 1] for slot in live.slots], device=self.device)
        live.mask = torch.cat([live.mask, live.mask.new_ones(len(live.slots), 1)], 1)
        return self.forward(ids, live.mask, positions, live.cache)

    def forward(self, ids: Tensor, mask: Tensor, positions: Tensor | None, cache: Cache) -> Tensor:
        """[rows, vocabulary]: logits behind the last token."""
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        # behind a prompt a slice of the last one would not be contiguous, and its head a product for each row
        last = torch.tensor([ids.shape[1] - 1], device=ids.device) if ids.shape[1] > 1 else 1
        out = self.model(input_ids=ids, attention_mask=mask.long(), position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=last)
        if cache.get_seq_length() != mask.shape[1] or len(cache.layers) != self.layers:
            raise Unfit("its cache holds other than the tokens given: virtual tokens, or layers that keep something else")
        return out.logits[:, -1]

    def take(self, slots: list[Slot], logits: Tensor) -> Iterator[tuple[int, list[int]]]:
        """Choose each row's next token; gives the answers that end with it."""
        scores = logits.float()
        if self.temperature:
            noise = torch.stack([torch.empty(scores.shape[-1]).exponential_(generator=slot.generator).log().neg() for slot in slots])
            scores = scores / self.temperature + noise.to(scores.device)
        for slot, token in zip(slots, scores.argmax(-1).tolist(), strict=True):
            if not slot.ended:
                slot.ended = token in self.ends
                if not slot.ended:
                    slot.made.append(token)
                    slot.position += 1
                    slot.ended = len(slot.made) >= self.most or (self.stopped is not None and self.stopped(slot.made))
                if slot.ended:
                    yield slot.number, list(slot.made)
                    slot.made.append(token)  # something to feed until the row is taken out

    def cache(self) -> Cache:
        return Cache(layers=[Laid() for _ in range(self.layers)])


def together(parts: list[tuple[Block, list[int]]]) -> Block | None:
    """These rows of these blocks as one block, right-aligned, without the columns that no row of a part has, and with room."""
    if not parts:
        return None
    chosen = []
    for block, rows in parts:
        mask = block.mask[rows]
        chosen.append((block, torch.tensor(rows, device=mask.device), mask.any(0).nonzero().flatten(), mask))
    width, count = max(len(columns) for _, _, columns, _ in chosen), sum(len(rows) for _, rows, _, _ in chosen)
    whole = chosen[0][3].new_zeros(count, width)
    at = 0
    for _, rows, columns, mask in chosen:
        whole[at : at + len(rows), width - len(columns) :] = mask[:, columns]
        at += len(rows)
    layers = []
    for number in range(len(parts[0][0].cache.layers)):
        layer, laid = Laid(), []
        for name in ("keys", "values"):
            first = getattr(parts[0][0].cache.layers[number], name)
            wide, at = first.new_zeros(count, first.shape[1], width + ROOM, first.shape[3]), 0
            for block, rows, columns, _ in chosen:
                source = getattr(block.cache.layers[number], name)
                wide[at : at + len(rows), :, width - len(columns) : width] = source[rows][:, :, columns]
                at += len(rows)
            laid.append(wide)
        layer.lay(laid[0], laid[1], width)
        layers.append(layer)
    return Block(Cache(layers=layers), whole, [block.slots[row] for block, rows in parts for row in rows])


def _alike(numbers: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Prompts by falling length in batches that hold little padding."""
    begun = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or (at - begun >= FEW and lengths[at] < NEAR * lengths[begun]):
            yield numbers[begun:at]
            begun = at


def _full(cache: Cache) -> bool:
    return bool(cache.layers[0].used >= cache.layers[0].wide[0].shape[-2])


def _generator(seeds: Sequence[int] | None, number: int) -> torch.Generator | None:
    return None if seeds is None else torch.Generator().manual_seed(seeds[number])
