"""How fast this machine trains: measured once for each shape of model and settings, and kept in ftx's cache directory."""

from __future__ import annotations

import hashlib
import importlib.metadata as metadata
import json
import os
import platform
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftx.models import cache_directory
from ftx.recipe import Recipe
from ftx.run import write_text
from ftx.shape import Shape

if TYPE_CHECKING:
    from ftx.machine import Machine

#: What of a model's shape its speed hangs on.
SIZES = ("model_type", "hidden", "intermediate", "layers", "heads", "kv_heads", "head_dim", "vocabulary", "tied")
#: Trainer options by which a position takes no longer or shorter.
IDLE = re.compile(
    r"num_train_epochs|max_steps|learning_rate|lr_.*|warmup_.*|weight_decay|max_grad_norm|logging_.*|save_.*|eval_.*|early_stopping_patience|"
    r"load_best_model_at_end|per_device_eval_batch_size|gradient_accumulation_steps|max_length|beta|label_smoothing|dataloader_drop_last"
)


def machine_name(device: str) -> dict[str, Any]:
    """This machine, as far as its speed goes: host, processor, cores that may be used, threads, GPU, torch."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text("utf-8", errors="replace"))):
        processor = found[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about: dict[str, Any] = {"host": platform.node(), "processor": processor, "cores": cores, "threads": os.environ.get("OMP_NUM_THREADS", "")}
    if device == "cuda":
        from ftx.machine import gpus

        about["gpu"] = gpus()[0][0] if gpus() else ""
    return about | {"torch": metadata.version("torch")}


def settings_of(recipe: Recipe, shape: Shape) -> dict[str, Any]:
    """What the speed hangs on: sizes of the model, its plugins, and of their options those that count."""
    found: dict[str, Any] = {"model": {name: getattr(shape, name) for name in SIZES}, "dtype": recipe.dtype}
    for stage in ("quantizer", "adapter", "trainer"):
        choice = getattr(recipe, stage)
        if choice is not None:
            options = {name: value for name, value in choice.options.items() if stage != "trainer" or not IDLE.fullmatch(name)}
            found[stage] = {"name": choice.name, **options}
    checkpointing = found.get("trainer", {}).get("gradient_checkpointing")
    if "trainer" in found:
        found["trainer"]["gradient_checkpointing"] = bool(checkpointing)
    return found


def known(recipe: Recipe, shape: Shape, machine: Machine) -> float | None:
    """Seconds for each position that goes through the model in training (`rows.computed`), measured on this very machine; None if never."""
    if not machine.here:
        return None
    entry = _read().get(_key(recipe, shape, machine.device)) or {}
    return float(entry["seconds_per_position"]) if "seconds_per_position" in entry else None


def remember(recipe: Recipe, shape: Shape, device: str, seconds_per_position: float) -> None:
    """Keep a measurement in place of an earlier one of the same machine, shape and settings; nothing where the cache cannot be written."""
    about = {"machine": machine_name(device), **settings_of(recipe, shape)}
    entry = {"seconds_per_position": seconds_per_position, "measured": time.strftime("%Y-%m-%d %H:%M:%S"), "of": about}
    try:
        write_text(_file(), json.dumps(_read() | {_key(recipe, shape, device): entry}, indent=1, default=str))
    except OSError:
        return


def _key(recipe: Recipe, shape: Shape, device: str) -> str:
    text = json.dumps([machine_name(device), device, settings_of(recipe, shape)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _file() -> Path:
    return cache_directory() / "speed.json"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
