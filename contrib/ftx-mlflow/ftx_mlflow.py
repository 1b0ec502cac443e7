"""The observer `mlflow`: transformers' own MLflowCallback in a run that also gets the scores of base and tuned."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftx import hookimpl, option, plugin

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ftx import Run, Score


@plugin
class MLflow:
    """Sends the figures of a training, and the scores of base and tuned, to MLflow."""

    tracking_uri: str = option("", "A server, a database or a directory; empty: MLFLOW_TRACKING_URI, else mlruns/ beside the run's directory.")
    experiment: str = option("ftx", "The experiment that the run belongs to; made if there is none.")

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        return [] if find_spec("mlflow") else ["observer 'mlflow' needs mlflow: pip install mlflow-skinny"]

    @hookimpl
    def trainer_callbacks(self, run: Run) -> list[TrainerCallback]:
        if not run.is_main:
            return []
        mlflow = self._open(run)
        from transformers.integrations import MLflowCallback

        if mlflow.active_run() is None:  # transformers' callback takes the run that is open
            mlflow.start_run(run_name=Path(str(run.directory)).name, tags={"ftx.run": str(run.directory)})
        return [MLflowCallback()]

    @hookimpl
    def run_finished(self, run: Run, scores: list[Score]) -> None:
        mlflow = self._mine(run)
        if mlflow is not None:
            mlflow.log_metrics({f"{score.phase}/{score.evaluator}/{score.metric}".replace(":", "/"): score.value for score in scores})
            mlflow.end_run()

    @hookimpl
    def run_failed(self, run: Run) -> None:
        mlflow = self._mine(run)
        if mlflow is not None:
            mlflow.end_run("FAILED")

    def _open(self, run: Run) -> Any:
        assert run.directory is not None
        uri = self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or str(run.directory.path.parent / "mlruns")
        if "://" not in uri:  # a directory: mlflow asks for a word that one is wanted, a database being its default
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = Path(uri).expanduser().absolute().as_uri()
        import mlflow

        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(self.experiment)
        return mlflow

    def _mine(self, run: Run) -> Any:
        """mlflow, with its asynchronous writing done, if the open run is this one; None where training never began."""
        import sys

        mlflow: Any = sys.modules.get("mlflow")
        active = mlflow.active_run() if mlflow else None
        if active is None or active.data.tags.get("ftx.run") != str(run.directory):
            return None
        mlflow.flush_async_logging()
        return mlflow
