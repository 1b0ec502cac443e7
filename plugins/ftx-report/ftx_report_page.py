"""One self-contained HTML page from parts: facts, tables, charts, items. Everything from outside is escaped."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ftx_report_script import SCRIPT
from ftx_report_style import STYLE

TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{{ policy }}">
<title>{{ title }}</title><style>{{ style | safe }}</style></head><body>
<h1>{{ title }}</h1>
{% for line in lead %}<p{% if not loop.first %} class="soft"{% endif %}>{{ line }}</p>
{% endfor %}
{%- if verdict %}<p class="verdict {{ verdict.tone }}" id="verdict">{{ verdict.sentence }}</p>
{% endif %}
{%- for part in parts %}
<section{% if part.id %} id="{{ part.id }}"{% endif %}>{% if part.heading %}<h2>{{ part.heading }}</h2>{% endif %}
{% for line in part.lines %}<p>{{ line }}</p>
{% endfor %}
{%- if part.facts %}<div class="scroll"><table class="facts">{% for name, value in part.facts.items() if value is not none -%}
<tr><th>{{ name }}</th><td>{{ value }}</td></tr>{% endfor %}</table></div>
{% endif %}
{%- if part.rows %}<div class="scroll"><table><tr>{% for name in part.rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in part.rows %}<tr>{% for value in row.values() %}<td{% if not loop.first and part.numbers %} class="n"{% endif %}>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
{% endif %}
{%- if part.charts %}<div class="charts">{% for name, chart in part.charts %}
<figure{{ chart | alone }}><figcaption>{{ name }}</figcaption>{{ chart | safe }}</figure>
{%- endfor %}</div>
{% endif %}
{%- for name, text in part.texts.items() %}<h3>{{ name }}</h3><div class="copy"><button type="button" data-copy="{{ part.id }}-{{ loop.index }}">copy</button>
<pre id="{{ part.id }}-{{ loop.index }}">{{ text }}</pre></div>
{% endfor %}
{%- if part.browser %}<div class="bar"><select id="set" aria-label="evaluator"></select><select id="category" aria-label="category"></select>
<input id="search" type="search" placeholder="search in prompts, answers and references" aria-label="search"></div>
<div class="bar" id="filters" role="group" aria-label="filter"></div><p class="soft" id="count" role="status"></p>
<div class="browser"><div class="list" id="list" role="listbox" tabindex="0" aria-label="items"><div class="sheet" id="sheet"></div></div>
<div class="detail" id="detail" aria-live="polite"></div></div>
<noscript><p>The items need a script of this page, and scripts are off.</p></noscript>
{% endif %}</section>
{% endfor %}
{%- if items %}<script type="application/json" id="items">{{ items | safe }}</script>
{% endif %}
{%- if script %}<script>{{ script | safe }}</script>
{% endif %}</body></html>
"""
#: Nothing is fetched, and of scripts only ours runs.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


@dataclass(kw_only=True)
class Part:
    """One section. `rows` are a table's, of one form, the first column in words and the others numbers unless told otherwise; `charts` are
    (heading, SVG made by ftx_report_charts); `texts` stand with copy buttons and need the `id`; `browser` shows the page's items."""

    heading: str = ""
    id: str = ""
    lines: Sequence[str] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    numbers: bool = True
    charts: Sequence[tuple[str, str]] = ()
    texts: Mapping[str, str] = field(default_factory=dict)
    browser: bool = False

    def __bool__(self) -> bool:
        return bool(self.lines or self.facts or self.rows or self.charts or self.texts or self.browser)


def whole_page(title: str, parts: Sequence[Part], *, lead: Sequence[str] = (), verdict: Any = None, items: str = "", script: str = SCRIPT) -> str:
    """`items` is JSON that ftx_report_items.embedded made. The only script that the page lets run is its own, by its hash."""
    from jinja2 import Environment
    from markupsafe import Markup

    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(autoescape=True)
    environment.filters["alone"] = lambda chart: "" if re.search('class="[bc]1"', chart) else Markup(' class="alone"')
    html = environment.from_string(TEMPLATE).render(
        title=title,
        lead=lead,
        verdict=verdict,
        parts=[part for part in parts if part],
        items=items,
        # SVG, style and script are ours, and SVG escapes what it is given; all else is escaped here
        style=STYLE,
        script=script,
        policy=f"{POLICY}; script-src 'sha256-{digest}'",
    )
    return html.encode("utf-8", "replace").decode("utf-8")  # a model's answer may hold half of a surrogate pair, which no file can


def page(title: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, str]], charts: Sequence[tuple[str, str]], heading: str = "Training") -> str:
    """A small page without a script, for plugins that have one of their own: facts, a table of scores, charts."""
    return whole_page(title, [Part(facts=facts), Part(heading="Scores", rows=rows), Part(heading=heading, charts=charts)], script="")


def score_table(scores: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Entries of scores.json -> one row a metric: base, tuned and change with their intervals, n, unscored."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for score in scores:
        key = str(score.get("evaluator", "")), score["metric"]
        row = rows.setdefault(key, {"metric": " ".join(filter(None, key)), "base": "", "tuned": "", "change": "", "n": "", "unscored": ""})
        phase = score.get("phase") or "tuned"
        row[phase] = with_interval(score)
        row["n"], row["unscored"] = str(score.get("n", "")), str(score.get("unscored", ""))
    return list(rows.values())


def with_interval(score: Mapping[str, Any]) -> str:
    """`0.970 [0.915, 0.990]`."""
    if score["value"] is None:
        return "none scored"
    value = f"{score['value']:.3f}" if abs(score["value"]) >= 0.001 or score["value"] == 0 else f"{score['value']:.2e}"
    return value + (f" [{score['ci_low']:.3f}, {score['ci_high']:.3f}]" if score.get("ci_low") is not None else "")
