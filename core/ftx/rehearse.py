"""The first steps of the real training, in a directory that is thrown away: to measure, or without weights and without memory to trace."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from ftx import pipeline
from ftx.catalogue import Catalogue
from ftx.hooks import Hooks
from ftx.peak import Peak
from ftx.run import Run, RunDir

if TYPE_CHECKING:
    from datasets import Dataset


class Stop(TrainerCallback):  # type: ignore[misc]
    """Ends training behind so many steps, and writes no checkpoint."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_evaluate = False
        control.should_training_stop = control.should_training_stop or state.global_step >= self.steps

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = control.should_evaluate = False


def rehearse(hooks: Hooks, tokenizer: Any, tokens: Dataset, run: Run, catalogue: Catalogue, *, steps: int = 2) -> dict[str, Any]:
    """Load the model and train `steps` steps on `tokens` as the run will: `measured` of plan.json for them. The run's own state is untouched."""
    with tempfile.TemporaryDirectory(prefix="ftx-rehearsal-") as scratch:
        trial = trial_run(run, scratch)
        model = pipeline.load_base(hooks, catalogue, trial)
        pipeline.seed_everything(run.seed)
        model = hooks.call("adapt_model", model=model, run=trial)
        peak = Peak(trial)
        trainer = trainer_of(hooks, model, tokenizer, tokens, [peak, Stop(steps)], trial)
        try:
            trainer.train()
        finally:
            peak.close()
        assert trial.directory is not None
        found: dict[str, Any] = trial.directory.read_json("plan.json")["measured"]
        return found


def trace(hooks: Hooks, tokenizer: Any, tokens: Dataset, run: Run, *, steps: int = 2) -> int:
    """Bytes: the peak of `steps` training steps on `tokens`, run with shapes in the place of numbers; no weights are read and no memory is
    taken. The model is made from its config, everything else is the plugins' own: adapter, trainer, loss, optimizer."""
    from ftx.pretend import pretending

    with tempfile.TemporaryDirectory(prefix="ftx-trace-") as scratch, pretending() as machine:
        trial = trial_run(run, scratch)
        model = hollow_model(run.model_path, run.dtype, hooks.hook.quantization_config(run=trial))
        hooks.hook.model_loaded(model=model, run=trial)
        model = hooks.call("adapt_model", model=model, run=trial)
        trainer = trainer_of(hooks, model, tokenizer, tokens, [Stop(steps)], trial)
        machine.peak = machine.live
        trainer.train()
        return machine.peak


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


def trial_run(run: Run, scratch: str) -> Run:
    trial = replace(run, directory=RunDir(scratch), say=lambda line: None, notes={})
    assert trial.directory is not None
    trial.directory.checkpoints.mkdir()
    return trial


def trainer_of(hooks: Hooks, model: Any, tokenizer: Any, tokens: Dataset, callbacks: list[Any], run: Run) -> Any:
    return hooks.call("make_trainer", model=model, tokenizer=tokenizer, train_dataset=tokens, eval_dataset=None, callbacks=callbacks, run=run)


def longest_rows(tokens: Dataset, count: int) -> Dataset:
    """The `count` longest rows, the longest first."""
    columns = [name for name in tokens.column_names if name.endswith("input_ids")]
    lengths = [max(len(row[name]) for name in columns) for row in tokens.select_columns(columns)]
    return tokens.select(sorted(range(len(lengths)), key=lambda number: -lengths[number])[:count])
