"""The adapter `full`: every weight of the model trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftx import hookimpl, plugin
from ftx.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ftx import Run
    from ftx.shape import Shape


@plugin
class Full:
    """Full fine-tuning: no adapter, every weight trains.

    The weights are kept in float32 whatever the run's dtype: at a learning rate of 5e-6 most steps are smaller than the
    spacing of bfloat16, and weights in bfloat16 would not move. They are read again as the checkpoint has them: those that a run
    in bfloat16 has loaded lie in the middle of what is rounded to them, and the first steps would change no number that is computed with.
    """

    suggests = {
        "trainer.learning_rate": 5e-6,
        "trainer.num_train_epochs": 2,
        "trainer:dpo.learning_rate": 1e-5,
        "trainer:dpo.num_train_epochs": 1,
    }
    exam = {"trains_everything": True}

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        if run.recipe.quantizer is None:
            return []
        return [f"quantizer '{run.recipe.quantizer.name}' gives weights that cannot be trained in full: drop --quantizer, or use --adapter lora."]

    @hookimpl
    def plan_shape(self, shape: Shape, run: Run) -> Shape:
        return replace(shape, trained=shape.parameters, trains_base=True, reference=True)

    @hookimpl
    def memory_use(self, shape: Shape, run: Run) -> dict[str, int]:
        """Weights and gradients in float32, and the inputs that the weights' gradients are made of."""
        from ftx.activations import trained_inputs

        return {
            "weights": (4 - shape.loaded) * shape.parameters,
            "gradients": 4 * shape.parameters,
            "activations": trained_inputs(shape),
        }

    @hookimpl
    def adapt_model(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """The same model in float32 with every weight trainable; RunError for a quantised one."""
        if getattr(model, "is_quantized", False):
            raise RunError(f"the weights of {run.model} are quantised and cannot be trained in full.", "Use --adapter lora, or a model that is not quantised.")
        _note_learning_rate(run)
        there = next(model.parameters()).untyped_storage().device.type != "meta"  # it is not where a plan traces shapes
        if run.recipe.start is None and model.dtype.itemsize < 4 and there:
            _read_again(model, run)
        model.float()
        model.config.dtype = _float32()
        model.requires_grad_(True)
        return model

    @hookimpl
    def save_adapted(self, model: PreTrainedModel, path: Path, run: Run) -> None:
        model.save_pretrained(path)

    @hookimpl
    def load_adapted(self, base: PreTrainedModel, path: Path, run: Run) -> PreTrainedModel:
        """The model in `path`, in float32, on the base's device; the base itself is not used up.

        transformers reads it, because the names on disk may differ from those in memory (mixtures of experts).
        Raises RunError for missing, unexpected or misshapen weights: transformers alone would fill them in at random.
        """
        if not (path / "config.json").is_file():
            raise RunError(f"{path} holds no model (no config.json).", "It must come from a run with --adapter full.")
        model, info = type(base).from_pretrained(
            path,
            dtype=_float32(),
            attn_implementation=base.config._attn_implementation,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        wrong = {
            "missing": info["missing_keys"],
            "unexpected": info["unexpected_keys"],
            "misshapen": [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]],
        }
        for what, names in wrong.items():
            if names:
                raise RunError(f"{path}: {len(names)} {what} weights, such as {min(names)}.", "Start from the model that this run started from.")
        return model.to(base.device).eval()

    @hookimpl
    def merge_adapted(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """The same model in the run's dtype; the float32 weights are gone afterwards."""
        if run.dtype is not None:
            for parameter in model.parameters():  # not model.to(dtype), which would round the rotary frequencies too
                parameter.data = parameter.data.to(run.dtype)
            model.config.dtype = run.dtype
        return model

    @hookimpl
    def adapter_off(self, model: Any, run: Run) -> None:
        """None: the base's weights are overwritten."""


def _read_again(model: PreTrainedModel, run: Run) -> None:
    """Give the parameters the values that they have in the model's files, in float32."""
    from ftx.models import load_model

    whole = dict(load_model(run.model_path, dtype=_float32(), device=run.device, code=run.recipe.trusts_model).named_parameters())
    for name, parameter in model.named_parameters():
        parameter.data = whole.pop(name).data


def _note_learning_rate(run: Run) -> None:
    trainer = run.recipe.trainer
    rate = trainer.options.get("learning_rate") if trainer else None
    low, high = ("5e-7", "1e-5") if trainer and trainer.name == "dpo" else ("1e-6", "5e-6")
    if rate is not None and not float(low) <= rate <= float(high):
        run.say(f"note: learning rate {rate:g} is outside {low} to {high}, the usual range for full fine-tuning")


def _float32() -> Any:
    import torch

    return torch.float32
