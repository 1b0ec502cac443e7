"""What a plugin is, from its class: the option tables of `ftx plugins show` and of the docs."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from ftx.authoring import declared, suggestions
from ftx.catalogue import Catalogue
from ftx.hooks import hook_names
from ftx.options import describe as describe_type
from ftx.options import fields, option_types


def described(stage: str, name: str, catalogue: Catalogue | None = None) -> dict[str, Any]:
    """Everything that a person wants to know of one plugin, as plain values. Imports that plugin only."""
    catalogue = catalogue or Catalogue()
    entry, cls = catalogue.find(stage, name), catalogue.load(stage, name)
    return {
        "stage": stage,
        "name": name,
        "origin": entry.origin if entry.version else entry.value,
        "location": entry.location,
        "doc": inspect.getdoc(cls) or "",
        **{what: list(declared(cls, what)) for what in ("accepts", "produces", "requires", "conflicts")},
        "suggests": suggestions(cls),
        "hooks": [hook for hook in hook_names() if hasattr(cls, hook)],
        "options": option_table(cls),
    }


def option_table(cls: type[Any]) -> list[dict[str, str]]:
    """name, type, default and help of each option."""
    types = option_types(cls)
    return [{"name": n, "type": describe_type(types[n]), "default": _default(f), "help": f.metadata.get("help", "")} for n, f in fields(cls).items()]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
