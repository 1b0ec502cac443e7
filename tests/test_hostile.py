"""Hostile plugins, really installed: whoever does not name them does not meet them, and each has an error of its own."""

from __future__ import annotations

import json

import pytest
from shelf import GOOD
from support import write_rows
from venvs import Environment, built, wheel

CALM = '''
from ftx import hookimpl, option, plugin


@plugin
class Formatter:
    @hookimpl
    def format_dataset(self, dataset): ...


@plugin
class Adapter:
    """Does its work."""

    r: int = option(8, "Rank.")

    @hookimpl
    def adapt_model(self, model): ...
    @hookimpl
    def save_adapted(self, model): ...
    @hookimpl
    def load_adapted(self, base): ...


@plugin
class Trainer:
    @hookimpl
    def encode_dataset(self, dataset): ...
    @hookimpl
    def make_trainer(self, model): ...
'''
BODY = "from ftx import hookimpl, option, plugin\n\n@plugin\nclass Plugin:\n    '''A plugin.'''\n"

#: name of the plugin (and of its distribution hostile-NAME) -> its module
HOSTILE = {
    "raising": "raise RuntimeError('boom\\nand more')",
    "exiting": "import sys\nprint('bye')\nsys.exit(0)",
    "killing": "import os, signal\nraise KeyError('x' * 10)",
    "lacking": "import a_library_that_nobody_has",
    "misfit": BODY + "    @hookimpl\n    def adapt_model(self, model, weights): ...\n",
    "defaulted": BODY + "    @hookimpl\n    def adapt_model(self, model, run=None): ...\n",
    "unmarked": BODY + "    def adapt_model(self, model): ...\n",
    "unknown": BODY + "    @hookimpl\n    def adapt_modle(self, model): ...\n",
    "needy": BODY + "    path: str = option(help='Where.')\n    @hookimpl\n    def adapt_model(self, model): ...\n",
    "thing": "Plugin = 7",
    "plain": "class Plugin: ...",
    "annotated": "from ftx import option, plugin\n@plugin\nclass Plugin:\n    accepts: tuple = option((), 'x')\n",
    "newer": BODY,
    "chatty": 'print(\'{"status": "hacked"}\')\n' + BODY + "    def adapt_model(self, model): ...\n",
}


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    """An environment with the core, a calm plugin, what a run needs, and all the hostile ones."""
    folder = tmp_path_factory.mktemp("hostile")
    wheels = built(folder, "core", *(f"plugins/ftx-{name}" for name in ("formats", "lora", "fast", "sft", "exact-match")))
    wheels += [
        wheel(folder, "calm-one", {f"{stage}:calm": f"calm_one:{stage.title()}" for stage in ("formatter", "adapter", "trainer")}, calm_one=CALM),
        wheel(folder, "twin-a", {"adapter:twin": "twin_a:Twin"}, twin_a=GOOD.format(name="Twin")),
        wheel(folder, "twin-b", {"adapter:twin": "twin_b:Twin"}, version="2.0", twin_b=GOOD.format(name="Twin")),
        wheel(folder, "hostile-malformed", {"adapter:malformed": "not-a-module::Class"}),
    ]
    for name, text in HOSTILE.items():
        needs = ("ftx-core>=99",) if name == "newer" else ("ftx-core>=0.1,<0.2",)
        wheels.append(wheel(folder, f"hostile-{name}", {f"adapter:{name}": f"hostile_{name}:Plugin"}, requires=needs, **{f"hostile_{name}": text}))
    made = Environment(folder / "venv")
    made.pip("install", "--no-deps", *wheels)
    return made


def test_help_and_version_are_untouched(env):
    for argument in ("--help", "--version"):
        done = env.ftx(argument)
        assert done.returncode == 0 and done.stderr == "" and done.stdout


def test_the_list_has_them_all(env):
    done = env.ftx("plugins")
    assert done.returncode == 0 and done.stderr == "" and "bye" not in done.stdout and "hacked" not in done.stdout
    listed = {tuple(line.split()[:2]) for line in done.stdout.splitlines()}
    assert {("adapter", name) for name in (*HOSTILE, "twin", "malformed", "calm")} <= listed
    assert done.stdout.count("  twin  ") == 2, "both of one name are listed"


def test_an_unrelated_plugin_is_shown(env):
    done = env.ftx("plugins", "show", "adapter", "calm")
    assert done.returncode == 0 and done.stderr == "" and done.stdout.startswith("adapter calm (calm-one 1.0)\nDoes its work.\n")


def test_a_run_that_names_none_of_them_is_what_it_is_without_them(env, tiny, tmp_path):
    """One step, from the rows to the scores; nothing that they print or break reaches it."""
    rows = write_rows(tmp_path / "rows.jsonl", [{"instruction": f"say {i}", "input": "", "output": f"it is {i}"} for i in range(12)])
    run = tmp_path / "run"
    done = env.ftx(
        *("run", "--model", tiny, "--data", rows, "--eval-data", rows, "--allow-overlap", "--adapter", "lora", "--evaluator", "exact-match"),
        *("-o", "trainer.max_steps=1", "-o", "exact-match.max_new_tokens=2", "--dtype", "float32", "--output", run, "--json"),
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["status"] == "done" and {score["phase"] for score in said["scores"]} >= {"base", "tuned"}
    assert set(json.loads((run / "manifest.json").read_text())["plugins"]) == {"formatter:auto", "adapter:lora", "trainer:sft", "evaluator:exact-match"}
    assert (run / "model" / "adapter_model.safetensors").is_file()
    for trace in ("bye", "hacked", "boom", "hostile-", "hostile_", "twin"):
        assert trace not in done.stderr + (run / "log.txt").read_text() + (run / "manifest.json").read_text()


EXPECTED = {
    "raising": ("adapter 'raising' (hostile-raising 1.0) could not be loaded: boom", "See it all with --traceback."),
    "exiting": (
        "adapter 'exiting' (hostile-exiting 1.0) could not be loaded: it ends the program on import (SystemExit: 0)",
        "See it all with --traceback.",
    ),
    "killing": ("adapter 'killing' (hostile-killing 1.0) could not be loaded: 'xxxxxxxxxx'", "See it all with --traceback."),
    "lacking": (
        "adapter 'lacking' (hostile-lacking 1.0) could not be loaded: No module named 'a_library_that_nobody_has'",
        "pip install a_library_that_nobody_has, or see it all with --traceback.",
    ),
    "misfit": ("adapter 'misfit' does not fit its hooks: ", "See docs/hooks.md for the arguments of each hook."),
    "defaulted": ("Plugin.adapt_model has an argument 'run=None' that a hook cannot have.", "Hooks take plain arguments without defaults: see docs/hooks.md."),
    "unmarked": ("Plugin.adapt_model looks like a hook but is not marked @hookimpl.", "Mark it, or give the method another name."),
    "unknown": ("adapter 'unknown' implements an unknown hook 'adapt_modle'. Did you mean 'adapt_model'?", "See docs/hooks.md for the hooks there are."),
    "needy": ("adapter 'needy' needs the option 'path'.", "-o adapter.path=VALUE"),
    "thing": (
        "adapter 'thing' (hostile-thing 1.0): hostile_thing:Plugin is a int, not a class.",
        "Decorate the class with @ftx.plugin and name it in the entry point.",
    ),
    "plain": (
        "adapter 'plain' (hostile-plain 1.0): hostile_plain:Plugin is a class without @plugin.",
        "Decorate the class with @ftx.plugin and name it in the entry point.",
    ),
    "annotated": (
        "adapter 'annotated' (hostile-annotated 1.0) could not be loaded: Plugin.accepts must have no annotation: with one it would be an option",
        "See it all with --traceback.",
    ),
    "newer": ("adapter 'newer' (hostile-newer 1.0) needs ftx-core>=99, this is ftx-core 0.1.0.", "pip install -U ftx-core hostile-newer"),
    "chatty": ("Plugin.adapt_model looks like a hook but is not marked @hookimpl.", "Mark it, or give the method another name."),
    "twin": (
        "two adapters are called 'twin': twin-a 1.0 (twin_a:Twin) and twin-b 2.0 (twin_b:Twin).",
        "Uninstall one, or name the class: --adapter twin_b:Twin",
    ),
    "malformed": (
        "adapter 'malformed' (hostile-malformed 1.0) could not be loaded: its entry point 'not-a-module::Class' is not of the form module:Class",
        "See it all with --traceback.",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_naming_one_gives_its_own_error(env, name):
    done = env.ftx("run", "--formatter", "calm", "--trainer", "calm", "--adapter", name, "--data", "x.jsonl", "--json")
    problem, remedy = EXPECTED[name]
    said = json.loads(done.stdout)
    assert done.returncode == 2 and said["status"] == "refused", done.stderr
    assert said["error"].startswith(problem) and said["remedy"] == remedy
    assert "Error: " in done.stderr and "Traceback" not in done.stderr


def test_every_hostile_one_has_its_error():
    assert set(EXPECTED) == {*HOSTILE, "twin", "malformed"}


def test_the_whole_story_is_there_for_who_asks(env):
    done = env.ftx("plugins", "show", "adapter", "raising", "--traceback")
    assert done.returncode == 2 and "Traceback" in done.stderr and 'hostile_raising.py", line 1' in done.stderr and "and more" in done.stderr


def test_the_way_out_of_two_of_one_name(env):
    done = env.ftx("plugins", "show", "adapter", "twin_b:Twin")
    assert done.returncode == 0 and done.stdout.startswith("adapter twin_b:Twin (twin_b:Twin)\nThe plugin Twin.\n")
