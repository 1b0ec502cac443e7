"""Errors a person can act on: one line says what is wrong, one says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

REFUSED = 2
FAILED = 1
INTERRUPTED = 130


class FtxError(Exception):
    """What is wrong, what to do about it, and the exit status that follows.

    `problem` is one line without a full traceback; `remedy` (may be empty, may have several lines) says what to type
    or change. The status is 2 while nothing has started and 1 once a run has.
    """

    status = REFUSED

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy

    def __str__(self) -> str:
        return "\n".join([self.problem, *self.remedy.splitlines()])


class PluginError(FtxError):
    """A plugin that is unknown, ambiguous, broken or does not fit the others."""


class OptionError(FtxError):
    """An option that does not exist or has a value of the wrong kind."""


class RecipeError(FtxError):
    """A recipe that cannot be read or holds a key that nobody knows."""


class DataError(FtxError):
    """Data that cannot be read or must not be trained on."""


class ModelError(FtxError):
    """A model that cannot be found or loaded."""


class RunError(FtxError):
    """The run started and failed."""

    status = FAILED


class Refused(RunError):
    """A run that cannot go on, and of which nothing was changed."""

    status = REFUSED


class Interrupted(FtxError):
    """The user stopped the run; it can be resumed."""

    status = INTERRUPTED


class RowError(ValueError):
    """Raised by a formatter for a row that does not fit; the core adds file and line."""


def printable(text: str) -> str:
    """Text that cannot move the cursor, recolour a terminal or turn the reading direction: what is not printable, but for
    line ends and tabs, becomes a replacement character."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def one_line(text: str) -> str:
    """`printable` text as one line: a line end in a name from data (a column, a key, a file) begins no line that looks like the
    program's own."""
    return printable(text.replace("\n", "\\n"))


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the closest known word, else for one that is its beginning (`rank`: `r`), or nothing."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5) or [one for one in known if one and word.startswith(one)]
    return f" Did you mean '{close[0]}'?" if close else ""
