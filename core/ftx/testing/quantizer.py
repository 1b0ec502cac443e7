"""The exam of quantizers: from_pretrained takes the configuration, or preflight says why not."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from ftx import models
from ftx.catalogue import Catalogue
from ftx.generate import Generate
from ftx.pipeline import load_base
from ftx.testing.common import Contract
from ftx.testing.runs import make_run, shared_model_dir


class QuantizerContract(Contract):
    """For classes in the group ftx.quantizer. `similarity`: the least cosine of the quantised model's logits with the
    plain one's, on random weights."""

    stage = "quantizer"
    needs = ("quantization_config",)
    similarity: ClassVar[float] = 0.8

    def load(self, given: dict[str, Any], directory: Path) -> Any:
        """The tiny model as this quantizer has it loaded; skips where preflight refuses."""
        hooks, run = self.hooks(given), make_run(directory / "run", quantizer=self.choice(given))
        self.skip_if_refused(hooks, run)
        return load_base(hooks, Catalogue([]), run)

    def test_a_model_loads_with_it(self, given: dict[str, Any], tmp_path: Path) -> None:
        """The model takes less memory and says about the same."""
        import torch

        plain = models.load_model(shared_model_dir(), dtype=torch.float32, device="cpu")
        quantised = self.load(given, tmp_path)
        assert quantised.get_memory_footprint() < plain.get_memory_footprint(), "the quantised model is no smaller than the plain one"
        found, wanted = _logits(quantised), _logits(plain)
        assert bool(found.isfinite().all()), "the quantised model gives logits that are not numbers"
        similarity = float(torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), dim=0))
        assert similarity >= self.similarity, f"the quantised model's logits have a cosine of {similarity:.2f} with the plain one's"

    def test_generating_does_not_change_it(self, given: dict[str, Any], tmp_path: Path) -> None:
        """An evaluation between two steps must not change the weights: some kernels repack them at the first generation."""
        import torch

        model = self.load(given, tmp_path)
        model.train()
        before = _logits(model)
        Generate(model, models.load_tokenizer(shared_model_dir()))(["one", "twenty-two"], max_new_tokens=2)
        model.train()
        assert torch.equal(_logits(model), before), "generating changes the quantised weights: see to it in model_loaded"

    def test_same_configuration_again(self, given: dict[str, Any], tmp_path: Path) -> None:
        """The hook gives an equal configuration each time."""
        hooks, run = self.hooks(given), make_run(tmp_path / "run", quantizer=self.choice(given))
        self.skip_if_refused(hooks, run)
        first, second = (hooks.hook.quantization_config(run=run) for _ in range(2))
        assert first is not None, "quantization_config gives None, so nothing is quantised"
        assert first.to_dict() == second.to_dict(), "quantization_config gives another configuration the second time"


def _logits(model: Any) -> Any:
    """Logits for 32 fixed tokens, float32, in the mode that the model is in."""
    import torch

    with torch.no_grad():
        return model(input_ids=torch.arange(32).mul(7919).remainder(250).add(5).unsqueeze(0)).logits.float().clone()
