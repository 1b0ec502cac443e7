"""The longest steps of a training, known before it begins: the order of the rows hangs on the seed alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any


def longest_steps(loader: Any, *, accumulation: int, after: int, last: int) -> set[int] | None:
    """Numbers (from 1) of the steps behind `after`, up to `last`, that hold the batch with the most tokens, and the one with the
    most positions once it is padded; the first of several. None where a DataLoader does not tell: rows of unknown length, an
    order that hangs on whatever drew random numbers before, several processes. It is left as it was.
    """
    from accelerate.data_loader import SeedableRandomSampler
    from torch.utils.data import BatchSampler, SequentialSampler

    from ftx.planning import lengths_of

    batches: Any = getattr(loader, "batch_sampler", None)
    if type(batches) is not BatchSampler or type(batches.sampler) not in (SeedableRandomSampler, SequentialSampler) or not len(batches):
        return None
    try:
        lengths = lengths_of(loader.dataset)
    except (AttributeError, KeyError, TypeError, IndexError):
        return None
    steps = math.ceil(len(batches) / accumulation)
    tokens, padded = (0, 0), (0, 0)  # the most, and the number of its step with a minus: of equals the first wins
    for epoch in range(after // steps, math.ceil(last / steps)):
        for number, batch in enumerate(epoch_of(batches, epoch)):
            step = epoch * steps + number // accumulation + 1
            if after < step <= last:
                sequences = [length for row in batch for length in lengths[row]]
                tokens = max(tokens, (sum(sequences), -step))
                padded = max(padded, (max(sequences) * len(sequences), -step))
    return {-step for _, step in (tokens, padded) if step}


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
