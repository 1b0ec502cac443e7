"""ftx.measure: live tensor storage, counted to the byte."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import threading

import pytest
import torch

from ftx.measure import live_storages, measure, resident, size_of
from ftx.testing.tiny import tiny_model

MB = 1_000_000


def zeros(megabytes: int) -> torch.Tensor:
    return torch.zeros(megabytes * MB // 4)


class Saves(torch.autograd.Function):
    """Keeps 3 MB for the backward pass, and 5 MB for a moment of it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(zeros(3))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        assert ctx.saved_tensors[0].numel() == 3 * MB // 4
        zeros(5)
        return grad


def test_what_comes_and_goes():
    old, kept = zeros(4), zeros(1)
    with measure() as found:
        first = zeros(2)
        view = first[5:].view(-1)
        del old
        second = zeros(3)
        del first
    assert found.added == 2 * MB  # the old one went before the second came
    assert found.end - found.start == MB
    assert found.start >= size_of([kept]) + 4 * MB
    with measure() as again:  # blocks that an earlier measurement has seen come
        del view, second
    assert (again.added, again.end - again.start) == (0, -5 * MB)
    assert again.start == found.end


def test_nothing_is_recorded_but_memory(monkeypatch):
    seen = []
    stop = torch.autograd._disable_profiler
    monkeypatch.setattr(torch.autograd, "_disable_profiler", lambda: (seen.append(stop()), seen[-1])[1])
    with measure():
        (zeros(1).requires_grad_() * 2).sum().backward()
    (result,) = seen
    events = result.experimental_event_tree()
    assert events and all(event.tag == torch._C._profiler._EventType.Allocation and not event.children for event in events)


def test_beside_another_profiler():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as other:
        with pytest.raises(RuntimeError, match="another profiler"), measure():
            pass
        torch.ones(1).cos()
    assert "aten::cos" in {event.key for event in other.key_averages()}  # it went on
    with measure() as found:  # that left nothing behind
        zeros(1)
    assert found.added == MB


def test_what_has_no_storage_counts_nothing():
    """torch's compiler leaves such tensors behind, which say that they are on the CPU."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(MB)
    assert fake.device.type == "cpu" and size_of([fake]) == 0
    assert fake.untyped_storage().nbytes() == 4 * MB and all(storage.data_ptr() for storage in live_storages())


@pytest.mark.parametrize("where", ["a step of its schedule", "another thread"])
def test_beside_a_profiler_that_does_not_say_so(where):
    """torch tells of neither that it is there; ended by ours, either took the process with it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if where == "another thread":
        ready, done = threading.Event(), threading.Event()

        def theirs():
            with torch.profiler.profile(activities=activities):
                ready.set()
                done.wait(60)

        other = threading.Thread(target=theirs)
        other.start()
        ready.wait(60)
        try:
            with pytest.raises(RuntimeError, match="another profiler"), measure():
                pass
        finally:
            done.set()
            other.join()
    else:
        with torch.profiler.profile(activities=activities, schedule=torch.profiler.schedule(wait=0, warmup=1, active=1)) as other:
            with pytest.raises(RuntimeError, match="another profiler"), measure():
                pass
            other.step()
            torch.ones(1).cos()
        assert "aten::cos" in {event.key for event in other.key_averages()}
    with measure() as found:
        zeros(1)
    assert found.added == MB


def test_a_storage_counts_once_and_wholly():
    one = zeros(2)
    assert size_of([one, one[:10], one.view(2, -1), one.detach(), "no tensor"]) == 2 * MB
    assert sum(storage.data_ptr() == one.data_ptr() for storage in live_storages()) == 1
    weight = zeros(1).requires_grad_()
    weight.sum().backward()  # nothing in Python holds the gradient
    assert sum(storage.nbytes() == MB for storage in live_storages()) >= 2


def test_functions_of_ones_own_and_their_backward_pass():
    x = torch.zeros(MB // 4, requires_grad=True)
    gc.collect()  # what others left would otherwise go meanwhile
    with measure() as found:
        y = Saves.apply(x)
        loss = y.sum()
        loss.backward()
    # y 1, saved 3, in the backward pass 5 more; the sum and its gradient have 4 bytes each, and expanding takes none
    assert 9 * MB <= found.added <= 9 * MB + 64
    assert 2 * MB <= found.end - found.start <= 2 * MB + 64  # y, and the gradient of x


def test_the_same_weights_measured_or_not():
    rows = torch.arange(120).view(2, 60)
    twins = [tiny_model(), copy.deepcopy(tiny_model())]
    for model, measured in zip(twins, (True, False), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(3):
            if measured:
                with measure():
                    step(model, optimizer, rows)
            else:
                step(model, optimizer, rows)
    for one, other in zip(*(model.parameters() for model in twins), strict=True):
        assert torch.equal(one, other)


def step(model, optimizer, rows):
    model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def test_weights_gradients_and_states_to_the_byte():
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters())
    weights = size_of(model.parameters())
    rows = torch.arange(60).view(1, 60)
    with measure() as found:
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    assert found.end - found.start == weights  # the gradients
    with measure() as found:
        optimizer.step()
    steps = sum(state["step"].untyped_storage().nbytes() for state in optimizer.state.values())
    assert found.end - found.start == 2 * weights + steps


def test_a_process_is_not_told_what_its_parent_held():
    ballast = torch.ones(100 * MB)  # 400 MB that are there
    asked = "from ftx.measure import resident; print(resident())"
    found = int(subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True, preexec_fn=lambda: None).stdout)  # with one it forks
    assert found < ballast.nbytes < resident()
