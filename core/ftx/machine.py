"""What this machine has, asked without torch: GPUs and their memory, memory that is free, bfloat16; and sizes as people write them."""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata as metadata
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ftx.errors import OptionError

UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
#: CPU flags of processors that multiply bfloat16 in fact (see ftx.device.best_dtype).
BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
#: Where Linux says what the control group of this process may have.
GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """Where a run is planned for."""

    device: str
    """cpu or cuda."""
    memory: int | None
    """Bytes that tensors may take together with what the device itself needs; None: unknown."""
    here: bool
    """Whether it is the machine that plans."""
    name: str = ""

    def room(self) -> int | None:
        """Bytes left for tensors. A GPU's context and libraries take about 0.6 GB, and its allocator loses some 3 % to gaps;
        a CPU process has its libraries loaded already, and loses as much."""
        if self.memory is None:
            return None
        return max(0, int((self.memory - (600 << 20 if self.device == "cuda" else 0)) / 1.03))


def this_machine(device: str = "auto") -> Machine:
    """The device that `--device` means here, with the memory that it has free now (GPU: has in all)."""
    found = gpus() if device in ("auto", "cuda") else []
    if found:
        name, size = found[0]
        return Machine("cuda", size, True, name)
    return Machine("cuda" if device == "cuda" else "cpu", None if device == "cuda" else memory()[0], True)


@functools.cache
def gpus() -> list[tuple[str, int]]:
    """(name, bytes) of each GPU that CUDA shows, from its driver; none where torch is built without CUDA."""
    try:
        if "+cpu" in metadata.version("torch"):
            return []
        driver = ctypes.CDLL("libcuda.so.1")
    except (OSError, metadata.PackageNotFoundError):
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    found = []
    for number in range(count.value):
        device, size, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(96)
        if not (driver.cuDeviceGet(ctypes.byref(device), number) or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)):
            driver.cuDeviceGetName(name, len(name), device)
            found.append((name.value.decode(errors="replace"), size.value))
    return found


def memory(group: Path = GROUP) -> tuple[int | None, int | None]:
    """Bytes of memory that are free and in all: the machine's, or those of its control group (a container's) where they are
    less. Where a system says only how much there is, that is free too; None: unknown."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
        free, total = (int(lines[key].split()[0]) << 10 for key in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):
        try:
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return None, None
        return total, total
    try:
        limit, used = (int((group / name).read_text("ascii")) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text("ascii").splitlines())
        used -= int(statistics.get("inactive_file", 0))  # cached files, which the kernel gives back when it is asked
    except (OSError, ValueError):  # no group, or none with a limit
        return free, total
    return min(free, max(0, limit - used)), min(total, limit)


def compute_bytes(dtype: str, device: str) -> int:
    """Bytes of a number in the dtype that `--dtype` means on a device."""
    if dtype != "auto":
        return 4 if dtype == "float32" else 2
    if device == "cuda":
        return 2
    try:
        flags = set(re.split(r"\s+", Path("/proc/cpuinfo").read_text("utf-8", errors="replace")))
    except OSError:
        from ftx.device import best_dtype

        return int(best_dtype(device).itemsize)
    return 2 if flags & BF16_FLAGS else 4


def parse_size(text: str) -> int:
    """`48GB`, `48 GiB`, `500M` -> bytes. G is 2**30: that is what a card sold as 48 GB has. OptionError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", text, re.IGNORECASE)
    if not match or not float(match[1]):
        raise OptionError(f"'{text}' is no size of memory.", "For example: 48GB, 24GB, 800MB.")
    size = int(float(match[1]) * UNITS[match[2].lower()])
    if size < 1 << 20:  # 48 means 48GB to whoever writes it
        raise OptionError(f"'{text}' is {size} bytes, in which no model fits.", f"With a unit: {match[1]}GB")
    return size


def said(size: float) -> str:
    """Bytes as a person reads them, in GB of 2**30."""
    return f"{size / (1 << 30):.1f} GB" if size >= 1 << 30 else f"{size / (1 << 20):.{0 if size >= 10 << 20 else 1}f} MB"
