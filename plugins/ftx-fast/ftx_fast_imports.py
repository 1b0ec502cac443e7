"""Libraries that others import only because they are installed, imported when something of them is used."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

#: peft (and through it transformers and TRL) imports bitsandbytes, which brings torch's compiler: a third of all import time. TRL imports wandb.
POSTPONED = ("bitsandbytes", "wandb")


class Later(ModuleType):
    """Stands in for a module that is found but not run yet: whoever asks for one of its names runs it."""

    def __getattr__(self, name: str) -> Any:
        module = arrive(self.__name__)
        try:
            return getattr(module, name)
        except AttributeError:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None


def postpone(*names: str) -> None:
    """Put a stand-in for each of these top-level modules that is installed and not imported yet."""
    for name in names or POSTPONED:
        if name in sys.modules:
            continue
        spec = importlib.util.find_spec(name)
        if spec is not None:
            stand_in = Later(name)
            stand_in.__spec__, stand_in.__file__ = spec, spec.origin  # who asks whether it is installed need not run it
            sys.modules[name] = stand_in


def arrive(name: str) -> ModuleType:
    """The module itself; modules that hold the stand-in see through it."""
    stand_in = sys.modules.get(name)
    if not isinstance(stand_in, Later):
        return importlib.import_module(name)
    del sys.modules[name]
    try:
        module = importlib.import_module(name)
    except BaseException:
        sys.modules[name] = stand_in
        raise
    vars(stand_in).update({key: value for key, value in vars(module).items() if key != "__name__"})
    return module
