"""The exam of commands passes one that is right and fails one that is wrong, in each way, for the right reason."""

from __future__ import annotations

import pytest
from shelf import install

from ftx.testing import CommandContract

GOOD = '''
import click


@click.group()
def good():
    """Greets."""


@good.command()
@click.option("--who", help="Whom.")
def greet(who):
    """Greet someone."""
'''
BARE = "import click\n\n@click.command()\n@click.option('--who')\ndef bare(who):\n    'Greets.'\n"
TESTS = [name for name in dir(CommandContract) if name.startswith("test_")]


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    points = {"command:good": "acme_good:good", "command:bare": "acme_bare:bare", "command:run": "acme_good:good"}
    points |= {"command:odd": "acme_good:click", "command:heavy": "acme_heavy:good"}
    install(tmp_path, "acme-commands", points, acme_good=GOOD, acme_bare=BARE, acme_heavy="import datasets\n" + GOOD)
    monkeypatch.syspath_prepend(str(tmp_path))


def exam(name: str) -> CommandContract:
    return type("Exam", (CommandContract,), {"name": name})()


@pytest.mark.parametrize("test", TESTS)
def test_a_right_one_passes(shelf, test):
    getattr(exam("good"), test)()


@pytest.mark.parametrize(
    ("name", "test", "words"),
    [
        ("odd", "test_it_is_a_command", "decorate the function with @click.command"),
        ("heavy", "test_its_import_is_light", "importing acme_heavy loads datasets"),
        ("bare", "test_it_says_what_it_does", "ftx bare: --who has no help"),
        ("run", "test_it_hides_no_command_of_the_core", "'run' is a command of the core"),
    ],
)
def test_a_wrong_one_fails(shelf, name, test, words):
    with pytest.raises(AssertionError, match=words):
        getattr(exam(name), test)()
