"""The page of a run: whole, well-formed, with everything from outside escaped."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from ftx.testing.own import ROWS
from ftx.testing.runs import catalogue, train
from ftx_report_charts import Bar, bars, curves, lines
from ftx_report_page import page, score_table

HOSTILE = "<script>alert(1)</script>"


def figures(html: str) -> dict[str, str]:
    return dict(re.findall(r"<figcaption>(.*?)</figcaption>(<svg.*?</svg>)", html))


def test_a_run_writes_its_page(tmp_path):
    from ftx.recipe import Choice
    from ftx.testing.trainer import OWN
    from ftx_report import Report

    pytest.importorskip("ftx_sft")
    train(
        tmp_path / "run",
        ROWS["prompt-completion"],
        catalogue(observer={"page": Report}),
        adapter=OWN,
        trainer=Choice("sft", {"max_steps": 3, "logging_steps": 1}),
        observers=(Choice("page", {}),),
    )
    html = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert "http://" not in html and "https://" not in html and "<script" not in html
    drawn = figures(html)
    assert {"loss", "learning_rate", "grad_norm"} <= drawn.keys()
    assert len(re.search(r'<polyline class="c0" points="([^"]*)"', drawn["loss"]).group(1).split()) == 3


def test_both_sides_of_a_preference_share_a_chart():
    metrics = [{"step": step, "rewards/chosen": 0.1 * step, "rewards/rejected": -0.1 * step, "rewards/margins": 0.2 * step, "kl": 0.0} for step in (1, 2)]
    drawn = dict(curves(metrics))
    assert list(drawn) == ["rewards", "rewards/margins", "kl"]
    assert drawn["rewards"].count("<polyline") == 2 and drawn["kl"].count("<polyline") == 1


def test_what_is_no_number_is_not_drawn():
    assert curves([{"step": 1, "loss": float("nan"), "note": "text", "flag": True}]) == []
    assert dict(curves([{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("inf")}])).keys() == {"loss"}


def test_a_line_goes_from_corner_to_corner():
    root = ElementTree.fromstring(lines({"y": [(0, 0), (10, 1)]}))
    first, last = (tuple(map(float, point.split(","))) for point in root.find("polyline").get("points").split())
    assert first[0] < last[0] and first[1] > last[1]


def test_bars_are_as_long_as_their_values():
    root = ElementTree.fromstring(bars([Bar(group="math", name="base", value=2, low=1, high=3), Bar(group="math", name="tuned", value=4)], (0, 10)))
    widths = [float(rect.get("width")) for rect in root.findall("rect")]
    assert widths[1] == pytest.approx(2 * widths[0])
    assert len(root.findall("path")) == 1


def test_everything_from_outside_is_escaped():
    scores = [{"evaluator": HOSTILE, "metric": HOSTILE, "phase": "tuned", "value": 1.0, "ci_low": None, "n": 1, "unscored": 0}]
    charts = [(HOSTILE, bars([Bar(group=HOSTILE, name=HOSTILE, value=1)], (0, 1))), (HOSTILE, lines({HOSTILE: [(0, 0)], "b": [(1, 1)]}))]
    assert "<script" not in page(HOSTILE, {HOSTILE: HOSTILE}, score_table(scores), charts)


def test_one_row_a_metric():
    common = {"evaluator": "e", "metric": "m", "n": 5, "unscored": 1}
    scores = [{**common, "phase": "base", "value": 0.5, "ci_low": 0.25, "ci_high": 0.75}, {**common, "phase": "tuned", "value": None}]
    assert score_table(scores) == [{"metric": "e m", "base": "0.500 [0.250, 0.750]", "tuned": "none scored", "change": "", "n": "5", "unscored": "1"}]
