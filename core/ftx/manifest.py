"""manifest.json: what a run was made of, so that it can be found again, repeated and compared."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata as metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement

from ftx import __version__, models
from ftx.catalogue import Catalogue, Entry
from ftx.readers import behind, straight
from ftx.recipe import merge, read_recipe, to_yaml
from ftx.run import Run, RunDir

LIBRARIES = ("torch", "transformers", "datasets", "tokenizers", "accelerate", "safetensors", "numpy")


def write_manifest(directory: RunDir, run: Run, catalogue: Catalogue) -> None:
    """Write (or write again, with what came to be known) the manifest of a run."""
    directory.write_json("manifest.json", manifest_of(run, catalogue))


def add_notes(directory: RunDir, notes: dict[str, Any]) -> None:
    """Put the notes of a later evaluation into a run's manifest, in place of those of the same names; `usage` is added up.

    `usage` is evaluator -> judge -> counts, and money in USD; an `estimate` of what would be used is not kept.
    """
    manifest = directory.read_json("manifest.json", {})
    new = {name: value for name, value in notes.items() if name not in ("usage", "estimate")}
    if notes.get("usage"):
        new["usage"] = _added(manifest.get("usage") or {}, notes["usage"])
    if new:
        directory.write_json("manifest.json", manifest | new)


def _added(one: Any, other: Any) -> Any:
    """Two numbers added; of two mappings, each entry."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one + other
    return one | {name: _added(one[name], value) if name in one else value for name, value in other.items()}


def manifest_of(run: Run, catalogue: Catalogue) -> dict[str, Any]:
    """What the run is made of here and now, and its notes."""
    entries = {f"{stage}:{choice.name}": catalogue.find(stage, choice.name) for stage, choice in run.recipe.choices()}
    fingerprint, *beneath = fingerprints(run)
    names = {*LIBRARIES, *(name for entry in entries.values() for name in _requirements(entry))}
    return {
        "ftx": __version__,
        "recipe": sha256(written) if (written := run.directory and run.directory.recipe) and written.exists() else _digest(to_yaml(run.recipe)),
        "plugins": {key: _about(entry) for key, entry in entries.items()},
        "libraries": {name: version for name in sorted(names) if (version := _version(name))},
        "python": platform.python_version(),
        "model": {"reference": run.model, "revision": models.revision(run.model_path), "fingerprint": fingerprint, **({"beneath": beneath} if beneath else {})},
        "files": {
            f"{stage}:{choice.name}.{option}": digests
            for stage, choice in run.recipe.choices()
            for option, value in choice.options.items()
            if stage != "observer" and option != "cache" and (digests := named_files(value))  # those are written by the run itself
        },
        "data": {name: data_fingerprint(reference) for name in ("data", "eval_data") if (reference := getattr(run.recipe, name))},
        "seed": run.seed,
        "dtype": str(run.dtype).removeprefix("torch."),
        "device": run.device,
        "hardware": hardware(),
        "git_revision": git_revision(),
        **run.notes,
    }


def fingerprints(run: Run) -> list[str]:
    """Of the run's model, and with `--from` of those that it stands on: the one that the earlier run was trained on, and so on down."""
    paths, recipe = [run.model_path], run.recipe
    while recipe.start is not None:
        recipe = merge(read_recipe(RunDir(recipe.start).recipe), {})
        paths.append(RunDir(recipe.start).model if recipe.start else models.resolve(recipe.model, code=recipe.trusts_model))
    return [models.fingerprint(path) for path in paths]


def data_fingerprint(reference: str) -> dict[str, Any]:
    """Files with their sizes and sha256; a hub id as it is."""
    paths = [Path(one).expanduser() for one in behind(reference)]
    files = [file for path in paths for file in ([path] if path.is_file() else sorted(one for one in path.glob("*") if one.is_file()) if path.is_dir() else [])]
    if not files:
        return {"hub": reference}
    return {"files": {str(straight(file)): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files}}


def named_files(value: Any) -> list[str]:
    """sha256 of each file that the value of an option names."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [digest for one in value for digest in named_files(one)]
    with contextlib.suppress(OSError, ValueError):
        if isinstance(value, str) and value and Path(value).expanduser().is_file():
            return [sha256(Path(value).expanduser())]
    return []


def weights_of(model: Path) -> dict[str, str]:
    """File -> sha256 of all weights in a run's model/."""
    return {file.relative_to(model).as_posix(): sha256(file) for file in sorted(model.rglob("*.safetensors"))}


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def hardware() -> dict[str, Any]:
    import torch

    about: dict[str, Any] = {"machine": platform.machine(), "system": platform.system(), "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return about


def git_revision() -> str | None:
    """The commit of the directory that ftx was called in, if it is one."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _about(entry: Entry) -> dict[str, str]:
    """A plugin's distribution, version and class; one that is not packaged has no version, so its file stands for it."""
    about = {"distribution": entry.distribution, "version": entry.version, "class": entry.value}
    source = getattr(sys.modules.get(entry.value.partition(":")[0]), "__file__", None)
    return about if entry.version or not source else {**about, "sha256": sha256(Path(source))}


def _requirements(entry: Entry) -> list[str]:
    """The distributions that a plugin's own one requires: what it computes with."""
    names = []
    for line in (entry.point.dist.requires or []) if entry.point.dist else []:
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if (not requirement.marker or requirement.marker.evaluate({"extra": ""})) and requirement.name != "ftx-core":
            names.append(requirement.name)
    return names


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
