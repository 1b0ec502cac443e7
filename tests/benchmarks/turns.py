"""Who may train now: several trainers in one process, each in a thread of its own, take their steps one after the other."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from ftx import hookimpl, option, plugin


class Turn(TrainerCallback):
    """A trainer's place in the ring: its step runs from where it is given the turn to the beginning of its next one, where it hands it on.

    So a step has all that it costs: its batch, its log line, whatever else listens. The last one has no next, and is not timed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.ready, self.mine = threading.Event(), threading.Semaphore(0)
        self.next = self
        self.began: float | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.began is None:
            self.ready.set()
        else:
            self.seconds.append(time.perf_counter() - self.began)
            self.next.mine.release()
        self.mine.acquire()
        self.began = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.next.mine.release()


#: By name, for those that an observer of `ftx run` stands for.
KNOWN: dict[str, Turn] = {}


@plugin
class Taker:
    """Gives the trainer of an `ftx run` its place."""

    place: str = option("", "Its name.")

    @hookimpl
    def trainer_callbacks(self, run):
        return [KNOWN[self.place]]


def in_turns(sides: dict[str, Callable[[Turn], None]]) -> dict[str, Turn]:
    """Train all sides, which must take equally many steps; the last of them in this thread. One is brought to its first step before the next
    begins. Where one fails, the process ends.
    """
    KNOWN.update((name, Turn(name)) for name in sides)
    ring = [KNOWN[name] for name in sides]
    for turn, after in zip(ring, [*ring[1:], ring[0]], strict=True):
        turn.next = after

    def run(name: str) -> None:
        try:
            sides[name](KNOWN[name])
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # the others wait for a turn that never comes

    *others, last = sides
    threads = [threading.Thread(target=run, args=[name]) for name in others]
    for thread, turn in zip(threads, ring, strict=False):
        thread.start()
        turn.ready.wait()
    threading.Thread(target=lambda: (ring[-1].ready.wait(), ring[0].mine.release())).start()
    run(last)
    for thread in threads:
        thread.join()
    return {name: KNOWN.pop(name) for name in sides}
