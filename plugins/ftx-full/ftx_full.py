"""The adapter `full`: every weight of the model trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftx import hookimpl, plugin
from ftx.errors import RunError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ftx import Run
    from ftx.shape import Shape


@plugin
class Full:
    """Full fine-tuning: no adapter, every weight trains.

    The weights are kept in float32 whatever the run's dtype: at a learning rate of 5e-6 most steps are smaller than the
    spacing of bfloat16, and weights in bfloat16 would not move. They are loaded so, too: see the hook `base_dtype`.
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
        return replace(shape, loaded=4, trained=shape.parameters, trains_base=True, reference=True)

    @hookimpl
    def memory_use(self, shape: Shape, run: Run) -> dict[str, int]:
        """Gradients in float32, and the inputs that the weights' gradients are made of."""
        from ftx.activations import trained_inputs

        return {
            "gradients": 4 * shape.parameters,
            "activations": trained_inputs(shape),
        }

    @hookimpl
    def base_dtype(self, run: Run) -> torch.dtype:
        return _float32()

    @hookimpl
    def adapt_model(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """The same model in float32 with every weight trainable; RunError for a quantised one."""
        if getattr(model, "is_quantized", False):
            raise RunError(f"the weights of {run.model} are quantised and cannot be trained in full.", "Use --adapter lora, or a model that is not quantised.")
        _note_learning_rate(run)
        model.float()
        model.config.dtype = _float32()
        model.requires_grad_(True)
        return model

    @hookimpl
    def save_adapted(self, model: PreTrainedModel, path: Path, run: Run) -> None:
        model.save_pretrained(path)

    @hookimpl
    def load_adapted(self, base: PreTrainedModel, path: Path, run: Run) -> PreTrainedModel:
        """The model in `path`, in float32, on the base's device, whose weights are given up first: two would not fit where one does.

        transformers reads it, because the names on disk may differ from those in memory (mixtures of experts).
        Raises RunError for missing, unexpected or misshapen weights: transformers alone would fill them in at random.
        """
        if not (path / "config.json").is_file():
            raise RunError(f"{path} holds no model (no config.json).", "It must come from a run with --adapter full.")
        device = base.device
        base.to("meta")
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
        return model.to(device).eval()

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


def _note_learning_rate(run: Run) -> None:
    trainer = run.recipe.trainer
    rate = trainer.options.get("learning_rate") if trainer else None
    low, high = ("5e-7", "1e-5") if trainer and trainer.name == "dpo" else ("1e-6", "5e-6")
    if rate is not None and not float(low) <= rate <= float(high):
        run.say(f"note: learning rate {rate:g} is outside {low} to {high}, the usual range for full fine-tuning")


def _float32() -> Any:
    import torch

    return torch.float32
