"""A bar chart as SVG, drawn by hand: it needs no library, and its diff can be read."""

from __future__ import annotations

from html import escape

COLOURS = ("#1f6feb", "#9aa4b2", "#5c6773", "#c9a227", "#a23b72")
BAR, LEFT, WIDTH = 16, 190, 720


def bars(values: dict[str, dict[str, float]], title: str) -> str:
    """One group for each workload, one bar for each side, with its number."""
    sides = list(dict.fromkeys(side for one in values.values() for side in one))
    most = max((value for one in values.values() for value in one.values()), default=1)
    parts, y = [], 34
    for name, one in values.items():
        parts.append(f'<text x="8" y="{y + BAR * len(one) / 2 + 4:.0f}">{escape(name)}</text>')
        for side, value in one.items():
            length = (WIDTH - LEFT - 150) * value / most
            parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.1f}" height="{BAR - 3}" fill="{COLOURS[sides.index(side) % len(COLOURS)]}"/>')
            parts.append(f'<text x="{LEFT + length + 6:.1f}" y="{y + BAR - 5}">{value:,.0f} {escape(side)}</text>')
            y += BAR
        y += 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" font-family="sans-serif" font-size="12">'
    back = f'<rect width="{WIDTH}" height="{y}" fill="white"/><text x="8" y="20" font-weight="bold">{escape(title)}</text>'
    return "\n".join([head, back, *parts, "</svg>\n"])
