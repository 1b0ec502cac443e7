"""ftx doctor: the environment, and each installed plugin's own checks."""

from __future__ import annotations

import click

from ftx.commands.common import answering, output_options


@click.command("doctor")
@output_options
def command(quiet: bool, as_json: bool, traceback: bool) -> None:
    """Check this machine: a line each, ok, warning or failure, and what to do. Exit status 1 if a default would fail."""
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx.doctor import examine_environment, split_line
        from ftx.errors import RunError, printable

        lines = [printable(line) for line in examine_environment()]
        result.content = {"checks": [split_line(line) for line in lines]}
        for line in lines:
            if not quiet or line.startswith("failure"):
                click.echo(line)
        failures = sum(line.startswith("failure") for line in lines)
        if failures:
            raise RunError(f"{failures} {'check' if failures == 1 else 'checks'} failed.", "Mend what the failures name: what is chosen by default needs it.")
