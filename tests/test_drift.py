"""Resume refuses to go on with what is no longer the same run, and lists what changed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from shelf import install
from support import write_rows

from ftx.drift import MATTERS, NOTED, describe, differences
from ftx.recipe import Choice

PLUGIN = '''
from toys import Pairs as Base
from ftx import plugin


@plugin
class Pairs(Base):
    """Columns q and a, in a distribution of its own."""
'''


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny):
    """A run that Ctrl-C ended behind step 3, made of a packaged formatter, an unpackaged adapter, and copies of all it needs."""
    from ftx.testing import ftx

    folder = tmp_path_factory.mktemp("drift")
    install(folder / "site", "acme-pairs", {"formatter:acme-pairs": "acme_pairs:Pairs"}, version="1.0", acme_pairs=PLUGIN)
    (folder / "site" / "drifter.py").write_text(
        "from toys import Head as Base\nfrom ftx import plugin\n\n\n@plugin\nclass Mine(Base):\n    'Trains the head.'\n"
    )
    shutil.copytree(tiny, folder / "model")
    write_rows(folder / "train.jsonl", [{"q": f"what is {i}?", "a": f"it is {i}"} for i in range(12)])
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(folder / "site")
    answer = ftx(
        *("run", "--model", folder / "model", "--data", folder / "train.jsonl", "--formatter", "acme-pairs", "--adapter", "drifter:Mine", "--dtype", "float32"),
        *("-o", "trainer.max_steps=6", "-o", "trainer.save_steps=2", "--output", folder / "run"),
        *("--observer", "ftx.testing.own:CtrlC", "-o", "ftx.testing.own:CtrlC.after=2"),
    )
    assert answer.exit_code == 130, answer.output
    yield folder
    patch.undo()


def refused(cli, folder: Path) -> list[str]:
    result = cli("resume", folder / "run")
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert lines[0] == f"Error: {folder / 'run'} was made of something else than what is here now:"
    assert lines[-1].endswith(f"ftx resume {folder / 'run'} --accept-drift")
    return [line.strip() for line in lines[1:-1]]


def changed(file: Path, old: str, new: str):
    """A file changed for a while."""
    text = file.read_text()
    assert old in text, f"{file.name} does not hold '{old}'"
    file.write_text(text.replace(old, new, 1))
    return lambda: file.write_text(text)


def test_each_change_that_matters_is_refused(cli, stopped):
    run = stopped / "run"
    about = {
        "train.jsonl": ("it is 3", "it is 4", f"the data {stopped / 'train.jsonl'} has changed"),
        "model/config.json": ('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05', "the model has other weights, another config or another tokenizer"),
        "site/acme_pairs-1.0.dist-info/METADATA": ("Version: 1.0", "Version: 1.1", "the plugin formatter:acme-pairs.version was 1.0 and is 1.1"),
        "site/drifter.py": ("Trains the head.", "Trains the head!", "the code of the plugin adapter:drifter:Mine has changed"),
        "run/recipe.yaml": ("seed: 42", "seed: 43", "recipe.yaml was edited"),
    }
    for name, (old, new, says) in about.items():
        file = stopped / name
        if not file.exists():  # the shelf names its metadata in its own way
            file = next(path for path in (stopped / "site").rglob("METADATA"))
        back = changed(file, old, new)
        try:
            assert says in refused(cli, stopped), name
        finally:
            back()
    manifest = json.loads((run / "manifest.json").read_text())
    back = changed(run / "manifest.json", f'"torch": "{manifest["libraries"]["torch"]}"', '"torch": "2.0.0"')
    assert refused(cli, stopped) == [f"the library torch was 2.0.0 and is {manifest['libraries']['torch']}"]
    back()


def test_data_under_another_name_is_the_same_data(cli, toy_run, small, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "link").symlink_to(small["train"].parent)
    monkeypatch.chdir(tmp_path / "sub")
    stop = ["--observer", "ftx.testing.own:CtrlC", "-o", "ftx.testing.own:CtrlC.after=2", "-o", "trainer.save_steps=1"]
    assert cli(*toy_run("--data", f"../link/{small['train'].name}", *stop)).exit_code == 130
    result = cli("resume", tmp_path / "run")
    assert result.exit_code == 0 and "Going on from step 3" in result.output, result.output


def test_a_file_that_an_option_names_is_a_part_of_the_run(stopped):
    """A judge's rubric, for one: base and tuned would be rated by different rules."""
    from ftx.manifest import manifest_of
    from ftx.testing.runs import catalogue, make_run

    named = [str(stopped / "rubric.yaml"), str(stopped / "none.yaml")]
    for file in ("rubric.yaml", "answers.sqlite"):
        (stopped / file).write_text("polite: 1\n")
    judge = Choice("mine", {"rubric": named, "cache": str(stopped / "answers.sqlite"), "mode": "rubric"})
    run = make_run(evaluators=(), observers=())
    run.recipe = replace(run.recipe, evaluators=(judge,), observers=(Choice("mine", {"file": named}),))
    plugins = catalogue(evaluator={"mine": object}, observer={"mine": object})
    before = manifest_of(run, plugins)
    assert list(before["files"]) == ["evaluator:mine.rubric"]
    (stopped / "rubric.yaml").write_text("polite: 2\n")
    said = [describe(*change) for change in differences(before, manifest_of(run, plugins), MATTERS)]
    assert said == ["what stands in the file that the option evaluator:mine.rubric names has changed"]


def test_an_adapter_does_not_go_onto_another_base(cli, toy_run, small, tiny, tmp_path):
    """Not by eval, not by --from, and not by the resumption of a run that began with --from."""
    first, second, short = tmp_path / "first", tmp_path / "second", ("--model", tmp_path / "base", "-o", "trainer.max_steps=2")
    shutil.copytree(tiny, tmp_path / "base")
    assert cli(*toy_run(*short, output=first)).exit_code == 0
    stop = ("--observer", "ftx.testing.own:CtrlC", "-o", "ftx.testing.own:CtrlC.after=0")
    assert cli(*toy_run(*short, *stop, "--from", first, output=second)).exit_code == 130
    model = json.loads((second / "manifest.json").read_text())["model"]
    assert model["beneath"] == [json.loads((first / "manifest.json").read_text())["model"]["fingerprint"]] != [model["fingerprint"]]

    back = changed(tmp_path / "base" / "config.json", '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
    evaluation = ("--eval-data", small["eval"], "--evaluator", "toys:Equal")
    for command in (["eval", first, *evaluation], toy_run(*short, "--from", first, output=tmp_path / "third")):
        result = cli(*command)
        assert result.exit_code == 2, result.output
        assert f"{first} was trained on another model than {tmp_path / 'base'} is now" in result.stderr and "Put back the one" in result.stderr
    assert not (tmp_path / "third").exists()
    says = "the model that the run of --from was trained on has other weights, another config or another tokenizer"
    result = cli("resume", second)
    assert result.exit_code == 2 and [line.strip() for line in result.stderr.splitlines()[1:-1]] == [says], result.output
    assert cli("resume", second, "--accept-drift").exit_code == 0
    assert cli("eval", second, *evaluation).exit_code == 0, "what was accepted is the run's from then on"
    back()
    assert cli("eval", second, *evaluation).exit_code == 2 and cli("eval", first, *evaluation).exit_code == 0
    (tmp_path / "base").rename(tmp_path / "moved")
    result = cli("eval", first, *evaluation)
    assert result.exit_code == 2 and f"name it under `model:` in {first / 'recipe.yaml'}" in result.stderr
    changed(first / "recipe.yaml", str(tmp_path / "base"), str(tmp_path / "moved"))
    assert cli("eval", first, *evaluation).exit_code == 0


def test_accepted_drift_goes_on_and_stays_in_the_manifest(cli, stopped, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(stopped, folder)
    recipe = (folder / "run" / "recipe.yaml").read_text().replace(str(stopped), str(folder)).replace("after: 2", "after: 4")
    (folder / "run" / "recipe.yaml").write_text(recipe)
    said = refused(cli, folder)
    assert f"the data {folder / 'train.jsonl'} is new" in said and "recipe.yaml was edited" in said
    again = cli("resume", folder / "run", "--accept-drift")
    assert again.exit_code == 130 and "warning: since the run was started, recipe.yaml was edited" in again.stdout, again.output
    (folder / "run" / "recipe.yaml").write_text(recipe.replace("after: 4", "after: 99"))
    assert refused(cli, folder) == ["recipe.yaml was edited"], "what was accepted once is the run's from then on"
    assert cli("resume", folder / "run", "--accept-drift").exit_code == 0
    manifest = json.loads((folder / "run" / "manifest.json").read_text())
    assert manifest["finished"] and [one["what"] for one in manifest["drift"]].count("recipe") == 2
    assert all(set(one) == {"what", "before", "after"} for one in manifest["drift"])


def test_what_is_compared_and_how_it_reads():
    before = {
        "ftx": "0.1.0",
        "python": "3.11.2",
        "libraries": {"torch": "2.13.0"},
        "hardware": {"cpus": 2, "threads": 2},
        "model": {"reference": "a", "revision": None, "fingerprint": "f"},
        "data": {"data": {"files": {"/x/a.b.jsonl": {"bytes": 1, "sha256": "s"}}}},
        "git_revision": "1",
        "finished": True,
    }
    after = json.loads(json.dumps(before)) | {"git_revision": "2", "python": "3.11.9"}
    after["model"] |= {"reference": "b", "revision": "r"}
    assert list(differences(before, after, MATTERS + NOTED)) == [], "names, commits of the caller and patch releases of Python do not matter"
    after["libraries"] = {"torch": "2.14.0", "peft": "1"}
    after["data"]["data"]["files"]["/x/a.b.jsonl"] = {"bytes": 2, "sha256": "t"}
    after["hardware"]["threads"] = 4
    after["python"] = "3.12.0"
    said = [describe(*change) for change in differences(before, after, MATTERS + NOTED)]
    assert said == [
        "the library torch was 2.13.0 and is 2.14.0",
        "the library peft was not there and is 1",
        "python was 3.11.2 and is 3.12.0",
        "the data /x/a.b.jsonl has changed",
        "the hardware (threads) was 2 and is 4",
    ]


def test_a_run_without_a_manifest_is_not_resumed_blindly(cli, stopped, tmp_path):
    shutil.copytree(stopped / "run", tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    result = cli("resume", tmp_path / "run")
    assert result.exit_code == 2 and "has no manifest.json" in result.stderr
