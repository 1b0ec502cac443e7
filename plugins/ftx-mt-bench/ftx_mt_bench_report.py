"""The page of an MT-Bench: base against tuned by turn and category, as a table and as a chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ftx import Score
from ftx.run import write_text
from ftx_mt_bench_numbers import Rating, rating_scores
from ftx_report_charts import Bar, bars
from ftx_report_page import page, score_table


def write_report(path: Path, facts: Mapping[str, object], phases: Mapping[str, Sequence[Rating]], changes: Sequence[Score], seed: int, pairwise: bool) -> None:
    """`phases` are base's and tuned's ratings, 1 to 10 or (pairwise) 0 to 1; `changes` their paired differences by turn and category."""
    name = "win_rate_adjusted" if pairwise else "average"
    scores = [score.as_dict() | {"phase": phase} for phase, ratings in phases.items() for score in rating_scores(ratings, seed, name)]
    drawn = [
        Bar(group=score["metric"], name=score["phase"], value=score["value"], low=score["ci_low"], high=score["ci_high"])
        for score in scores
        if score["value"] is not None
    ]
    rows = score_table([*scores, *(score.as_dict() | {"metric": score.metric.removesuffix("_change"), "phase": "change"} for score in changes)])
    whole = (0.0, 1.0) if pairwise else (1.0, 10.0)
    charts = [("win rate, a tie is half a win" if pairwise else "rating, 1 to 10", bars(drawn, whole))] if drawn else []
    write_text(path, page("MT-Bench", facts, rows, charts, heading="By turn and category"))
