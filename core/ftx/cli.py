"""The command table. Imports click and nothing else: a command's module is imported when the command is called."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import click

from ftx import __version__

#: Command -> one line of help. The module is ftx.commands.NAME, its command is called `command`.
COMMANDS = {
    "run": "Fine-tune: resolve, check, train, evaluate base and tuned.",
    "plan": "Predict memory, time and disk of a run before anything is loaded.",
    "resume": "Go on with a run that was interrupted.",
    "rerun": "Repeat a run in a new directory: is the result equal?",
    "compare": "Show what differs between runs in recipe, versions, data and scores.",
    "eval": "Evaluate a finished run again, base and tuned.",
    "report": "Write and open the page of a run, or one that compares several.",
    "export": "Hand a finished run on in another form, read back and checked.",
    "models": "List recommended models, and which fit this machine.",
    "plugins": "List, describe, scaffold and examine plugins.",
    "doctor": "Look at the environment and at each installed plugin's needs.",
}


class Commands(click.Group):
    """click's own group would import every command for --help and for its suggestions."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in COMMANDS:
            command: click.Command = import_module(f"ftx.commands.{name}").command
            return command
        from ftx.commands.brought import load_command

        return load_command(name)

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            from ftx.commands.brought import command_names

            names = [*COMMANDS, *command_names()]
            if args[0] not in names:
                close = difflib.get_close_matches(args[0], names, n=1)
                hint = f" Did you mean '{close[0]}'?" if close else ""
                raise click.UsageError(f"no command is called '{args[0]}'.{hint}\n       Commands: {', '.join(names)}.")
        return super().resolve_command(context, args)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))
        formatter.write_paragraph()
        formatter.write_text("Distributions bring more commands: `ftx plugins` lists them.")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ftx")
def main() -> None:
    """ftx fine-tunes language models out of plugins, chosen by name.

    Start with: ftx run --model smollm2 --data FILE
    """
    from ftx import startup

    startup.begin()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its allocator warns of each measured step: see ftx.measure
