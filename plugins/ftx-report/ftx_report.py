"""The observer `report`: report.html, the page of a run, and pages that compare runs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from ftx import hookimpl, option, plugin

if TYPE_CHECKING:
    from ftx import Run
    from ftx.run import RunDir

log = logging.getLogger("ftx")


@plugin
class Report:
    """Writes report.html at the end of a run: what came of it with intervals, curves, the audit, and every answer of base and tuned to browse."""

    title: str = option("", "The page's heading; empty: plugins and model.")
    max_items: int = option(10_000, "Items of each evaluator that the page holds; it says how many are left out, and eval/ has all.")

    def __post_init__(self) -> None:
        if self.max_items < 0:
            raise ValueError(f"max_items must be at least 0, not {self.max_items}")

    @hookimpl
    def run_finished(self, run: Run) -> None:
        self._write(run)

    @hookimpl
    def run_failed(self, run: Run) -> None:
        """What there is of a run that was interrupted or failed behind its first step."""
        if run.directory is not None and run.directory.metrics.exists():
            self._write(run)

    @hookimpl
    def render_runs(self, directories: list[RunDir]) -> str:
        from ftx_report_read import tell, tell_all
        from ftx_report_run import compare_page, run_page

        if len(directories) == 1:
            return run_page(tell(directories[0]), title=self.title, limit=self.max_items)
        return compare_page(tell_all(directories), title=self.title, limit=self.max_items)

    def _write(self, run: Run) -> None:
        """A page that cannot be made costs a finished training nothing but the page."""
        from ftx.run import write_text

        if run.directory is None or not run.is_main:
            return
        try:
            write_text(run.directory / "report.html", self.render_runs(directories=[run.directory]))
        except Exception as error:
            log.exception("report.html could not be written")
            run.say(f"warning: report.html could not be written ({type(error).__name__}: {error}). Again: ftx report {run.directory}")
        else:
            run.say(f"report: {run.directory / 'report.html'}")
