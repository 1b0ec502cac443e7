"""Commands that distributions bring: click commands under the entry points of the group `ftx.command`."""

from __future__ import annotations

import click

from ftx.commands.common import answering


def command_names() -> list[str]:
    from ftx.catalogue import Catalogue

    return Catalogue().names("command")


def load_command(name: str) -> click.Command | None:
    """The command that a distribution brings under that name; None if none does. A broken one ends in its error and status."""
    with answering():
        from ftx.catalogue import Catalogue, load
        from ftx.errors import PluginError

        catalogue = Catalogue()
        if name not in catalogue.names("command"):
            return None
        entry = catalogue.find("command", name)
        command = load(entry)
        if not isinstance(command, click.Command):
            raise PluginError(f"command '{name}' ({entry.origin}): {entry.value} is no click command.", "Decorate the function with @click.command.")
        return command
    return None
