"""kill -9 at any moment: a resumed run ends with the weights and scores of one that was never stopped, to the bit."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPO, write_rows

STEPS = 12
COMBINATIONS = [("sft", "lora"), ("sft", "full"), ("dpo", "lora"), ("dpo", "full")]


class Zygote:
    """ftx in processes of its own that start at once; see toys/zygote.py."""

    def __init__(self, folder: Path) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "FTX_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        self.log = folder / "log.txt"
        self.process = subprocess.Popen(
            [sys.executable, REPO / "tests" / "toys" / "zygote.py"], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
        )
        assert json.loads(self.process.stdout.readline()) == {"ready": True}

    def __call__(self, *args: object, kill: dict | None = None) -> tuple[int, float, str]:
        """Exit status, seconds, and what was printed."""
        self.log.unlink(missing_ok=True)
        self.process.stdin.write(json.dumps({"args": [str(one) for one in args], "log": str(self.log), "kill": kill}) + "\n")
        self.process.stdin.flush()
        said = json.loads(self.process.stdout.readline())
        return said["status"], said["seconds"], self.log.read_text(errors="replace") if self.log.exists() else ""

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    made = Zygote(tmp_path_factory.mktemp("zygote"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def arguments(tiny, tmp_path_factory):
    """`arguments(trainer, adapter, output)`: a run of STEPS steps with a checkpoint at each, base and tuned evaluated."""
    folder = tmp_path_factory.mktemp("kill")
    questions = [f"what is {i}?" for i in range(30)]
    plain = [{"prompt": q, "completion": f"it is {i}"} for i, q in enumerate(questions)]
    pairs = [{"prompt": q, "chosen": f"it is {i}", "rejected": "who knows"} for i, q in enumerate(questions)]
    data = {"sft": write_rows(folder / "plain.jsonl", plain[:26]), "dpo": write_rows(folder / "pairs.jsonl", pairs[:26])}
    held_out = {"sft": write_rows(folder / "plain-test.jsonl", plain[26:]), "dpo": write_rows(folder / "pairs-test.jsonl", pairs[26:])}

    def made(trainer: str, adapter: str, output: Path, model: object = tiny, steps: int = STEPS) -> list[str]:
        return [
            *("run", "--model", str(model), "--data", str(data[trainer]), "--eval-data", str(held_out[trainer]), "--trainer", trainer),
            *("--adapter", adapter, "--evaluator", "reward-accuracy" if trainer == "dpo" else "exact-match", "--dtype", "float32", "--device", "cpu"),
            *("--observer", "none"),
            *([] if trainer == "dpo" else ["-o", "exact-match.max_new_tokens=4"]),
            *("-o", f"trainer.max_steps={steps}", "-o", "trainer.save_steps=1", "-o", "trainer.logging_steps=5"),
            *("-o", "trainer.per_device_train_batch_size=2", "-o", "trainer.gradient_accumulation_steps=2", "--output", str(output)),
        ]

    return made


def outcome(run: Path) -> dict:
    """All that must be equal: weights, scores, answers, and the steps and losses that were logged."""
    files = [*sorted((run / "model").rglob("*.safetensors")), run / "scores.json", *sorted((run / "eval").rglob("*.jsonl"))]
    found = {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return found | {"metrics": [(line["step"], line["loss"], line["tokens"]) for line in metrics]}


def trial(zygote, first: list[str], run: Path, kills: list[dict]) -> tuple[int, set[str]]:
    """Start a run, kill it and each resumption once as `kills` say, then let it end. How many kills hit, and what they hit."""
    hits, states = 0, set()
    for kill in [*kills, None]:
        command = ["resume", run] if (run / "recipe.yaml").exists() else first
        status, _, said = zygote(*command, kill=kill)
        assert status in (0, -signal.SIGKILL), said
        hits += status == -signal.SIGKILL
        if status:
            folders = list((run / "checkpoints").glob("checkpoint-*")) if run.exists() else []
            states.add("in a checkpoint" if any(not (one / "ftx-complete.json").exists() for one in folders) else "elsewhere")
    assert status == 0, said
    assert not [file.name for file in run.rglob("*.tmp")] and not (run / ".ftx-lock").exists()
    return hits, states


def moments(rng: random.Random, run: Path, seconds: float, count: int) -> list[dict]:
    """Random moments in a run of `seconds`, every third as soon as a checkpoint is begun, and a little later."""
    kills = []
    for number in range(count):
        inside = {"checkpoints": str(run / "checkpoints"), "delay": rng.choice([0, 0, 0.001, 0.003, 0.01])}
        kills.append(inside if number % 3 == 1 else {"after": rng.uniform(0.02, seconds * 0.98)})
    return kills


@pytest.mark.parametrize(("trainer", "adapter"), [("sft", "full"), ("dpo", "lora")])
def test_killed_twice_at_random(zygote, arguments, tmp_path, trainer, adapter):
    whole = arguments(trainer, adapter, tmp_path / "whole")
    status, seconds, said = zygote(*whole)
    assert status == 0, said
    rng, run = random.Random(f"{trainer} {adapter}"), tmp_path / "run"
    # the first hits whatever the machine is doing besides: it waits for a checkpoint to be begun
    kills = [{"checkpoints": str(run / "checkpoints"), "delay": rng.choice([0, 0.01])}, {"after": rng.uniform(0.2, 0.6) * seconds}]
    hits, _ = trial(zygote, arguments(trainer, adapter, run), run, kills)
    assert hits, "no kill hit: nothing was tested"
    assert outcome(run) == outcome(tmp_path / "whole")


@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_killed_behind_the_last_step_trains_no_further(cli, arguments, tmp_path, trainer):
    """The last checkpoint stands, in the middle of an epoch, and model/ does not: what a kill between the two leaves."""
    run = tmp_path / "run"
    done = cli(*arguments(trainer, "lora", run, steps=3), "-o", "trainer.lr_scheduler_type=constant")
    assert done.exit_code == 0, done.output
    wanted = outcome(run)
    shutil.rmtree(run / "model")
    manifest = run / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"finished": true', '"finished": false'))
    resumed = cli("resume", run)
    assert resumed.exit_code == 0 and "Going on from step 3." in resumed.output and "step 4" not in resumed.output, resumed.output
    assert outcome(run) == wanted


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("trainer", "adapter"), COMBINATIONS)
def test_killed_at_twenty_random_moments(zygote, arguments, tmp_path, trainer, adapter):
    """Twenty hits over several runs, each killed up to three times on its way."""
    status, seconds, said = zygote(*arguments(trainer, adapter, tmp_path / "whole"))
    assert status == 0, said
    wanted = outcome(tmp_path / "whole")
    rng, hits, states, number = random.Random(f"twenty {trainer} {adapter}"), 0, set(), 0
    while hits < 20 and number < 40:
        run, number = tmp_path / f"run{number}", number + 1
        more, seen = trial(zygote, arguments(trainer, adapter, run), run, moments(rng, run, seconds, 3))
        hits, states = hits + more, states | seen
        assert outcome(run) == wanted, f"run {number} differs after {more} kills"
        shutil.rmtree(run)
    print(f"{trainer} {adapter}: {hits} kills over {number} runs of {seconds:.1f} s, all equal to the bit; hit {sorted(states)}")
    assert hits >= 20 and states == {"in a checkpoint", "elsewhere"}


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_smollm2_killed_three_times(zygote, arguments, tmp_path):
    status, seconds, said = zygote(*arguments("sft", "lora", tmp_path / "whole", model="smollm2", steps=4))
    assert status == 0, said
    run = tmp_path / "run"
    hits, _ = trial(
        zygote,
        arguments("sft", "lora", run, model="smollm2", steps=4),
        run,
        [{"after": seconds * 0.4}, {"checkpoints": str(run / "checkpoints")}, {"after": seconds * 0.5}],
    )
    assert hits >= 2
    assert outcome(run) == outcome(tmp_path / "whole")


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_compiled_and_killed(zygote, arguments, tmp_path):
    """Each process compiles for itself, beginning with another batch's shape: the numbers are the same."""
    compiled = ("-o", "trainer.fast=[auto,compile]")
    status, seconds, said = zygote(*arguments("sft", "lora", tmp_path / "whole"), *compiled)
    assert status == 0, said
    assert "layers compiled" in (tmp_path / "whole" / "log.txt").read_text()
    run = tmp_path / "run"
    kills = [{"checkpoints": str(run / "checkpoints")}, {"after": seconds * 0.6}, {"checkpoints": str(run / "checkpoints"), "delay": 0.01}]
    hits, _ = trial(zygote, [*arguments("sft", "lora", run), *compiled], run, kills)
    assert hits >= 2
    assert outcome(run) == outcome(tmp_path / "whole")
