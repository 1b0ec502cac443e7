"""ftx report: the page of a run, or one that compares several."""

from __future__ import annotations

from pathlib import Path

import click

from ftx.commands.common import answering, output_options


@click.command("report")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--observer", metavar="NAME", default="report", show_default=True, help="The observer that makes the page.")
@click.option("--output", metavar="FILE", help="Where to write it (default: report.html in RUN; of several compare.html in the first).")
@click.option("--open", "show", is_flag=True, help="Open it in a browser.")
@click.option("-o", "--option", "assignments", metavar="NAME.K=V", multiple=True, help="An option of the observer; repeatable.")
@output_options
def command(
    runs: tuple[str, ...], observer: str, output: str | None, show: bool, assignments: tuple[str, ...], quiet: bool, as_json: bool, traceback: bool
) -> None:
    """Write one page about RUN from what lies in its directory, or one page that compares several RUNs. Nothing is loaded or measured anew.

    A run's own options of the observer hold for a page of that run alone.
    """
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx.catalogue import Catalogue
        from ftx.console import Console
        from ftx.readback import render

        console = Console(quiet=quiet, json=as_json)
        file = render(runs, observer, assignments, Catalogue(), Path(output) if output else None)
        console.say(f"report: {file}")
        result.content = {"report": str(file)}
        if show:
            import webbrowser

            if not webbrowser.open(file.as_uri()):
                console.say("no browser was found: open the file by hand.")
