"""The exam of the command `advise`."""

from ftx.testing import CommandContract


class TestAdvise(CommandContract):
    name = "advise"
