"""Write what the docs take from the code: options.md, commands.md, and the marked parts of hooks.md and README.md.

python docs/generate.py            write what is stale
python docs/generate.py --check    only name it; exit status 1 if there is any
"""

from __future__ import annotations

import inspect
import re
import sys
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

import click
from click.testing import CliRunner

from ftx import hookspecs
from ftx.catalogue import KINDS, STAGES, Catalogue
from ftx.cli import COMMANDS, main
from ftx.describe import described
from ftx.hooks import hook_names, stage_hooks

REPO = Path(__file__).resolve().parent.parent
WIDTH = 100

OPTIONS = """# Options

The options of every official plugin. This page is made by `python docs/generate.py`.

An option is given on the command line as `-o STAGE.OPTION=VALUE`, for an evaluator or observer as `-o NAME.OPTION=VALUE`, or in a
[recipe](recipes.md). `ftx plugins show STAGE NAME` prints the same table. A plugin may *suggest* options of other plugins: a
suggestion holds where neither the recipe nor `-o` says otherwise.
"""

COMMANDS_PAGE = """# Commands

What `--help` prints for each command. This page is made by `python docs/generate.py`.

| exit status | means |
|---|---|
| 0 | done |
| 1 | the run started and failed; what it had reached is kept |
| 2 | refused before it started; nothing was written |
| 130 | interrupted; `ftx resume RUN` goes on |

Errors, and with `--json` everything but the result, go to standard error. `python -m ftx` is the same as `ftx`.
"""


GALLERY = """# Gallery of plugins
"""
GALLERY_END = """## Yours

`ftx plugins new STAGE NAME` writes an installable distribution of two files with its exam; [writing a plugin](writing-a-plugin.md) goes on from
there. One that is installed is found: there is no list to be put on.
"""


def official() -> list[tuple[str, str, str]]:
    """(stage, name, distribution) of every plugin and command under plugins/, in the order of the stages, commands last."""
    found = []
    for file in sorted((REPO / "plugins").glob("*/pyproject.toml")):
        project = tomllib.loads(file.read_text("utf-8"))["project"]
        for group, points in project.get("entry-points", {}).items():
            stage = group.removeprefix("ftx.")
            found += [(stage, name, project["name"]) for name in points if stage in KINDS]
    return sorted(found, key=lambda one: (KINDS.index(one[0]), one[1]))


def about(stage: str, name: str, catalogue: Catalogue) -> dict[str, Any]:
    """`described`, with `suggests` as on a machine without a GPU and what one adds under `suggests_on_gpu`."""
    import torch

    with mock.patch.object(torch.cuda, "is_available", lambda: True):
        on_gpu = described(stage, name, catalogue)["suggests"]
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        found = described(stage, name, catalogue)
    return {**found, "suggests_on_gpu": {key: value for key, value in on_gpu.items() if found["suggests"].get(key) != value}}


# ---- pages ---------------------------------------------------------------------------------------------------------


def options_page(catalogue: Catalogue) -> str:
    parts = [OPTIONS]
    for stage in STAGES:
        plugins = [(name, distribution) for one, name, distribution in official() if one == stage]
        if plugins:
            parts.append(f"## {stage}\n")
        parts += [plugin_section(about(stage, name, catalogue), distribution) for name, distribution in plugins]
    return "\n".join(parts)


def plugin_section(plugin: dict[str, Any], distribution: str) -> str:
    lines = [f"### {plugin['stage']} {plugin['name']}", "", plugin["doc"], ""]
    facts = [f"Distribution: `{distribution}`."]
    facts += [f"{label}: {', '.join(plugin[what])}." for what, label in (("accepts", "Takes rows of type"), ("produces", "Gives rows of type")) if plugin[what]]
    facts += [f"{what.capitalize()}: {', '.join(f'`{one}`' for one in plugin[what])}." for what in ("requires", "conflicts") if plugin[what]]
    facts += [f"{label}: {assignments(plugin[what])}." for what, label in (("suggests", "Suggests"), ("suggests_on_gpu", "On a GPU also")) if plugin[what]]
    lines += [" ".join(facts), ""]
    if not plugin["options"]:
        return "\n".join([*lines, "No options.", ""])
    rows = [(f"`{one['name']}`", one["type"], f"`{one['default']}`", one["help"]) for one in plugin["options"]]
    return "\n".join([*lines, *table(("option", "type", "default", "what it is"), rows), ""])


def assignments(values: dict[str, Any]) -> str:
    return ", ".join(f"`{path}={value}`" for path, value in values.items())


def commands_page() -> str:
    parts = [COMMANDS_PAGE, help_section([])]
    for name in [*COMMANDS, *(name for stage, name, _ in official() if stage == "command")]:
        parts.append(help_section([name]))
        command = main.get_command(click.Context(main), name)
        if name == "plugins":
            parts.append(f"With the official plugins it prints:\n\n```text\n{listing()}```\n")
        parts += [help_section([name, sub]) for sub in getattr(command, "commands", {})]
    return "\n".join(parts)


def help_section(path: list[str]) -> str:
    result = CliRunner().invoke(main, [*path, "--help"], prog_name="ftx", terminal_width=WIDTH)
    assert result.exit_code == 0, result.output
    return f"## {' '.join(['ftx', *path])}\n\n```text\n{result.output.rstrip()}\n```\n"


def listing() -> str:
    """What `ftx plugins` prints where no other plugin is installed."""
    ours = {(stage, name, distribution) for stage, name, distribution in official()}
    points = [one.point for one in Catalogue().entries if (one.stage, one.name, one.distribution) in ours]
    with mock.patch("ftx.catalogue._installed", lambda: points):
        result = CliRunner().invoke(main, ["plugins"])
    assert result.exit_code == 0, result.output
    return result.output


def gallery_page() -> str:
    """Every distribution of the repository, official and contrib, with what it brings."""
    ours = {}
    for file in sorted(REPO.glob("*/*/pyproject.toml")):
        project = tomllib.loads(file.read_text("utf-8"))["project"]
        ours[project["name"]] = (file.parent.relative_to(REPO), project)

    def needed(name: str) -> list[str]:
        """The directories of a distribution and of all of ours that it requires, its own last."""
        folder, project = ours[name]
        others = [word for line in project["dependencies"] if (word := re.split(r"[<>=\[ ]", line)[0]) in ours]
        return list(dict.fromkeys([one for other in others for one in needed(other)] + [f"./{folder}"]))

    parts = [GALLERY]
    for title, words, parent in (
        ("Official", "Installed together by `ftx-suite`.", "plugins"),
        ("Contrib", "Same shape and tested, but no promise.", "contrib"),
    ):
        rows = []
        for name, (folder, project) in ours.items():
            if folder.parts[0] == parent:
                groups = project.get("entry-points", {}).items()
                brings = [f"{group.removeprefix('ftx.')} {', '.join(f'`{point}`' for point in points)}" for group, points in groups]
                rows.append((f"`{name}`", "; ".join(brings) or "used by others", project["description"], f"`pip install ./core {' '.join(needed(name))}`"))
        parts += [f"## {title}\n\n{words}\n", "\n".join(table(("distribution", "brings", "what it is", "install it alone"), rows)), ""]
    return "\n".join([*parts, GALLERY_END])


# ---- marked parts --------------------------------------------------------------------------------------------------


def hooks_part(catalogue: Catalogue) -> str:
    """Every hook from hookspecs.py: arguments, owner, text, and the official plugins that implement it."""
    implemented = {(stage, name): described(stage, name, catalogue)["hooks"] for stage, name, _ in official() if stage in STAGES}
    parts = []
    for name in hook_names():
        function = getattr(hookspecs, name)
        signature = inspect.signature(function)
        kind = "Stage hook: at most one owner in a run." if name in stage_hooks() else "Gathering hook: every chosen plugin may answer."
        types = ", ".join(f"`{p.name}: {p.annotation}`" for p in signature.parameters.values()) or "no arguments"
        who = [plugin for (_, plugin), hooks in implemented.items() if name in hooks]
        parts.append(
            f"### {name}({', '.join(signature.parameters)})\n\n{inspect.getdoc(function)}\n\n"
            f"{kind} Takes {types}; gives `{signature.return_annotation}`.\n\n"
            f"Implemented by: {', '.join(f'`{one}`' for one in who) or 'no official plugin yet'}.\n"
        )
    return "\n".join(parts)


def plugins_part(catalogue: Catalogue) -> str:
    """The table of official plugins."""
    rows = []
    for stage, name, distribution in official():
        if stage == "command":
            words = main.get_command(click.Context(main), name).get_short_help_str(WIDTH)
            rows.append((stage, f"[`ftx {name}`](docs/commands.md#ftx-{name})", f"`{distribution}`", words))
            continue
        summary = described(stage, name, catalogue)["doc"].split("\n\n")[0].replace("\n", " ")
        rows.append((stage, f"[`{name}`](docs/options.md#{stage}-{name})", f"`{distribution}`", summary))
    return "\n".join(table(("stage", "plugin", "distribution", "what it does"), rows)) + "\n"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    cells = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    return [f"| {' | '.join(row)} |" for row in [header]] + ["|" + "---|" * len(header)] + [f"| {' | '.join(row)} |" for row in cells]


def filled(text: str, part: str, content: str) -> str:
    """`text` with `content` between the two comments that mark `part`."""
    begin, end = f"<!-- generated: {part} -->\n", "<!-- end of generated -->"
    marked = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    assert len(marked.findall(text)) == 1, f"no place is marked for the part '{part}'"
    return marked.sub(lambda _: f"{begin}\n{content}\n{end}", text)


def generated() -> dict[Path, str]:
    """Every file that has generated text, and what it should hold."""
    catalogue, hooks, readme = Catalogue(), REPO / "docs" / "hooks.md", REPO / "README.md"
    return {
        REPO / "docs" / "options.md": options_page(catalogue),
        REPO / "docs" / "commands.md": commands_page(),
        REPO / "docs" / "gallery.md": gallery_page(),
        hooks: filled(hooks.read_text("utf-8"), "hooks", hooks_part(catalogue)),
        readme: filled(readme.read_text("utf-8"), "plugins", plugins_part(catalogue)),
    }


def stale() -> dict[Path, str]:
    """Those of them that hold something else."""
    return {file: text for file, text in generated().items() if not file.exists() or file.read_text("utf-8") != text}


if __name__ == "__main__":
    old = stale()
    for file, text in old.items():
        if "--check" not in sys.argv:
            file.write_text(text, encoding="utf-8")
        print(f"{'stale' if '--check' in sys.argv else 'written'}: {file.relative_to(REPO)}")
    sys.exit(bool(old) and "--check" in sys.argv)
