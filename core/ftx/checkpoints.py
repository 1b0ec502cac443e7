"""Checkpoints that can be trusted: marked once all their bytes are on disk, and examined before they are used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import xxhash

from ftx.errors import Refused
from ftx.run import RunDir, write_lines, write_text

#: In every checkpoint that is whole; written last. File -> its bytes and its digest.
MARKER = "ftx-complete.json"


def mark(checkpoint: Path) -> None:
    """Sync every file of a checkpoint to the disk, then write the marker that makes it count."""
    files = sorted(file for file in checkpoint.rglob("*") if file.is_file() and file.name != MARKER)
    for file in files:
        sync(file)
    about = {str(file.relative_to(checkpoint)): {"bytes": file.stat().st_size, "xxh3_128": digest(file)} for file in files}
    sync(checkpoint)
    write_text(checkpoint / MARKER, json.dumps(about))
    sync(checkpoint)
    sync(checkpoint.parent)


def sync(path: Path) -> None:
    """fsync a file, or a directory's list of names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(file: Path) -> str:
    """128 bits of XXH3: it finds damage at the speed of the disk; sha256 would cost seconds a gigabyte. It is no defence
    against somebody who writes both the file and the marker."""
    state = xxhash.xxh3_128()
    with open(file, "rb") as stream:
        while piece := stream.read(1 << 22):
            state.update(piece)
    return state.hexdigest()


def fault(checkpoint: Path, *, thorough: bool = False) -> str | None:
    """Why a checkpoint does not count, or None. `thorough` reads every byte, else the sizes are compared. OSError for one that
    cannot be looked at now: that says nothing of what is in it."""
    try:
        about = json.loads((checkpoint / MARKER).read_text("utf-8"))
        expected = {name: (one["bytes"], one["xxh3_128"]) for name, one in about.items()}
    except FileNotFoundError:
        return "it was not finished"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"its {MARKER} cannot be read"
    for name, (size, wanted) in expected.items():
        file = checkpoint / name
        try:
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size:,} bytes instead of {size:,}"
            if thorough and digest(file) != wanted:
                return f"{name} is damaged: its bytes are not those that were written"
        except FileNotFoundError:
            return f"{name} is missing"
    return None


def checkpoints(directory: RunDir) -> list[Path]:
    """All of a run's checkpoints, oldest first, whether they count or not."""
    return sorted((path for path in directory.checkpoints.glob("checkpoint-*") if path.name.partition("-")[2].isdigit()), key=step_of)


def whole_checkpoints(directory: RunDir) -> list[Path]:
    """The checkpoints that count, oldest first: marked, and every file there with the size that was marked."""
    return [path for path in checkpoints(directory) if _counts(path)]


def _counts(checkpoint: Path) -> bool:
    try:
        return fault(checkpoint) is None
    except OSError:
        return False


def prune(directory: RunDir, keep: int, best: str | None = None) -> None:
    """Delete all whole checkpoints but the newest `keep` and the one called `best`."""
    for old in whole_checkpoints(directory)[:-keep]:
        if old.name != best:
            remove(old)


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, its marker first, so that a half-deleted one never counts."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.partition("-")[2])


def rewind(directory: RunDir, say: Callable[[str], None] = print) -> Path | None:
    """Go back to the newest checkpoint that is whole to the last byte: what came behind it (broken checkpoints, metrics) is
    taken away, and `say` gets a line for each that is not used and why. Refused, with nothing taken away, if one cannot be read:
    it may be whole."""
    good, broken = None, dict[Path, str]()
    for checkpoint in reversed(checkpoints(directory)):
        try:
            why = fault(checkpoint, thorough=True)
        except OSError as error:
            problem = f"{error.filename or checkpoint} cannot be read ({error.strerror}), so nothing says whether {checkpoint.name} is whole."
            raise Refused(problem, f"Nothing was deleted. Make it readable, or delete {checkpoint} to go on from the one before.") from error
        if why is None:
            good = checkpoint
            break
        broken[checkpoint] = why
    for checkpoint, why in broken.items():
        say(f"{checkpoint.name} is not used: {why}.")
        remove(checkpoint)
    step = step_of(good) if good else 0
    if directory.metrics.exists():
        lines = [json.loads(line) for line in directory.metrics.read_text("utf-8", errors="replace").splitlines() if line.endswith("}")]
        write_lines(directory.metrics, [line for line in lines if line["step"] <= step])
    return good
