"""A plugin whose module imports an ML library as soon as it is named."""

import datasets

from ftx import hookimpl, plugin


@plugin
class Heavy:
    """Says which version of datasets there is."""

    @hookimpl
    def run_started(self, run):
        run.say(datasets.__version__)
