"""Where the loss counts: the positions whose next token is supervised, and no other."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from ftx.encode import IGNORE


def next_is_supervised(labels: Tensor) -> Tensor:
    """Labels [batch, length] -> bool mask [batch, length] of the positions that predict a supervised token."""
    keep = torch.zeros_like(labels, dtype=torch.bool)
    keep[:, :-1] = labels[:, 1:] != IGNORE
    return keep


def supervised_tokens(labels: Tensor) -> int:
    """How many labels [batch, length] count in the loss: the denominator. The first of a row is nobody's next token."""
    return int((labels[:, 1:] != IGNORE).sum())


def kept_logits(logits: Tensor, keep: Tensor, *, only: bool) -> Tensor:
    """Logits of the kept positions, [kept, vocabulary], whether or not the model left out the others. `only`: it was told to.

    `keep`: a mask [batch, length], or the places [kept] in one sequence. Full logits may be longer than a mask at the front:
    prompt-tuning adapters put virtual tokens there.
    """
    if keep.dim() == 1:
        return logits[0] if only and logits.shape[1] == len(keep) else logits[0].index_select(0, keep)
    return logits[:, -keep.shape[1] :][keep] if logits.dim() == 3 else logits


def takes(module: nn.Module, name: str) -> bool:
    """Whether the module's forward takes an argument of this name, or any."""
    parameters = inspect.signature(module.forward).parameters
    return name in parameters or any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())


def takes_mask(model: nn.Module, inner: nn.Module) -> bool:
    """Whether `model(..., logits_to_keep=mask)` runs the head of the transformers model `inner` on the mask only."""
    settings: Any = getattr(model, "active_peft_config", None)
    virtual = getattr(settings, "is_prompt_learning", False)  # virtual tokens in front: the mask would not fit
    return not virtual and takes(model, "logits_to_keep") and "logits_to_keep" in inspect.signature(inner.forward).parameters
