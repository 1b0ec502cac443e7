"""docs/writing-a-plugin.md, word by word: its files are those of examples/ftx-hello, its commands print what it says."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import pytest
from support import REPO

from ftx.testing import ftx

PAGE = (REPO / "docs" / "writing-a-plugin.md").read_text("utf-8")
HELLO = REPO / "examples" / "ftx-hello"
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def section(title: str) -> list[tuple[str, str]]:
    """The blocks below a heading: (language, text)."""
    _, found, rest = PAGE.partition(f"\n## {title}\n")
    assert found, f"no heading {title}"
    return BLOCK.findall(rest.partition("\n## ")[0])


def commands() -> dict[str, str]:
    """Every command of the page and what it prints there."""
    lines = "".join(text for language, text in BLOCK.findall(PAGE) if language == "console")
    return {command: output for command, output in re.findall(r"^\$ (.*)\n((?:[^$].*\n)*)", lines, re.MULTILINE)}


def full_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed the plugin."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--target", folder, HELLO]
    subprocess.run(command, check=True)
    return str(folder)


@pytest.mark.parametrize("file", ["pyproject.toml", "ftx_hello.py", "test_ftx_hello.py"])
def test_the_page_holds_the_whole_file(file):
    """Its blocks, one after the other, are the file; only empty lines between them are free."""
    language = "toml" if file.endswith("toml") else "python"
    blocks = section(f"`{file}`")
    assert {name for name, _ in blocks} == {language}
    assert full_lines("".join(text for _, text in blocks)) == full_lines((HELLO / file).read_text("utf-8"))


def test_the_plugin_is_what_new_writes(tmp_path, monkeypatch):
    """And `ftx plugins new` prints what the page says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ftx.catalogue.Catalogue.__init__", lambda self: setattr(self, "entries", []))  # hello may be installed here
    command = "ftx plugins new adapter hello"
    result = ftx(*command.split()[1:])
    assert result.exit_code == 0 and result.output == commands()[command]
    written = {file.name: file.read_text("utf-8") for file in (tmp_path / "ftx-hello").iterdir()}
    assert written == {name: (HELLO / name).read_text("utf-8") for name in written}


def test_show_prints_what_the_page_says(site, process):
    command = "ftx plugins show adapter hello"
    result = process(*command.split()[1:], PYTHONPATH=site)
    assert result.returncode == 0 and result.stdout.replace(site, "lib/python3.11/site-packages") == commands()[command]


def test_check_prints_what_the_page_says(site, process):
    command = "ftx plugins check ftx-hello"
    result = process(*command.split()[1:], PYTHONPATH=site, OMP_NUM_THREADS="1")

    def timeless(text: str) -> str:
        return re.sub(r"(, \d+ warnings)? in [\d.]+s( \(.*\))?", " in a moment", text)

    assert result.returncode == 0 and timeless(result.stdout) == timeless(commands()[command])


def test_the_run_works(site, process, tiny, tmp_path):
    """As the page has it, but one step of the tiny model."""
    command = "ftx run --adapter hello --data examples/data/products-train.jsonl"
    assert command in commands()
    words = [str(REPO / word) if word.startswith("examples/") else word for word in command.split()[1:]]
    short = ("--model", str(tiny), "--output", str(tmp_path / "run"), "-o", "trainer.max_steps=1", "--dtype", "float32")
    result = process(*words, *short, PYTHONPATH=site)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "model" / "factors.safetensors").is_file()


def test_every_command_is_tested():
    tested = inspect.getsource(sys.modules[__name__])
    untested = {command for command in commands() if f'command = "{command}"' not in tested}
    assert untested == {"pip install -e ftx-hello"}, "the fixture installs it"


def test_the_table_of_stages_is_true():
    """Hooks that a stage must have, as the contracts have them; and every attribute that it names is one of the contract."""
    import ftx.testing
    from ftx.catalogue import STAGES

    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[0] in STAGES]
    assert sorted(row[0] for row in rows) == sorted(STAGES)
    for stage, hooks, _, needs in rows:
        contract = getattr(ftx.testing, f"{stage.capitalize()}Contract")
        assert tuple(re.findall(r"`(\w+)`", hooks)) == contract.needs
        assert all(hasattr(contract, name) for name in re.findall(r"`(\w+)`", needs) if name != "max_steps")


def test_the_names_of_ftx_testing_are_there():
    import ftx.testing

    named = set(re.findall(r"`(\w+)\(\)`", PAGE))
    assert {"tiny_model", "make_run", "catalogue", "ftx"} <= named <= set(ftx.testing.__all__)
