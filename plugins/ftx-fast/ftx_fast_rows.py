"""Rows of a batch joined into one sequence without padding, and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

#: The label that counts nowhere.
IGNORE = -100
#: Share of padding from which joining the rows pays: what attention's copies into batches of near lengths cost is less.
#: SmolLM2-135M, 16 rows of 40 to 140 tokens (36 % padding), CPU: a layer 235 ms padded, 148 ms joined.
PAYS = 0.03
#: On a CPU the joined length is filled up to a multiple of this: oneDNN prepares its products anew for each new shape.
MULTIPLE = 32


@dataclass(frozen=True)
class Joined:
    """Rows one after another. What is filled up at the end is a segment of its own, without labels."""

    input_ids: Tensor
    """[1, total]"""
    labels: Tensor
    """[1, total]; the first of each row is IGNORE: nothing of its own row precedes it."""
    position_ids: Tensor
    """[1, total]; from 0 in each row, which is how transformers' masks know the rows apart."""
    offsets: Tensor
    """int32 [segments + 1]: 0, then the end of each segment (`cu_seq_lens` of flash-attention)."""
    lengths: tuple[int, ...]
    """Tokens of each row, in order."""

    def arguments(self) -> dict[str, Any]:
        """What a transformers model gets. No mask; and no cache: with one, transformers does not look for segments."""
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "use_cache": False}


def lengths_of(attention_mask: Tensor) -> tuple[int, ...]:
    """Tokens of each row of a mask [batch, length]; ValueError if padding is anywhere but on the right."""
    lengths = attention_mask.long().sum(1)
    right = torch.arange(attention_mask.shape[1], device=attention_mask.device) < lengths.unsqueeze(1)
    if not torch.equal(right, attention_mask.bool()):
        raise ValueError("rows can be joined only if their padding is on the right: pad right.")
    return tuple(lengths.tolist())


def pays(lengths: Sequence[int]) -> bool:
    """Whether rows of these lengths are better joined than padded to the longest."""
    padded = max(lengths, default=0) * len(lengths)
    return len(lengths) > 1 and padded - sum(lengths) > PAYS * padded


def join(input_ids: Tensor, labels: Tensor, lengths: Sequence[int], fill: int, multiple: int = 1) -> Joined:
    """A batch [batch, length], padded right, whose rows have `lengths` tokens -> one sequence, filled up with the token `fill`.

    Raises ValueError for a length that is 0 or more than the batch's.
    """
    if len(lengths) != len(input_ids) or not all(0 < length <= input_ids.shape[1] for length in lengths):
        raise ValueError(f"{len(input_ids)} rows of at most {input_ids.shape[1]} tokens cannot have the lengths {list(lengths)}.")
    rest = -sum(lengths) % multiple
    segments = [*lengths, rest] if rest else list(lengths)
    # worked out on the CPU, so that no GPU is waited for
    positions, offsets = torch.cat([torch.arange(length) for length in segments]), torch.tensor([0, *segments]).cumsum(0)
    places = torch.cat([torch.arange(length) + row * input_ids.shape[1] for row, length in enumerate(lengths)])
    positions, ends, places, starts = (one.to(input_ids.device, non_blocking=True) for one in (positions, offsets.int(), places, offsets[: len(lengths)]))
    return Joined(
        input_ids=torch.cat([input_ids.flatten()[places], input_ids.new_full((rest,), fill)]).unsqueeze(0),
        labels=torch.cat([labels.flatten()[places].index_fill_(0, starts, IGNORE), labels.new_full((rest,), IGNORE)]).unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        offsets=ends,
        lengths=tuple(lengths),
    )


def part(joined: Tensor, lengths: Sequence[int], padding: float = 0) -> Tensor:
    """[1, total, ...] -> [batch, longest, ...], padded right with `padding`."""
    rows = joined[0, : sum(lengths)].split(list(lengths))
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=padding)
