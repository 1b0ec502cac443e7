"""The adapter `qlora`: LoRA on a base that it loads in 4 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftx import hookimpl, plugin
from ftx_bnb import environment, four_bits, keep_weights, obstacles, packed, packing
from ftx_lora import LoRA, changes_base

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedModel

    from ftx import Run
    from ftx.shape import Shape


@plugin
class QLoRA(LoRA):
    """LoRA on a base in NF4 with double quantisation, computing in bfloat16 (Dettmers et al., 2023, arXiv 2305.14314)."""

    owns = {"quantization_config": "qlora brings its own 4-bit base: drop --quantizer, or use --adapter lora."}

    def __post_init__(self) -> None:
        super().__post_init__()
        if changes_base(self.init):
            raise ValueError(f"init={self.init} changes the base's weights, which cannot be done to quantised ones: use init=true")

    @staticmethod
    def suggests(device: str) -> dict[str, Any]:
        """LoRA's, and the paper's paged 8-bit optimizer where there is a GPU for it. `device`: as --device says, auto included."""
        from ftx.machine import gpus

        paged = {"trainer.optim": "paged_adamw_8bit"} if device == "cuda" or (device == "auto" and gpus()) else {}
        return LoRA.suggests | paged

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        reasons = super().preflight(run) + obstacles(run)
        optimizer = getattr(run.recipe.trainer, "options", {}).get("optim")
        if run.device == "cpu" and str(optimizer).startswith("paged_"):
            reasons.append(f"the optimizer {optimizer} needs a GPU: -o trainer.optim=adamw_torch")
        return reasons

    @hookimpl
    def plan_shape(self, shape: Shape, run: Run) -> Shape:
        return super().plan_shape(packed(shape, 4), run)

    @hookimpl
    def memory_use(self, shape: Shape, run: Run) -> dict[str, int]:
        found = super().memory_use(shape, run)
        for kind, size in packing(shape, bits=4, double_quant=True).items():
            found[kind] = found.get(kind, 0) + size
        return found

    @hookimpl
    def quantization_config(self, run: Run) -> BitsAndBytesConfig:
        return four_bits("nf4", double_quant=True, run=run)

    @hookimpl
    def model_loaded(self, model: PreTrainedModel, run: Run) -> None:
        keep_weights(model)
        super().model_loaded(model, run)

    @hookimpl
    def adapt_model(self, model: PreTrainedModel, run: Run) -> PeftModel:
        computes = str(run.dtype or "float32").removeprefix("torch.")
        if computes != "bfloat16":
            run.say(f"note: qlora computes in {computes}, the run's dtype, instead of bfloat16")
        return super().adapt_model(model, run)

    @hookimpl
    def check_environment(self) -> list[str]:
        return environment()
