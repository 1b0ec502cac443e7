"""The first steps of the real training, in a directory that is thrown away: to measure, or without weights and without memory to trace."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ftx import pipeline
from ftx.authoring import declared
from ftx.catalogue import Catalogue
from ftx.errors import FtxError
from ftx.hooks import Hooks
from ftx.machine import said
from ftx.measure import bystanders
from ftx.peak import Peak
from ftx.planning import TIMES, Case, Planner, with_options
from ftx.recipe import Recipe, resolve
from ftx.rows import typical_batch
from ftx.run import Run, RunDir

if TYPE_CHECKING:
    from datasets import Dataset

    from ftx.console import Console


class Stop(TrainerCallback):  # type: ignore[misc]
    """Ends training behind so many steps, and writes no checkpoint."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_evaluate = False
        control.should_training_stop = control.should_training_stop or state.global_step >= self.steps

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_evaluate = False


def beside(planner: Planner, case: Case, console: Console, *, traced: bool, measured: bool) -> dict[str, Any]:
    """What `ftx plan --trace` and `--measure` add: the peak by the other way, the speed of this machine, each printed and as --json has it."""
    import torch

    from ftx.device import best_dtype
    from ftx.speed import remember

    machine, found = planner.machine, dict[str, Any]()
    dtype = getattr(torch, case.recipe.dtype, None) or (torch.bfloat16 if machine.device == "cuda" else best_dtype("cpu"))
    run = replace(planner.run, recipe=case.recipe, hooks=case.hooks, dtype=dtype, model_path=planner.config)
    tokenizer = tokenizer_of(planner.config)
    if traced:
        prediction = case.prediction
        peak = trace(case, replace(run, device="cpu"), like(case), tokenizer, planner.catalogue)
        apart = prediction.peak_memory / peak - 1
        note = " (traced as on a CPU, with the shortcuts that are taken there)" if machine.device != "cpu" else ""
        console.say(f"trace: {said(peak)}; the closed form says {said(prediction.peak_memory)}, {apart:+.1%}{note}")
        found["traced"] = {"peak_memory": peak, "closed_form_over_trace": apart}
    if measured:
        if not machine.here or not any(planner.config.glob("*.safetensors")):
            raise FtxError("there is nothing to measure.", "--measure times the model on this machine: it needs weights, and no --device-memory.")
        console.say("Measuring: four steps of the real training.")
        spread = typical(planner, case)
        took = rehearse(case, run, like(case, spread), tokenizer, planner.catalogue, steps=4, memory=False)
        speed = took["seconds_per_position"]
        remember(case.recipe, case.prediction.shape, machine.device, speed)
        console.say(f"speed: {1 / speed:,.0f} positions a second, kept for this machine, model and settings")
        found["seconds_per_position"] = speed
    return found


def typical(planner: Planner, case: Case) -> tuple[int, ...]:
    """Lengths of sequences for one pass that stand for the whole data: evenly spaced among the sorted ones."""
    if planner.rows is None:
        return case.prediction.asked.lengths
    return typical_batch(planner.rows, max(1, len(case.prediction.asked.lengths) // planner.rows.lengths.shape[1]))[0]


def tokenizer_of(config: Path) -> Any:
    """The model's tokenizer; for a config alone one that knows a pad token, which is all that a trainer asks of it here."""
    from ftx import models
    from ftx.testing.tiny import tiny_tokenizer

    return models.load_tokenizer(config) if (config / "tokenizer.json").is_file() else tiny_tokenizer()


def rehearse(case: Case, run: Run, tokens: Dataset, tokenizer: Any, catalogue: Catalogue, *, steps: int = 2, memory: bool = True) -> dict[str, Any]:
    """Load the model and train `steps` steps on `tokens` as a run would: `measured` of plan.json for them. Without `memory` only the speed is."""
    recipe, hooks = shortened(case, steps, catalogue)
    with tempfile.TemporaryDirectory(prefix="ftx-rehearsal-") as scratch:
        trial = trial_run(run, recipe, hooks, scratch)
        apart = bystanders()  # what else the process holds is not the run's
        model = pipeline.load_base(hooks, catalogue, trial)
        pipeline.seed_everything(run.seed)
        model = hooks.call("adapt_model", model=model, run=trial)
        peak = Peak(trial, apart)
        peak.working = memory
        trainer = trainer_of(hooks, model, tokenizer, tokens, [peak, Stop(steps)], trial)
        try:
            trainer.train()
        finally:
            peak.close()
        assert trial.directory is not None
        found: dict[str, Any] = trial.directory.read_json("plan.json")["measured"]
        return found


def trace(case: Case, run: Run, tokens: Dataset, tokenizer: Any, catalogue: Catalogue) -> int:
    """Bytes: the peak of two training steps on `tokens`, run with shapes in the place of numbers; no weights are read and no memory is
    taken. The model is made from its config, everything else is the plugins' own: adapter, trainer, loss, optimizer."""
    from ftx.pretend import pretending

    recipe, hooks = shortened(case, 2, catalogue)
    with tempfile.TemporaryDirectory(prefix="ftx-trace-") as scratch, pretending() as machine:
        trial = trial_run(run, recipe, hooks, scratch)
        model = hollow_model(run.model_path, pipeline.base_dtype(hooks, trial), hooks.hook.quantization_config(run=trial))
        hooks.hook.model_loaded(model=model, run=trial)
        model = hooks.call("adapt_model", model=model, run=trial)
        trainer = trainer_of(hooks, model, tokenizer, tokens, [Stop(2)], trial)
        machine.peak = machine.live
        trainer.train()
        return machine.peak


def shortened(case: Case, steps: int, catalogue: Catalogue) -> tuple[Recipe, Hooks]:
    """The recipe of a case with so many steps of at most two passes: the second pass of a step finds gradients there."""
    options = case.recipe.trainer.options if case.recipe.trainer else {}
    short = {"max_steps": steps, TIMES: min(2, options.get(TIMES, 1)), "save_strategy": "no", "save_steps": None, "eval_strategy": "no", "eval_steps": None}
    short |= {"early_stopping_patience": None, "load_best_model_at_end": False}
    wanted = replace(case.wanted, evaluators=(), observers=())
    return resolve(with_options(wanted, **{name: value for name, value in short.items() if name in options}), catalogue)


def like(case: Case, lengths: Sequence[int] = ()) -> Dataset:
    """Encoded rows for the steps of a trial: of the lengths that the case was planned for, or of those given, with its shares of
    supervised tokens and of tokens that repeat another sequence's beginning."""
    from datasets import Dataset

    shape, trainer = case.prediction.asked, next(plugin for key, plugin in case.hooks.list_name_plugin() if key.startswith("trainer:"))
    names = ["chosen_", "rejected_"] if declared(type(trainer), "sequences") == 2 else [""]
    wanted, share = lengths or shape.lengths, shape.supervised / max(1, sum(shape.lengths))
    each, more = divmod(shape.alike * sum(wanted) // max(1, sum(shape.lengths)), max(1, len(wanted) - 1))
    rows: list[dict[str, Any]] = []
    for copy in range(min(2, case.prediction.shape.accumulation)):
        for first in range(0, len(wanted), len(names)):
            row: dict[str, Any] = {}
            for number, (name, length) in enumerate(zip(names, wanted[first:], strict=False), first):
                counted, alike = max(1, round(share * length)), each + (number <= more)
                begins = [0 if place < alike else 1 + copy * len(wanted) + number for place in range(length)]  # no two sequences go on alike
                ids = [(begin + place) % (shape.vocabulary - 3) + 3 for place, begin in enumerate(begins)]
                row |= {f"{name}input_ids": ids, f"{name}labels": [-100] * (length - counted) + ids[length - counted :]}
            rows.append(row)
    return Dataset.from_list(rows)


def hollow_model(path: Path, dtype: Any, quantization: Any = None) -> Any:
    """The model of a directory's config.json, in eval mode as it is loaded, on the Pretend of the block in hand: its weights take no room.

    Of what is quantised a matrix of each shape is quantised for real, once, to see the form; every layer of that shape
    gets one of the same form without numbers.
    """
    import torch
    from torch.utils._python_dispatch import _disable_current_modes
    from transformers import AutoConfig, AutoModelForCausalLM

    from ftx.pretend import current

    config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    config.dtype = dtype
    forms: dict[Any, Any] = {}
    machine, quantizer = current(), None
    with _disable_current_modes():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        if quantization is not None:
            from transformers.quantizers import AutoHfQuantizer

            quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
            with torch.device("meta"):
                quantizer.preprocess_model(model=model, device_map={"": "cpu"}, dtype=dtype)
            model.hf_quantizer = quantizer
        for name, parameter in list(model.named_parameters()):
            if quantizer is not None and quantizer.param_needs_quantization(model, name):
                key = parameter.shape, name.rpartition(".")[2]
                if key not in forms:
                    numbers = torch.zeros(parameter.shape, dtype=dtype)
                    forms[key] = quantizer.get_quantize_ops().convert({name: [numbers]}, full_layer_name=name, model=model)[name]
                forms[name] = forms[key]
    hollow: dict[int, Any] = {}
    for place, module in model.named_modules():
        for kind in (module._parameters, module._buffers):
            for own, tensor in kind.items():
                if tensor is not None:  # tied weights once
                    form = forms.get(f"{place}.{own}", tensor)
                    kind[own] = hollow.setdefault(id(tensor), machine.hollowed(form))
    if quantizer is not None:
        quantizer.postprocess_model(model)
    return model.eval()


def trial_run(run: Run, recipe: Recipe, hooks: Hooks, scratch: str) -> Run:
    trial = replace(run, recipe=recipe, hooks=hooks, directory=RunDir(scratch), say=lambda line: None, notes={})
    assert trial.directory is not None
    trial.directory.checkpoints.mkdir()
    return trial


def trainer_of(hooks: Hooks, model: Any, tokenizer: Any, tokens: Dataset, callbacks: list[Any], run: Run) -> Any:
    return hooks.call("make_trainer", model=model, tokenizer=tokenizer, train_dataset=tokens, eval_dataset=None, callbacks=callbacks, run=run)
