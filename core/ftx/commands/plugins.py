"""ftx plugins: list (imports nothing), show, new, check."""

from __future__ import annotations

import click

from ftx.commands.common import answering, echo, output_options


@click.group("plugins", invoke_without_command=True)
@click.pass_context
@output_options
def command(context: click.Context, quiet: bool, as_json: bool, traceback: bool) -> None:
    """List the installed plugins: stage, name, distribution, version, summary (or where it lies). Imports none of them."""
    if context.invoked_subcommand is not None:
        return
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx.catalogue import Catalogue

        entries = Catalogue().entries
        result.content = {
            "plugins": [{key: getattr(one, key) for key in ("stage", "name", "distribution", "version", "summary", "value", "location")} for one in entries]
        }
        if not entries:
            echo("No plugin is installed.")
        widths = [max((len(cell) for cell in column), default=0) for column in zip(*[(e.stage, e.name, e.origin) for e in entries], strict=True)]
        for e in entries:
            cells = [cell.ljust(width) for cell, width in zip((e.stage, e.name, e.origin), widths, strict=True)]
            echo("  ".join([*cells, e.summary or e.location]).rstrip())


@command.command("show")
@click.argument("stage")
@click.argument("name")
@output_options
def show(stage: str, name: str, quiet: bool, as_json: bool, traceback: bool) -> None:
    """Describe one plugin: its options with types, defaults and help, and the hooks it implements."""
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx.describe import described

        about = described(_stage(stage), name)
        result.content = about
        echo(f"{about['stage']} {about['name']} ({about['origin']})")
        echo(about["doc"])
        for what in ("accepts", "produces", "requires", "conflicts"):
            if about[what]:
                echo(f"{what}: {', '.join(about[what])}")
        if about["suggests"]:
            echo("suggests: " + ", ".join(f"{key}={value}" for key, value in about["suggests"].items()))
        echo("hooks: " + (", ".join(about["hooks"]) or "none"))
        if about["location"]:
            echo(f"installed in: {about['location']}")
        echo("options:" if about["options"] else "options: none")
        widths = [max(len(str(option[key])) for option in about["options"]) for key in ("name", "type", "default")] if about["options"] else []
        for option in about["options"]:
            cells = [str(option[key]).ljust(width) for key, width in zip(("name", "type", "default"), widths, strict=True)]
            echo("  " + "  ".join(cells) + f"  {option['help']}".rstrip())


@command.command("new")
@click.argument("stage")
@click.argument("name")
@click.option("--output", metavar="DIR", help="Where to write it (default: ./ftx-NAME).")
@output_options
def new(stage: str, name: str, output: str | None, quiet: bool, as_json: bool, traceback: bool) -> None:
    """Write a plugin to start from: an installable distribution of two files, and its contract test."""
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx.scaffold import write_plugin

        directory, files = write_plugin(_stage(stage), name, output)
        result.content = {"directory": str(directory), "files": files}
        echo(f"{directory}: {', '.join(files)}")
        echo(f"Install it: pip install -e {directory}    Examine it: ftx plugins check {directory.name}")


@command.command("check")
@click.argument("distribution")
@output_options
def check(distribution: str, quiet: bool, as_json: bool, traceback: bool) -> None:
    """Let every plugin of an installed distribution sit the exam (ftx.testing; needs pytest)."""
    with answering(as_json=as_json, traceback=traceback) as result:
        from ftx.testing.check import examine

        result.content = examine(distribution, quiet=quiet)


def _stage(stage: str) -> str:
    from ftx.catalogue import STAGES
    from ftx.errors import PluginError, did_you_mean

    if stage not in STAGES:
        raise PluginError(f"no stage is called '{stage}'.{did_you_mean(stage, STAGES)}", f"Stages: {', '.join(STAGES)}.")
    return stage
