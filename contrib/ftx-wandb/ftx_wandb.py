"""The observer `wandb`: transformers' own WandbCallback in a run that also gets the scores of base and tuned."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

from ftx import hookimpl, option, plugin

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from ftx import Run, Score


@plugin
class WandB:
    """Sends the figures of a training, and the scores of base and tuned, to Weights & Biases."""

    project: str = option("ftx", "The project that the run belongs to.")
    mode: Literal["auto", "online", "offline"] = option("auto", "auto does what WANDB_MODE says, else online; offline writes wandb/ in the run's directory.")

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        if not find_spec("wandb"):
            return ["observer 'wandb' needs wandb: pip install wandb"]
        if self._mode() == "online":
            import wandb

            if not wandb.api.api_key:  # else it would ask for one, or fail, when the base is evaluated already
                return ["observer 'wandb' is online and knows no key: set WANDB_API_KEY, or -o wandb.mode=offline (later: wandb sync)"]
        return []

    @hookimpl
    def trainer_callbacks(self, run: Run) -> list[TrainerCallback]:
        if not run.is_main:
            return []
        import wandb
        from transformers.integrations import WandbCallback

        assert run.directory is not None
        # quiet, and without its own copy of the terminal: --json and the panel need theirs whole. transformers' callback takes the run that is open
        settings = wandb.Settings(console="off", silent=True)
        name, place = run.directory.path.name, str(run.directory)
        wandb.init(project=self.project, name=name, group=name, dir=place, mode=self._mode(), settings=settings, config={"ftx": {"run": place}})
        return [WandbCallback()]

    @hookimpl
    def run_finished(self, run: Run, scores: list[Score]) -> None:
        opened = self._mine(run)
        if opened is not None:
            opened.summary.update({f"{score.phase}/{score.evaluator}/{score.metric}": score.value for score in scores})
            opened.finish()

    @hookimpl
    def run_failed(self, run: Run) -> None:
        opened = self._mine(run)
        if opened is not None:
            opened.finish(exit_code=1)

    def _mode(self) -> str:
        return os.environ.get("WANDB_MODE", "online") if self.mode == "auto" else self.mode

    def _mine(self, run: Run) -> Any:
        """The open run of wandb if it is this one; None where training never began."""
        import sys

        opened = getattr(sys.modules.get("wandb"), "run", None)
        return opened if opened is not None and (opened.config.get("ftx") or {}).get("run") == str(run.directory) else None
