"""The exam of exporters: something is written where it was asked for, and the model is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftx import models
from ftx.testing.common import Contract
from ftx.testing.runs import make_run, shared_model_dir


class ExporterContract(Contract):
    """For classes in the group ftx.exporter, on the tiny model in float32 on the CPU."""

    stage = "exporter"
    needs = ("export_model",)

    def test_it_writes_the_model(self, given: dict[str, Any], tmp_path: Path) -> None:
        """The directory holds at least one file that is not empty, the result says what was written, and the model's weights
        are what they were."""
        import torch

        hooks, run = self.hooks(given), make_run(tmp_path / "run")
        self.skip_if_refused(hooks, run)
        model = models.load_model(shared_model_dir(), dtype=torch.float32, device="cpu")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        path = tmp_path / "exported"
        path.mkdir()
        result = hooks.call("export_model", model=model, tokenizer=models.load_tokenizer(shared_model_dir()), path=path, run=run)
        assert result is not None
        assert [file for file in path.rglob("*") if file.is_file() and file.stat().st_size], (
            f"nothing was written into the directory that was given; it says {result!r}"
        )
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert not changed, f"exporting changes the model's weights: {', '.join(changed[:3])}"
