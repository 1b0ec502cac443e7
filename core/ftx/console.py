"""What the person at the terminal sees: a live line on a terminal, plain lines elsewhere, tables at the end."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

from ftx.errors import one_line, printable

if TYPE_CHECKING:
    from ftx.run import Score

log = logging.getLogger("ftx")


class PlainFormatter(logging.Formatter):
    """Lines for log.txt: text from data, or a library's message that quotes it, gives no escape sequence to who prints the file."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class Console:
    """Prints to standard output, or to standard error when standard output belongs to `--json`."""

    def __init__(self, *, quiet: bool = False, json: bool = False) -> None:
        from rich.console import Console as Rich

        self.quiet = quiet
        self.rich = Rich(file=sys.stderr if json else sys.stdout, highlight=False, markup=False, soft_wrap=True)
        self._live: Any = None

    def say(self, text: str) -> None:
        """One line for the person, and for log.txt. Text from data cannot move the cursor, recolour the terminal or begin a line."""
        clean = one_line(str(text))
        log.info("%s", clean)
        if not self.quiet:
            (self._live.console if self._live else self.rich).print(clean)

    @property
    def can_draw(self) -> bool:
        """Whether something may be drawn and drawn over: on a terminal that can, and where it is wanted."""
        return self.rich.is_terminal and not self.rich.is_dumb_terminal and not self.rich.options.ascii_only and not self.quiet

    def begin(self, what: str, total: int) -> Progress:
        """Progress over `total` steps."""
        self.settle()
        return Bar(self, what, total) if self.can_draw else Progress(self, what, total)

    def watch(self, what: str, total: int, *, done: int = 0, planned: int | None = None, resident: bool = False) -> Progress:
        """Progress of a training from step `done` on: the live panel where it can be drawn, with memory beside the `planned` bytes."""
        self.settle()
        if not self.can_draw:
            return Progress(self, what, total, done)
        from ftx.panel import TrainingPanel

        return TrainingPanel(self, what, total, done, planned, resident)

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.settle()

    def settle(self) -> None:
        """Whatever was drawn and did not end (an evaluator raised, the training failed) is drawn no more, and the cursor is back."""
        if self._live:
            self._live.stop()
            self._live = None

    def table(self, header: list[str], rows: list[list[str]]) -> None:
        """A table of at most 80 columns; numbers to the right."""
        if self.quiet or not rows:
            return
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i < 2 else "right", overflow="fold")
        for row in rows:
            table.add_row(*(one_line(cell) for cell in row))
        self.rich.print(table, width=min(80, self.rich.width))


class Progress:
    """A plain line a call, at most one every few seconds."""

    SECONDS = 10.0

    def __init__(self, console: Console, what: str, total: int, done: int = 0) -> None:
        self.console, self.what, self.total, self.first, self.done = console, what, total, done, done
        self.started = self.said = time.monotonic()
        self._bar: Any = None

    def update(self, done: int, figures: str = "", *, always: bool = False, **values: Any) -> None:
        """`figures`: the latest numbers as text, `values` the same as they are. `always` prints a plain line now."""
        self.done = done
        if always or (time.monotonic() - self.said > self.SECONDS and done < self.total):
            self.said = time.monotonic()
            left = self.left()
            self.console.say(f"{self.what} {done}/{self.total}{'  ' + figures if figures else ''}{f'  {clock(left)} left' if left else ''}")

    def left(self) -> float | None:
        """Seconds to go at the pace so far; None where there is no pace, or nothing to go."""
        if not self.first < self.done < self.total:
            return None
        return (time.monotonic() - self.started) / (self.done - self.first) * (self.total - self.done)

    def end(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = self.console._live = None


class Bar(Progress):
    """A bar that goes away at its end."""

    def __init__(self, console: Console, what: str, total: int) -> None:
        super().__init__(console, what, total)
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        self._bar = console._live = RichProgress(*columns, console=console.rich, transient=True)
        self._bar.start()
        self._task = self._bar.add_task(what, total=total)

    def update(self, done: int, figures: str = "", *, always: bool = False, **values: Any) -> None:
        self._bar.update(self._task, completed=done)


def clock(seconds: float) -> str:
    """`2:05`, `1:02:05`."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def score_table(scores: list[Score]) -> tuple[list[str], list[list[str]]]:
    """Scores side by side: one row a metric with base, tuned and their difference; what changed below."""
    by: dict[tuple[str, str], dict[str, Score]] = {}
    for score in scores:
        by.setdefault((score.evaluator, score.metric), {})[score.phase] = score
    rows = []
    for (evaluator, metric), phases in by.items():
        base, tuned, change = (phases.get(phase) for phase in ("base", "tuned", "change"))
        if change:
            rows.append([evaluator, metric, "", "", f"{change.value:.3g}"])
        else:
            moved = f"{tuned.value - base.value:+.3f}" if base and tuned else ""
            rows.append([evaluator, metric, _cell(base), _cell(tuned), moved])
    return ["evaluator", "metric", "base", "tuned", "change"], rows


def file_table(scores: list[Score]) -> tuple[list[str], list[list[str]]]:
    """Scores that were read from files, one a row: they have models instead of phases."""
    rows = [[score.model or "-", score.metric, _cell(score), str(score.n), str(score.unscored)] for score in scores]
    return ["model", "metric", "value", "n", "unscored"], rows


def _cell(score: Score | None) -> str:
    if score is None:
        return "-"
    interval = f" [{score.ci_low:.2f}, {score.ci_high:.2f}]" if score.ci_low is not None and score.ci_high is not None else ""
    return f"{score.value:.3f}{interval}"
