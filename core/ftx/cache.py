"""The formatted and encoded rows of earlier runs, found again by all that they were made from."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata as metadata
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftx import __version__
from ftx.authoring import declared
from ftx.hooks import Hooks
from ftx.ledger import Entry
from ftx.manifest import data_fingerprint, named_files, sha256
from ftx.models import cache_directory
from ftx.options import as_dict
from ftx.run import Run

if TYPE_CHECKING:
    from datasets import Dataset

#: Raise it when the form of an entry changes.
FORM = 1
#: Fewer rows are encoded again faster than anybody waits.
LEAST = 1000
#: Days without use after which an entry is removed.
KEPT = 30
#: Libraries whose version decides what rows become.
LIBRARIES = ("transformers", "tokenizers", "datasets", "pyarrow", "jinja2")
#: Of a model directory, what a tokenizer may be made of.
TOKENIZER = (".json", ".jinja", ".txt", ".model", ".tiktoken")
HOOKS = ("format_dataset", "encode_dataset")


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One split, read, formatted and encoded: how many rows came, the formatted and the encoded ones, and what is said, noted
    and written into the ledger for it."""

    came: int
    rows: Dataset
    tokens: Dataset
    said: list[str]
    notes: dict[str, Any]
    entries: list[Entry]


def key_of(reference: str, hooks: Hooks, run: Run) -> str | None:
    """What a split's rows are made from as one name: the data's bytes, the plugins that format and encode with the options
    that they read, the tokenizer's files and the recipe's switches. None for a hub's data, which has a cache of its own."""
    data = data_fingerprint(reference)
    if "files" not in data or run.recipe.no_cache:
        return None
    plugins = []
    for key, plugin in hooks.list_name_plugin():
        if any(impl.plugin is plugin for hook in HOOKS for impl in getattr(hooks.hook, hook).get_hookimpls()):
            options = as_dict(plugin)
            read = declared(type(plugin), "encodes_with") if key.startswith("trainer:") else None
            kept = options if read is None else {name: options[name] for name in read}
            plugins.append([key, f"{type(plugin).__module__}:{type(plugin).__qualname__}", kept, named_files(kept)])
    recipe = run.recipe
    tokenizer = {str(file.relative_to(run.model_path)): sha256(file) for file in _tokenizer_files(run.model_path)}
    parts = [
        [FORM, __version__, [metadata.version(name) for name in LIBRARIES], list(sys.version_info[:2])],
        [reference, data],
        [recipe.model, recipe.start, run.seed, recipe.skip_bad_rows, recipe.allow_truncation],
        plugins,
        tokenizer,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def load(key: str) -> Prepared | None:
    """The entry of that name, if it is whole and none of the code that made it has changed since; else None."""
    from ftx import columns

    folder = _folder() / key
    try:
        about = json.loads((folder / "about.json").read_text("utf-8"))
        if any((folder / name).stat().st_size != size for name, size in about["sizes"].items()) or not all(
            _stamp(file) == stamp for file, stamp in about["code"].items()
        ):
            return None
        rows, tokens = (columns.read(folder / f"{name}.arrow", fingerprint=about["fingerprints"][name]) for name in ("rows", "tokens"))
        os.utime(folder / "about.json")
    except (OSError, ValueError, KeyError):
        return None
    return Prepared(about["came"], rows, tokens, about["said"], about["notes"], [Entry(**entry) for entry in about["entries"]])


def store(key: str, made: Prepared) -> None:
    """Keep what was made; where that cannot be (a full disk, notes that are no JSON), it is made again the next time."""
    from ftx import columns

    if len(made.tokens) <= LEAST:
        return
    with contextlib.suppress(OSError, TypeError):
        _folder().mkdir(parents=True, exist_ok=True)
        _prune()
        with tempfile.TemporaryDirectory(dir=_folder(), prefix=".new-") as scratch:
            work = Path(scratch) / "entry"
            work.mkdir()
            files = {"rows": made.rows, "tokens": made.tokens}
            for name, dataset in files.items():
                columns.write(dataset, work / f"{name}.arrow")
            about = {
                "came": made.came,
                "said": made.said,
                "notes": made.notes,
                "entries": [dataclasses.asdict(entry) for entry in made.entries],
                "sizes": {f"{name}.arrow": (work / f"{name}.arrow").stat().st_size for name in files},
                "fingerprints": {name: dataset._fingerprint for name, dataset in files.items()},
                "code": _code(),
            }
            (work / "about.json").write_text(json.dumps(about), "utf-8")
            shutil.rmtree(_folder() / key, ignore_errors=True)  # stale, or of another process that is as far as this one
            os.replace(work, _folder() / key)


def _folder() -> Path:
    return cache_directory() / "encoded"


def _prune() -> None:
    for about in _folder().glob("*/about.json"):
        if time.time() - about.stat().st_mtime > KEPT * 86400:
            shutil.rmtree(about.parent, ignore_errors=True)


def _code() -> dict[str, list[int]]:
    """Every file of code that this process has loaded, with its time and size: versions do not tell of an editable install,
    nor of a helper beside a class that is not packaged."""
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    return {file: stamp for file in files if isinstance(file, str) and (stamp := _stamp(file)) is not None}


def _stamp(file: str) -> list[int] | None:
    try:
        about = os.stat(file)
    except OSError:
        return None
    return [about.st_mtime_ns, about.st_size]


def _tokenizer_files(path: Path) -> list[Path]:
    return sorted(file for pattern in ("*", "additional_chat_templates/*") for file in path.glob(pattern) if file.suffix in TOKENIZER)
