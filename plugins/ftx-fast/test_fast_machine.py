"""Settings of the process: the allocator is seen to keep memory, and to be as before afterwards."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys

import pytest
import torch

import ftx_fast_machine
from ftx_fast_machine import fp32_products, keep_memory, set_outside

#: In a process of its own, for what other tests have freed may hold the block whatever the settings are: whether a block (of more than
#: glibc ever raises its own threshold to, 32 MB) is mapped by itself, to go back to the system when it is freed.
MAPPED = """
import ctypes, json
from ftx_fast_machine import keep_memory

class MallInfo2(ctypes.Structure):
    _fields_ = [(f"field{number}", ctypes.c_size_t) for number in range(10)]  # the fourth is hblks, the number of mapped blocks

libc = ctypes.CDLL(None)
libc.mallinfo2.restype, libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = MallInfo2, ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def mapped():
    before = libc.mallinfo2().field3
    block = libc.malloc(40 << 20)
    found = libc.mallinfo2().field3 - before
    libc.free(block)
    return bool(found)

found = [mapped()]
kept = keep_memory()
assert kept.on
found.append(mapped())
kept.undo()
found.append(mapped())
print(json.dumps(found))
"""


def mapped(**environment: str) -> list[bool]:
    """Whether a large block is mapped by itself: at first, while memory is kept, and after."""
    if platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("no mallinfo2 of glibc's")
    own = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "GLIBC_TUNABLES") and not name.startswith("MALLOC_")}
    return json.loads(subprocess.run([sys.executable, "-c", MAPPED], env=own | environment, check=True, capture_output=True, text=True).stdout)


def test_memory_is_kept_and_given_back_again():
    assert mapped() == [True, False, True]


@pytest.mark.parametrize(("name", "value"), [("MALLOC_MMAP_MAX_", "0"), ("GLIBC_TUNABLES", "glibc.malloc.check=0:glibc.malloc.mmap_max=0")])
def test_what_was_set_from_outside_is_set_again(name, value):
    assert mapped(**{name: value}) == [False, False, False]


@pytest.fixture
def amd_with_avx512(monkeypatch):
    """A processor on which oneDNN is the faster library for fp32, whatever this one is."""
    monkeypatch.setattr(ftx_fast_machine, "slow_mkl", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)


def test_fp32_goes_through_onednn_and_back(amd_with_avx512):
    settings = torch.backends.mkldnn.matmul
    before = settings.fp32_precision
    installed = fp32_products(torch.nn.Linear(2, 2))
    assert installed.on == ["fp32 products through oneDNN"] and settings.fp32_precision == "bf16" != before
    installed.undo()
    assert settings.fp32_precision == before


@pytest.mark.parametrize(
    ("place", "name", "value", "why"),
    [
        (torch.cpu, "_is_amx_tile_supported", True, "with AMX oneDNN would round float32"),
        (ftx_fast_machine, "slow_mkl", False, "MKL is as fast on this processor"),
        (torch.backends.mkldnn, "is_available", False, "torch was built without oneDNN"),
        (torch.ops.mkldnn, "_is_mkldnn_bf16_supported", False, "torch takes oneDNN for fp32 only with AVX-512, which this processor lacks"),
    ],
)
def test_why_fp32_stays_with_the_usual_library(amd_with_avx512, monkeypatch, place, name, value, why):
    before = torch.backends.mkldnn.matmul.fp32_precision
    monkeypatch.setattr(place, name, lambda: value)
    assert fp32_products(torch.nn.Linear(2, 2)).off == [f"products: {why}"]
    assert fp32_products(torch.nn.Linear(2, 2).bfloat16()).off == ["products: no weights in float32"]
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_settings_as_glibc_reads_them(monkeypatch):
    for name in ("GLIBC_TUNABLES", "MALLOC_TOP_PAD_"):
        monkeypatch.delenv(name, raising=False)
    assert set_outside("top_pad", 5) == 5
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.top_pad=0x100")
    assert set_outside("top_pad", 5) == 256 and set_outside("mmap_max", 7) == 7
    monkeypatch.setenv("MALLOC_TOP_PAD_", "12")
    assert set_outside("top_pad", 5) == 12
    monkeypatch.setenv("MALLOC_TOP_PAD_", "much")
    assert set_outside("top_pad", 5) == 5


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    kept = keep_memory()
    assert not kept.on and (platform.libc_ver()[0] != "glibc" or kept.off == ["memory: jemalloc is preloaded, not glibc's allocator"])
