"""Which checkpoints count: damage to any file of one is found, and said, and the one before is used."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from ftx.checkpoints import MARKER, fault, mark, prune, rewind, step_of, whole_checkpoints
from ftx.run import RunDir

FILES = {"head.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MARKER}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, tiny, small):
    """A run that Ctrl-C ended behind step 5, with checkpoints of the steps 2, 4 and 5."""
    from ftx.testing import ftx

    run = tmp_path_factory.mktemp("stopped") / "run"
    answer = ftx(
        *("run", "--model", tiny, "--data", small["train"], "--formatter", "toys:Pairs", "--adapter", "toys:Head", "--dtype", "float32", "--output", run),
        *("-o", "trainer.max_steps=8", "-o", "trainer.save_steps=2", "-o", "trainer.save_total_limit=9", "-o", "trainer.per_device_train_batch_size=2"),
        *("--observer", "ftx.testing.own:CtrlC", "-o", "ftx.testing.own:CtrlC.after=4"),
    )
    assert answer.exit_code == 130, answer.output
    return run


@pytest.fixture
def copy(stopped, tmp_path):
    return RunDir(shutil.copytree(stopped, tmp_path / "run"))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def test_what_is_in_a_checkpoint(stopped):
    checkpoint = stopped / "checkpoints" / "checkpoint-5"
    names = {file.name for file in checkpoint.iterdir()}
    assert names >= FILES - {"head.safetensors"} and any(name.endswith(".safetensors") for name in names)
    assert set(json.loads((checkpoint / MARKER).read_text())) == names - {MARKER}
    assert [step_of(one) for one in whole_checkpoints(RunDir(stopped))] == [2, 4, 5]


@pytest.mark.parametrize("damage", [cut, flip, empty, Path.unlink], ids=lambda damage: damage.__name__)
def test_damage_to_any_file_is_found(copy, damage):
    names = sorted(file.name for file in (copy.checkpoints / "checkpoint-5").iterdir())
    assert len(names) >= 6
    for name in names:
        checkpoint = copy.checkpoints / "checkpoint-5"
        saved = shutil.copytree(checkpoint, copy.path.parent / name)
        damage(checkpoint / name)
        said: list[str] = []
        assert rewind(copy, said.append) == copy.checkpoints / "checkpoint-4", name
        assert len(said) == 1 and said[0].startswith("checkpoint-5 is not used: "), said
        assert name in said[0] or (name == MARKER and damage is Path.unlink and "it was not finished" in said[0]), said
        assert not checkpoint.exists(), "what is broken is taken away, or the trainer would meet it again"
        shutil.move(saved, checkpoint)
    assert rewind(copy, said.append) == copy.checkpoints / "checkpoint-5" and len(said) == 1


def test_several_broken_ones(copy):
    flip(copy.checkpoints / "checkpoint-5" / "optimizer.pt")
    (copy.checkpoints / "checkpoint-4" / MARKER).unlink()
    said: list[str] = []
    assert rewind(copy, said.append) == copy.checkpoints / "checkpoint-2"
    assert said == [
        "checkpoint-5 is not used: optimizer.pt is damaged: its bytes are not those that were written.",
        "checkpoint-4 is not used: it was not finished.",
    ]
    assert [json.loads(line)["step"] for line in copy.metrics.read_text().splitlines()][-1] == 2
    cut(copy.checkpoints / "checkpoint-2" / "trainer_state.json")
    assert rewind(copy, said.append) is None and "trainer_state.json has" in said[-1]


@pytest.mark.parametrize("name", [MARKER, "optimizer.pt"])
def test_what_cannot_be_read_is_not_taken_for_broken(copy, cli, monkeypatch, name):
    """A disk that fails for a moment, or a right that is missing, says nothing of the checkpoint: nothing is deleted."""
    from ftx import checkpoints

    broken = copy.checkpoints / "checkpoint-5" / "scheduler.pt"
    flip(broken)
    unreadable = copy.checkpoints / "checkpoint-4" / name
    if name == MARKER:
        unreadable.rename(copy.path / "marker")
        unreadable.mkdir()
    else:
        usual = checkpoints.digest

        def failing(file):
            if file == unreadable:
                raise OSError(errno.EIO, "Input/output error", str(file))
            return usual(file)

        monkeypatch.setattr(checkpoints, "digest", failing)
    before = sorted(copy.path.rglob("*")), copy.metrics.read_bytes()
    result = cli("resume", copy.path)
    assert result.exit_code == 2, result.output
    assert f"{unreadable} cannot be read (" in result.stderr and "Nothing was deleted." in result.stderr
    assert "is not used" not in result.output
    assert set(before[0]) <= set(copy.path.rglob("*")) and copy.metrics.read_bytes() == before[1]
    assert step_of(whole_checkpoints(copy)[0]) == 2


def test_a_torn_line_of_metrics_is_cut_off(copy):
    whole = copy.metrics.read_text()
    copy.metrics.write_text(whole + '{"step": 6, "lo')
    rewind(copy)
    assert copy.metrics.read_text() == whole


def test_resume_says_what_it_did_not_use(stopped, tmp_path, cli):
    """The whole way once: the newest checkpoint is damaged inside, and the run ends as if nothing had been."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    shutil.copytree(stopped, whole)
    shutil.copytree(stopped, run)
    flip(run / "checkpoints" / "checkpoint-5" / "optimizer.pt")
    for place in (whole, run):
        recipe = (place / "recipe.yaml").read_text().replace("after: 4", "after: 99")
        (place / "recipe.yaml").write_text(recipe)
    results = [cli("resume", place, "--accept-drift") for place in (whole, run)]
    assert [result.exit_code for result in results] == [0, 0], results
    assert "Going on from step 5." in results[0].stdout and "is not used" not in results[0].stdout
    assert "checkpoint-5 is not used: optimizer.pt is damaged" in results[1].stdout and "Going on from step 4." in results[1].stdout
    assert (whole / "model" / "head.safetensors").read_bytes() == (run / "model" / "head.safetensors").read_bytes()


def test_pruning_counts_whole_ones_only_and_keeps_the_best(tmp_path):
    run = RunDir(tmp_path)
    for step in (1, 2, 3, 10):
        folder = run.checkpoints / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "weights").write_text("w")
        if step != 3:
            mark(folder)
    prune(run, 1, best="checkpoint-1")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["checkpoint-1", "checkpoint-10", "checkpoint-3"]
    assert fault(run.checkpoints / "checkpoint-3") == "it was not finished"
