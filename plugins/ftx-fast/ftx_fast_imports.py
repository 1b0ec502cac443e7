"""Libraries that others import only because they are installed, imported when something of them is used."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
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


def import_losses() -> None:
    """Import transformers' losses without scipy.optimize, of which those for object detection want one function."""
    name, losses = "scipy.optimize", "transformers.loss.loss_utils"
    if name in sys.modules or losses in sys.modules or importlib.util.find_spec("scipy") is None:
        return

    def linear_sum_assignment(*args: Any, **kwargs: Any) -> Any:
        return importlib.import_module(name).linear_sum_assignment(*args, **kwargs)

    stand_in = ModuleType(name)
    vars(stand_in)["linear_sum_assignment"] = linear_sum_assignment
    sys.modules[name] = stand_in
    try:
        importlib.import_module(losses)
    finally:
        del sys.modules[name]


class Installed(Mapping[str, list[str]]):
    """What `importlib.metadata.packages_distributions` gives, found out when somebody looks.

    Asked for a package that a distribution of the same name says it brings, it gives that one and looks no further: TRL would choose it
    among several.
    """

    def __init__(self, scan: Callable[[], Mapping[str, list[str]]]) -> None:
        self.scan = functools.cache(scan)

    def __getitem__(self, name: str) -> list[str]:
        same = name.replace("_", "-")
        try:
            if name in (importlib.metadata.distribution(same).read_text("top_level.txt") or "").split():
                return [same]
        except importlib.metadata.PackageNotFoundError:
            pass
        return self.scan()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.scan())

    def __len__(self) -> int:
        return len(self.scan())


def import_trl() -> None:
    """Import TRL without its scan of everything installed, which takes a second: it asks for versions of what is not there."""
    usual = importlib.metadata.packages_distributions
    importlib.metadata.packages_distributions = lambda: Installed(usual)
    try:
        importlib.import_module("trl.import_utils")
    finally:
        importlib.metadata.packages_distributions = usual
