"""Two settings of the process while it trains: which library multiplies fp32 on a CPU, and whether freed memory goes back."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from pathlib import Path

import torch
from torch import nn

from ftx_fast_installed import Installed

#: glibc's malloc.h: M_TRIM_THRESHOLD (-1: never), M_TOP_PAD, M_MMAP_MAX; what training sets, glibc's defaults, and what glibc calls them where
#: they are set from outside.
MALLOPT = ((-1, -1, 128 << 10, "trim_threshold"), (-2, 64 << 20, 0, "top_pad"), (-4, 0, 65536, "mmap_max"))
#: Allocators that take glibc's place when they are preloaded; mallopt would say nothing to them.
OTHERS = ("jemalloc", "tcmalloc", "mimalloc")


def keep_memory() -> Installed:
    """Let glibc's allocator keep what is freed: a step asks for the same sizes again, and fresh pages cost a fault each.

    Set in the running process; no environment variable, no second start. Undone, freed memory goes back to the system, by the
    thresholds that the process was started with, which from then on stay (glibc raises those that nobody has set).
    """
    if platform.libc_ver()[0] != "glibc":
        return Installed(lambda: None, off=["memory: not glibc's allocator"])
    if other := next((name for name in OTHERS if name in os.environ.get("LD_PRELOAD", "")), None):
        return Installed(lambda: None, off=[f"memory: {other} is preloaded, not glibc's allocator"])
    libc = ctypes.CDLL(None)
    for option, value, _, _ in MALLOPT:
        libc.mallopt(option, value)

    def undo() -> None:
        for option, _, default, name in MALLOPT:
            libc.mallopt(option, set_outside(name, default))
        libc.malloc_trim(0)

    return Installed(undo, on=["memory kept between steps"])


def set_outside(name: str, default: int) -> int:
    """glibc's malloc setting of this name as the environment has it: MALLOC_TOP_PAD_ or GLIBC_TUNABLES=glibc.malloc.top_pad=N."""
    tunables = dict(one.partition("=")[::2] for one in os.environ.get("GLIBC_TUNABLES", "").split(":"))
    found = os.environ.get(f"MALLOC_{name.upper()}_", tunables.get(f"glibc.malloc.{name}", ""))
    try:
        return min(int(found, 0), 2**31 - 1)  # mallopt takes a C int
    except ValueError:
        return default


def fp32_products(model: nn.Module) -> Installed:
    """Multiply fp32 through oneDNN where that is exact (without AMX it rounds nothing) and twice as fast as MKL.

    torch takes the setting only where the processor has AVX-512: elsewhere MKL multiplies whatever it says, and both libraries reach
    the same there (32 GFLOP/s a core on an EPYC with AVX2, forward and backward, 64 to 800 rows).
    """
    if why := keeps_mkl(model):
        return Installed(lambda: None, off=[f"products: {why}"])
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"

    def undo() -> None:
        settings.fp32_precision = before

    return Installed(undo, on=["fp32 products through oneDNN"])


def keeps_mkl(model: nn.Module) -> str:
    """Why fp32 stays with torch's usual library, or ""."""
    if not any(parameter.device.type == "cpu" and parameter.dtype is torch.float32 and parameter.dim() == 2 for parameter in model.parameters()):
        return "no weights in float32"
    if not torch.backends.mkldnn.is_available():
        return "torch was built without oneDNN"
    if torch.cpu._is_amx_tile_supported():
        return "with AMX oneDNN would round float32"
    if not slow_mkl():
        return "MKL is as fast on this processor"
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # what torch itself asks before it takes oneDNN
        return "torch takes oneDNN for fp32 only with AVX-512, which this processor lacks"
    return ""


@functools.cache
def slow_mkl() -> bool:
    """Whether MKL takes its slow path on this processor: on AMD's.

    Told from its name and not from the clock: one run of a recipe must choose what the next one chooses, to the bit.
    """
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text("utf-8", errors="replace")
