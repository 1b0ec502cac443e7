"""The largest sum of live tensor storage while something runs: what a plan is compared with."""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import sys
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass
class Measured:
    """What a block came to, in bytes; complete when the block is left."""

    start: int = 0
    """Live storage at its beginning."""
    peak: int = 0
    """The largest sum of live storage in it."""
    end: int = 0
    """Live storage at its end."""
    moment: int = 0
    """When the peak was reached, in nanoseconds since the epoch; 0 on CUDA."""
    curve: list[tuple[int, int]] = field(default_factory=list, repr=False)
    """(nanoseconds since the epoch, bytes that came or went) on a CPU, in order."""

    @property
    def added(self) -> int:
        """How far the peak stands above the beginning."""
        return self.peak - self.start


@contextlib.contextmanager
def measure(device: str = "cpu", apart: Sequence[weakref.ref[torch.UntypedStorage]] = ()) -> Iterator[Measured]:
    """Measure a block: each storage counts once, with all its bytes, from its allocation until it is freed.

    On a CPU torch's profiler reports what the allocator gives and takes back, temporaries inside of operators and the
    backward pass included, and nothing else: of operators it is told nothing, which would be most of its work. It changes
    no result, in contrast to a dispatch mode, under which autograd no longer adds gradients in place. What stood before is
    found by the garbage collector (a saved activation of a graph that is older than the block is not). On CUDA it is
    `max_memory_allocated`, whose peak is reset at the beginning. Blocks cannot be nested, nor stand inside another
    profiler's. On a CPU `apart` (of `bystanders`) does not count.
    """
    import torch

    found = Measured()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        found.start = torch.cuda.memory_allocated()
        try:
            yield found
        finally:
            torch.cuda.synchronize()
            found.peak, found.end = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
        return
    freed: list[tuple[int, int]] = []
    watched = []
    strange = {storage.data_ptr() for storage in [one() for one in apart] if storage is not None}
    _listen()
    try:
        for storage in live_storages("cpu"):
            if storage.data_ptr() in strange:
                continue
            size = storage.nbytes()
            found.start += size
            watched.append(weakref.finalize(storage, _note, freed, size))
        storage = None  # this name must not keep one alive
        yield found
    finally:
        allocations = _allocations()
        for one in watched:
            one.detach()
        found.curve = sorted([*freed, *allocations])
        live = found.peak = found.start
        for moment, change in found.curve:
            live += change
            if live > found.peak:
                found.peak, found.moment = live, moment
        found.end = live


def live_storages(device: str = "cpu") -> list[torch.UntypedStorage]:
    """The storages behind every tensor that Python holds, and behind their gradients, once each."""
    import torch

    kinds: dict[type, bool] = {}
    found: dict[int, torch.UntypedStorage] = {}
    for one in gc.get_objects():
        kind = type(one)
        if kind not in kinds:
            kinds[kind] = issubclass(kind, torch.Tensor)
        if kinds[kind]:
            for tensor in (one, one.grad if one.is_leaf else None):
                if tensor is not None and tensor.device.type == device:
                    _add(tensor, found)
    return list(found.values())


def bystanders() -> list[weakref.ref[torch.UntypedStorage]]:
    """What is live now and none of what is measured later: `measure(apart=...)` leaves it out for as long as it lives."""
    gc.collect()
    return [weakref.ref(storage) for storage in live_storages("cpu")]


def size_of(tensors: Iterable[Any]) -> int:
    """Bytes of the storages behind `tensors`, each counted once; whatever is no tensor counts nothing."""
    import torch

    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor):
            _add(tensor, found)
    return sum(storage.nbytes() for storage in found.values())


def resident() -> int:
    """Bytes: the most that this process held resident since it began. (Where there is no /proc, getrusage: it counts the parent's at the fork.)"""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _add(tensor: Any, found: dict[int, Any]) -> None:
    with contextlib.suppress(RuntimeError, NotImplementedError):  # sparse ones and wrappers have no storage of their own
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.device == tensor.device:  # else there is none: torch's compiler keeps such
            found.setdefault(storage.data_ptr(), storage)


def _note(freed: list[tuple[int, int]], size: int) -> None:
    freed.append((time.time_ns(), -size))


def _others_profile() -> bool:
    """Whether a profiler of torch's is at work, in any thread, or waits for a step that its schedule names: two would end each other without a
    word, or the process."""
    import torch
    from torch.autograd import profiler

    return torch.autograd._profiler_enabled() or profiler._is_profiler_enabled or "ProfilerStep" in profiler.KinetoStepTracker._step_dict


def _listen() -> None:
    """Start torch's profiler for what CPU allocators do. `torch.profiler` takes no scope, and without one each operator is recorded, too:
    a third of a step more on a small model. RuntimeError where another profiler is at work.
    """
    import torch
    from torch._C._profiler import ProfilerActivity, ProfilerConfig, ProfilerState, RecordScope, _ExperimentalConfig

    if _others_profile():
        raise RuntimeError("another profiler of torch's is at work")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its two lines on standard error at each start and stop
    shapes = stack = flops = modules = False
    config = ProfilerConfig(ProfilerState.KINETO, shapes, True, stack, flops, modules, _ExperimentalConfig())
    torch.autograd._prepare_profiler(config, {ProfilerActivity.CPU})
    torch.autograd._enable_profiler(config, {ProfilerActivity.CPU}, {RecordScope.STATIC_RUNTIME_MODEL})  # a scope that nothing opens


def _allocations() -> list[tuple[int, int]]:
    """Stop listening -> (nanoseconds, bytes) of every block that the CPU's allocator gave meanwhile, and of its return.

    The return of an older block counts where its storage was watched: the profiler knows of some and not of others.
    """
    import torch
    from torch._C._profiler import _EventType

    given, found = set(), list[tuple[int, int]]()
    events = torch.autograd._disable_profiler().experimental_event_tree()
    for event in sorted(events, key=lambda one: one.start_time_ns):
        fields = event.extra_fields
        if event.tag != _EventType.Allocation or fields.device.type != "cpu":
            continue
        size, address = fields.alloc_size, fields.ptr
        if size > 0:
            given.add(address)
        elif address in given:
            given.remove(address)
        else:
            continue
        found.append((event.start_time_ns, size))
    return found
