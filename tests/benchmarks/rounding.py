"""How far a step of DPO in bfloat16 is from the same in float32, by the way that it is computed; writes its table into docs/benchmarks.md.

`rounding.py [--steps N] [--adapters N]`: smollm2 and a LoRA that has moved, 2 pairs of dpo_en_demo a step, with several adapters at random, for
a step is off by chance; the loss and all gradients of the adapter beside those of the plain model in float32. TRL as it comes keeps float32 weights
and multiplies in bfloat16 (autocast), TRL tuned loads bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from run import at_least, command, processor, replace, write_data
from torch import Tensor, nn

from ftx import models
from ftx.encode import encode_rows
from ftx_fast import PARTS, Fast, install
from ftx_fast_prefixes import tree_of

MARKS = "<!-- rounding: begin -->", "<!-- rounding: end -->"
SIDES = ("chosen", "rejected")
BETA = 0.1
#: Name -> dtype of the weights, parts of ftx-fast, whether under autocast.
WAYS: dict[str, tuple[torch.dtype, list[str], bool]] = {
    "ftx, float32": (torch.float32, list(PARTS), False),
    "as TRL comes": (torch.float32, [], True),
    "as TRL tuned": (torch.bfloat16, [], False),
    "ftx": (torch.bfloat16, list(PARTS), False),
    "ftx without `prefixes`": (torch.bfloat16, [part for part in PARTS if part != "prefixes"], False),
}


def batches(file: Path, tokenizer: Any, steps: int) -> list[tuple[Tensor, Tensor, list[int]]]:
    """Tokens and labels [4, length] of two pairs, the chosen ones first, and the lengths of the rows."""
    pairs = [json.loads(line) for line in file.read_text("utf-8").splitlines()][: 2 * steps]
    found = []
    for first in range(0, len(pairs) - 1, 2):
        two = [(pair, side) for side in SIDES for pair in pairs[first : first + 2]]
        turn = [{"prompt": [{"role": "user", "content": pair["prompt"]}], "completion": [{"role": "assistant", "content": pair[side]}]} for pair, side in two]
        rows = [row for row in encode_rows(turn, tokenizer) if not isinstance(row, Exception)]
        tensors = [[torch.tensor(getattr(row, name)) for row in rows] for name in ("input_ids", "labels")]
        ids, labels = (nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=fill) for some, fill in zip(tensors, (0, -100), strict=True))
        found.append((ids, labels, [len(row.input_ids) for row in rows]))
    return found


def adapted(path: Path, dtype: torch.dtype, seed: int) -> nn.Module:
    """LoRA in float32 whose update is not nothing."""
    torch.manual_seed(seed)
    base = models.load_model(path, dtype=dtype, device="cpu")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape) * 0.003 if "lora_B" in name else parameter.data.float()
    return model


def sums(model: Any, fast: Fast, ids: Tensor, labels: Tensor, lengths: list[int]) -> Tensor:
    """fp32 [4]: the log-probability of each answer, in nats."""
    keep = labels[:, 1:] != -100
    targets = labels[:, 1:][keep]
    if fast.head is None:
        logps = model(input_ids=ids, use_cache=False).logits[:, :-1][keep].float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    else:
        tree = tree_of(ids, labels, lengths)
        given, places = fast.shared({"input_ids": ids}, tree, 0), (torch.zeros_like(tree.kept), tree.kept)
        if given is None:
            given, joined = fast.joined({"input_ids": ids, "use_cache": False}, labels, lengths, 0)
            places = (joined[:, 1:] != -100).nonzero(as_tuple=True)
        with fast.head.left_out():
            hidden = model(**given).logits[places]
        logps = fast.head.logps(hidden, targets)
    return torch.zeros(keep.shape).masked_scatter(keep, logps).sum(1)


def steps_of(
    path: Path, some: list[tuple[Tensor, Tensor, list[int]]], seed: int, dtype: torch.dtype, parts: list[str], autocast: bool
) -> list[tuple[float, Tensor]]:
    """(loss, all gradients in one) of each batch."""
    model: Any = adapted(path, dtype, seed)
    fast = install(model, parts)
    trained, found = [parameter for parameter in model.parameters() if parameter.requires_grad], []
    for batch in some:
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            with torch.no_grad(), model.eval().disable_adapter():
                reference = sums(model, fast, *batch)
            chosen, rejected = (sums(model.train(), fast, *batch) - reference).chunk(2)
            loss = -nn.functional.logsigmoid(BETA * (chosen - rejected)).mean()
        found.append((loss.item(), torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, trained)])))
    fast.undo()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=at_least(2), default=10)
    parser.add_argument("--adapters", type=at_least(1), default=3)
    asked = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    path = models.resolve("smollm2")
    with tempfile.TemporaryDirectory() as folder:
        some = batches(write_data(Path(folder))["pairs"], models.load_tokenizer(path), asked.steps)
    away, losses = {name: list[float]() for name in WAYS}, {name: list[float]() for name in WAYS}
    for seed in range(asked.adapters):
        truth = steps_of(path, some, seed, torch.float32, [], False)
        for name, way in WAYS.items():
            for (loss, mine), (true, theirs) in zip(steps_of(path, some, seed, *way), truth, strict=True):
                away[name].append(float((mine - theirs).norm() / theirs.norm()))
                losses[name].append(loss - true)
            print(f"adapter {seed}: {name}: gradients off {statistics.median(away[name]):.4f} so far", flush=True)
    lines = []
    for name, found in away.items():
        gradients = f"{statistics.median(found):.4f} | {statistics.mean(one * one for one in found) ** 0.5:.4f} | {max(found):.4f}"
        lines.append(f"| {name} | {gradients} | {statistics.pstdev(losses[name]):.4f} | {statistics.mean(losses[name]):+.4f} |")
    replace(
        MARKS,
        [
            f"`{command()}`, {datetime.date.today()}, {processor()}: {len(some)} steps of 2 pairs with each of {asked.adapters} adapters.",
            "",
            "| | gradients off, median | root of the mean square | at most | losses off, standard deviation | mean |",
            "|---|---|---|---|---|---|",
            *lines,
        ],
    )


if __name__ == "__main__":
    main()
