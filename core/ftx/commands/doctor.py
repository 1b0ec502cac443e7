"""ftx doctor: the environment, and each installed plugin's own checks."""

from __future__ import annotations

import click

from ftx.commands.common import answering, output_options


@click.command("doctor")
@output_options
def command(quiet: bool, as_json: bool, traceback: bool) -> None:
    """Check this machine: a line each, ok, warning or failure. Exit status 1 if a default would fail."""
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx.doctor import examine_environment
        from ftx.errors import RunError

        lines = examine_environment()
        result.content = {"checks": [dict(zip(("status", "what"), line.split(": ", 1), strict=True)) for line in lines]}
        for line in lines:
            if not quiet or line.startswith("failure"):
                click.echo(line)
        failures = sum(line.startswith("failure") for line in lines)
        if failures:
            raise RunError(f"{failures} checks failed.", "Mend what the failures name; runs that do not use it are not affected.")
