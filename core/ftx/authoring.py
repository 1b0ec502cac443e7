"""All that a plugin's author imports: @plugin, @hookimpl and option."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, TypeVar, dataclass_transform

import pluggy

T = TypeVar("T")

PROJECT = "ftx"

#: Marks a method of a plugin as the implementation of the hook of the same name.
hookimpl = pluggy.HookimplMarker(PROJECT)

#: What a plugin class may say of itself: unannotated class attributes, never options.
DECLARATIONS: dict[str, Any] = {
    "accepts": (),
    "produces": (),
    "conflicts": (),
    "requires": (),
    "suggests": {},
    "owns": {},
    "encodes_with": None,
    "sequences": 1,
}


def option(default: Any = dataclasses.MISSING, help: str = "", *, rest: bool = False) -> Any:
    """One option of a plugin: a dataclass field with a default and a sentence of help.

    `default` may be a list or a dict (each plugin gets its own copy); without one the option is required. With
    `rest=True` (a `dict` option) the option collects every name that the plugin does not list itself.
    """
    metadata = {"help": help, "rest": rest}
    if isinstance(default, list | dict | set):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass_transform(kw_only_default=True, frozen_default=True, eq_default=False, field_specifiers=(option,))
def plugin(cls: type[T]) -> type[T]:
    """Make a class a plugin: its annotated fields become its options, its @hookimpl methods its behaviour.

    Frozen, so that options stay what the recipe says; compared by identity, because pluggy keeps plugins in sets.
    Raises TypeError for a declaration (`accepts`, `suggests`, ...) with an annotation, which would silently become
    an option, for one that is a bare text where a tuple belongs, for an option without `option(...)` metadata, which
    would have no help, and for one called `name`: in a recipe that key names the plugin.
    """
    for name in inspect.get_annotations(cls):
        if name in DECLARATIONS:
            raise TypeError(f"{cls.__name__}.{name} must have no annotation: with one it would be an option")
        if name == "name":
            raise TypeError(f"{cls.__name__} must not have an option called 'name': in a recipe that key names the plugin")
    for name in DECLARATIONS:
        if isinstance(declared(cls, name), str):
            raise TypeError(f"{cls.__name__}.{name} must be a tuple of texts, not a text")
    made = dataclasses.dataclass(kw_only=True, frozen=True, eq=False)(cls)
    for field in dataclasses.fields(made):  # type: ignore[arg-type]
        if "help" not in field.metadata:
            raise TypeError(f"{cls.__name__}.{field.name} must be declared with option(default, 'help')")
    return made


def is_plugin(cls: object) -> bool:
    """True for a class that @plugin itself decorated; a subclass without it would turn options into Field objects."""
    return isinstance(cls, type) and "__dataclass_params__" in vars(cls)


def declared(cls: object, what: str) -> Any:
    """What a plugin says of itself under one of DECLARATIONS, or the empty default."""
    return getattr(cls, what, DECLARATIONS[what])


def suggestions(cls: object, device: str = "auto") -> dict[str, Any]:
    """What a plugin suggests on a device (as `--device` says, auto included): its mapping, or what its callable gives."""
    said = declared(cls, "suggests")
    if callable(said):
        said = said(device) if inspect.signature(said).parameters else said()
    return dict(said)
