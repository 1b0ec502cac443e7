"""The observer `report`: report.html, the page of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftx import hookimpl, option, plugin

if TYPE_CHECKING:
    from ftx import Run, Score


@plugin
class Report:
    """Writes report.html at the end of a run: its scores with their intervals, and a curve for each figure of its metrics."""

    title: str = option("", "The page's heading; empty: adapter, trainer and model.")

    @hookimpl
    def run_finished(self, run: Run, scores: list[Score]) -> None:
        from ftx.run import read_lines, write_text
        from ftx_report_charts import curves
        from ftx_report_page import page, score_table

        if run.directory is None or not run.is_main:
            return
        recipe = run.recipe
        trained = " + ".join(choice.name for choice in (recipe.quantizer, recipe.adapter, recipe.trainer) if choice is not None)
        facts = {"model": run.model, "data": recipe.data, "evaluation data": recipe.eval_data, "seed": run.seed, "dtype": run.dtype, "device": run.device}
        metrics = read_lines(run.directory.metrics) if run.directory.metrics.exists() else []
        html = page(self.title or f"{trained} on {run.model}", facts, score_table([score.as_dict() for score in scores]), curves(metrics))
        write_text(run.directory / "report.html", html)
        run.say(f"report: {run.directory / 'report.html'}")
