"""The exams of the commands `chat` and `generate`."""

from ftx.testing import CommandContract


class TestChat(CommandContract):
    name = "chat"


class TestGenerate(CommandContract):
    name = "generate"
