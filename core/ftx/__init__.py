"""ftx: fine-tune language models out of plugins. The public names load on first use (PEP 562)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "hookimpl": "ftx.authoring",
    "option": "ftx.authoring",
    "plugin": "ftx.authoring",
    "FtxError": "ftx.errors",
    "RowError": "ftx.errors",
    "Evaluation": "ftx.run",
    "Run": "ftx.run",
    "Score": "ftx.run",
    "format_rows": "ftx.data",
}

__all__ = ["Evaluation", "FtxError", "RowError", "Run", "Score", "__version__", "format_rows", "hookimpl", "option", "plugin"]

if TYPE_CHECKING:
    from ftx.authoring import hookimpl, option, plugin
    from ftx.data import format_rows
    from ftx.errors import FtxError, RowError
    from ftx.run import Evaluation, Run, Score


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ftx' has no attribute {name!r}")
