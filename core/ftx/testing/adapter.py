"""The exam of adapters: same start, only what should train trains, and what was trained comes back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from ftx import models
from ftx.catalogue import Catalogue
from ftx.errors import FtxError
from ftx.pipeline import load_base, seed_everything
from ftx.testing.common import Contract
from ftx.testing.runs import make_run, shared_model_dir

if TYPE_CHECKING:
    import torch

    from ftx.hooks import Hooks
    from ftx.run import Run

Weights = dict[str, "torch.Tensor"]
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class AdapterContract(Contract):
    """For classes in the group ftx.adapter, on the tiny model in float32 on the CPU.

    `trains_everything`: the base's own weights train. `changes_at_start`: the adapted model is not the base even before
    training. `tolerance`: how far merging may move a logit. `learning_rate`: of the ten steps of AdamW that must lower
    the loss. All as class attributes.
    """

    stage = "adapter"
    needs = ("adapt_model", "save_adapted", "load_adapted", "merge_adapted", "adapter_off")
    trains_everything: ClassVar[bool] = False
    changes_at_start: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-3
    #: How far a logit of the loaded model may lie from the saved one's; more only where the file holds other tensors than the model.
    load_tolerance: ClassVar[float] = 1e-5
    learning_rate: ClassVar[float] = 1e-2

    def load(self, given: dict[str, Any], directory: Path) -> tuple[Hooks, Run, Any]:
        """The plugin, a Run and a fresh base as this plugin has it loaded; skips where preflight refuses."""
        hooks = self.hooks(given)
        run = make_run(directory / "run", adapter=self.choice(given))
        self.skip_if_refused(hooks, run)
        return hooks, run, load_base(hooks, Catalogue([]), run)

    def adapted(self, given: dict[str, Any], directory: Path, *, steps: int = 0, seed: int = 0) -> tuple[Hooks, Run, Any]:
        """The plugin, a Run and a fresh adapted model, trained for `steps`."""
        hooks, run, base = self.load(given, directory)
        seed_everything(seed)
        model = hooks.call("adapt_model", model=base, run=run)
        _train(model, steps, self.learning_rate)
        return hooks, run, model

    def test_it_starts_from_the_base(self, given: dict[str, Any], tmp_path: Path) -> None:
        """Before training, the adapted model says what the base says."""
        if self.changes_at_start:
            pytest.skip("changes_at_start: the adapted model is another from the start")
        hooks, run, base = self.load(given, tmp_path)
        before = _logits(base)
        _same(_logits(hooks.call("adapt_model", model=base, run=run)), before, "the adapted model is not the base before it is trained")

    def test_only_what_should_train_trains(self, given: dict[str, Any], tmp_path: Path) -> None:
        """The base is frozen, two steps change every trainable weight and no other, and ten lower the loss."""
        import torch

        hooks, run, base = self.load(given, tmp_path)
        originals = dict(base.named_parameters())
        seed_everything(0)
        model = hooks.call("adapt_model", model=base, run=run)
        thawed = [name for name, parameter in originals.items() if parameter.requires_grad]
        assert self.trains_everything or not thawed, f"the base is not frozen: {_some(thawed)} (or say trains_everything = True)"
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable, "nothing trains"
        before = _weights(model)
        losses = _train(model, 2, self.learning_rate)
        moved = {name for name, tensor in _weights(model).items() if not torch.equal(tensor, before[name])}
        assert not moved - trainable, f"training changes what should not train: {_some(moved - trainable)}"
        assert not trainable - moved, f"two steps do not change what should train: {_some(trainable - moved)}"
        losses += _train(model, 8, self.learning_rate)
        assert losses[-1] < losses[0], f"ten steps do not lower the loss: {losses[0]:.4f} to {losses[-1]:.4f}"

    def test_what_is_saved_loads(self, given: dict[str, Any], tmp_path: Path) -> None:
        """On a fresh base and with a fresh plugin, what was saved says what the trained model said; it is safetensors only."""
        hooks, run, model = self.adapted(given, tmp_path, steps=2)
        before, saved = _logits(model), tmp_path / "saved"
        saved.mkdir()
        hooks.hook.save_adapted(model=model, path=saved, run=run)
        files = [file for file in saved.rglob("*") if file.is_file()]
        pickles = [file.name for file in files if file.suffix in PICKLES]
        assert not pickles, f"save_adapted wrote pickles: {_some(pickles)}"
        assert [file for file in files if file.suffix == ".safetensors"], f"save_adapted wrote no safetensors, but {_some(f.name for f in files)}"
        hooks, run, base = self.load(given, tmp_path)
        assert not _close(_logits(base), before), "the training left no trace, so saving cannot be examined"
        loaded = hooks.call("load_adapted", base=base, path=saved, run=run)
        assert not loaded.training, "load_adapted must give the model in eval mode"
        _same(_logits(loaded), before, "the loaded model is not the one that was saved", self.load_tolerance)

    def test_it_merges(self, given: dict[str, Any], tmp_path: Path) -> None:
        """The merged model is a plain one that saves and loads without the adapter and says nearly the same. A method that
        has no merged form raises an FtxError that says so."""
        import torch
        from transformers import PreTrainedModel

        hooks, run, model = self.adapted(given, tmp_path, steps=2)
        before = _logits(model)
        try:
            merged = hooks.call("merge_adapted", model=model, run=run)
        except FtxError as error:
            pytest.skip(f"it refuses to merge: {error.problem}")
        assert isinstance(merged, PreTrainedModel), f"merge_adapted gave a {type(merged).__name__}, not a transformers model"
        plain = models.load_model(shared_model_dir(), dtype=torch.float32, device="cpu")
        odd = set(merged.state_dict()) ^ set(plain.state_dict())
        assert not odd, f"the merged model is no plain one: its weights differ by {_some(odd)}"
        _same(_logits(merged), before, "merging changes what the model says", self.tolerance)
        merged.save_pretrained(tmp_path / "merged")
        again = models.load_model(tmp_path / "merged", dtype=torch.float32, device="cpu")
        _same(_logits(again), before, "the merged model, saved and loaded, is another", self.tolerance)

    def test_it_switches_off(self, given: dict[str, Any], tmp_path: Path) -> None:
        """With the adapter off, the trained model is the base; afterwards it is the trained model again."""
        base = _logits(self.load(given, tmp_path)[2])
        hooks, run, model = self.adapted(given, tmp_path, steps=2)
        before = _logits(model)
        assert not _close(base, before), "the training left no trace, so switching off cannot be examined"
        off = hooks.hook.adapter_off(model=model, run=run)
        if off is None:
            pytest.skip("adapter_off gives None: the base cannot be had again")
        with off:
            _same(_logits(model), base, "with the adapter off the model is not the base")
        _same(_logits(model), before, "switching off and on again changes the model")

    def test_same_seed_same_weights(self, given: dict[str, Any], tmp_path: Path) -> None:
        """The same seed gives the same weights, to the bit."""
        import torch

        first, second = (_weights(self.adapted(given, tmp_path, steps=2, seed=7)[2]) for _ in range(2))
        other = [name for name in first if not torch.equal(first[name], second[name])]
        assert first.keys() == second.keys() and not other, f"the same seed gives other weights: {_some(other)}"


def _tokens() -> torch.Tensor:
    """Token ids (2, 24), the same every time."""
    import torch

    return torch.arange(48).mul(7919).remainder(250).add(5).view(2, 24)


def _logits(model: Any) -> torch.Tensor:
    """The model's logits for `_tokens()` in eval mode, float32; the model's mode is as before."""
    import torch

    training = model.training
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=_tokens()).logits.float().clone()
    model.train(training)
    return logits


def _train(model: Any, steps: int, learning_rate: float) -> list[float]:
    """Steps of AdamW on one batch; the loss before each."""
    import torch

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters or [torch.nn.Parameter(torch.zeros(1))], lr=learning_rate, weight_decay=0.0)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(input_ids=_tokens(), labels=_tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def _weights(model: Any) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= tolerance + tolerance * b.abs()).all())


def _same(found: torch.Tensor, wanted: torch.Tensor, what: str, tolerance: float = 1e-5) -> None:
    """Equal up to the rounding of float32: kernels round differently by where a tensor lies in memory."""
    assert found.shape == wanted.shape, f"{what}: logits have the shape {tuple(found.shape)} instead of {tuple(wanted.shape)}"
    assert _close(found, wanted, tolerance), f"{what}: a logit differs by {float((found - wanted).abs().max()):.2g}"


def _some(names: Any, most: int = 3) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
