"""Log-probabilities of both answers of each pair under the model in hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ftx import RowError
from ftx.encode import encode_row
from ftx_dpo import split_prompt
from ftx_sft_loan import inner_model
from ftx_sft_loss import kept_logits, next_is_supervised, takes_mask

SIDES = ("chosen", "rejected")
#: Positions whose logits are in fp32 at a time.
CHUNK = 256


def pair_logps(rows: list[dict[str, Any]], model: Any, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> list[dict[str, Any] | str]:
    """For each row `logps` (nats, summed over the answer) and `tokens` of both sides, or the reason why there are none."""
    found: list[dict[str, Any] | str] = []
    waiting: list[tuple[dict[str, Any], str, Any]] = []
    for row in rows:
        pair = _encode(row, tokenizer)
        if not isinstance(pair, str) and max(len(one.input_ids) for one in pair.values()) > max_tokens:
            pair = f"the pair is longer than {max_tokens} tokens: raise max_tokens"
        if isinstance(pair, str):
            found.append(pair)
            continue
        found.append(entry := {"logps": {}, "tokens": {}})
        waiting += [(entry, side, encoded) for side, encoded in pair.items()]
    waiting.sort(key=lambda one: -len(one[2].input_ids))
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.inference_mode():
            while waiting:
                size = max(1, max_tokens // len(waiting[0][2].input_ids))
                batch, waiting = waiting[:size], waiting[size:]
                for (entry, side, _), (logp, tokens) in zip(batch, _logps([encoded for _, _, encoded in batch], model), strict=True):
                    entry["logps"][side], entry["tokens"][side] = logp, tokens
    finally:
        for module, training in modes:
            module.training = training
    return found


def _encode(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any] | str:
    """Both sides encoded as the trainer does, or the reason why not."""
    if row.get("chosen") is None or row.get("rejected") is None:
        return "the row is not a pair of a chosen and a rejected answer"
    try:
        row = split_prompt(row) if row.get("prompt") is None else row
        pair = {side: encode_row({**row, "completion": row[side]}, tokenizer) for side in SIDES}
    except RowError as error:
        return str(error)
    if not all(next_is_supervised(torch.tensor([one.labels])).any() for one in pair.values()):
        return "an answer of the pair is empty"
    return pair


def _logps(batch: list[Any], model: Any) -> list[tuple[float, int]]:
    """(summed log-probability in fp32, tokens) of the supervised tokens of each encoded row; padding on the right."""
    device = next(model.parameters()).device
    width = max(len(one.input_ids) for one in batch)
    ids = torch.tensor([[*one.input_ids, *[0] * (width - len(one.input_ids))] for one in batch], device=device)
    labels = torch.tensor([[*one.labels, *[-100] * (width - len(one.labels))] for one in batch], device=device)
    keep = next_is_supervised(labels)
    kept: dict[str, Any] = {"logits_to_keep": keep} if takes_mask(model, inner_model(model)) else {}
    logits = kept_logits(model(input_ids=ids, use_cache=False, **kept).logits, keep, only=bool(kept))
    targets = labels[:, 1:][keep[:, :-1]]
    parts = zip(logits.split(CHUNK), targets.split(CHUNK), strict=True)
    logps = -torch.cat([nn.functional.cross_entropy(part.float(), target, reduction="none") for part, target in parts])
    sums = torch.zeros_like(keep[:, :-1], dtype=torch.float32).masked_scatter(keep[:, :-1], logps).double().sum(-1)
    return list(zip(sums.tolist(), keep.sum(-1).tolist(), strict=True))
