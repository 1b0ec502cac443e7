"""`ftx plan`: a recipe, its data if there are any, and a machine -> what the run will need, in words and numbers."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftx.catalogue import Catalogue
from ftx.errors import ModelError
from ftx.hooks import Hooks
from ftx.ledger import Ledger
from ftx.machine import Machine, parse_size, said, this_machine
from ftx.planning import AGAIN, MICRO, TIMES, Case, Change, Planner, refusal, settle, with_options
from ftx.recipe import Recipe, resolve
from ftx.rows import Rows, rows_of
from ftx.run import Run, RunDir

if TYPE_CHECKING:
    from datasets import Dataset

    from ftx.console import Console

log = logging.getLogger("ftx")

CONFIGS = Path(__file__).parent / "configs"
#: Rows in one forward pass of the table of what fits, and the longest row that it looks for.
TRIED, LONGEST = (1, 2, 4, 8, 16), 32768
MOMENTS = {
    "loss": "when the loss is computed",
    "last layer": "at the beginning of the backward pass",
    "first layer": "at the end of the backward pass",
    "embedding": "behind the backward pass",
    "step": "at the optimizer's step",
}


def plan(
    wanted: Recipe,
    catalogue: Catalogue,
    console: Console,
    *,
    device_memory: str | None = None,
    fit: bool = False,
    force: bool = False,
    show: int = 0,
    trace: bool = False,
    measure: bool = False,
) -> dict[str, Any]:
    """Print the plan of a recipe, and `show` of its training rows; its numbers as `--json` has them. `trace` and `measure`: see
    ftx.rehearse. FtxError where the run would not fit, unless `force`."""
    machine = machine_of(wanted, device_memory)
    wanted = replace(wanted, device=machine.device) if not machine.here else wanted
    config = base_of(RunDir(wanted.start).model) if wanted.start else config_of(wanted.model, console)
    weights = any(config.glob("*.safetensors"))
    if wanted.data and not weights:
        console.say(f"{config} has no weights: planned without the data.")
    recipe, hooks = resolve(wanted, catalogue)
    run = Run(recipe=recipe, ledger=Ledger(), device=machine.device, model=recipe.model, model_path=config, hooks=hooks, say=console.say)
    rows, audit = None, None
    if wanted.data and weights:
        rows, audit = read(recipe, hooks, console, machine, show)
    elif machine.here:
        from ftx.pipeline import preflight

        preflight(hooks, run)
    planner = Planner(catalogue, replace(run, say=_silent), machine, config, rows)
    case, made, advice = settle(planner, wanted, fit=fit)
    beside: dict[str, Any] = {}
    if trace or measure:
        from ftx import rehearse

        beside = rehearse.beside(planner, case, console, traced=trace, measured=measure)
        case, made, advice = settle(planner, wanted, fit=fit)  # with the speed
    report(planner, case, made, console)
    table = what_fits(planner, case.wanted) if rows is None else []
    if table:
        console.say("The longest rows that fit, by rows in one forward pass:")
        console.table(["rows", "", "activations kept", "recomputed"], [[str(micro), "", _length(kept), _length(again)] for micro, kept, again in table])
    if advice and not force:
        raise refusal(planner, case, advice)
    if not planner.fits(case):
        if not force:
            raise refusal(planner, case, advice)
        console.say("It does not fit.")
    content: dict[str, Any] = {
        "model": recipe.model,
        "parameters": case.prediction.shape.parameters,
        "device": machine.device,
        "device_memory": machine.memory,
        "fits": planner.fits(case),
        "predicted": case.prediction.as_dict(),
        "settings": settings(case),
        "changes": [{"what": change.what, "option": change.option, "needs": change.case.prediction.needed} for change in made or advice],
    }
    if table:
        content["longest"] = [{"rows": micro, "kept": kept, "recomputed": again} for micro, kept, again in table]
    return content | beside | ({"audit": audit} if audit is not None else {})


def decide(asked: Recipe, encoded: Dataset, run: Run, catalogue: Catalogue, *, force: bool = False) -> Case | None:
    """What `ftx run` does with its plan, before the run directory is written: checkpointing, and the micro-batch where the
    recipe leaves it open, are decided, put into the run, and said where memory asked for them. FtxError where the run would
    not fit, unless `force`. Plugins other than the trainer stay the objects that they are. None for a model whose config
    does not say how large it is; one of an unknown kind is never refused, for its numbers are an estimate."""
    machine = Machine("cuda", _free_on_gpu(), True) if run.device == "cuda" else this_machine("cpu")
    planner = Planner(catalogue, replace(run, say=_silent), machine, base_of(run.model_path), rows_of(encoded))
    try:
        case, made, advice = settle(planner, asked)
    except ModelError as error:
        run.say(f"no plan: {error.problem}")
        return None
    if not planner.fits(case):
        if not force and planner.model.known:
            raise refusal(planner, case, advice)
        run.say(f"The plan is {said(case.prediction.needed)}, and {machine.device} has {said(machine.memory or 0)}: tried all the same.")
    for change in made:
        run.say(f"plan: {change.what}, so that it fits: {said(change.case.prediction.needed)}")
    assert run.hooks is not None
    hooks = Hooks()
    for key, plugin in run.hooks.list_name_plugin():
        stage, _, name = key.partition(":")
        hooks.add(case.hooks.get_plugin(key) if stage == "trainer" else plugin, stage, name)
    hooks.check()
    run.recipe, run.hooks = case.recipe, hooks
    return replace(case, hooks=hooks)


def base_of(path: Path) -> Path:
    """The directory with the config of what lies in `path`: itself, or of a run's adapter the model that the run started from."""
    from ftx import models
    from ftx.readback import recipe_of

    while not (path / "config.json").is_file() and (path.parent / "recipe.yaml").is_file():
        recipe = recipe_of(RunDir(path.parent))
        path = RunDir(recipe.start).model if recipe.start else models.resolve(recipe.model)
    return path


def _free_on_gpu() -> int:
    import torch

    return int(torch.cuda.mem_get_info()[0])


def machine_of(wanted: Recipe, device_memory: str | None) -> Machine:
    if device_memory is None:
        return this_machine(wanted.device)
    return Machine("cpu" if wanted.device == "cpu" else "cuda", parse_size(device_memory), False)


def config_of(reference: str, console: Console) -> Path:
    """The directory with the config that `reference` means: a directory with or without weights, a name that `ftx models`
    lists, or whatever `--model` takes. ModelError if there is none."""
    path = Path(reference).expanduser()
    if (path / "config.json").is_file() and not (path / "recipe.yaml").exists():
        return path.absolute()
    if (CONFIGS / reference / "config.json").is_file() and "/" not in reference:
        return CONFIGS / reference
    from ftx import models

    return models.resolve(reference, console.say)


def read(recipe: Recipe, hooks: Hooks, console: Console, machine: Machine, show: int = 0) -> tuple[Rows, dict[str, Any]]:
    """The training data as `ftx run` would use it: read, formatted, encoded and audited. DataError where the gate refuses."""
    from ftx import models, pipeline
    from ftx.prepare import check_row_types, prepare
    from ftx.show import show_rows

    check_row_types(hooks)
    run = pipeline.begin(replace(recipe, device="auto") if not machine.here else recipe, hooks, console)
    if machine.here:
        pipeline.preflight(hooks, run)
    tokenizer = models.load_tokenizer(run.model_path, code=run.recipe.trusts_model)
    splits, audit = prepare(hooks, tokenizer, run)
    show_rows(splits["train"].tokens, tokenizer, show, console)
    return rows_of(splits["train"].tokens), audit


# ---- what is printed


def report(planner: Planner, case: Case, made: list[Change], console: Console) -> None:
    """Model, settings, the peak by kind, what there is, and what the data come to."""
    prediction, shape, machine = case.prediction, case.prediction.shape, planner.machine
    names = [choice.name for choice in (case.recipe.quantizer, case.recipe.adapter, case.recipe.trainer) if choice is not None]
    console.say(
        f"{case.recipe.model}: {shape.parameters:,} parameters, {shape.layers} layers; {', '.join(names)} on {machine.name or machine.device}; "
        f"trains {shape.trained:,}"
    )
    if not shape.trained:
        console.say("note: nothing trains, as far as the plugins say: see that the adapter's target_modules name modules of the model.")
    if not shape.known:
        console.say(f"note: the formulas are made for models of Llama's kind; for '{shape.model_type}' they are an estimate.")
    asked = prediction.asked
    lengths = f"{len(asked.lengths)} sequences, the longest of {asked.longest} tokens" if len(asked.lengths) > 1 else f"one sequence of {asked.longest} tokens"
    lengths += f", joined to {shape.tokens} without padding" if shape.joined else ""
    lengths += ", what they begin with alike once" if shape.shared else ""
    again = "recomputed" if shape.checkpointing else "kept"
    console.say(f"a forward pass: {lengths}; {shape.accumulation} a step; activations {again}")
    for change in made:
        console.say(f"decided: {change.what} ({said(change.case.prediction.needed)}); {change.option}")
    console.table(["memory", "", "bytes", "GB"], [[kind, "", f"{size:,}", f"{size / (1 << 30):.2f}"] for kind, size in prediction.by_kind.items()])
    console.say(f"peak {said(prediction.peak_memory)}, {MOMENTS[prediction.moment]}")
    if case.recipe.evaluators:
        console.say(f"evaluation {said(prediction.evaluation)}")
    if machine.memory is not None:
        verdict = "fits" if planner.fits(case) else "does not fit"
        console.say(f"{machine.device} has {said(machine.memory)}{' free' if machine.here and machine.device == 'cpu' else ''}: {verdict}")
    if prediction.tokens is not None:
        seconds = f", {prediction.seconds:.0f} seconds" if prediction.seconds is not None else ""
        console.say(
            f"training: {prediction.steps} steps, {prediction.tokens:,} tokens, {prediction.supervised_tokens:,} of them supervised; "
            f"disk {said(prediction.disk or 0)}{seconds}"
        )


def settings(case: Case) -> dict[str, Any]:
    """What a plan may decide, as it stands in the recipe."""
    options = case.recipe.trainer.options if case.recipe.trainer else {}
    return {name: options[name] for name in (MICRO, TIMES, AGAIN, "max_length", "optim") if name in options}


def what_fits(planner: Planner, wanted: Recipe) -> list[tuple[int, int, int]]:
    """(rows in a forward pass, longest that fits with activations kept, and recomputed); 0 where nothing fits. Empty if the memory is unknown."""
    trainer = resolve(wanted, planner.catalogue)[0].trainer
    if planner.machine.room() is None or trainer is None or not {MICRO, AGAIN} <= trainer.options.keys():
        return []
    found = []
    for micro in TRIED:
        lengths = []
        for again in (False, True):
            recipe, hooks = resolve(with_options(wanted, **{MICRO: micro, AGAIN: again}), planner.catalogue)
            lengths.append(planner.longest(recipe, hooks, min(LONGEST, planner.model.context or LONGEST)))
        if not any(lengths):
            break
        found.append((micro, lengths[0], lengths[1]))
    return found


def _length(tokens: int) -> str:
    return f"{tokens} tokens" if tokens else "-"


def _silent(text: str) -> None:
    log.debug("%s", text)
