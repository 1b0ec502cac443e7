"""One process at a time writes a run directory: a lock of the operating system, which ends with its process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator

from ftx.errors import RecipeError
from ftx.run import RunDir

LOCK = ".ftx-lock"

log = logging.getLogger("ftx")


@contextlib.contextmanager
def locked(directory: RunDir, *, make: bool = False) -> Iterator[None]:
    """Hold the lock of a run directory; RecipeError if another process does. `make` creates the directory, and takes it
    away again if nothing stays in it.

    A record lock and not flock: a data worker that was forked and outlives its killed run does not hold it. The file that
    a crash leaves locks nothing; whoever finds it deletes it in the end.
    """
    if not make and not directory.path.is_dir():
        yield
        return
    made = not directory.path.exists()
    file = directory / LOCK
    try:
        directory.path.mkdir(parents=True, exist_ok=True)
        handle = _acquire(directory)
    except OSError as error:
        remedy = "Make the directory writable." if directory.recipe.exists() else "Give another --output."
        raise RecipeError(f"{directory} cannot be written ({error.strerror}).", remedy) from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if file.stat().st_ino == os.fstat(handle).st_ino:
                file.unlink()
        os.close(handle)
        if made:
            with contextlib.suppress(OSError):  # a run that was refused leaves no directory
                directory.path.rmdir()


def _acquire(directory: RunDir) -> int:
    file = directory / LOCK
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            said = os.read(handle, 32).decode(errors="replace")
            os.close(handle)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                owner = f" (process {said})" if said.isdigit() else ""
                raise RecipeError(f"{directory} is being written by another process{owner}.", "Wait until it ends, or give another --output.") from error
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                log.warning("%s: this file system has no locks, so a second process in this directory would not be noticed", directory)
                return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            raise
        try:
            current = file.stat().st_ino == os.fstat(handle).st_ino
        except FileNotFoundError:
            current = False
        if current:
            with contextlib.suppress(OSError):  # the number only helps to find the process; a full disk is met elsewhere
                os.truncate(handle, 0)
                os.pwrite(handle, str(os.getpid()).encode(), 0)
            return handle
        os.close(handle)  # its owner ended and deleted it between our two calls
