"""The exam of exporters: what they write is what the run says, read back by another program, and their check finds a difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest

from ftx import models, parity, pipeline
from ftx.catalogue import Catalogue
from ftx.errors import PluginError
from ftx.export import Departure, write_checked
from ftx.run import Run
from ftx.testing.common import Contract
from ftx.testing.own import ROWS
from ftx.testing.runs import OWN, finished_run


class ExporterContract(Contract):
    """For classes in the group ftx.exporter, on a run of the tiny model in float32 on the CPU. `adapter`: that of the run,
    where the exporter writes an adapter of some kind and no plain model. `least`: the least share of tokens that must agree
    in place of the reader's, for coarse weights: on random ones many tokens are nearly tied."""

    stage = "exporter"
    needs = ("export_model",)
    adapter: ClassVar[str] = OWN
    least: ClassVar[float | None] = None

    def run(self, given: dict[str, Any], directory: Path) -> Run:
        """A finished run with the exporter among its plugins; skips where its adapter is not installed, or preflight refuses."""
        try:
            Catalogue().load("adapter", self.adapter)
        except PluginError as error:
            pytest.skip(f"adapter {self.adapter}: {error.problem}")
        run = finished_run(directory, ROWS["conversation"], adapter=self.adapter)
        assert run.hooks is not None
        run.hooks.add(self.build(given), self.stage, self.name)
        self.skip_if_refused(run.hooks, run)
        return run

    def tuned(self, run: Run) -> Any:
        """The run's tuned model, read back."""
        assert run.hooks is not None and run.directory is not None
        return run.hooks.call("load_adapted", base=pipeline.load_base(run.hooks, Catalogue(), run), path=run.directory.model, run=run)

    def test_it_writes_the_model(self, given: dict[str, Any], tmp_path: Path) -> None:
        """The directory holds at least one file that is not empty, the result says what was written, and the model's weights
        are what they were."""
        import torch

        run, path = self.run(given, tmp_path / "run"), tmp_path / "exported"
        assert run.hooks is not None
        form = run.hooks.call("exported_form" if run.hooks.owners("exported_form") else "merge_adapted", model=self.tuned(run), run=run)
        model = form.model if isinstance(form, Departure) else form
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        path.mkdir()
        result = run.hooks.call("export_model", model=model, tokenizer=models.load_tokenizer(run.model_path), path=path, run=run)
        assert result is not None
        assert [file for file in path.rglob("*") if file.is_file() and file.stat().st_size], (
            f"nothing was written into the directory that was given; it says {result!r}"
        )
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert not changed, f"exporting changes the model's weights: {', '.join(changed[:3])}"

    def test_what_it_writes_agrees_with_the_run(self, given: dict[str, Any], tmp_path: Path) -> None:
        """Read back, it says token for token what the run says, renders the chat template as the run does, cuts texts into
        the same tokens, ends its answers where the run ends them, and every weight is used; another model than the one that
        was exported is not taken for it."""
        run, path = self.run(given, tmp_path / "run"), tmp_path / "exported"
        assert run.hooks is not None and run.directory is not None
        tokenizer = models.load_tokenizer(run.directory.model)
        prompts: list[Any] = [row["messages"][:1] for row in ROWS["conversation"]]
        path.mkdir()
        _, report = write_checked(run.hooks, self.tuned(run), tokenizer, prompts, path, run, least=self.least)
        assert report["agrees"], f"what it writes is not what the run says: {'; '.join(report['parity']['wrong'])}"

        other = finished_run(tmp_path / "other", ROWS["conversation"], adapter=self.adapter, seed=1)
        probe = parity.ask(self.tuned(other), tokenizer, prompts)
        reader = run.hooks.call("read_exported", path=path, run=run) if run.hooks.owners("read_exported") else parity.read_with_transformers(path, run)
        found = parity.agreement(reader, probe)
        assert found.share < (self.least or reader.bounds[0]), (
            "read_exported agrees with a model that was never exported: it must read what lies in the directory"
        )
