"""What hooks receive and what lies on disk: Run, RunDir, Score, Evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ftx.hooks import Hooks
    from ftx.ledger import Ledger
    from ftx.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Score:
    """One number that an evaluator gives.

    `value`, `ci_low` and `ci_high` are in the metric's own unit (a share lies in 0..1); the interval is the 95 % one
    or None. `n` counts the scored items, `unscored` those that could not be. `evaluator` and `phase` (`base`,
    `tuned`, `change`) are stamped by the core; `model` is set only where several models are scored at once.
    """

    metric: str
    value: float
    n: int
    ci_low: float | None = None
    ci_high: float | None = None
    unscored: int = 0
    evaluator: str = ""
    phase: str = ""
    model: str | None = None

    def stamped(self, evaluator: str, phase: str) -> Score:
        return replace(self, evaluator=evaluator, phase=phase)

    def as_dict(self) -> dict[str, Any]:
        entry = {"evaluator": self.evaluator, "metric": self.metric, "phase": self.phase}
        rest = {k: v for k, v in asdict(self).items() if k not in entry and not (k == "model" and v is None)}
        return entry | rest


@dataclass(frozen=True)
class Evaluation:
    """One phase of one evaluator: its scores, headline first, and one item a row in the data's order.

    An item is a JSON object with at least `prompt`, `answer`, `reference` and `verdict`.
    """

    scores: list[Score]
    items: list[dict[str, Any]]


@dataclass(kw_only=True)
class Run:
    """One execution of a recipe: what every hook may read.

    `device` is "cpu" or "cuda"; `dtype` the torch dtype in which the model computes, and in which its base is loaded
    unless the adapter says otherwise (`base_dtype`); `model` the portable reference of the base (hub id, name or path as
    the user gave it), `model_path` the directory that it resolved to. `directory` is None until the run directory is
    written (formatting, encoding and the audit come before it). `say` prints one line for the person at the terminal and
    into log.txt. `hooks` are the run's plugins, for one that asks another: `run.hooks.hook.adapter_off(model=model,
    run=run)` gives DPO its reference. `notes` stand in the manifest. `unwritten` is the core's own: (evaluator, phase) ->
    items that are not in the directory, or not yet.
    """

    recipe: Recipe
    ledger: Ledger
    seed: int = 42
    device: str = "cpu"
    dtype: torch.dtype | None = None
    model: str = ""
    model_path: Path = field(default_factory=Path)
    directory: RunDir | None = None
    hooks: Hooks | None = None
    say: Any = print
    notes: dict[str, Any] = field(default_factory=dict)
    unwritten: dict[tuple[str, str], list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def is_main(self) -> bool:
        """True in the one process that owns the run directory, the console and the evaluation."""
        return int(os.environ.get("RANK", "0")) == 0


class RunDir:
    """The files of one run. Every write is atomic: a reader finds the old file or the new one, never half of one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def scores(self) -> Path:
        return self.path / "scores.json"

    def items(self, evaluator: str, phase: str) -> Path:
        if Path(evaluator).name != evaluator or evaluator == "..":
            raise ValueError(f"'{evaluator}' is no name of a directory")
        return self.path / "eval" / evaluator / f"{phase}.jsonl"

    def write_json(self, name: str, value: Any) -> None:
        write_text(self.path / name, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")

    def read_json(self, name: str, default: Any = None) -> Any:
        file = self.path / name
        return json.loads(file.read_text("utf-8")) if file.exists() else default

    def write_items(self, evaluator: str, phase: str, items: Iterable[dict[str, Any]]) -> None:
        write_lines(self.items(evaluator, phase), items)

    def read_items(self, evaluator: str, phase: str) -> list[dict[str, Any]]:
        return read_lines(self.items(evaluator, phase))


def write_text(file: Path, text: str) -> None:
    """Write a whole file atomically: a temporary file beside it (named by process), fsync, rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def write_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines atomically."""
    write_text(file, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows))


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read JSON lines; no file, no rows."""
    if not file.exists():
        return []
    with open(file, encoding="utf-8") as stream:
        return [json.loads(line) for line in stream if line.strip()]
