"""What the benchmark notes of a training run, the same for every side: losses, gradient norms, seconds, memory. Knows nothing of ftx."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


def resident() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held() -> int:
    """Bytes that this process held at most, without what its parent held (which is in `ru_maxrss`)."""
    return 1024 * int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")).split()[1])


class Watch(TrainerCallback):
    """Writes `file` at the end of training: `losses`, `grad_norms`, `seconds` from each step's beginning to the next one's, `positions` that
    went through the model with gradients (padding included; not DPO's reference), `held` bytes at most, and `peak`, those above what was held at the start.

    From beginning to beginning, a step has all that it costs: its batch, its log line, and whatever else listens. The last one has
    no next, and is not timed.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.began: float | None = None
        self.noted: dict[str, Any] = {"losses": [], "grad_norms": [], "seconds": [], "positions": 0}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def count(module, given):
            if torch.is_grad_enabled():
                self.noted["positions"] += given[0].numel()

        self.counting = model.get_input_embeddings().register_forward_pre_hook(count)
        self.loaded = resident()

    def on_step_begin(self, args, state, control, **kwargs):
        now = time.perf_counter()
        if self.began is not None:
            self.noted["seconds"].append(now - self.began)
        self.began = now

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.noted["losses"].append(logs["loss"])
            self.noted["grad_norms"].append(logs.get("grad_norm"))

    def on_train_end(self, args, state, control, **kwargs):
        self.counting.remove()
        self.noted["held"] = held()
        self.noted["peak"] = self.noted["held"] - self.loaded
        self.file.write_text(json.dumps(self.noted))
