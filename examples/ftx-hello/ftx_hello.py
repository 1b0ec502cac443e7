"""The adapter `hello`: one learned factor for each output of some linear layers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ftx import hookimpl, option, plugin
from ftx.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from ftx import Run

FILE = "factors.safetensors"


@plugin
class HelloAdapter:
    """Learned factors on keys, values and hidden units, as in (IA)^3 (Liu et al., 2022, arXiv 2205.05638)."""

    target_modules: list[str] = option(["k_proj", "v_proj", "up_proj"], "Names of the linear layers whose outputs are scaled.")

    suggests = {"trainer.learning_rate": 1e-2}

    def __post_init__(self) -> None:
        if not self.target_modules:
            raise ValueError("target_modules must name at least one layer")

    @hookimpl
    def adapt_model(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Freeze the base; the factors start at 1, so that nothing changes until they are trained."""
        model.requires_grad_(False)
        for layer in self.targets(model).values():
            attach(layer)
        return model

    @hookimpl
    def save_adapted(self, model: PreTrainedModel, path: Path, run: Run) -> None:
        from safetensors.torch import save_file

        save_file({name: layer.factor.detach().clone() for name, layer in adapted(model).items()}, path / FILE)

    @hookimpl
    def load_adapted(self, base: PreTrainedModel, path: Path, run: Run) -> PreTrainedModel:
        """RunError if the file does not belong to this base and these target_modules."""
        from safetensors.torch import load_file

        factors, targets = load_file(path / FILE), self.targets(base)
        if factors.keys() != targets.keys():
            raise RunError(f"{path / FILE} holds factors of other layers than this model has.", "Load it on the model that it was trained on.")
        base.requires_grad_(False)
        for name, layer in targets.items():
            attach(layer)
            layer.factor.data.copy_(factors[name])
            layer.factor.requires_grad_(False)
        return base.eval()

    @hookimpl
    def merge_adapted(self, model: PreTrainedModel, run: Run) -> PreTrainedModel:
        """Multiply the factors into the weights; a quantised model is dequantised first."""
        factors = {name: detach(layer) for name, layer in adapted(model).items()}
        if getattr(model, "is_quantized", False):
            model = model.dequantize(dtype=run.dtype)
        for name, factor in factors.items():
            layer = model.get_submodule(name)
            layer.weight.data *= factor[:, None]
            if layer.bias is not None:
                layer.bias.data *= factor
        return model

    @hookimpl
    def adapter_off(self, model: PreTrainedModel, run: Run) -> AbstractContextManager[Any]:
        return off(model)

    def targets(self, model: PreTrainedModel) -> dict[str, Any]:
        """The layers to scale, by their full names; RunError if a name in target_modules fits none."""
        found = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in self.target_modules}
        for wanted in self.target_modules:
            if not any(name.rpartition(".")[2] == wanted for name in found):
                raise RunError(f"the model has no layer called '{wanted}'.", "Name its own: -o adapter.target_modules=[...]")
        return found


def attach(layer: Any) -> None:
    """Give a linear layer its factors, float32 of shape (outputs,), and let them work."""
    import torch

    layer.factor = torch.nn.Parameter(torch.ones(layer.out_features, device=layer.weight.device))
    layer.factor_hook = layer.register_forward_hook(scale)


def detach(layer: Any) -> torch.Tensor:
    """Take the factors off a layer; what they were."""
    factor: torch.Tensor = layer.factor.detach()
    layer.factor_hook.remove()
    del layer.factor, layer.factor_hook
    return factor


def scale(layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return (output * layer.factor).to(output.dtype)


def adapted(model: PreTrainedModel) -> dict[str, Any]:
    """The layers that have factors, by their full names."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "factor_hook")}


@contextmanager
def off(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The model without its factors, for as long as the block runs."""
    layers = adapted(model).values()
    for layer in layers:
        layer.factor_hook.remove()
    try:
        yield model
    finally:
        for layer in layers:
            layer.factor_hook = layer.register_forward_hook(scale)
