"""A run's directory while the run is at work in it: where it will lie, its log, and what an exception means for it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ftx.console import PlainFormatter
from ftx.errors import REFUSED, FtxError, Interrupted, RecipeError, RunError, first_line
from ftx.hooks import Hooks
from ftx.lock import LOCK
from ftx.memory import memory_error
from ftx.recipe import Recipe
from ftx.run import Run, RunDir

log = logging.getLogger("ftx")


def new_directory(output: str | None, recipe: Recipe) -> RunDir:
    """Where the run will lie; refused if something lies there already. Nothing is written yet."""
    if output is None:
        model = Path(recipe.model).stem.lower() or "model"
        adapter = recipe.adapter.name.replace(":", "-") if recipe.adapter else "none"
        stem = f"{model}-{adapter}-{time.strftime('%Y%m%d-%H%M%S')}"
        directory, number = RunDir(Path("runs") / stem), 2
        while directory.path.exists():
            directory, number = RunDir(Path("runs") / f"{stem}-{number}"), number + 1
        return directory
    directory = RunDir(Path(output).expanduser())
    if directory.recipe.exists():
        raise RecipeError(f"{directory} holds another run.", f"Give another --output, or go on with it: ftx resume {output}")
    stopped = (directory / LOCK).exists()  # a run that ended here before its recipe was written, or one that is at work: then the lock refuses
    if directory.path.exists() and not stopped and (not directory.path.is_dir() or any(directory.path.iterdir())):
        raise RecipeError(f"{directory} exists and is not an empty directory.", "Give another --output.")
    parent = next(p for p in [directory.path, *directory.path.parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RecipeError(f"{directory} cannot be written: {parent} is {'read-only' if parent.is_dir() else 'a file'}.", "Give another --output.")
    return directory


@contextlib.contextmanager
def writing(directory: RunDir, hooks: Hooks, run: Run, *, fresh: bool) -> Iterator[None]:
    """The run directory while it is written: log.txt, `run_failed`, and what an exception means for it."""
    if fresh and directory.recipe.exists():  # another process began and ended here since the directory was looked at
        raise RecipeError(f"{directory} holds another run.", f"Give another --output, or go on with it: ftx resume {directory}")
    try:
        clear(directory, temporary_only=True)
        directory.checkpoints.mkdir(parents=True, exist_ok=True)
        handler = logging.FileHandler(directory / "log.txt", encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{directory} cannot be written ({error.strerror}).", "Give another --output." if fresh else "Make it writable.") from error
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk is reported once, by the run
    handler.setFormatter(PlainFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("ftx").setLevel(logging.INFO)
    run.directory = directory
    try:
        yield
    except BaseException as error:
        refused = fresh and isinstance(error, FtxError) and error.status == REFUSED and not directory.metrics.exists()
        for key in hooks.implementers("run_failed"):
            try:
                hooks.ask(key, "run_failed", run=run, error=error)
            except Exception:
                log.exception("%s: run_failed raised", key)
        if refused:
            handler.close()
            clear(directory)
            raise
        log.error("the run ended early", exc_info=error)
        raise _as_run_error(error, directory, run) from error
    finally:
        root.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


def clear(directory: RunDir, *, temporary_only: bool = False) -> None:
    """Delete what lies in a run directory, or only what a killed process left half written; never the lock."""
    found = [*directory.path.glob(".*.tmp"), *directory.path.glob("eval/*/.*.tmp")] if temporary_only else list(directory.path.iterdir())
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=not temporary_only)
        elif path.name != LOCK:
            path.unlink(missing_ok=True)


def _as_run_error(error: BaseException, directory: RunDir, run: Run) -> BaseException:
    go_on = f"ftx resume {directory}"
    if isinstance(error, KeyboardInterrupt):
        return Interrupted("interrupted.", f"Go on with: {go_on}")
    if isinstance(error, RunError | Interrupted) or not isinstance(error, Exception):
        return error
    if no_room := memory_error(error, directory, run):
        return no_room
    text = first_line(error)
    if _has_no_room(error) or (re.search("(?i)write|inline_container", str(error)) and _nothing_can_be_written(directory)):
        return RunError(f"no space left on the disk of {directory}; the last whole checkpoint is kept.", f"Make room, then: {go_on}")
    if isinstance(error, FtxError):
        return RunError(error.problem, error.remedy)
    return RunError(f"{type(error).__name__}: {text}", f"See {directory / 'log.txt'}, or --traceback. Go on with: {go_on}")


def _has_no_room(error: Exception) -> bool:
    """A full disk, a quota, or a limit on the size of files. safetensors says it in words, for it writes by itself."""
    said = re.search(r"\(os error (\d+)\)", str(error))
    number = int(said[1]) if said else getattr(error, "errno", None)
    return number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error)


def _nothing_can_be_written(directory: RunDir) -> bool:
    """torch says only that a write failed, or of its inline_container.cc that a position is unexpected: look whether a write succeeds."""
    try:
        with tempfile.TemporaryFile(dir=directory.path) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return _has_no_room(error)
    return False
