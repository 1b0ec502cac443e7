"""Installed distributions made by hand: metadata directories and modules in a folder, as pip would leave them."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

GOOD = '''
"""A plugin that works."""
from ftx import hookimpl, option, plugin


@plugin
class {name}:
    """The plugin {name}."""

    r: int = option(8, "Rank.")

    @hookimpl
    def check_environment(self):
        return ["ok: {name} is here"]
'''


def install(
    folder: Path, name: str, points: dict[str, str], *, version: str = "1.0", requires: tuple[str, ...] = (), summary: str = "A test.", **modules: str
) -> Path:
    """Lay a distribution's metadata and modules into `folder`. `points`: "adapter:lora" -> "module:Class"."""
    folder.mkdir(parents=True, exist_ok=True)
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    needs = "".join(f"Requires-Dist: {line}\n" for line in requires)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: {summary}\n{needs}", encoding="utf-8")
    lines = []
    for key, value in points.items():
        stage, _, plugin = key.partition(":")
        lines += [f"[ftx.{stage}]", f"{plugin} = {value}"]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for module, text in modules.items():
        (folder / f"{module}.py").write_text(text, encoding="utf-8")
    return info


def points_in(*folders: Path) -> list[metadata.EntryPoint]:
    """The entry points of all distributions in these folders, in order."""
    return [point for folder in folders for one in metadata.distributions(path=[str(folder)]) for point in one.entry_points]
