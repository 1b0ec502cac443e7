"""The exam for a command that a distribution brings (an entry point of the group `ftx.command`)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import ClassVar

import click
from click.testing import CliRunner

from ftx.catalogue import Catalogue, load
from ftx.testing.common import HEAVY


class CommandContract:
    """Subclass it in a test file with `name`, the command's name: `ftx NAME`."""

    name: ClassVar[str]

    def test_it_is_a_command(self) -> None:
        """The entry point leads to a click command."""
        assert isinstance(self._command(), click.Command), f"ftx {self.name}: decorate the function with @click.command"

    def test_its_import_is_light(self) -> None:
        """Importing the module loads no machine-learning library: `ftx NAME --help` answers at once."""
        module = Catalogue().find("command", self.name).value.partition(":")[0]
        code = f"import sys, importlib; importlib.import_module({module!r}); print(*(n for n in {HEAVY!r} if n in sys.modules))"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"importing {module} fails:\n{result.stderr}"
        assert not result.stdout.split(), f"importing {module} loads {', '.join(result.stdout.split())}: import them inside the command"

    def test_it_says_what_it_does(self) -> None:
        """The command, its subcommands and every option have help."""
        for path, command in _all([self.name], self._command()):
            said = " ".join(["ftx", *path])
            assert (command.help or "").strip(), f"{said} has no help: give the function a docstring"
            bare = [option.opts[0] for option in command.params if isinstance(option, click.Option) and not (option.help or "").strip()]
            assert not bare, f"{said}: {', '.join(bare)} has no help"
            assert CliRunner().invoke(command, ["--help"]).exit_code == 0, f"{said} --help fails"

    def test_it_hides_no_command_of_the_core(self) -> None:
        """The core's own commands go first, so a command of their name could never be called."""
        from ftx.cli import COMMANDS

        assert self.name not in COMMANDS, f"'{self.name}' is a command of the core: choose another name"

    def _command(self) -> click.Command:
        command: click.Command = load(Catalogue().find("command", self.name))
        return command


def _all(path: list[str], command: click.Command) -> Iterator[tuple[list[str], click.Command]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _all([*path, name], inner)
