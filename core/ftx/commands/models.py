"""ftx models: the recommended models, and which fit this machine."""

from __future__ import annotations

import click

from ftx.commands.common import answering, output_options


@click.command("models")
@click.option("--device-memory", metavar="SIZE", help="Mark what fits a GPU with so much memory, such as 24GB, not this machine.")
@output_options
def command(device_memory: str | None, quiet: bool, as_json: bool, traceback: bool) -> None:
    """List recommended models with what they need under each installed adapter: one row of 512 tokens at a time, activations
    recomputed. What does not fit stands in brackets."""
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx.catalogue import Catalogue
        from ftx.console import Console
        from ftx.recommended import list_models

        result.content = list_models(Catalogue(), Console(quiet=quiet, json=as_json), device_memory)
