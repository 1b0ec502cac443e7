"""The longest steps of a training, known before it begins: the order of the rows hangs on the seed alone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any


def sizes_of_steps(loader: Any, *, accumulation: int, after: int, last: int) -> dict[int, tuple[int, ...]] | None:
    """Of each step (numbered from 1) behind `after`, up to `last`, the most that a batch of it has: of tokens, of tokens if what a row's
    two sequences begin with alike counts once, and of positions if it is padded. None where a DataLoader does not tell: rows of unknown
    length, an order that hangs on whatever drew random numbers before, several processes. It is left as it was.
    """
    import numpy
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import BatchSampler, SequentialSampler

    from ftx.rows import alike_of, lengths_of

    batches: Any = getattr(loader, "batch_sampler", None)
    if type(batches) is not BatchSampler or type(batches.sampler) not in (SeedableRandomSampler, SequentialSampler) or not len(batches):
        return None
    try:
        lengths, alike = lengths_of(loader.dataset), alike_of(loader.dataset)
    except (AttributeError, KeyError, TypeError, IndexError):
        return None
    steps = math.ceil(len(batches) / accumulation)
    tokens, longest = lengths.sum(1), lengths.max(1, initial=0)
    once = tokens - alike if len(alike) else tokens
    found: dict[int, tuple[int, ...]] = {}
    for epoch in range(after // steps, math.ceil(last / steps)):
        some = list(itertools.islice(epoch_of(batches, epoch), (last - epoch * steps) * accumulation))
        rows, counts = numpy.fromiter(itertools.chain.from_iterable(some), numpy.int64), numpy.array([len(batch) for batch in some])
        starts = counts.cumsum() - counts
        padded = numpy.maximum.reduceat(longest[rows], starts) * counts * lengths.shape[1]
        sums = (numpy.add.reduceat(one[rows], starts).tolist() for one in (tokens, once))
        for number, sizes in enumerate(zip(*sums, padded.tolist(), strict=True)):
            step = epoch * steps + number // accumulation + 1
            if step > after:
                found[step] = tuple(map(max, sizes, found.get(step, sizes)))
    return found


def longest_of(sizes: dict[int, tuple[int, ...]]) -> set[int]:
    """The steps that are the longest by one of these sizes; of equals the first."""
    return {max(sizes, key=lambda step: sizes[step][which]) for which in range(3)} if sizes else set()


def epoch_of(batches: Any, epoch: int) -> Iterator[list[int]]:
    """Row numbers of each batch of an epoch, in the order that its own seed gives (accelerate's SeedableRandomSampler)."""
    sampler = batches.sampler
    if not hasattr(sampler, "set_epoch"):
        yield from batches
        return
    before = sampler.epoch, sampler.generator
    sampler.generator = None  # it makes one of its own
    try:
        sampler.set_epoch(epoch)
        yield from batches
    finally:
        sampler.epoch, sampler.generator = before
