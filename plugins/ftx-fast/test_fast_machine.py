"""Settings of the process: the allocator is seen to keep memory, and to be as before afterwards."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys

import pytest

from ftx_fast_machine import keep_memory, set_outside

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
