"""Until the model is there, Python's garbage collector looks less often through what was imported, which stays: a tenth of the way to a first step."""

from __future__ import annotations

import gc

RARELY = 100_000, 20, 100
_usual: list[tuple[int, int, int]] = []


def begin() -> None:
    """Of a command; an interpreter that only imports ftx is left as it is."""
    if not _usual:
        _usual.append(gc.get_threshold())
        gc.set_threshold(*RARELY)


def over() -> None:
    """From here on as before, if it has begun."""
    if _usual:
        gc.set_threshold(*_usual.pop())
