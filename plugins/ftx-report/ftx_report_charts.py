"""Charts as inline SVG: lines over steps, and bars with intervals. No library draws them in fewer bytes, and a page needs no script."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 200, 56, 22, 10
#: Fields of metrics.jsonl that are no figure of a step.
NOT_DRAWN = {"step", "epoch", "tokens", "supervised_tokens"}


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One value with its interval; `group` and `name` say what of."""

    group: str
    name: str
    value: float
    low: float | None = None
    high: float | None = None


def curves(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(heading, SVG) of each figure in the lines of metrics.jsonl; `a/chosen` and `a/rejected` share a chart."""
    charts: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name in NOT_DRAWN or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            whole, _, side = name.rpartition("/")
            together = whole if side in ("chosen", "rejected") else name
            charts.setdefault(together, {}).setdefault(side if together == whole else name, []).append((float(line["step"]), float(value)))
    return [(name, lines(series)) for name, series in charts.items()]


def lines(series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """One chart of named lines of (x, y)."""
    points = [point for line in series.values() for point in line]
    (left, right), (low, high) = (span(axis) for axis in zip(*points, strict=True))
    drawn = [frame(low, high), text(LEFT, HEIGHT - 4, number(left)), text(WIDTH, HEIGHT - 4, number(right), "end")]
    for place, (name, line) in enumerate(series.items()):
        at = " ".join(f"{LEFT + (x - left) / (right - left) * (WIDTH - LEFT):.1f},{across(y, low, high):.1f}" for x, y in line)
        drawn.append(f'<polyline class="c{place % 4}" points="{at}"/>')
        if len(series) > 1:
            drawn.append(text(WIDTH - 4, TOP + 12 + 14 * place, name, "end", f"t{place % 4}"))
    return svg(drawn, HEIGHT, ", ".join(series))


def bars(values: Sequence[Bar], whole: tuple[float, float]) -> str:
    """Horizontal bars from `whole`'s low to its high, grouped, each with its interval."""
    names = list(dict.fromkeys(bar.name for bar in values))
    low, high = whole
    label, row = 150, 16
    place = lambda value: label + (min(max(value, low), high) - low) / (high - low) * (WIDTH - label - 40)  # noqa: E731
    drawn, y = [], 0
    for group in dict.fromkeys(bar.group for bar in values):
        drawn.append(text(label - 6, y + 12, group, "end"))
        for bar in (bar for bar in values if bar.group == group):
            kind = names.index(bar.name) % 4
            drawn.append(f'<rect class="b{kind}" x="{label}" y="{y + 2}" width="{max(place(bar.value) - label, 0):.1f}" height="{row - 4}"/>')
            if bar.low is not None and bar.high is not None:
                drawn.append(f'<path class="whisker" d="M{place(bar.low):.1f} {y + row / 2}H{place(bar.high):.1f}"/>')
            drawn.append(text(WIDTH, y + 12, f"{bar.value:.2f}", "end"))
            y += row
        y += 6
    for kind, name in enumerate(names):
        drawn.append(text(label + 70 * kind, y + 12, name, "start", f"t{kind % 4}"))
    return svg(drawn, y + 18, ", ".join(names))


def span(values: Iterable[float]) -> tuple[float, float]:
    """Lowest and highest, apart even if they are one."""
    low, high = min(values := list(values)), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def across(value: float, low: float, high: float) -> float:
    return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)


def frame(low: float, high: float) -> str:
    heights = [(value, across(value, low, high)) for value in (low, (low + high) / 2, high)]
    grid = "".join(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH}"/>' for _, y in heights)
    return grid + "".join(text(LEFT - 6, y + 4, number(value), "end") for value, y in heights)


def number(value: float) -> str:
    return f"{value:.3g}"


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{html.escape(words)}</text>'


def svg(parts: Sequence[str], height: float, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{html.escape(label)}">{"".join(parts)}</svg>'
