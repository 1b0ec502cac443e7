"""manifest.json: what a run was made of, so that it can be found again, repeated and compared."""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from ftx import __version__, models
from ftx.catalogue import Catalogue
from ftx.run import Run, RunDir

LIBRARIES = ("torch", "transformers", "datasets", "tokenizers", "accelerate", "peft", "trl", "bitsandbytes", "safetensors")


def write_manifest(directory: RunDir, run: Run, catalogue: Catalogue) -> None:
    """Write (or write again, with what came to be known) the manifest of a run."""
    plugins = {}
    for stage, choice in run.recipe.choices():
        entry = catalogue.find(stage, choice.name)
        plugins[f"{stage}:{choice.name}"] = {"distribution": entry.distribution, "version": entry.version, "class": entry.value}
    content = {
        "ftx": __version__,
        "plugins": plugins,
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
        "python": platform.python_version(),
        "model": {"reference": run.model, "fingerprint": models.fingerprint(run.model_path)},
        "data": {name: data_fingerprint(reference) for name in ("data", "eval_data") if (reference := getattr(run.recipe, name))},
        "seed": run.seed,
        "dtype": str(run.dtype).removeprefix("torch."),
        "device": run.device,
        "hardware": hardware(),
        "git_revision": git_revision(),
        **run.notes,
    }
    directory.write_json("manifest.json", content)


def data_fingerprint(reference: str) -> dict[str, Any]:
    """Files with their sizes and sha256; a hub id as it is."""
    path = Path(reference).expanduser()
    files = [path] if path.is_file() else sorted(file for file in path.glob("*") if file.is_file()) if path.is_dir() else []
    if not files:
        return {"hub": reference}
    return {"files": {str(file.absolute()): {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in files}}


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


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
