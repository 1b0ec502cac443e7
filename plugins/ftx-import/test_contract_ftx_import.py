"""The exam of the command `import`."""

from ftx.testing import CommandContract


class TestImport(CommandContract):
    name = "import"
