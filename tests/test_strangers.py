"""A stranger's plugin: built, installed with pip into a new environment, found, described, run, uninstalled."""

from __future__ import annotations

import json

import pytest
from support import REPO, write_rows
from venvs import Environment, built

from ftx import __version__

PROJECTS = ["core", "plugins/ftx-formats", "plugins/ftx-lora", "plugins/ftx-fast", "plugins/ftx-sft", "plugins/ftx-exact-match", "examples/ftx-hello"]


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strangers")
    missing = [project for project in PROJECTS if not (REPO / project / "pyproject.toml").exists()]
    assert not missing
    made = Environment(folder / "venv")
    made.pip("install", *built(folder, *PROJECTS))  # with their dependencies: pip finds them in the environment, and no index is asked
    return made


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory):
    rows = [{"instruction": f"say {i}", "input": "", "output": f"it is {i}"} for i in range(12)]
    return write_rows(tmp_path_factory.mktemp("alpaca") / "rows.jsonl", rows)


def test_nothing_of_ours_comes_from_elsewhere(env):
    where = env._call([env.python, "-c", "import ftx, ftx_hello, ftx_lora; print(ftx.__file__, ftx_hello.__file__, ftx_lora.__file__)"], check=True)
    assert all(str(env.python.parent.parent) in path for path in where.stdout.split())


def test_it_is_listed_beside_the_others(env):
    listed = {tuple(line.split()[:4]) for line in env.ftx("plugins").stdout.splitlines()}
    assert ("adapter", "hello", "ftx-hello", "0.1.0") in listed and ("adapter", "lora", "ftx-lora", __version__) in listed
    assert {name for stage, name, *_ in listed if stage == "adapter"} == {"hello", "lora"}


def test_it_is_described(env):
    done = env.ftx("plugins", "show", "adapter", "hello", "--json")
    about = json.loads(done.stdout)
    assert about["origin"] == "ftx-hello 0.1.0" and {"adapt_model", "save_adapted", "load_adapted", "merge_adapted"} <= set(about["hooks"])
    assert about["options"] and all(option["help"] and option["type"] for option in about["options"])


def test_it_runs_reads_back_and_is_missed_when_it_is_gone(env, tiny, alpaca, tmp_path):
    """One story: each step needs the one before."""
    run = tmp_path / "run"
    done = env.ftx(
        *("run", "--model", tiny, "--data", alpaca, "--eval-data", alpaca, "--allow-overlap", "--adapter", "hello", "--evaluator", "exact-match"),
        *("-o", "trainer.max_steps=2", "-o", "exact-match.max_new_tokens=4", "--dtype", "float32", "--output", run, "--json"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {(score["evaluator"], score["phase"]) for score in result["scores"]} >= {("exact-match", "base"), ("exact-match", "tuned")}
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["plugins"]["adapter:hello"] == {"distribution": "ftx-hello", "version": "0.1.0", "class": "ftx_hello:HelloAdapter"}
    assert list((run / "model").glob("*.safetensors"))

    done = env.ftx("eval", run, "--json")
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)["scores"]
    assert [(s["metric"], s["phase"], s["value"]) for s in again] == [(s["metric"], s["phase"], s["value"]) for s in result["scores"]]

    env.pip("uninstall", "--yes", "ftx-hello")
    assert "hello" not in env.ftx("plugins").stdout
    gone = "Error: no adapter is called 'hello'.\n       Installed: lora.\n"
    done = env.ftx("run", "--model", tiny, "--data", alpaca, "--adapter", "hello", "--output", tmp_path / "none")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", gone) and not (tmp_path / "none").exists()
    done = env.ftx("eval", run)
    assert (done.returncode, done.stderr) == (2, gone)
    assert env.ftx("plugins", "show", "adapter", "lora").returncode == 0
