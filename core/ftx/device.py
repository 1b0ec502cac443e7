"""Where a run computes, and in which precision."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ftx.errors import ModelError
from ftx.machine import BF16_FLAGS

if TYPE_CHECKING:
    import torch


def pick_device(device: str) -> str:
    """`auto`, `cpu` or `cuda` -> `cpu` or `cuda`; ModelError where there is no GPU to pick."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("no CUDA device can be used here.", "Use --device cpu, or a torch built for your GPU: ftx doctor")
    return device


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware computes in it (GPUs since Ampere; CPUs with AVX512-BF16, AMX or Arm's BF16 on which a product in
    it is no slower than in float32: elsewhere it is emulated); float16 on older GPUs; else float32."""
    import torch

    if device == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    able = torch.cpu.get_capabilities()
    claimed = any(able.get(name) for name in BF16_FLAGS)
    return torch.bfloat16 if claimed and _seconds(torch.bfloat16) <= _seconds(torch.float32) else torch.float32


@functools.cache
def _seconds(dtype: torch.dtype) -> float:
    """What a product [256, 576] x [576, 1536] takes on the CPU: a few milliseconds, asked once a process."""
    import torch

    x, weight = torch.ones(256, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
    return fastest(lambda: torch.nn.functional.linear(x, weight), "cpu")


def fastest(compute: Callable[[], Any], device: str, times: int = 5) -> float:
    """Seconds of the fastest of so many calls, after one that warms up."""
    import torch

    best = float("inf")
    for turn in range(times + 1):
        started = time.perf_counter()
        compute()
        if device == "cuda":
            torch.cuda.synchronize()
        if turn:
            best = min(best, time.perf_counter() - started)
    return best
