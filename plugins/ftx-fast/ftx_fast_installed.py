"""What putting a part on a model gives back: how to take it off, and what it did and did not do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Installed:
    """One part on one model. `undo()` restores every `forward` and setting; `on` and `off` are lines for a person."""

    undo: Callable[[], None]
    on: list[str] = field(default_factory=list)
    off: list[str] = field(default_factory=list)
