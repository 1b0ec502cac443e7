"""What a run's directory tells: its files as they are, each of which may be missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ftx import yamls
from ftx.run import RunDir


@dataclass(frozen=True, kw_only=True)
class Told:
    """One run as its files tell it. `recipe` is recipe.yaml read, `recipe_text` as it stands there."""

    directory: RunDir
    name: str
    recipe: dict[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    manifest: dict[str, Any] = field(default_factory=dict)
    audit: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    ledger: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    scores: list[dict[str, Any]] = field(default_factory=list)

    @property
    def evaluators(self) -> list[str]:
        """Those with items or scores: as scored, then as they lie in eval/."""
        folders = sorted(path.name for path in (self.directory / "eval").glob("*") if path.is_dir())
        return list(dict.fromkeys([*(score["evaluator"] for score in self.scores if score.get("evaluator")), *folders]))

    @property
    def finished(self) -> bool:
        return bool(self.manifest.get("finished"))

    @property
    def trained(self) -> str:
        """`nf4 + lora + sft`."""
        chosen = (self.recipe.get(stage) for stage in ("quantizer", "adapter", "trainer"))
        return " + ".join(one["name"] if isinstance(one, dict) else str(one) for one in chosen if one)

    @property
    def model(self) -> str:
        """The model that the run started from, short."""
        return Path(str(self.recipe.get("from") or self.recipe.get("model") or "")).name


def tell(directory: RunDir) -> Told:
    """Read a run's directory."""
    recipe_text = directory.recipe.read_text("utf-8") if directory.recipe.is_file() else ""
    return Told(
        directory=directory,
        name=directory.path.name,
        recipe=yamls.load(recipe_text) or {},
        recipe_text=recipe_text,
        manifest=directory.read_json("manifest.json", {}),
        audit=directory.read_json("audit.json", {}),
        plan=directory.read_json("plan.json", {}),
        ledger=whole_lines(directory / "ledger.jsonl"),
        metrics=[line for line in whole_lines(directory.metrics) if isinstance(line.get("step"), int | float)],
        scores=[score for score in directory.read_json("scores.json", []) if "metric" in score],
    )


def tell_all(directories: Sequence[RunDir]) -> list[Told]:
    """Several runs; those whose directories have one name get their parents' in front."""
    told = [tell(directory) for directory in directories]
    names = [one.name for one in told]
    return [one if names.count(one.name) == 1 else _renamed(one, place) for place, one in enumerate(told, start=1)]


def _renamed(one: Told, place: int) -> Told:
    from dataclasses import replace

    return replace(one, name=f"{one.directory.path.parent.name}/{one.name} ({place})")


def whole_lines(file: Path) -> list[dict[str, Any]]:
    """JSON lines of a file that may be growing: a last line that is not whole is left out."""
    if not file.is_file():
        return []
    found = []
    for line in file.read_text("utf-8").split("\n"):  # splitlines would split at U+2028, which may stand in a text
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]
