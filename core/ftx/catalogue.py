"""Installed plugins by stage and name, without importing them; stevedore turns the one that is named into its class."""

from __future__ import annotations

import importlib.metadata as metadata
import logging
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import stevedore
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from ftx import __version__
from ftx.authoring import is_plugin
from ftx.errors import PluginError, did_you_mean

log = logging.getLogger("ftx")

STAGES = ("formatter", "quantizer", "adapter", "trainer", "evaluator", "exporter", "observer")
#: What distributions bring: plugins of the stages, and commands (`ftx NAME`), which are click commands and no plugins.
KINDS = (*STAGES, "command")

#: A plugin's name, or module:Class. It becomes the name of a directory under eval/, so it must not lead anywhere else.
NAME = re.compile(r"[A-Za-z0-9][\w.-]*|[A-Za-z_]\w*(\.\w+)*:\w+")


@dataclass(frozen=True)
class Entry:
    """One installed plugin: what its metadata says, nothing imported."""

    stage: str
    name: str
    value: str
    distribution: str
    version: str
    summary: str
    location: str
    point: metadata.EntryPoint

    @property
    def origin(self) -> str:
        return f"{self.distribution} {self.version}".strip()


class Catalogue:
    """The plugins that a process can choose from: one scan of the installed metadata, or the entries given (tests)."""

    def __init__(self, points: Iterable[metadata.EntryPoint] | None = None) -> None:
        if points is None:
            points = _installed()
        seen: dict[tuple[str, ...], Entry] = {}
        for point in points:
            stage = point.group.removeprefix("ftx.")
            if point.group.startswith("ftx.") and stage in KINDS:
                entry = _entry(stage, point)
                # editable installs and lib64 links list the same plugin twice: equal ones are one
                seen.setdefault((stage, entry.name, entry.value, re.sub(r"[-_.]+", "-", entry.distribution).lower()), entry)
        self.entries = sorted(seen.values(), key=_order)

    def names(self, stage: str) -> list[str]:
        return sorted({entry.name for entry in self.entries if entry.stage == stage})

    def find(self, stage: str, name: str) -> Entry:
        """The one plugin of that name. `module:Class` names a class that is not packaged. PluginError if none or several."""
        if not NAME.fullmatch(name):
            raise PluginError(f"'{name}' cannot be a {stage}'s name.", "A name has letters, digits, . _ and -; a class that is not packaged is module:Class.")
        if ":" in name:
            return Entry(stage, name, name, "not packaged", "", "", "", metadata.EntryPoint(name, name, f"ftx.{stage}"))
        found = [entry for entry in self.entries if entry.stage == stage and entry.name == name]
        if not found:
            names = self.names(stage)
            raise PluginError(
                f"no {stage} is called '{name}'.{did_you_mean(name, names)}",
                f"Installed: {', '.join(names)}." if names else f"No {stage} is installed: pip install one.",
            )
        if len(found) > 1:
            raise PluginError(
                f"{'two' if len(found) == 2 else len(found)} {stage}s are called '{name}': "
                + " and ".join(f"{one.origin} ({one.value})" for one in found)
                + ".",
                f"Uninstall one, or name the class: --{stage} {found[-1].value}",
            )
        return found[0]

    def load(self, stage: str, name: str) -> type[Any]:
        """Import the plugin that is called so and give its class; PluginError, with a way out, if that cannot be."""
        entry = self.find(stage, name)
        cls: Any = load(entry)
        if not is_plugin(cls):
            what = "a class without @plugin" if isinstance(cls, type) else f"a {type(cls).__name__}, not a class"
            raise PluginError(
                f"{stage} '{name}' ({entry.origin}): {entry.value} is {what}.", "Decorate the class with @ftx.plugin and name it in the entry point."
            )
        loaded: type[Any] = cls
        return loaded


def load(entry: Entry) -> Any:
    """Import what an entry names; PluginError, with a way out, if that cannot be."""
    _check_version(entry)
    if ":" in entry.name and "" not in sys.path:
        sys.path.insert(0, "")  # a class named by hand lives beside the user, as with `python -m`
    try:
        return _Driver(f"ftx.{entry.stage}", entry.name, entry.point).extensions[0].plugin
    except (Exception, SystemExit) as error:
        raise _broken(entry, error) from error


class _Driver(stevedore.DriverManager[Any]):
    """stevedore's driver over the catalogue's own scan: its disk cache loses versions, misses editable reinstalls made
    within two minutes (float32 times) and is written by several processes at once."""

    def __init__(self, group: str, name: str, point: metadata.EntryPoint) -> None:
        self._point = point
        super().__init__(group, name, on_load_failure_callback=_raise)

    def list_entry_points(self) -> list[metadata.EntryPoint]:
        return [self._point]


def _raise(manager: Any, point: Any, error: BaseException) -> None:
    raise error


def _installed() -> list[metadata.EntryPoint]:
    """Every entry point of the kinds from one scan; metadata that cannot be read costs only its own distribution."""
    try:
        installed = metadata.entry_points()  # selected by group, because Python 3.11 iterates over group names
        found = [point for kind in KINDS for point in installed.select(group=f"ftx.{kind}")]
    except Exception:
        found = []
        for distribution in metadata.distributions():
            try:
                found += distribution.entry_points
            except Exception:
                log.warning("%s: its entry points cannot be read", distribution.locate_file(""))
    return found


def _order(entry: Entry) -> tuple[Any, ...]:
    """By stage and name; of two with the same name ours stands first, so that the other is the one to name by its class."""
    return KINDS.index(entry.stage), entry.name, not entry.distribution.startswith("ftx-"), entry.distribution


def _entry(stage: str, point: metadata.EntryPoint) -> Entry:
    distribution = point.dist
    if distribution is None:
        return Entry(stage, point.name, point.value, "unknown", "", "", "", point)
    try:
        about: Any = distribution.metadata
    except Exception:  # not UTF-8, for one: it must not break the list of the others
        about = {"Name": None, "Version": None, "Summary": None}
    return Entry(
        stage,
        point.name,
        point.value,
        about["Name"] or "unknown",
        about["Version"] or "",
        about["Summary"] or "",
        str(distribution.locate_file("")),
        point,
    )


def _check_version(entry: Entry) -> None:
    """pip checks the requirement at install; a later upgrade of the core alone does not, so look again."""
    for line in (entry.point.dist.requires or []) if entry.point.dist else []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        if canonicalize_name(requirement.name) == "ftx-core" and not requirement.specifier.contains(__version__, prereleases=True):
            raise PluginError(
                f"{entry.stage} '{entry.name}' ({entry.origin}) needs ftx-core{requirement.specifier}, this is ftx-core {__version__}.",
                f"pip install -U ftx-core {entry.distribution}",
            )


def _broken(entry: Entry, error: BaseException) -> PluginError:
    origin = f" ({entry.origin})" if entry.version else ""
    if isinstance(error, SystemExit):
        why = f"it ends the program on import (SystemExit: {error.code})"
    elif not re.fullmatch(r"[\w.]+\s*(:\s*[\w.]+\s*)?(\[.*\]\s*)?", entry.value):
        why = f"its entry point '{entry.value}' is not of the form module:Class"
    else:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    remedy = f"pip install {missing}, or see it all with --traceback." if missing else "See it all with --traceback."
    if missing and missing == entry.value.partition(":")[0].partition(".")[0]:
        packaged = ":" not in entry.name
        remedy = f"Install it again: pip install --force-reinstall {entry.distribution}" if packaged else "The module must lie here or be installed."
    log.debug("loading %s failed", entry.value, exc_info=error)
    return PluginError(f"{entry.stage} '{entry.name}'{origin} could not be loaded: {why}", remedy)
