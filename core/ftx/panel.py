"""The live panel of a training on a terminal: progress, time left, the loss as a sparkline, tokens a second, memory beside the plan's."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ftx.console import Progress

if TYPE_CHECKING:
    from ftx.console import Console

BLOCKS = "▁▂▃▄▅▆▇█"
GIB = 2**30


class TrainingPanel(Progress):
    """Drawn four times a second, at most 80 columns wide; its last state stays on the screen.

    `planned`: bytes of tensors that plan.json expects at most. `resident`: the figure `peak_memory` is what the process holds resident, its
    libraries included, so the two stand beside each other and not one over the other.
    """

    def __init__(self, console: Console, what: str, total: int, done: int, planned: int | None, resident: bool) -> None:
        super().__init__(console, what, total, done)
        from rich.live import Live

        self.done, self.planned, self.resident = done, planned, resident
        self.losses: list[float] = []
        self.figures: dict[str, Any] = {}
        self.ended: float | None = None
        self._bar = console._live = Live(get_renderable=self.drawn, console=console.rich, refresh_per_second=4)
        self._bar.start()

    def update(self, done: int, figures: str = "", *, always: bool = False, **values: Any) -> None:
        self.done = done
        self.figures |= values
        if "loss" in values:
            self.losses.append(values["loss"])

    def end(self) -> None:
        if self._bar:
            self.ended = time.monotonic()
        super().end()

    def drawn(self) -> Any:
        """What stands on the screen now."""
        from rich.box import ROUNDED
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = min(80, self.console.rich.width)
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        left = self.left()
        head.add_row(f"{self.what} {self.done}/{self.total}", ProgressBar(self.total, self.done), f"{clock(left)} left" if left is not None else "")
        lines: list[Any] = [head]
        if self.losses:
            said = f"loss {self.losses[-1]:.4f}  "
            lines.append(Text(said + sparkline(self.losses, width - 4 - len(said)), no_wrap=True, overflow="crop"))
        if told := "  ".join(self.told()):
            lines.append(Text(told, no_wrap=False, overflow="fold"))  # the console would not wrap it
        since = clock((self.ended or time.monotonic()) - self.started)
        return Panel(Group(*lines), box=ROUNDED, title=f"{'trained' if self.ended else 'training'} {since}", title_align="left", width=width)

    def told(self) -> list[str]:
        """The latest figures as words."""
        found = []
        if "learning_rate" in self.figures:
            found.append(f"lr {self.figures['learning_rate']:.2e}")
        if "tokens_per_second" in self.figures:
            found.append(f"{self.figures['tokens_per_second']:,.0f} tokens/s")
        if "peak_memory" in self.figures:
            held, plan = f"{self.figures['peak_memory'] / GIB:.2f}", f"{self.planned / GIB:.2f} GiB" if self.planned else ""
            if self.resident:
                found.append(f"resident {held} GiB" + (f" (plan: {plan} of tensors)" if plan else ""))
            else:
                found.append(f"memory {held} of {plan} planned" if plan else f"memory {held} GiB")
        return found


def clock(seconds: float) -> str:
    """`0:02:05`: of one width, because it is drawn over."""
    return str(timedelta(seconds=int(seconds)))


def sparkline(values: Sequence[float], width: int) -> str:
    """The values as blocks from lowest to highest, at most `width` of them: each the mean of a stretch. What is no number is a gap."""
    width = max(1, width)
    count = min(width, len(values))
    means = []
    for place in range(count):
        stretch = values[place * len(values) // count : (place + 1) * len(values) // count]
        finite = [value for value in stretch if abs(value) < float("inf")]
        means.append(sum(finite) / len(finite) if finite else None)
    known = [value for value in means if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if value is None else BLOCKS[round((value - low) * scale)] for value in means)
