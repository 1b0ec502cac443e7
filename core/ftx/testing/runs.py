"""Runs to try a plugin in: a Run for one hook, a whole run on the tiny model, the command line in this process."""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from ftx.catalogue import STAGES, Catalogue
from ftx.ledger import Ledger
from ftx.pipeline import Outcome
from ftx.recipe import SINGLE, Choice, Recipe, resolve, to_yaml
from ftx.run import Run, RunDir, write_lines, write_text
from ftx.testing.tiny import tiny_model_dir

#: The exam's own adapter, which needs no other distribution.
OWN = "ftx.testing.own:Norms"


@functools.cache
def _shelf() -> tempfile.TemporaryDirectory[str]:
    """A folder that lives as long as the process."""
    return tempfile.TemporaryDirectory(prefix="ftx-exam-")


@functools.cache
def shared_model_dir(*, merges: bool = False) -> Path:
    """The tiny model and its tokenizer on disk, made once a process. Its sizes are multiples of 64, as quantisers want.
    `merges`: with a tokenizer that has merges."""
    return tiny_model_dir(Path(_shelf().name) / f"model-{merges}", merges=merges, hidden_size=64, intermediate_size=128)


def make_run(directory: str | Path | None = None, *, model: str | Path | None = None, **recipe: Any) -> Run:
    """A Run for calling one hook: float32 on the CPU, over the shared tiny model unless `model` is a directory.

    `directory` becomes the run's directory and is made. The rest are fields of the Recipe: a plugin is a Choice or a
    name, evaluators and observers are tuples of Choice. What the run says is kept in `run.notes["said"]`.
    """
    import torch

    path = Path(model) if model is not None else shared_model_dir()
    recipe = {key: Choice(value) if key in SINGLE and isinstance(value, str) else value for key, value in recipe.items()}
    filled = Recipe(**{"model": str(path), "dtype": "float32", "device": "cpu", **recipe})
    said: list[str] = []
    run = Run(
        recipe=filled,
        ledger=Ledger(skip_bad_rows=filled.skip_bad_rows),
        seed=filled.seed,
        dtype=torch.float32,
        model=str(path),
        model_path=path,
        say=said.append,
        notes={"said": said},
    )
    if directory is not None:
        run.directory = RunDir(directory)
        run.directory.checkpoints.mkdir(parents=True, exist_ok=True)
    return run


class _Given(EntryPoint):
    """An entry point that is not installed: it gives the class that it was made with."""

    def __init__(self, stage: str, name: str, cls: type[Any]) -> None:
        super().__init__(name, f"{cls.__module__}:{cls.__qualname__}", f"ftx.{stage}")
        vars(self)["cls"] = cls

    def load(self) -> Any:
        return vars(self)["cls"]


def catalogue(*, installed: bool = True, **classes: dict[str, type[Any]]) -> Catalogue:
    """A Catalogue of the plugins given, `catalogue(adapter={"mine": Mine})`, and of those installed unless told not to."""
    unknown = set(classes) - set(STAGES)
    if unknown:
        raise TypeError(f"no stage is called {min(unknown)!r}; stages: {', '.join(STAGES)}")
    given = [_Given(stage, name, cls) for stage, named in classes.items() for name, cls in named.items()]
    return Catalogue([*given, *([entry.point for entry in Catalogue().entries] if installed else [])])


def train(output: str | Path, rows: list[dict[str, Any]], plugins: Catalogue, **recipe: Any) -> Outcome:
    """A whole run into `output` on the shared tiny model, over `rows`; the rest are fields of the Recipe, as in make_run."""
    from ftx.console import Console
    from ftx.pipeline import train as run_recipe

    data = Path(f"{output}.jsonl")
    write_lines(data, rows)
    recipe = {"data": str(data), "formatter": "ftx.testing.own:Rows", **recipe}
    return run_recipe(make_run(**recipe).recipe, catalogue=plugins, console=Console(quiet=True), output=str(output))


def finished_run(
    directory: str | Path, rows: list[dict[str, Any]], plugins: Catalogue | None = None, *, adapter: str = OWN, amount: float = 0.1, **recipe: Any
) -> Run:
    """A run's directory as training leaves it, in a moment: what the adapter would train is moved at random, by `amount`
    times a standard normal number each. For exporters, and all else that reads a run back.

    `rows` are its training data. The rest are fields of the Recipe, as in make_run; the model is the tiny one with merges
    unless `model` says otherwise. The Run has its hooks.
    """
    import torch

    from ftx import models, pipeline
    from ftx.manifest import write_manifest

    plugins = plugins or Catalogue()
    data = Path(f"{directory}.jsonl")
    write_lines(data, rows)
    chosen = {"model": shared_model_dir(merges=True), "formatter": "ftx.testing.own:Rows", "adapter": adapter, "data": str(data), **recipe}
    run = make_run(directory, **chosen)
    run.recipe, run.hooks = resolve(run.recipe, plugins, training=False)
    run.model_path = models.resolve(run.model)
    assert run.directory is not None
    write_text(run.directory.recipe, to_yaml(run.recipe))
    base = pipeline.load_base(run.hooks, plugins, run)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(run.seed)
        model = run.hooks.call("adapt_model", model=base, run=run)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += amount * torch.randn(parameter.shape).to(parameter)
    pipeline.save_model(run.hooks, model, models.load_tokenizer(run.model_path), run)
    write_manifest(run.directory, run, plugins)
    return run


@dataclass(frozen=True)
class Answer:
    """What a command came to. `output` is all that it printed; `run_dir` the run that it made, or None."""

    exit_code: int
    output: str
    stdout: str
    run_dir: RunDir | None


def ftx(*arguments: object) -> Answer:
    """The command line in this process: `ftx("run", "--data", file)`. An exception that is no exit status is raised."""
    from click.testing import CliRunner

    from ftx.cli import main

    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    named = [line.removeprefix("Run: ") for line in result.stdout.splitlines() if line.startswith("Run: ")]
    if "--json" in arguments and result.stdout.strip():
        content = json.loads(result.stdout)
        named = [content["run"]] if isinstance(content, dict) and content.get("run") else []  # scores of files are a list
    return Answer(result.exit_code, result.output, result.stdout, RunDir(named[-1]) if named else None)
