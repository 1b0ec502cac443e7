"""What the benchmark notes of a training run, the same for ftx and for a plain script: losses, gradient norms, seconds, memory."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from ftx import hookimpl, option, plugin


def resident() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch(TrainerCallback):
    """Writes `file` at the end of training: `losses`, `grad_norms`, `seconds` of each step, `positions` that went through the model
    (padding included), `peak` bytes above those at the start."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self.noted: dict[str, Any] = {"losses": [], "grad_norms": [], "seconds": [], "positions": 0}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def count(module, given):
            self.noted["positions"] += given[0].numel()

        self.counting = model.get_input_embeddings().register_forward_pre_hook(count)
        self.loaded = resident()

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.noted["seconds"].append(time.perf_counter() - self.began)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.noted["losses"].append(logs["loss"])
            self.noted["grad_norms"].append(logs.get("grad_norm"))

    def on_train_end(self, args, state, control, **kwargs):
        self.counting.remove()
        self.noted["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self.loaded
        self.file.write_text(json.dumps(self.noted))


@plugin
class Probe:
    """The same as an observer of `ftx run`."""

    file: str = option("", "Where the notes go.")

    @hookimpl
    def trainer_callbacks(self, run):
        return [Watch(self.file)]
