"""The command `ftx import`: a recipe out of another system's configuration, and what became of each of its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ftx.commands.common import answering, output_options


@click.group("import")
def command() -> None:
    """Turn a configuration of another fine-tuning system into a recipe.

    The recipe goes to standard output or --output; what carried over, what ftx needs no key for and what has no
    counterpart is listed on standard error.
    """


def _options(function: Any) -> Any:
    for option in (
        click.argument("config"),
        click.option("--output", metavar="FILE", help="Where to write the recipe (default: standard output)."),
        click.option("--force", is_flag=True, help="Write over an existing FILE."),
        output_options,
    ):
        function = option(function)
    return function


@command.command("axolotl")
@_options
def axolotl(config: str, output: str | None, force: bool, quiet: bool, as_json: bool, traceback: bool) -> None:
    """Read CONFIG, the YAML that `axolotl train` takes."""
    _run("ftx_import_axolotl", config, output, force, quiet, as_json, traceback)


@command.command("llamafactory")
@_options
def llamafactory(config: str, output: str | None, force: bool, quiet: bool, as_json: bool, traceback: bool) -> None:
    """Read CONFIG, the YAML or JSON that `llamafactory-cli train` takes; names of datasets are looked up in its dataset_info.json."""
    _run("ftx_import_llamafactory", config, output, force, quiet, as_json, traceback)


def _run(module: str, config: str, output: str | None, force: bool, quiet: bool, as_json: bool, traceback: bool) -> None:
    with answering(as_json=as_json, traceback=traceback) as result:
        from importlib import import_module

        import yaml

        from ftx.errors import RecipeError
        from ftx.run import write_text
        from ftx_import_translation import read_config

        if output is not None and Path(output).exists() and not force:
            raise RecipeError(f"{output} exists.", "Give another --output, or --force to write over it.")
        done = import_module(module).translate(read_config(Path(config)))
        check(done.recipe)
        text = yaml.safe_dump(done.recipe, sort_keys=False, allow_unicode=True)
        result.content = {"recipe": done.recipe, "carried": done.carried, "needless": done.needless, "lost": done.lost, "assumed": done.assumed}
        if output is not None:
            write_text(Path(output), text)
        elif not as_json:
            click.echo(text, nl=False)
        if not quiet:
            report(done)


def check(content: dict[str, Any]) -> None:
    """Resolve the recipe, so that what is written is one: the plugins are there, and take these options. Raises FtxError."""
    from ftx.catalogue import Catalogue
    from ftx.recipe import merge, resolve

    resolve(merge(content, {}), Catalogue())


def report(done: Any) -> None:
    """What became of each key, on standard error."""
    parts = (
        ("carried over", done.carried),
        (f"{done.system}'s defaults, written out", done.assumed),
        ("needed no more", done.needless),
        ("WITHOUT A COUNTERPART", done.lost),
    )
    for title, entries in parts:
        if entries:
            click.echo(f"{title}:", err=True)
            width = max(len(key) for key in entries)
            for key, words in entries.items():
                click.echo(f"  {key.ljust(width)}  {words}", err=True)
