"""Settings of the process: the allocator is seen to keep memory, and to be as before afterwards."""

from __future__ import annotations

import ctypes
import platform

import pytest

from ftx_fast_machine import keep_memory, set_outside

FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
#: More than glibc ever raises its own threshold to (32 MB), and less than the heap of a thread besides the main one holds (64 MB).
LARGE = 40 << 20


class MallInfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


@pytest.fixture
def mapped(monkeypatch):
    """A function that says whether a large block is mapped by itself, to go back to the system when it is freed."""
    libc = ctypes.CDLL(None)
    if platform.libc_ver()[0] != "glibc" or not hasattr(libc, "mallinfo2"):
        pytest.skip("no mallinfo2 of glibc's")
    for name in ("LD_PRELOAD", "GLIBC_TUNABLES", "MALLOC_MMAP_MAX_"):
        monkeypatch.delenv(name, raising=False)
    libc.mallinfo2.restype, libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = MallInfo2, ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

    def is_mapped():
        before = libc.mallinfo2().hblks
        block = libc.malloc(LARGE)
        found = libc.mallinfo2().hblks - before
        libc.free(block)
        return bool(found)

    yield is_mapped
    monkeypatch.undo()
    keep_memory().undo()


def test_memory_is_kept_and_given_back_again(mapped):
    keep_memory().undo()  # as glibc has it, whatever ran before
    assert mapped()
    kept = keep_memory()
    assert kept.on and not mapped()
    kept.undo()
    assert mapped()


@pytest.mark.parametrize(("name", "value"), [("MALLOC_MMAP_MAX_", "0"), ("GLIBC_TUNABLES", "glibc.malloc.check=0:glibc.malloc.mmap_max=0")])
def test_what_was_set_from_outside_is_set_again(name, value, mapped, monkeypatch):
    monkeypatch.setenv(name, value)
    keep_memory().undo()
    assert not mapped()


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
