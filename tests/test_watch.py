"""The rules that watch a training: on made-up lines one by one, and in runs that really go wrong."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from ftx.watch import LEARNS, STILL, TRY, stops, warnings


def lines(*losses: float, gradient: float = 1.0, rate: float = 1e-4) -> list[dict]:
    return [{"step": number, "loss": loss, "grad_norm": gradient, "learning_rate": rate} for number, loss in enumerate(losses, start=1)]


FALLING = [3 - 0.05 * step for step in range(40)]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lines(2.0, math.nan), "the loss is nan."),
        (lines(2.0, math.inf), "the loss is inf."),
        (lines(2.0, 1.9, gradient=math.nan), "the gradient is nan."),
        (lines(2.0, 1.9, 1.8, gradient=0.0), "the gradient is zero for the 3rd logged step in a row, so nothing is learned."),
        (lines(2.0, rate=2e-3), "the learning rate is 0.002, the recipe's is 0.0001."),
        (lines(2.0, rate=math.nan), "the learning rate is nan, the recipe's is 0.0001."),
        (lines(2.0, 1.5, 1.2, 1.1, 9.0, 10.5, 11.0), "the loss explodes: 9, 10.5, 11 after about 1.35, and 2 at first."),
    ],
)
def test_what_stops(given, says):
    assert stops(given, 1e-4) == says
    assert says.split(" ")[1] in TRY, "each stop says what to try"


@pytest.mark.parametrize(
    "given",
    [
        lines(*FALLING),
        lines(2.0, 1.5, 1.2, 1.1, 9.0, 10.5),  # two high ones: bad batches happen
        lines(2.0, 1.5, 0.5, 0.4, 0.3, 2.1, 2.2, 2.3),  # above the usual, but no worse than the beginning
        lines(2.0, 1.9, gradient=0.0),
        lines(1e-6, 1e-7, 0.0, gradient=0.0),  # learned by heart: nothing is left to do
        lines(*([1.0, 4.0] * 10)),
        [{"step": 1, "loss": 1.0}],
    ],
)
def test_what_does_not_stop(given):
    assert stops(given, 1e-4) is None


def test_float16_may_skip_steps_but_not_forever():
    assert stops(lines(2.0, 2.0, gradient=math.inf), 1e-4, scaled=True) is None
    assert stops(lines(2.0, 2.0, 2.0, gradient=math.inf), 1e-4, scaled=True) == "the gradient is inf."


def test_what_warns():
    assert warnings(lines(*FALLING)) == []
    assert [text.split(".")[0] for text in warnings(lines(*[2.0] * STILL))] == [f"the loss has not moved for {STILL} logged steps"]
    assert warnings(lines(*[2.0] * (STILL - 1))) == []
    assert [text.split(".")[0] for text in warnings(lines(*[2 + 0.1 * (step % 3) for step in range(LEARNS)]))] == ["the loss is no lower than at first"]
    assert warnings(lines(2.0, gradient=0.0)) == ["the gradient is zero."]


def test_a_run_that_goes_to_nan_keeps_its_last_good_checkpoint(cli, toy_run, tmp_path):
    """At 1e30 the head overflows within some steps; the step that is not a number leaves no checkpoint."""
    result = cli(*toy_run("-o", "trainer.learning_rate=1e38", "-o", "trainer.save_steps=1", "-o", "trainer.warmup_steps=2", "-o", "trainer.max_grad_norm=0"))
    assert result.exit_code == 1, result.output
    problem = result.stderr.splitlines()[0]
    assert problem.startswith("Error: step ") and (" the loss is " in problem or " the gradient is " in problem or "explodes" in problem)
    step = int(problem.split()[2].rstrip(":"))
    assert f"The last good checkpoint is of step {step - 1}." in result.stderr and "-o trainer.learning_rate=2e+37" in result.stderr
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] == f"checkpoint-{step - 1}"
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step, "the line that stopped it is there"


def test_a_run_without_gradient_stops(cli, toy_run, tmp_path):
    result = cli(*toy_run("-o", "trainer.logging_steps=1", adapter="toys:Detached"))
    assert result.exit_code == 1 and "step 3: the gradient is zero for the 3rd logged step in a row" in result.stderr, result.output
    assert "warning: step 1: the gradient is zero." in result.stdout
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["adapter"]["name"] == "toys:Detached"
