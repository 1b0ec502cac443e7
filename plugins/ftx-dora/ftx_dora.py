"""The adapter `dora`: LoRA whose weight rows have their size trained apart from their direction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftx import hookimpl, plugin
from ftx_lora import LoRA

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from ftx import Run
    from ftx.shape import Shape


@plugin
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation (Liu et al., 2024, arXiv 2402.09353): m * (W + s BA) / |W + s BA|.

    The norm counts as a constant in the gradient (section 4.3 of the paper). The magnitude m stays float32: in bfloat16
    its updates would be rounded away.
    """

    def lora_config(self, **more: Any) -> LoraConfig:
        return super().lora_config(use_dora=True, **more)

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        reasons = super().preflight(run)
        if run.device == "cpu" and run.recipe.quantizer is not None and run.recipe.quantizer.name == "int8":
            # peft 0.21 reads an 8-bit weight for its norm in a way that loses the weight's scales on a CPU
            reasons.append("dora cannot read int8 weights on a CPU: use --quantizer nf4, or --adapter lora.")
        return reasons

    @hookimpl
    def plan_shape(self, shape: Shape, run: Run) -> Shape:
        from ftx_lora_plan import shaped

        return shaped(self, shape, dora=True)

    @hookimpl
    def memory_use(self, shape: Shape, run: Run) -> dict[str, int]:
        from ftx_lora_plan import memory

        return memory(self, shape, dora=True)

    @hookimpl
    def adapt_model(self, model: PreTrainedModel, run: Run) -> PeftModel:
        """LoRA's model, with magnitudes that leave the base's output unchanged at the start."""
        adapted = super().adapt_model(model, run)
        start_exact(adapted)
        return adapted


def start_exact(model: PeftModel) -> None:
    """Set every magnitude to the norm of its rows in float32: peft takes it in the base's dtype, and a magnitude that was
    rounded to bfloat16 scales each row of the untrained model by up to 0.4 %."""
    import torch
    from peft.utils.integrations import dequantize_module_weight

    for layer in model.modules():
        for name, magnitude in getattr(layer, "lora_magnitude_vector", {}).items():
            if name not in layer.lora_A:
                continue  # an embedding: its magnitude is taken in float32 already
            with torch.no_grad():
                weight = dequantize_module_weight(layer.get_base_layer()).float()
                update = layer.lora_B[name].weight @ layer.lora_A[name].weight
                magnitude.weight.copy_(magnitude.get_weight_norm(weight, update, layer.scaling[name]))
