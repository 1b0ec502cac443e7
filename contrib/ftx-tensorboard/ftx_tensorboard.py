"""The observer `tensorboard`: transformers' own TensorBoardCallback, and the scores of base and tuned."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from ftx import hookimpl, option, plugin

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ftx import Run, Score


@plugin
class TensorBoard:
    """Sends the figures of a training, and the scores of base and tuned, to TensorBoard."""

    directory: str = option("", "Where the event files go; empty: tensorboard/ in the run's directory. Look with: tensorboard --logdir DIR")

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        return [] if find_spec("tensorboard") else ["observer 'tensorboard' needs tensorboard: pip install tensorboard"]

    @hookimpl
    def trainer_callbacks(self, run: Run) -> list[TrainerCallback]:
        from torch.utils.tensorboard import SummaryWriter
        from transformers.integrations import TensorBoardCallback

        return [TensorBoardCallback(SummaryWriter(self._place(run)))] if run.is_main else []

    @hookimpl
    def run_finished(self, run: Run, scores: list[Score]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if run.is_main and scores:
            with SummaryWriter(self._place(run)) as writer:
                for score in scores:
                    writer.add_scalar(f"{score.phase}/{score.evaluator}/{score.metric}", score.value, 0)

    def _place(self, run: Run) -> str:
        assert run.directory is not None
        return str(Path(self.directory).expanduser() if self.directory else run.directory / "tensorboard")
