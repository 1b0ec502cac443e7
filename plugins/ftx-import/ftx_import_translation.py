"""What a configuration becomes: a recipe's content, and for each of its keys whether and how it carried over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ftx import yamls
from ftx.errors import DataError, RecipeError, did_you_mean
from ftx.readers import absolute

#: Words for a key that the other system needs and ftx does not.
ALWAYS = "ftx always does"
ITSELF = "ftx sees to it by itself"


@dataclass
class Translation:
    """A configuration on its way to a recipe. Each key is taken once; what nobody takes has no counterpart."""

    system: str
    given: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, str] = field(default_factory=dict)
    """key -> where it stands in the recipe"""
    needless: dict[str, str] = field(default_factory=dict)
    """key -> why ftx needs none"""
    lost: dict[str, str] = field(default_factory=dict)
    """key -> what has no counterpart"""
    assumed: dict[str, Any] = field(default_factory=dict)
    """path in the recipe -> the other system's default, written out"""
    known: set[str] = field(default_factory=set)
    """every key that was looked for"""

    def get(self, key: str, default: Any = None) -> Any:
        self.known.add(key)
        value = self.given.get(key)
        return default if value is None else value

    def set(self, path: str, value: Any, key: str) -> None:
        """Put a value under `stage.option` (or a plain key) of the recipe, because of `key`."""
        self._put(path, value)
        shown = path if isinstance(value, dict | list) else f"{path}={value}"
        self.carried[key] = f"{self.carried[key]}, {shown}" if key in self.carried else shown

    def assume(self, path: str, value: Any) -> None:
        """The other system's default for something that the configuration leaves out, unless the recipe has it."""
        stage, _, option = path.partition(".")
        if (option in self.recipe.get(stage, {})) if option else stage in self.recipe:
            return
        self._put(path, value)
        self.assumed[path] = value

    def take(self, names: Mapping[str, str | tuple[str, Callable[[Any], Any]]]) -> None:
        """Carry keys over as they are, or through a function; a ValueError of it says why there is no counterpart."""
        for key, target in names.items():
            if self.get(key) is None:
                continue
            path, function = (target, None) if isinstance(target, str) else target
            try:
                self.set(path, function(self.given[key]) if function else self.given[key], key)
            except ValueError as error:
                self.lose(key, str(error))

    def skip(self, key: str, why: str) -> None:
        self.known.add(key)
        if key in self.given and key not in self.carried:
            self.needless[key] = why

    def lose(self, key: str, why: str) -> None:
        self.lost[key] = why

    def lose_set(self, names: Mapping[str, str]) -> None:
        """Of keys without a counterpart those that are set and not carried in part: key -> what to do instead, or ""."""
        for key, why in names.items():
            if self.get(key) not in (None, False, [], 0, "") and key not in self.carried:
                self.lose(key, why or "no counterpart")

    def finish(self) -> None:
        """Every key that nobody took: unset ones need nothing, the rest has no counterpart."""
        for key, value in self.given.items():
            if key in self.carried or key in self.needless or key in self.lost:
                continue
            if value is None or value is False or value == "" or value == []:
                self.needless[key] = "not set"
            elif key in self.known:
                self.lost[key] = "no counterpart"
            else:
                self.lost[key] = f"no key of {self.system} that ftx knows.{did_you_mean(key, self.known)}"
        order = ["model", "data", "eval_data", "formatter", "quantizer", "adapter", "trainer", "dtype", "seed"]
        self.recipe = {key: self.recipe[key] for key in order if key in self.recipe}

    def _put(self, path: str, value: Any) -> None:
        stage, _, option = path.partition(".")
        if not option:
            self.recipe[stage] = value
            return
        options = self.recipe.setdefault(stage, {})
        head, _, tail = option.partition(".")
        if tail:
            options.setdefault(head, {})[tail] = value
        else:
            options[head] = value


def read_config(file: Path) -> dict[str, Any]:
    """A configuration's YAML or JSON as a mapping; RecipeError with the line if it is none."""
    try:
        content = yamls.load(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"{file}: no such configuration.", "Give the YAML file that the other system was called with.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot be read ({error}).", "Check the path and its permissions.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise RecipeError(f"{file}{f':{mark.line + 1}' if mark else ''}: not valid YAML ({getattr(error, 'problem', error)}).", "Mend the file.") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise RecipeError(f"{file}: a configuration is a mapping of keys to values.", "Give the YAML file that the other system was called with.")
    return content


def number(value: Any) -> float:
    """YAML 1.1 reads 2e-4 as text; other systems take it as a number, and so does this."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is no number") from None


def whole(value: Any) -> int:
    if number(value) != int(number(value)):
        raise ValueError(f"{value!r} is no whole number")
    return int(number(value))


def steps(value: Any) -> int:
    if 0 < number(value) < 1:
        raise ValueError("a share of all steps has no counterpart: give a number of steps")
    return whole(value)


def names_of(value: Any) -> list[str]:
    """A list, or names with commas between them -> a list of names."""
    listed = value.split(",") if isinstance(value, str) else value
    if not isinstance(listed, list):
        raise ValueError(f"{value!r} is no list of names")
    return [str(one).strip() for one in listed if str(one).strip()]


def scheduler(value: Any) -> str:
    from typing import get_args

    from ftx_sft_options import Scheduler

    if value not in get_args(Scheduler):
        raise ValueError(f"no schedule of transformers is called '{value}'")
    return str(value)


def optimizer(value: Any) -> str:
    from ftx_sft_args import unknown_optimizer

    if unknown_optimizer(str(value)):
        raise ValueError(f"no optimizer of transformers is called '{value}'")
    return str(value)


def found(reference: str) -> str:
    """A path that exists, absolute; anything else (a hub id) as it is."""
    return absolute(reference) or reference


def refuse(system: str, what: str) -> DataError:
    return DataError(f"{system}: {what}.", "ftx has the trainers that `ftx plugins` lists; one of your own is a plugin (docs/writing-a-plugin.md).")
