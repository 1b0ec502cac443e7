"""Where the segments of a flattened batch stand, and how they are batched for attention: rows one after another, or a tree of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Rows up to this length go through the products on a CPU, and keep [heads, length, length / 2] probabilities for the
#: backward pass; longer ones go through SDPA, which keeps none (more a matter of memory than of speed).
PRODUCTS = 512
#: A segment joins a batch of segments if it is at least this share of the longest there,
NEAR = 0.75
#: and if its first query is no further than this from the others': what a row shares is asked for by one row only.
APART = 16


@dataclass(frozen=True)
class Segments:
    """Where the segments of a flattened batch begin and end. Stands in the place of a mask.

    Of a tree of rows (`ftx_fast_prefixes`) the segments are the rows, whose tokens stand at `nodes` of the batch.
    """

    offsets: Tensor
    """int32 [segments + 1], with `nodes` and `owners` on the CPU or on the batch's device: 0, the ends of the segments. Some may be empty."""
    bound: int | None = None
    """No segment is longer, where that is known without asking the device."""
    nodes: Tensor | None = None
    """int64 [tokens]: where in the batch each token of the segments stands. None: one after another."""
    owners: Tensor | None = None
    """With `nodes`: int64 [length of the batch], a token of the segments that stands there."""
    starts: tuple[int, ...] = ()
    """With `nodes`: of each segment the first token that is an owner."""
    device: torch.device | None = None
    """The batch's device, where that is not the offsets': all is worked out on the CPU then, and no GPU is waited for."""

    @property
    def place(self) -> torch.device:
        return self.device or self.offsets.device

    @cached_property
    def placed_offsets(self) -> Tensor:
        """The offsets on the batch's device."""
        return self.offsets.to(self.place, non_blocking=True)

    @cached_property
    def ends(self) -> list[int]:
        """The offsets of those that are not empty."""
        return self.offsets.unique_consecutive().tolist()

    @cached_property
    def lengths(self) -> list[int]:
        """Of those that are not empty."""
        return [end - start for start, end in itertools.pairwise(self.ends)]

    @property
    def longest(self) -> int:
        return self.bound or max(self.lengths)

    @cached_property
    def groups(self) -> list[list[int]]:
        """The segments of each batch, by number; batches and segments longest first."""
        found: list[list[int]] = []
        for number in sorted(range(len(self.lengths)), key=lambda number: -self.lengths[number]):
            group = next((group for group in found if self._joins(number, group)), None)
            if group is None:
                found.append([number])
            else:
                group.append(number)
        return found

    def _joins(self, number: int, group: list[int]) -> bool:
        starts = [self.start(one) for one in (*group, number)]
        return self.lengths[number] >= NEAR * self.lengths[group[0]] and max(starts) - min(starts) <= APART

    def start(self, number: int) -> int:
        """From which of its tokens on a segment asks: from the first, where SDPA is to do it, which takes no others."""
        return self.starts[number] if self.starts and self.lengths[number] <= PRODUCTS and self.place.type == "cpu" else 0

    @cached_property
    def batches(self) -> list[tuple[int, int, int]]:
        """(segments, longest, first token that asks) of each batch."""
        return [(len(group), self.lengths[group[0]], min(map(self.start, group))) for group in self.groups]

    @cached_property
    def spread(self) -> tuple[Spread, Spread]:
        """How queries, and how keys and values, are taken from the batch for `batches`: each segment filled up to its batch's longest
        with its last token."""
        return self._spread(*self._places(skip=True), adds=False), self._spread(*self._places(skip=False), adds=True)

    @cached_property
    def whole(self) -> tuple[Spread, Spread] | None:
        """The same for segments one after another, whole; None where they stand so in the batch."""
        if self.nodes is None:
            return None
        each = torch.arange(self.ends[-1], device=self.offsets.device)
        return self._spread(each, each, adds=False), self._spread(each, each, adds=True)

    def _places(self, *, skip: bool) -> tuple[Tensor, Tensor]:
        """(the token at each place of the batches, the place of each token that has one), with `skip` from each batch's first token that asks on."""
        tokens, places, place = [], torch.zeros(self.ends[-1], dtype=torch.long), 0
        for group, (_, longest, first) in zip(self.groups, self.batches, strict=True):
            first = first if skip else 0
            for number in group:
                length, begin = self.lengths[number], self.ends[number]
                tokens.append(torch.arange(first, longest).clamp_(max=length - 1) + begin)
                places[begin + first : begin + length] = torch.arange(place, place + length - first)
                place += longest - first
        return torch.cat(tokens).to(self.offsets.device), places.to(self.offsets.device)

    def _spread(self, tokens: Tensor, places: Tensor, *, adds: bool) -> Spread:
        if self.nodes is None or self.owners is None:
            return Spread(tokens, places).to(self.place)
        if not adds:
            return Spread(self.nodes[tokens], places[self.owners]).to(self.place)
        others = torch.ones_like(self.nodes, dtype=torch.bool)
        others[self.owners] = False
        again, number = self.nodes[others].unique(return_inverse=True)
        return Spread(self.nodes[tokens], places[self.owners], places[others], again, number).to(self.place)

    def mask(self, batch: int) -> Tensor:
        """The same as a bool mask [batch, 1, length, length], for whatever cannot do without."""
        numbers = torch.repeat_interleave(self.placed_offsets.diff().long()).view(batch, 1, -1)
        return (numbers.unsqueeze(-1) == numbers.unsqueeze(-2)).tril_()


@dataclass(frozen=True)
class Spread:
    """How the n tokens of a batch are spread over the m places that attention works on. int64."""

    tokens: Tensor
    """[m]: the token at each place."""
    own: Tensor
    """[n]: the place of a token that counts for it: where its output is taken from."""
    others: Tensor | None = None
    """[more]: the further places of tokens that stand at several, as keys and values of several rows; no padding."""
    again: Tensor | None = None
    """[some]: which tokens those are."""
    number: Tensor | None = None
    """[more]: which of them stands at each of `others`."""

    def to(self, device: torch.device) -> Spread:
        given = (self.tokens, self.own, self.others, self.again, self.number)
        return Spread(*(None if one is None else one.to(device, non_blocking=True) for one in given))

    def take(self, x: Tensor) -> Tensor:
        """[n, ...] -> [m, ...]. The gradient of a token is the sum over its places; padding has none."""
        return Taken.apply(x, self)

    def back(self, x: Tensor) -> Tensor:
        """[m, ...] -> [n, ...]."""
        return x.index_select(0, self.own)


class Taken(torch.autograd.Function):
    """Tokens [n, ...] -> places [m, ...]; in the backward pass gradients of several places are added up in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: Spread) -> Tensor:
        ctx.spread = spread
        return x.index_select(0, spread.tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        spread: Spread = ctx.spread
        found = grad.index_select(0, spread.own)
        if spread.others is not None:
            sums, more = found[spread.again].float(), grad.index_select(0, spread.others).float()
            # on a GPU index_add_ adds in any order
            sums = sums.index_put_((spread.number,), more, accumulate=True) if grad.is_cuda else sums.index_add_(0, spread.number, more)
            found[spread.again] = sums.to(found.dtype)
        return found, None
