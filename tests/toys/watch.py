"""The benchmark's clock as an observer of `ftx run`."""

from __future__ import annotations

from clock import Watch

from ftx import hookimpl, option, plugin


@plugin
class Probe:
    """Gives the trainer the clock that a plain script has, too."""

    file: str = option("", "Where the notes go.")

    @hookimpl
    def trainer_callbacks(self, run):
        return [Watch(self.file)]
