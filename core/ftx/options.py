"""Text and YAML -> a plugin's typed options: directed by the field's type, strict, with suggestions. Never guesses."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, Union

import yaml

from ftx.errors import OptionError, did_you_mean


class Text(str):
    """A value as it was typed on the command line: to be read as whatever the option's type wants."""


def build(cls: Any, values: dict[str, Any], *, stage: str, name: str, key: str | None = None) -> Any:
    """A plugin object from its options; OptionError for an unknown name, a wrong type, or what the plugin refuses.

    `key` is what stands before an option's name on the command line (default: the stage).
    """
    prefix = key or stage
    known = fields(cls)
    rest = next((field.name for field in known.values() if field.metadata.get("rest")), None)
    types_of = option_types(cls)
    ready: dict[str, Any] = {}
    for option, value in values.items():
        head, _, tail = option.partition(".")
        if tail and head in known and isinstance(value, Text) and _takes_dict(types_of[head]):
            ready[head] = {**(ready.get(head) or {}), tail: value}
        elif option in known:
            coerced = coerce(value, types_of[option], f"{prefix}.{option}")
            ready[option] = {**ready[option], **coerced} if isinstance(ready.get(option), dict) and isinstance(coerced, dict) else coerced
        elif rest is not None:
            ready[rest] = {**(ready.get(rest) or {}), option: value}
        else:
            raise OptionError(
                f"{stage} '{name}' has no option '{option}'.{did_you_mean(option, known)} Options: {', '.join(known) or 'none'}.",
                f"ftx plugins show {stage} {name}",
            )
    missing = [option for option, field in known.items() if option not in ready and not _has_default(field)]
    if missing:
        raise OptionError(f"{stage} '{name}' needs the option '{missing[0]}'.", f"-o {prefix}.{missing[0]}=VALUE")
    try:
        return cls(**ready)
    except (ValueError, TypeError) as error:
        raise OptionError(f"{stage} '{name}': {str(error).removesuffix('.')}.", f"ftx plugins show {stage} {name}") from error


def fields(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    """A plugin's options by name."""
    return {field.name: field for field in dataclasses.fields(cls)}


def option_types(cls: Any) -> dict[str, Any]:
    """A plugin's option types by name, with postponed annotations resolved."""
    return typing.get_type_hints(cls)


def as_dict(plugin: Any) -> dict[str, Any]:
    """A plugin's options as plain values for a recipe; Text, which stays unread in a dict, as the text it is."""
    return {name: _plain(getattr(plugin, name)) for name in fields(type(plugin))}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, str) else value


def coerce(value: Any, annotation: Any, label: str) -> Any:
    """`value` as `annotation` wants it. `label` names the option in the OptionError.

    A typed value (from YAML) must have the type; an int does for a float, and so does text like 2e-4, which PyYAML does
    not read as a number. Text is read by the type: numbers, true/false, none, `[a, b]` as a list. For a union the exact
    type wins, then the arms in their order, `str` last.
    """
    arms = _arms(annotation)
    for arm in arms:
        if not isinstance(value, Text) and _is(value, arm):
            return list(value) if isinstance(value, tuple) else value
    if isinstance(value, str):
        is_list = value.strip().startswith("[")
        # a list only where the text says so: `all-linear` must not become a list of one
        ordered = sorted(arms, key=lambda arm: (_is_list(arm) != is_list, arm is str))
        for arm in ordered:
            if arm is not float and not isinstance(value, Text):
                continue  # YAML has its own types; only a number like 2e-4 comes out of it as text
            try:
                return _read(str(value), arm, label)
            except (ValueError, yaml.YAMLError):
                continue
    elif isinstance(value, int) and not isinstance(value, bool) and float in arms:
        return float(value)
    elif isinstance(value, list):
        for arm in arms:
            if typing.get_origin(arm) is list:
                return [coerce(one, typing.get_args(arm)[0], label) for one in value]
    got = repr(str(value)) if isinstance(value, str) else repr(value)
    raise OptionError(f"{label} wants {describe(annotation)}, got {got}.", f"For example: {label}={_example(arms[0])}")


def describe(annotation: Any) -> str:
    """A type in the words of the option tables: `int`, `float or none`, `'chat' or 'instruction'`, `list of str`."""
    words = []
    for arm in _arms(annotation):
        if typing.get_origin(arm) is Literal:
            words += [repr(one) if isinstance(one, str) else str(one).lower() for one in typing.get_args(arm)]
        elif typing.get_origin(arm) is list:
            words.append(f"list of {describe(typing.get_args(arm)[0])}")
        elif arm is type(None):
            words.append("none")
        else:
            words.append("dict" if _takes_dict(arm) else getattr(arm, "__name__", str(arm)))
    return " or ".join(words)


def _example(arm: Any) -> str:
    origin = typing.get_origin(arm)
    if origin is Literal:
        return str(typing.get_args(arm)[0])
    return "[a, b]" if origin is list else {int: "8", float: "2e-4", bool: "true"}.get(arm, "text")


def supported(annotation: Any) -> bool:
    """True if options may have this type."""
    plain = (int, float, bool, str, type(None), dict, Any)
    return all(
        arm in plain or typing.get_origin(arm) in (Literal, dict) or (typing.get_origin(arm) is list and supported(typing.get_args(arm)[0]))
        for arm in _arms(annotation)
    )


def _arms(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [arm for part in typing.get_args(annotation) for arm in _arms(part)]
    return [list[Any] if annotation is list else annotation]


def _is_list(arm: Any) -> bool:
    return typing.get_origin(arm) is list


def _takes_dict(annotation: Any) -> bool:
    return any(arm is dict or typing.get_origin(arm) is dict for arm in _arms(annotation))


def _is(value: Any, arm: Any) -> bool:
    origin = typing.get_origin(arm)
    if arm is Any:
        return True
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in typing.get_args(arm))
    if origin is list:
        return isinstance(value, list | tuple) and all(any(_is(one, a) for a in _arms(typing.get_args(arm)[0])) for one in value)
    if arm is dict or origin is dict:
        return isinstance(value, dict)
    return type(value) is arm or (arm is str and isinstance(value, str))


def _read(text: str, arm: Any, label: str) -> Any:
    """Text as one type, or ValueError."""
    origin = typing.get_origin(arm)
    word = text.strip()
    if arm is str or arm is Any:
        return text
    if arm is bool and word.lower() in ("true", "false", "yes", "no", "on", "off"):
        return word.lower() in ("true", "yes", "on")
    if arm is int:
        return int(word)
    if arm is float:
        return float(word)
    if arm is type(None) and word.lower() in ("none", "null"):
        return None
    if origin is Literal:
        for one in typing.get_args(arm):
            if word == str(one) or (isinstance(one, bool | None) and word.lower() == str(one).lower()):
                return one
    if origin is list:
        item = typing.get_args(arm)[0]
        # YAML strips what is not quoted; what is quoted keeps its spaces
        parts = yaml.load(word, yaml.BaseLoader) if word.startswith("[") else [part.strip() for part in word.split(",")] if word else []
        if all(isinstance(part, str) for part in parts):
            return [coerce(Text(part), item, label) for part in parts]
    if arm is dict or origin is dict:
        value = yaml.safe_load(word)
        if isinstance(value, dict):
            return value
    raise ValueError(text)


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
