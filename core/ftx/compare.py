"""Runs side by side: what differs in recipe, versions, data and scores, and whether two runs are equal."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ftx.drift import MATTERS, NOTED, describe, differences
from ftx.errors import RecipeError
from ftx.manifest import weights_of
from ftx.readback import recipe_of
from ftx.recipe import PLAIN, Recipe
from ftx.run import RunDir

RESAMPLES = 10_000


def compare_runs(paths: Sequence[str]) -> dict[str, Any]:
    """What differs between two or more runs, the first being the one that the others are held against.

    `recipe`, `versions` and `data`: name -> one value a run, only where they are not all equal. `scores`: one entry a
    score, with `values` (tuned, one a run, None where a run lacks it). `pairs`: one entry for each figure that the items
    of an evaluator have and each run but the first: `difference` to the first over the `n` items that both evaluated,
    with its 95 % interval and p. `equal_weights`: one a run. RecipeError for what is no run, or only one.
    """
    if len(paths) < 2:
        raise RecipeError("one run cannot be compared.", "Name two or more: ftx compare RUN RUN")
    runs = [RunDir(path) for path in paths]
    recipes = [dict(_settings(recipe_of(run))) for run in runs]
    manifests = [run.read_json("manifest.json", {}) for run in runs]
    weights = [weights_of(run.model) if run.model.is_dir() else {} for run in runs]
    return {
        "runs": [str(run) for run in runs],
        "recipe": _unequal(recipes),
        "versions": _unequal([dict(_versions(manifest)) for manifest in manifests]),
        "data": _unequal([dict(_data(run, manifest)) for run, manifest in zip(runs, manifests, strict=True)]),
        "equal_weights": [bool(own) and own == weights[0] for own in weights],
        "scores": list(_scores(runs)),
        "pairs": list(_pairs(runs)),
    }


def equality(first: RunDir, second: RunDir) -> dict[str, Any]:
    """Whether two runs came to the same: `equal` (None if the first has no result), `differs` (what does) and `changed`
    (what they were made of differently)."""
    if not first.model.is_dir():
        return {"equal": None, "differs": [], "changed": []}
    old, new = weights_of(first.model), weights_of(second.model)
    differs = [f"model/{name}" for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    before, after = (
        {(s["evaluator"], s["phase"], s["metric"], s.get("model")): s["value"] for s in run.read_json("scores.json", [])} for run in (first, second)
    )
    for key in dict.fromkeys([*before, *after]):
        if before.get(key) != after.get(key):
            differs.append(f"{key[0]} {key[2]} ({key[1]}): {before.get(key, 'not there')} and {after.get(key, 'not there')}")
    changes = differences(first.read_json("manifest.json", {}), second.read_json("manifest.json", {}), (*MATTERS, *NOTED))
    return {"equal": not differs, "differs": differs, "changed": [describe(*change) for change in changes]}


def paired_bootstrap(differences: Sequence[float], seed: int = 0) -> tuple[float, float, float, float]:
    """The mean of paired differences, its 95 % percentile interval over resampled items, and the two-sided p that the
    mean is 0 (Efron and Tibshirani, 1993, 13.3 and 16.4). Not numpy's or scipy's: scipy.stats.bootstrap gives no p."""
    import numpy

    values = numpy.asarray(differences, dtype=float)
    generator = numpy.random.default_rng(seed)
    size = max(1, min(RESAMPLES, 4_000_000 // len(values)))
    means = numpy.concatenate([values[generator.integers(0, len(values), (size, len(values)))].mean(axis=1) for _ in range(-(-RESAMPLES // size))])
    below, above = (means <= 0).mean(), (means >= 0).mean()
    low, high = numpy.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high), float(min(1.0, max(2 * min(below, above), 1 / len(means))))


def numbers_of(item: dict[str, Any]) -> dict[str, float]:
    """The figures of one item: a verdict of `correct` or `wrong` as 1 or 0, one that is a number or holds numbers, and every
    other number that the evaluator wrote down. An item that could not be scored has none."""
    if item.get("verdict") == "unscored":
        return {}
    verdict = item.get("verdict")
    words = {"correct": 1.0, "wrong": 0.0}
    found = {key: float(value) for key, value in item.items() if isinstance(value, int | float)}
    if isinstance(verdict, str) and verdict in words:
        found["verdict"] = words[verdict]
    elif isinstance(verdict, dict):
        found |= {f"verdict.{key}": float(value) for key, value in verdict.items() if isinstance(value, int | float)}
    return found


def _settings(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    for key in PLAIN:
        yield key, getattr(recipe, "start" if key == "from" else key)
    suggested: dict[str, dict[str, Any]] = {}
    for said in recipe.suggested.values():
        for path, value in said.items():
            target, _, option = path.partition(".")
            suggested.setdefault(target.partition(":")[0], {})[option] = value
    for stage, choice in recipe.choices():
        repeated = stage in ("evaluator", "observer")
        yield (f"{stage} {choice.name}", "yes") if repeated else (stage, choice.name)
        options = {**({} if repeated else suggested.get(stage, {})), **choice.options}
        for name, value in options.items():
            yield f"{choice.name if repeated else stage}.{name}", value


def _versions(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "ftx", manifest.get("ftx")
    yield "python", manifest.get("python")
    for key, about in manifest.get("plugins", {}).items():
        yield key, f"{about['distribution']} {about['version'] or about.get('sha256', '')[:12]}".strip()
    for key in ("libraries", "hardware"):
        yield from manifest.get(key, {}).items()
    for key in ("dtype", "device", "git_revision"):
        yield key, manifest.get(key)


def _data(run: RunDir, manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    model = manifest.get("model", {})
    yield "model", f"{model.get('reference')} {str(model.get('fingerprint'))[:12]}"
    audit = run.read_json("audit.json", {})
    for key, split in (("data", "train"), ("eval_data", "eval")):
        about = manifest.get("data", {}).get(key, {})
        files = {Path(file).name: one["sha256"][:12] for file, one in about.get("files", {}).items()}
        yield key, about.get("hub") or ", ".join(f"{name} {digest}" for name, digest in files.items()) or None
        for figure in ("rows", "tokens", "supervised_tokens"):
            yield f"{split} {figure}", audit.get(split, {}).get(figure)
    ledger = run / "ledger.jsonl"
    yield "ledger entries", ledger.read_text("utf-8").count("\n") if ledger.is_file() else None


def _unequal(columns: list[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for column in columns for name in column)
    rows = {name: [column.get(name) for column in columns] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def _scores(runs: list[RunDir]) -> Iterator[dict[str, Any]]:
    found: dict[tuple[str, str], list[Any]] = {}
    for number, run in enumerate(runs):
        for score in run.read_json("scores.json", []):
            if score["phase"] == "tuned" and score.get("model") is None:
                found.setdefault((score["evaluator"], score["metric"]), [None] * len(runs))[number] = score["value"]
    for (evaluator, metric), values in found.items():
        yield {"evaluator": evaluator, "metric": metric, "values": values}


def _pairs(runs: list[RunDir]) -> Iterator[dict[str, Any]]:
    evaluators = dict.fromkeys(file.parent.name for run in runs for file in sorted(run.path.glob("eval/*/tuned.jsonl")))
    for evaluator in evaluators:
        first, *others = (_items(run, evaluator) for run in runs)
        for run, other in zip(runs[1:], others, strict=True):
            both = [(first[key], other[key]) for key in first if key in other]
            for figure in dict.fromkeys(name for a, _ in both for name in a):
                values = [b[figure] - a[figure] for a, b in both if figure in a and figure in b]
                if values:
                    mean, low, high, p = paired_bootstrap(values)
                    yield {
                        **{"evaluator": evaluator, "figure": figure, "run": str(run), "n": len(values)},
                        **{"difference": mean, "ci_low": low, "ci_high": high, "p_value": p},
                    }


def _items(run: RunDir, evaluator: str) -> dict[str, dict[str, float]]:
    """Question and reference (and which time they stand there) -> figures."""
    seen: Counter[str] = Counter()
    found = {}
    for item in run.read_items(evaluator, "tuned"):
        key = json.dumps([item.get("prompt"), item.get("reference")], sort_keys=True)
        seen[key] += 1
        found[f"{seen[key]} {key}"] = numbers_of(item)
    return found
