"""`ftx plugins check DIST`: every plugin of an installed distribution sits the exam of its stage, under pytest."""

from __future__ import annotations

import importlib.metadata as metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import click

from ftx import testing
from ftx.catalogue import Catalogue, Entry
from ftx.errors import PluginError, RunError, did_you_mean

#: What pytest collects: the contract classes, made from the distribution's entry points.
MODULE = """from ftx.testing.check import contracts

globals().update(contracts({distribution!r}))
"""


def examine(distribution: str, quiet: bool = False) -> dict[str, Any]:
    """Examine an installed distribution and print pytest's report (with `quiet` only when a test fails): how many tests
    passed and how many were skipped. Raises PluginError if there is nothing to examine, RunError if a test fails."""
    plugins_of(distribution)
    if importlib.util.find_spec("pytest") is None:
        raise PluginError("the exam needs pytest, which is not installed.", "pip install pytest")
    with tempfile.TemporaryDirectory(prefix="ftx-exam-") as scratch:
        folder = Path(scratch)
        (folder / "test_exam.py").write_text(MODULE.format(distribution=distribution), encoding="utf-8")
        (folder / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-rs", "--disable-warnings", "-p", "no:cacheprovider", "--junit-xml=report.xml"]
        said = []
        with subprocess.Popen(command, cwd=folder, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            for line in process.stdout or []:
                said.append(line)
                if not quiet:
                    click.echo(line, nl=False)
        counts = _counts(folder / "report.xml")
    failed, total = counts["failures"] + counts["errors"], counts["tests"]
    if quiet and (failed or not total):
        click.echo("".join(said), nl=False)
    if not total:
        raise RunError(f"{distribution}: the exam could not be held.", "pytest says why above.")
    if failed:
        raise RunError(f"{distribution}: {failed} of {total} tests failed.", "The report above says what each of them wants.")
    return {"distribution": distribution, "passed": total - counts["skipped"], "failed": 0, "skipped": counts["skipped"]}


def plugins_of(distribution: str) -> list[Entry]:
    """The plugins of an installed distribution; PluginError if it is not installed or has none."""
    try:
        found = metadata.distribution(distribution)
    except (metadata.PackageNotFoundError, ValueError) as error:
        known = sorted({entry.distribution for entry in Catalogue().entries})
        raise PluginError(
            f"no distribution is called '{distribution}'.{did_you_mean(distribution, known)}",
            f"Installed, with plugins: {', '.join(known)}." if known else "Install it first: pip install -e DIRECTORY",
        ) from error
    entries = Catalogue(found.entry_points).entries
    if not entries:
        raise PluginError(f"{distribution} has no plugin: no entry point in a group such as ftx.adapter.", "See docs/writing-a-plugin.md.")
    return entries


def contracts(distribution: str) -> dict[str, type[Any]]:
    """A test class for each plugin of a distribution, by the name that pytest shows."""
    made: dict[str, type[Any]] = {}
    for entry in plugins_of(distribution):
        label = f"Test_{entry.stage}_{entry.name}".replace("-", "_")
        if entry.stage == "command":
            made[label] = type(label, (testing.CommandContract,), {"name": entry.name})
            continue
        try:
            cls = Catalogue([entry.point]).load(entry.stage, entry.name)
            made[label] = type(label, (getattr(testing, f"{entry.stage.capitalize()}Contract"),), {"plugin": cls})
        except Exception as error:  # one that does not load fails alone
            made[label] = type(label, (), {"test_it_loads": _failing(error)})
    return made


def _failing(error: Exception) -> Any:
    def test_it_loads(self: Any) -> None:
        raise error

    return test_it_loads


def _environment() -> dict[str, str]:
    """The same packages as here, whatever way they came onto the path; no pytest settings or plugins of the person's; and
    one thread, because on the tiny model several only wait for one another."""
    path = os.pathsep.join(place or os.getcwd() for place in sys.path)
    own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return {"OMP_NUM_THREADS": "1", **os.environ, **own}


def _counts(report: Path) -> dict[str, int]:
    """pytest's own count of its tests; zeros if it wrote none."""
    suite = xml.etree.ElementTree.parse(report).find("testsuite") if report.exists() else None
    return {name: int(suite.get(name, 0)) if suite is not None else 0 for name in ("tests", "failures", "errors", "skipped")}
