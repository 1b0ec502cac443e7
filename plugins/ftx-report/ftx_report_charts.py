"""Charts as inline SVG: lines over steps, and bars with intervals. No library draws them in fewer bytes, and they show without a script."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 420, 200, 56, 22, 10
#: Points that one line is drawn with at most: more are not to be told apart at this width.
POINTS = 400
#: Fields of metrics.jsonl that are no figure of a step, or the library's own timing of an evaluation.
NOT_DRAWN = {"step", "epoch", "tokens", "supervised_tokens", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
#: These come first, in this order.
FIRST = ("loss", "learning_rate", "grad_norm", "tokens_per_second")
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One value with its interval; `group` and `name` say what of."""

    group: str
    name: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step: a dashed line down the chart, with a word or none."""

    step: float
    word: str = ""


Line = Sequence[tuple[float, float]]


def curves(metrics: Sequence[Mapping[str, Any]], marks: Sequence[Mark] = ()) -> list[tuple[str, str]]:
    """(heading, SVG) of each figure in the lines of metrics.jsonl; `a/chosen` and `a/rejected` share a chart, `eval_a` is dots on that of `a`."""
    charts: dict[str, tuple[dict[str, list[tuple[float, float]]], dict[str, list[tuple[float, float]]]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name in NOT_DRAWN or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            evaluated = name.startswith("eval_")
            whole, _, side = (plain := name.removeprefix("eval_")).rpartition("/")
            heading = whole if side in ("chosen", "rejected") else plain
            if heading == "peak_memory":
                heading, value = "peak_memory, GiB", value / GIB
            shown = f"{'eval ' * evaluated}{side}" if heading == whole else "evaluation" if evaluated else plain
            charts.setdefault(heading, ({}, {}))[evaluated].setdefault(shown, []).append((float(line["step"]), float(value)))
    order = {name: place for place, name in enumerate(FIRST)}
    return [(name, lines(drawn, dots=dots, marks=marks)) for name, (drawn, dots) in sorted(charts.items(), key=lambda one: order.get(one[0], len(order)))]


def lines(series: Mapping[str, Line], *, dots: Mapping[str, Line] | None = None, marks: Sequence[Mark] = ()) -> str:
    """One chart of named lines of (x, y), and of dots joined by nothing; what the pointer is at is read from `data-points`."""
    dots = dots or {}
    thinned = {name: thin(line) for name, line in [*series.items(), *dots.items()]}
    points = [point for line in thinned.values() for point in line]
    (left, right), (low, high) = (span(axis) for axis in zip(*points, strict=True))
    along = lambda x: LEFT + (min(max(x, left), right) - left) / (right - left) * (WIDTH - LEFT - 6)  # noqa: E731
    drawn = [frame(low, high), text(LEFT, HEIGHT - 4, number(left)), text(WIDTH, HEIGHT - 4, number(right), "end")]
    for mark in marks:
        drawn.append(f'<path class="mark" d="M{along(mark.step):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        if mark.word:
            late = mark.step > (left + right) / 2
            drawn.append(text(along(mark.step) + (-3 if late else 3), HEIGHT - BOTTOM - 4, mark.word, "end" if late else "start", "word"))
    for place, (name, line) in enumerate(thinned.items()):
        if name in series and len(line) > 1:
            at = " ".join(f"{along(x):.1f},{across(y, low, high):.1f}" for x, y in line)
            drawn.append(f'<polyline class="c{place % 4}{" dashed" * (place > 3)}" points="{at}"/>')
        else:
            drawn += [f'<circle class="b{place % 4}" cx="{along(x):.1f}" cy="{across(y, low, high):.1f}" r="3"/>' for x, y in line]
        if len(thinned) > 1:
            drawn.append(text(WIDTH - 8, TOP + 12 + 14 * place, name, "end", f"t{place % 4}"))
    data = {"x": [left, right], "box": [LEFT, WIDTH - 6, TOP, HEIGHT - BOTTOM], "lines": thinned}
    return svg(drawn, HEIGHT, ", ".join(thinned), json.dumps(data, separators=(",", ":")))


def thin(line: Line) -> Line:
    """At most POINTS points: of each stretch the lowest and the highest, so that no spike is lost, and both ends."""
    if len(line) <= POINTS:
        return list(line)
    size = math.ceil(2 * len(line) / (POINTS - 2))
    kept = {0, len(line) - 1}
    for start in range(0, len(line), size):
        stretch = range(start, min(start + size, len(line)))
        kept |= {min(stretch, key=lambda i: line[i][1]), max(stretch, key=lambda i: line[i][1])}
    return [line[i] for i in sorted(kept)]


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
    """Three digits in at most eight characters, which is what the margin holds: `1.95e-4`, not `0.000195`."""
    if value and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{html.escape(words)}</text>'


def svg(parts: Sequence[str], height: float, label: str, points: str = "") -> str:
    data = f' data-points="{html.escape(points)}"' if points else ""
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img" aria-label="{html.escape(label)}"{data}>{"".join(parts)}</svg>'
