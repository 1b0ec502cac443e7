"""One self-contained HTML page: facts, a table of scores, charts. Everything from outside is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{{ title }}</title><style>
:root { color-scheme: light dark; --grid: #8884; --c0: #2563eb; --c1: #dc2626; --c2: #059669; --c3: #9333ea }
@media (prefers-color-scheme: dark) { :root { --c0: #7aa7ff; --c1: #ff8a8a; --c2: #5fd9a8; --c3: #c9a0ff } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid var(--grid) }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem }
figure { margin: 0 } svg { width: 100% } svg text { font-size: 11px; fill: currentColor }
.grid { stroke: var(--grid) } .whisker { stroke: currentColor; stroke-width: 1.5 } polyline { fill: none; stroke-width: 1.5 }
{% for i in range(4) -%}
.c{{ i }} { stroke: var(--c{{ i }}) } .b{{ i }} { fill: var(--c{{ i }}) } svg text.t{{ i }} { fill: var(--c{{ i }}) }
{% endfor %}
</style></head><body>
<h1>{{ title }}</h1>
<table>{% for name, value in facts.items() if value is not none %}<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}</table>
{% if rows %}<h2>Scores</h2>
<table><tr>{% for name in rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for value in row.values() %}<td{% if not loop.first %} class="n"{% endif %}>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}
{% if charts %}<h2>{{ heading }}</h2>
<div class="charts">{% for name, chart in charts %}<figure><figcaption>{{ name }}</figcaption>{{ chart | safe }}</figure>{% endfor %}</div>{% endif %}
</body></html>
"""


def page(title: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, str]], charts: Sequence[tuple[str, str]], heading: str = "Training") -> str:
    """`rows` are the table's, of one form; `charts` are (heading, SVG made by ftx_report_charts)."""
    from jinja2 import Environment

    # SVG is ours and escapes what it is given; all else is escaped here
    return Environment(autoescape=True).from_string(TEMPLATE).render(title=title, facts=facts, rows=rows, charts=charts, heading=heading)


def score_table(scores: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Entries of scores.json -> one row a metric: base, tuned and change with their intervals, n, unscored."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for score in scores:
        key = str(score.get("evaluator", "")), score["metric"]
        row = rows.setdefault(key, {"metric": " ".join(filter(None, key)), "base": "", "tuned": "", "change": "", "n": "", "unscored": ""})
        interval = f" [{score['ci_low']:.3f}, {score['ci_high']:.3f}]" if score.get("ci_low") is not None else ""
        phase = score.get("phase") or "tuned"
        row[phase] = "none scored" if score["value"] is None else f"{score['value']:.3f}{interval}"
        row["n"], row["unscored"] = str(score.get("n", "")), str(score.get("unscored", ""))
    return list(rows.values())
