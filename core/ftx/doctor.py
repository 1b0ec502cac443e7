"""The checks behind `ftx doctor`: each a line `ok: `, `warning: ` or `failure: `, what was found, and behind `; ` what to do.

A failure is what would fail by default; a warning what would fail, or be slow, only if it is chosen.
"""

from __future__ import annotations

import difflib
import importlib.metadata as metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from ftx import __version__
from ftx.catalogue import KINDS, STAGES, Catalogue, load
from ftx.errors import FtxError, first_line
from ftx.machine import memory
from ftx.recipe import DEFAULTS, OBSERVERS

#: Bytes below which a disk or the memory is a warning: the default model and a checkpoint of a small run take less.
LITTLE_DISK, LITTLE_MEMORY = 5 * 2**30, 4 * 2**30
#: Seconds that the hub may take to answer.
HUB_TIMEOUT = 3.0


def examine_environment() -> list[str]:
    """All lines, the core's first, then each installed plugin's."""
    lines = []
    for check in (_python, _torch, _cuda, _bfloat16, _attention, _versions, _disk, _memory, _hub, _default_model):
        lines += _guarded(check)
    return lines + _plugins(Catalogue())


def split_line(line: str) -> dict[str, str]:
    """A line's `status`, `what` and `do` (empty where nothing need be done)."""
    status, _, rest = line.partition(": ")
    what, _, do = rest.partition("; ") if status != "ok" else (rest, "", "")
    return {"status": status, "what": what, "do": do}


def _guarded(check: Callable[[], list[str]]) -> list[str]:
    try:
        return check()
    except Exception as error:
        return [f"failure: {check.__name__.strip('_')}: {type(error).__name__}: {first_line(error)}; see it all: ftx doctor --traceback"]


# ---- Python, torch, the accelerator


def _python() -> list[str]:
    said = f"ftx-core {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.maxsize < 2**32:
        return [f"failure: {said} is a 32-bit Python; torch needs a 64-bit one"]
    return [f"ok: {said}"]


def _torch() -> list[str]:
    import torch

    from ftx.device import best_dtype, pick_device

    device = pick_device("auto")
    dtype = str(best_dtype(device)).removeprefix("torch.")
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    return [f"ok: torch {torch.__version__} on {device} ({name}), --dtype auto is {dtype}"]


def _cuda() -> list[str]:
    """The GPU as the driver sees it, and as torch does."""
    import torch

    seen = _driver()
    built = f"this torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "this torch is built without CUDA"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        free, total = torch.cuda.mem_get_info()
        lines = [f"ok: CUDA {torch.version.cuda}, driver {seen.get('driver', 'unknown')}, capability {major}.{minor}, {_gib(free)} of {_gib(total)} free"]
        if f"sm_{major}{minor}" not in torch.cuda.get_arch_list() and not any(a.startswith(f"sm_{major}") for a in torch.cuda.get_arch_list()):
            lines.append(f"failure: this torch has no kernels for capability {major}.{minor}; install a torch built for this GPU, or use --device cpu")
        return lines
    if seen:
        return [f"warning: {seen['name']} with driver {seen['driver']} is here, but {built} and cannot use it; install a torch that fits the driver"]
    return [f"ok: no GPU here ({built}): runs use the CPU"]


def _driver() -> dict[str, str]:
    """`name` and `driver` of the first NVIDIA GPU, from nvidia-smi; empty where there is none."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
        name, driver = done.stdout.splitlines()[0].rsplit(", ", 1)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}
    return {"name": name, "driver": driver}


def _bfloat16() -> list[str]:
    """A product in bfloat16 and in float32, compared and timed: what a capability list says need not hold."""
    import torch

    from ftx.device import best_dtype, fastest, pick_device

    device = pick_device("auto")
    chosen = best_dtype(device) is torch.bfloat16
    size = 2048 if device == "cuda" else 512
    a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).to(device) for seed in (0, 1))
    try:
        ratio = fastest(lambda: a.bfloat16() @ b.bfloat16(), device) / fastest(lambda: a @ b, device)
        error = float(((a.bfloat16() @ b.bfloat16()).float() - a @ b).abs().max()) / size**0.5
    except RuntimeError as problem:
        status = "failure" if chosen else "warning"
        return [f"{status}: bfloat16 does not compute on {device} ({first_line(problem)}); use --dtype {'float16' if device == 'cuda' else 'float32'}"]
    said = f"bfloat16 measured on {device}: a product of {size} x {size} takes {ratio:.2f} of float32's time"
    if error > 0.2:  # rounding gives about 0.02
        return [f"{'failure' if chosen else 'warning'}: {said} and is wrong by {error:.2g}; use --dtype float32"]
    if chosen and ratio > 1.5:
        return [f"warning: {said}, and --dtype auto takes it; use --dtype float32"]
    return [f"ok: {said}"]


def _attention() -> list[str]:
    """Flash attention is torch's own, inside scaled_dot_product_attention: run it alone, without a way out."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from ftx.device import best_dtype, pick_device

    device = pick_device("auto")
    dtype = best_dtype(device)
    query = torch.randn(1, 4, 128, 64, device=device, dtype=dtype)
    extra = "; the package flash-attn is not needed" if metadata_version("flash-attn") is None else ""
    try:
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            scaled_dot_product_attention(query, query, query, is_causal=True)
    except RuntimeError as problem:
        return [f"warning: flash attention does not run on {device} in {str(dtype)[6:]} ({first_line(problem)}); attention takes torch's slower kernels"]
    return [f"ok: flash attention runs on {device} in {str(dtype)[6:]}, torch's own{extra}"]


# ---- What is installed


def tested_versions() -> dict[str, str]:
    """Distribution -> the version that this release was tested with: constraints.txt of the repository, or its copy in the
    metadata of the installed wheel; empty where neither is there."""
    file = Path(__file__).resolve().parents[2] / "constraints.txt"
    text = file.read_text("utf-8") if file.is_file() else metadata.distribution("ftx-core").read_text("extra_metadata/constraints.txt")
    lines = [line.partition("#")[0].strip() for line in (text or "").splitlines()]
    return {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in lines) if version}


def _versions() -> list[str]:
    """Requirements of our distributions that are not met, and versions other than the tested ones."""
    lines, needed = [], set()
    ours = [one for one in metadata.distributions() if canonicalize_name(one.name or "").startswith("ftx-")]
    for distribution in ours:
        for line in distribution.requires or []:
            try:
                requirement = Requirement(line)
            except InvalidRequirement:
                continue
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            needed.add(canonicalize_name(requirement.name))
            there = metadata_version(requirement.name)
            if there is None or not requirement.specifier.contains(there, prereleases=True):
                status = "failure" if canonicalize_name(distribution.name) == "ftx-core" else "warning"
                found = f"{there} is installed" if there else "it is not installed"
                lines.append(f"{status}: {distribution.name} needs {requirement.name}{requirement.specifier}, {found}; pip install '{line.partition(';')[0]}'")
    tested = tested_versions()
    if not tested:
        return [*sorted(set(lines)), "warning: the versions that this release was tested with are not known; install ftx-core from its wheel or repository"]
    pairs = [(name, metadata_version(name), version) for name, version in tested.items() if name in needed]
    others = [f"{name} {there} (tested: {version})" for name, there, version in pairs if there and not _same(there, version)]
    if others:
        lines.append(f"warning: other versions than the tested ones: {', '.join(others)}; pip install -c constraints.txt, if something goes wrong")
    else:
        lines.append(f"ok: the {len([pair for pair in pairs if pair[1]])} libraries that ftx requires have the tested versions")
    return list(dict.fromkeys(lines))


def _same(there: str, tested: str) -> bool:
    try:
        return Version(there).public == Version(tested).public  # 2.13.0+cpu is 2.13.0
    except InvalidVersion:
        return there == tested


def metadata_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# ---- Disk, memory, hub, model


def _disk() -> list[str]:
    from ftx import models

    lines = []
    for what, path in (("here", Path(".")), ("the cache", models.cache_directory())):
        there = next(parent for parent in [path.absolute(), *path.absolute().parents] if parent.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            do = "work in another directory, or give --output" if what == "here" else "set FTX_CACHE to a directory that can be written"
            lines.append(f"{'failure' if what == 'here' else 'warning'}: {what} ({there}) nothing can be written; {do}")
        elif free < LITTLE_DISK:
            lines.append(f"warning: {_gib(free)} free on the disk of {what}; make room: a checkpoint of a full fine-tuning is up to 16 bytes a parameter")
        else:
            lines.append(f"ok: {_gib(free)} free on the disk of {what}")
    return lines


def _memory() -> list[str]:
    free, total = memory()
    if free is None:
        return ["ok: how much memory is free is not known on this system"]
    of = f" of {_gib(total)}" if total else ""
    if free < LITTLE_MEMORY:
        return [f"warning: {_gib(free)}{of} of memory free; close other programs, or take a smaller micro-batch: ftx plan"]
    return [f"ok: {_gib(free)}{of} of memory free"]


def _hub() -> list[str]:
    """Whether the hub answers; asked only where it is not switched off."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return ["ok: the hub is switched off (HF_HUB_OFFLINE)"]
    import urllib.error
    import urllib.request

    started = time.monotonic()
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError) as error:
        return [f"warning: the hub cannot be reached ({first_line(error)}); use installed names, files or the local cache, and set HF_HUB_OFFLINE=1"]
    return [f"ok: the hub answers in {time.monotonic() - started:.1f} s"]


def _default_model() -> list[str]:
    from ftx import models

    try:
        return [f"ok: the default model smollm2 ({models.resolve('smollm2').name})"]
    except FtxError as error:
        return [f"failure: the default model: {error.problem} {error.remedy}".replace(f" {error.remedy}", f"; {error.remedy}")]


def _gib(size: int | None) -> str:
    return f"{(size or 0) / 2**30:.0f} GiB" if (size or 0) > 10 * 2**30 else f"{(size or 0) / 2**30:.1f} GiB"


# ---- Plugins


def _plugins(catalogue: Catalogue) -> list[str]:
    lines = []
    for (stage, name), count in Counter((entry.stage, entry.name) for entry in catalogue.entries).items():
        bad = "failure" if DEFAULTS.get(stage) == name or (stage == "observer" and name in OBSERVERS) else "warning"
        if count > 1:
            origins = " and ".join(e.origin for e in catalogue.entries if (e.stage, e.name) == (stage, name))
            lines.append(f"{bad}: two {stage}s are called '{name}' ({origins}); uninstall one")
            continue
        try:
            if stage not in STAGES:
                load(catalogue.find(stage, name))
                lines.append(f"ok: {stage} {name}: {catalogue.find(stage, name).origin}")
                continue
            cls = catalogue.load(stage, name)
            said = cls().check_environment() if getattr(cls, "check_environment", None) else None
            lines += [_of_plugin(line, f"{stage} {name}", bad) for line in said or [f"ok: {catalogue.find(stage, name).origin}"]]
        except FtxError as error:
            lines.append(f"{bad}: {error.problem}; {error.remedy}")
        except (Exception, SystemExit) as error:
            lines.append(f"{bad}: {stage} {name}: {type(error).__name__}: {first_line(error)}; see it all: ftx plugins show {stage} {name} --traceback")
    return lines + _strange_groups()


def _of_plugin(line: str, who: str, bad: str) -> str:
    """A plugin's own line under its name; what fails there fails by default only if the plugin is a default."""
    status, colon, rest = line.partition(": ")
    if not colon or status not in ("ok", "warning", "failure"):
        return f"ok: {who}: {line}"
    return f"{bad if status == 'failure' else status}: {who}: {rest}"


def _strange_groups() -> list[str]:
    """Entry points in a group that is almost one of ours, such as ftx.adaptor: nothing reads them, and nothing says so. Other
    groups may be a distribution's own."""
    known = [*(f"ftx.{kind}" for kind in KINDS), "ftx.model"]
    lines = set()
    for point in (point for one in metadata.distributions() for point in one.entry_points if point.group.startswith("ftx.")):
        close = difflib.get_close_matches(point.group.removeprefix("ftx."), [group.removeprefix("ftx.") for group in known], n=1, cutoff=0.8)
        if point.group not in known and close:
            lines.add(f"warning: the entry point {point.name} is in the group {point.group}, which nothing reads; name the group ftx.{close[0]}")
    return sorted(lines)
