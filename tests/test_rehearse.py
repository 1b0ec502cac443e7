"""A run measures itself, a trace finds the same, and the speed is kept for this machine only."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from ftx import models, speed
from ftx.catalogue import Catalogue
from ftx.ledger import Ledger
from ftx.machine import Machine
from ftx.peak import Peak
from ftx.planning import Planner
from ftx.recipe import Choice, Recipe
from ftx.rehearse import like, rehearse, trace
from ftx.rows import Rows, computed
from ftx.run import Run
from ftx_fast import PARTS

#: Two adapters whose bases differ, both trainers, both ways of keeping activations; with the accumulation.
CASES = [("dora", "dpo", True, 2), ("qlora", "sft", True, 1), ("lora with dropout", "sft", False, 1)]
#: The others, in the heavy suite.
MORE = [("lora", "sft", False, 2), ("full", "dpo", False, 1), ("qlora", "dpo", False, 1), ("full", "sft", True, 2)]


@pytest.mark.parametrize(("adapter", "trainer", "checkpointing", "accumulation"), [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in MORE)])
def test_a_trace_finds_what_is_measured(shared, adapter, trainer, checkpointing, accumulation):
    planner, case, run, tokenizer = planned(shared, adapter, trainer, checkpointing, accumulation)
    tokens = like(case)
    measured = rehearse(case, run, tokens, tokenizer, planner.catalogue)
    assert measured["step"] == 2, "the second step has the optimizer's states"
    assert sum(measured["by_kind"].values()) == measured["peak_memory"]
    assert trace(case, run, tokens, tokenizer, planner.catalogue) == pytest.approx(measured["peak_memory"], rel=0.01)
    own = sum(parameter.numel() for parameter in models.load_model(shared, dtype=torch.float32, device="cpu").parameters())
    if adapter == "full":
        assert measured["by_kind"]["weights"] == 4 * own
        assert (measured["by_kind"]["other"] >= 4 * own) == (trainer == "dpo"), "the reference"
    if adapter == "qlora":
        assert measured["by_kind"]["weights"] < 2 * own


def test_what_else_the_process_holds_is_not_the_runs(shared):
    planner, case, run, tokenizer = planned(shared)
    alone = rehearse(case, run, like(case), tokenizer, planner.catalogue)
    ballast = torch.ones(10_000_000)
    beside = rehearse(case, run, like(case), tokenizer, planner.catalogue)
    assert beside["peak_memory"] == pytest.approx(alone["peak_memory"], rel=0.001) and ballast.nbytes > 10 * alone["peak_memory"]


@pytest.mark.parametrize(("trainer", "alike"), [("sft", ([], 30)), ("dpo", ([40] * 4, 10))])
def test_rows_of_a_trial_begin_alike_as_the_datas_do(shared, trainer, alike):
    planner, case, run, tokenizer = planned(shared, trainer=trainer, accumulation=2, alike=alike)
    tokens = like(case)
    names = [name for name in tokens.column_names if name.endswith("input_ids")]
    sequences = [row[name] for row in tokens for name in names]
    assert [len(one) for one in sequences] == list(case.prediction.asked.lengths) * 2
    nodes = {tuple(one[:end]) for one in sequences[: len(sequences) // 2] for end in range(1, len(one) + 1)}
    assert len(nodes) == sum(case.prediction.asked.lengths) - case.prediction.asked.alike
    measured = rehearse(case, run, tokens, tokenizer, planner.catalogue)
    assert measured["peak_memory"] == pytest.approx(case.prediction.peak_memory, rel=0.05)
    assert trace(case, run, tokens, tokenizer, planner.catalogue) == pytest.approx(measured["peak_memory"], rel=0.01)
    assert len({len(row[names[0]]) for row in like(case, (20,) * len(case.prediction.asked.lengths))}) == 1


@pytest.fixture(scope="module")
def shared():
    from ftx.testing.runs import shared_model_dir

    return shared_model_dir()


def planned(path, adapter="lora", trainer="sft", checkpointing=False, accumulation=1, alike=()):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation, "gradient_checkpointing": checkpointing}
    options |= {"fast": [part for part in PARTS if part != "products"]}  # oneDNN's workspace is memory too, and no trace sees it
    name, _, drops = adapter.partition(" with ")
    recipe = Recipe(
        data="-",
        formatter=Choice("auto"),
        adapter=Choice(name, {"dropout": 0.1} if drops else {}),
        trainer=Choice(trainer, options),
        dtype="float32",
        device="cpu",
    )
    sides = 2 if trainer == "dpo" else 1
    run = Run(recipe=recipe, ledger=Ledger(), dtype=torch.float32, model=str(path), model_path=path, say=lambda line: None)
    planner = Planner(Catalogue(), run, Machine("cpu", None, True), path, Rows([(60,) * sides, (50,) * sides] * 2, [20 * sides] * 4, *alike))
    case = planner.case(recipe)
    return planner, case, replace(run, recipe=case.recipe, hooks=case.hooks), models.load_tokenizer(path)


def test_a_run_writes_what_it_took_and_is_the_same_run(toy_run, tmp_path, cli, monkeypatch):
    monkeypatch.setenv("FTX_CACHE", str(tmp_path / "cache"))
    assert cli(*toy_run(output=tmp_path / "watched")).exit_code == 0
    plan = json.loads((tmp_path / "watched" / "plan.json").read_text())
    assert set(plan) == {"predicted", "measured"}
    measured = plan["measured"]
    assert measured["peak_memory"] == sum(measured["by_kind"].values())
    assert measured["by_kind"]["optimizer"] > 0
    assert measured["resident_memory"] > measured["peak_memory"]
    assert measured["tokens"] > 0 and measured["seconds"] > 0
    assert measured["disk"] == pytest.approx(sum(file.stat().st_size for file in (tmp_path / "watched").rglob("*") if file.is_file()), rel=0.05)

    monkeypatch.setattr(Peak, "_begin", lambda self: None)  # a run that measures nothing
    assert cli(*toy_run(output=tmp_path / "alone")).exit_code == 0
    assert "peak_memory" not in json.loads((tmp_path / "alone" / "plan.json").read_text())["measured"]
    ours, theirs = (load_file(tmp_path / name / "model" / "head.safetensors")["weight"] for name in ("watched", "alone"))
    assert torch.equal(ours, theirs)


def measured_of(run):
    return json.loads((run / "plan.json").read_text())["measured"]


def test_a_killed_run_has_what_was_measured_and_its_resumption_the_sum(toy_run, tmp_path, cli, process, monkeypatch):
    """Killed behind step 4 of 6 with checkpoints of 2 and 4; the newer one is spoiled, so the steps 3 and 4 are trained, and counted, again."""
    monkeypatch.setenv("FTX_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    saves = ("-o", "trainer.save_steps=2", "-o", "trainer.save_total_limit=9")
    assert process(*toy_run(*saves, "--observer", "toys:Dying", "-o", "toys:Dying.at=4")).returncode < 0
    logged = {line["step"]: line["tokens"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    killed = measured_of(run)
    assert killed["tokens"] == logged[4] and killed["seconds"] > 0 and killed["peak_memory"] > 0
    inside = run / "checkpoints" / "checkpoint-2" / "ftx-measured.json"
    assert json.loads(inside.read_text())["tokens"] == logged[2] < logged[4]
    (run / "checkpoints" / "checkpoint-4" / "optimizer.pt").write_bytes(b"")
    monkeypatch.setenv("FTX_TEST_SURVIVE", "1")
    resumed = cli("resume", run)
    assert resumed.exit_code == 0 and "Going on from step 2." in resumed.stdout, resumed.output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert measured_of(run)["tokens"] == lines[-1]["tokens"], "what stands beside the prediction for the whole run is of the whole run"
    assert measured_of(run)["seconds"] > json.loads(inside.read_text())["seconds"] and measured_of(run)["disk"] > 0


def test_a_run_that_an_error_ended_has_what_was_measured(toy_run, tmp_path, cli):
    assert cli(*toy_run("--observer", "toys:Falling")).exit_code == 1  # before any checkpoint
    assert measured_of(tmp_path / "run")["seconds"] > 0 and measured_of(tmp_path / "run")["peak_memory"] > 0


def test_several_processes_of_a_run_keep_the_largest_peak_and_sum_the_rest(tmp_path):
    before = {"peak_memory": 9, "by_kind": {"weights": 9}, "step": 2, "batch_tokens": 3, "resident_memory": 7, "seconds": 1.0, "tokens": 10}
    before |= {"timed_steps": 8, "seconds_per_position": 0.1}
    (tmp_path / "ftx-measured.json").write_text(json.dumps(before))
    peak = Peak(Run(recipe=Recipe(), ledger=Ledger()), checkpoint=tmp_path)
    now = {"peak_memory": 5, "by_kind": {"weights": 5}, "step": 4, "batch_tokens": 2, "resident_memory": 8, "seconds": 2.0, "tokens": 4}
    now |= {"timed_steps": 3, "seconds_per_position": 0.2}
    assert peak._with_earlier(now) == before | {"resident_memory": 8, "seconds": 3.0, "tokens": 14}
    assert peak._with_earlier(now | {"peak_memory": 11, "timed_steps": 9})["by_kind"] == {"weights": 5}
    del peak.earlier["seconds_per_position"]  # of a checkpoint that an earlier version wrote
    assert peak._with_earlier(now)["timed_steps"] == 8


def test_only_longer_batches_are_measured(shared):
    """Of ten steps the first, the second, and those whose batch is longer than all before."""
    run = Run(recipe=Recipe(), ledger=Ledger())
    peak, begun = Peak(run), []
    peak._begin = lambda: begun.append(peak.positions)
    peak.model = torch.nn.Linear(1, 1)
    for size in (8, 5, 6, 6, 4, 9, 9, 3, 8, 9):
        peak.on_step_begin(None, None, None, optimizer=None)
        peak._forward(peak.model, (), {"input_ids": torch.zeros(1, size, dtype=torch.long)})
        peak.on_step_end(None, None, None)
    assert begun == [8, 5, 6, 9]


def test_a_step_lasts_from_the_end_of_the_one_before(monkeypatch):
    """With its batch, and what a GPU had still to do; not with what is evaluated or saved between them."""
    now = [0.0]
    monkeypatch.setattr("ftx.peak.time.monotonic", lambda: now[0])
    peak = Peak(Run(recipe=Recipe(), ledger=Ledger()))
    for between in (None, None, peak.on_evaluate, peak.on_save):
        if between is not None:
            now[0] += 50
            between(None, SimpleNamespace(global_step=1), None)
            now[0] += 50  # others that are told after it
        now[0] += 2  # the batch
        peak.on_step_begin(None, None, None, optimizer=None)
        now[0] += 1
        peak.on_step_end(None, None, None)
    assert [seconds for seconds, _, _ in peak.steps] == [1, 3, 1, 1]


def test_beside_somebody_elses_profiler_nothing_is_measured(caplog):
    peak = Peak(Run(recipe=Recipe(), ledger=Ledger()))
    peak.model = torch.nn.Linear(1, 1)
    with torch.profiler.profile() as theirs:
        for size in (8, 9):
            peak.on_step_begin(None, None, None, optimizer=None)
            for _ in range(2):  # micro-batches
                peak._forward(peak.model, (), {"input_ids": torch.zeros(1, size, dtype=torch.long)})
            peak.model(torch.ones(1, 1)).sum().backward()
            peak.on_optimizer_step(None, None, None)
            peak.on_step_end(None, None, None)
    assert caplog.text.count("memory is not measured: another profiler") == 1
    assert "aten::linear" in {event.key for event in theirs.key_averages()}
    assert "peak_memory" not in peak.result(1.0)


def test_seconds_only_from_this_machine(shared, tmp_path, monkeypatch):
    monkeypatch.setenv("FTX_CACHE", str(tmp_path))
    planner, case, *_ = planned(shared)
    assert case.prediction.seconds is None
    speed.remember(case.recipe, case.prediction.shape, "cpu", 0.001)
    found = planned(shared)[1].prediction
    assert found.shape.shared == 0 and found.seconds == pytest.approx(0.001 * found.tokens)
    ragged = [(length,) for length in (64, 64, 60, 8, 9, 30, 11, 7, 25, 13, 40, 10)]
    long = replace(planner, rows=Rows(ragged, [5] * 12)).case(case.wanted).prediction
    assert not long.shape.joined, "the largest batch has no padding"
    assert long.seconds == pytest.approx(0.001 * long.tokens), "others do, and are joined"
    prefix = {"alike": ([], 40)}  # data that begin alike are trained in less time: one row of a step's two finds 40 tokens there
    assert planned(shared, **prefix)[1].prediction.seconds == pytest.approx(found.seconds - 0.001 * (4 + 2 * 40) * found.tokens / 220)
    assert planned(shared, accumulation=4)[1].prediction.seconds, "accumulation makes no token slower"
    assert planned(shared, checkpointing=True)[1].prediction.seconds is None
    assert planned(shared, adapter="dora")[1].prediction.seconds is None
    assert replace(planner, machine=Machine("cpu", None, False)).case(case.wanted).prediction.seconds is None, "planned for another machine"
    monkeypatch.setattr(speed.platform, "node", lambda: "elsewhere")
    assert planned(shared)[1].prediction.seconds is None


def test_the_command(toy_run, tmp_path, cli, monkeypatch, shared, small):
    monkeypatch.setenv("FTX_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    arguments = ["plan", "--model", str(shared), "--data", str(small["train"]), "--formatter", "toys:Pairs", "--dtype", "float32", "--json"]
    found = []
    monkeypatch.setattr("ftx.planning.computed", lambda rows, size, **how: (found.append(computed(rows, size, **how)), found[-1])[1])
    first = json.loads(cli(*arguments, "--trace", "--measure").stdout)
    assert abs(first["traced"]["closed_form_over_trace"]) < 0.05
    assert first["predicted"]["seconds"] == pytest.approx(first["seconds_per_position"] * 3 * found[-1]), "three passes over the rows"
    second = json.loads(cli(*arguments).stdout)
    assert second["predicted"]["seconds"] == first["predicted"]["seconds"]
    refused = cli("plan", "--model", "llama-3.1-8b", "--device-memory", "48GB", "--measure")
    assert refused.exit_code == 2
    assert "there is nothing to measure." in refused.stderr
