"""The checks behind `ftx doctor`: each a line that begins with `ok: `, `warning: ` or `failure: `."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable

from ftx import __version__
from ftx.catalogue import Catalogue
from ftx.errors import FtxError
from ftx.recipe import DEFAULTS


def examine_environment() -> list[str]:
    """All lines, the core's first, then each installed plugin's."""
    lines = [f"ok: ftx-core {__version__}, Python {platform.python_version()}"]
    for check in (_torch, _libraries, _disk, _hub, _default_model):
        lines += _guarded(check)
    return lines + _plugins(Catalogue())


def _guarded(check: Callable[[], list[str]]) -> list[str]:
    try:
        return check()
    except Exception as error:
        return [f"failure: {check.__name__.strip('_')}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"]


def _torch() -> list[str]:
    import torch

    from ftx import models

    device = models.pick_device("auto")
    dtype = str(models.best_dtype(device)).removeprefix("torch.")
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    return [f"ok: torch {torch.__version__} on {device} ({name}), --dtype auto is {dtype}"]


def _libraries() -> list[str]:
    return [f"ok: {name} {metadata.version(name)}" for name in ("transformers", "datasets")]


def _disk() -> list[str]:
    free = shutil.disk_usage(".").free / 2**30
    return [f"{'ok' if free > 5 else 'warning'}: {free:.0f} GiB free on this disk"]


def _hub() -> list[str]:
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes")
    return ["ok: the hub is switched off (HF_HUB_OFFLINE)" if offline else "ok: hub ids are fetched from the hub when they are named"]


def _default_model() -> list[str]:
    from ftx import models

    try:
        return [f"ok: the default model smollm2 ({models.resolve('smollm2').name})"]
    except FtxError as error:
        return [f"failure: the default model: {error.problem} {error.remedy}"]


def _plugins(catalogue: Catalogue) -> list[str]:
    lines = []
    counts = Counter((entry.stage, entry.name) for entry in catalogue.entries)
    for (stage, name), count in counts.items():
        bad = "failure" if DEFAULTS.get(stage) == name else "warning"
        if count > 1:
            origins = " and ".join(e.origin for e in catalogue.entries if (e.stage, e.name) == (stage, name))
            lines.append(f"{bad}: two {stage}s are called '{name}' ({origins}): uninstall one")
            continue
        try:
            cls = catalogue.load(stage, name)
            check = getattr(cls, "check_environment", None)
            said = cls().check_environment() if check else None
            lines += [
                f"{stage} {name}: {line}" if ": " not in line else line.replace(": ", f": {stage} {name}: ", 1)
                for line in said or [f"ok: {catalogue.find(stage, name).origin}"]
            ]
        except FtxError as error:
            lines.append(f"{bad}: {error.problem} {error.remedy}")
        except (Exception, SystemExit) as error:
            lines.append(f"{bad}: {stage} {name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return lines
