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


#: A product in bfloat16 takes about half as long as in float32 where the processor has it, and several times as long where it is emulated.
#: What lies between is another program's doing: the same recipe must not come to another precision for that.
EMULATED = 1.5
#: How often both are timed; the fastest of all counts.
TURNS = 4


def pick_device(device: str) -> str:
    """`auto`, `cpu` or `cuda` -> `cpu` or `cuda`; ModelError where there is no GPU to pick."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("no CUDA device can be used here.", "Use --device cpu, or a torch built for your GPU: ftx doctor")
    return device


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware computes in it (GPUs since Ampere; CPUs with AVX512-BF16, AMX or Arm's BF16 that multiply it in
    fact); float16 on older GPUs; else float32."""
    import torch

    if device == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    able = torch.cpu.get_capabilities()
    claimed = any(able.get(name) for name in BF16_FLAGS)
    if not claimed:
        return torch.float32
    seconds = _seconds()
    return torch.bfloat16 if seconds[torch.bfloat16] < EMULATED * seconds[torch.float32] else torch.float32


@functools.cache
def _seconds() -> dict[torch.dtype, float]:
    """What a product [256, 576] x [576, 1536] takes in bfloat16 and in float32: timed in turns, some ten milliseconds, once a process."""
    import torch

    seconds = {torch.bfloat16: float("inf"), torch.float32: float("inf")}
    for _ in range(TURNS):
        for dtype, best in seconds.items():
            x, weight = torch.ones(256, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
            seconds[dtype] = min(best, fastest(functools.partial(torch.nn.functional.linear, x, weight), "cpu", times=2))
    return seconds


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
