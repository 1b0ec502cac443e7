"""YAML, defaults and the command line merged into one Recipe; and the Recipe written back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from ftx import yamls
from ftx.authoring import suggestions as suggestions_of
from ftx.catalogue import Catalogue
from ftx.errors import OptionError, RecipeError, did_you_mean
from ftx.hooks import REQUIRED_STAGES, Hooks
from ftx.models import installed
from ftx.options import Text, as_dict, build, coerce, fields
from ftx.readers import absolute, straight

SINGLE = ("formatter", "quantizer", "adapter", "trainer")
REPEATED = {"evaluators": "evaluator", "observers": "observer"}
DEFAULTS = {"formatter": "auto", "adapter": "lora", "trainer": "sft"}
#: What watches a run whose recipe has no `observers`. They change no result, so one that is not installed is left out, and the run says so.
OBSERVERS = ("audit", "report")
NONE = "none"
PATHS = ("data", "eval_data", "model", "from", "trust_remote_code")

#: Recipe key -> its type, for everything that is not a stage.
PLAIN: dict[str, Any] = {
    "model": str,
    "data": str | None,
    "eval_data": str | None,
    "from": str | None,
    "seed": int,
    "dtype": Literal["auto", "float32", "bfloat16", "float16"],
    "device": Literal["auto", "cpu", "cuda"],
    "skip_bad_rows": bool,
    "allow_truncation": bool,
    "allow_overlap": bool,
    "trust_remote_code": str | None,
    "no_cache": bool,
}


@dataclass(frozen=True)
class Choice:
    """A plugin chosen by name, with its options: as given until `resolve`, all of them afterwards. `by_default`: nobody named it."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    by_default: bool = field(default=False, compare=False)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What one run does. `start` is the earlier run to start from (`from:` in YAML, --from)."""

    model: str = "smollm2"
    data: str | None = None
    eval_data: str | None = None
    start: str | None = None
    formatter: Choice | None = None
    quantizer: Choice | None = None
    adapter: Choice | None = None
    trainer: Choice | None = None
    evaluators: tuple[Choice, ...] = ()
    observers: tuple[Choice, ...] = ()
    seed: int = 42
    dtype: str = "auto"
    device: str = "auto"
    skip_bad_rows: bool = False
    allow_truncation: bool = False
    allow_overlap: bool = False
    trust_remote_code: str | None = None
    no_cache: bool = False
    suggested: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def trusts_model(self) -> bool:
        """Whether the code that comes with the model may run: only if it was granted to this model by its name."""
        return self.trust_remote_code is not None and self.start is None and self.trust_remote_code in (self.model, self.model.partition("@")[0])

    def choices(self) -> list[tuple[str, Choice]]:
        """Every chosen plugin as (stage, choice), in the order in which they are registered."""
        single = [(stage, getattr(self, stage)) for stage in SINGLE]
        repeated = [(stage, choice) for key, stage in REPEATED.items() for choice in getattr(self, key)]
        return [(stage, choice) for stage, choice in single + repeated if choice is not None]


def read_recipe(file: Path) -> dict[str, Any]:
    """A recipe's YAML with its paths made absolute (they are relative to the file); RecipeError if it is not one."""
    try:
        content = yamls.load(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"{file}: no such recipe.", "Give a YAML file, or leave it out and use options.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot be read ({error}).", "Check the path and its permissions.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{file}{line}: not valid YAML ({getattr(error, 'problem', error)}).", "Mend the file.") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: a recipe is a mapping of keys to values.", "See docs/recipes.md for an example.")
    _check_keys(content, file)
    for key in PATHS:
        value = content.get(key)
        if isinstance(value, str) and not (key == "model" and value in installed()):
            beside = straight(file.parent / Path(value).expanduser())
            if (found := absolute(value, file.parent)) or value.startswith((".", "/", "~")):
                content[key] = found or str(beside)
    return content


def _check_keys(content: dict[str, Any], file: Path) -> None:
    known = [*PLAIN, *SINGLE, *REPEATED, "suggested"]
    for key in content:
        if key == "output":
            raise RecipeError(
                f"{file}: 'output' does not belong into a recipe: a repeat must not write over the run.", "Give --output DIR on the command line."
            )
        if key not in known:
            raise RecipeError(f"{file}: unknown key '{key}'.{did_you_mean(str(key), known)}", f"Keys: {', '.join(known)}.")
    for key in SINGLE:
        if content.get(key) is not None:
            _choice(content[key], f"{file}: {key}")
    for key in REPEATED:
        if not isinstance(content.get(key) or [], list):
            raise RecipeError(f"{file}: '{key}' must be a list of names.", f"{key}: [{content[key]}]")
        for one in content.get(key) or []:
            _choice(one, f"{file}: {key}")


def _choice(value: Any, where: str) -> Choice:
    if isinstance(value, str):
        return Choice(value)
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return Choice(value["name"], {str(k): v for k, v in value.items() if k != "name"})
    raise RecipeError(f"{where}: a plugin is a name, or a mapping with the key 'name' and its options.", "For example: {name: lora, r: 8}")


def merge(content: dict[str, Any], given: dict[str, Any], assignments: tuple[str, ...] = ()) -> Recipe:
    """A recipe's content, what the command line gives over it, and `-o` assignments -> an unresolved Recipe.

    Naming another plugin discards the recipe's options of that stage, and what was suggested for it; naming the same keeps
    them. Evaluators named replace the recipe's; observers named are added to the recipe's or the default ones, `none` drops those.
    """
    values: dict[str, Any] = {}
    for key, annotation in PLAIN.items():
        value = given.get(key) if given.get(key) is not None else content.get(key)
        if value is not None:
            values["start" if key == "from" else key] = _plain(coerce(value, annotation, key), key)
    for stage in SINGLE:
        written = _choice(content[stage], stage) if content.get(stage) is not None else None
        name = given.get(stage)
        chosen = written if name is None or (written and written.name == name) else Choice(name)
        if chosen is None and stage in DEFAULTS:
            chosen = Choice(DEFAULTS[stage])
        values[stage] = chosen
    for key, stage in REPEATED.items():
        listed = [_choice(one, key) for one in content.get(key) or []]
        names = given.get(stage) or ()
        if stage == "observer":
            values[key] = _observers(listed if content.get(key) is not None else [Choice(name, by_default=True) for name in OBSERVERS], names)
        else:
            values[key] = tuple(next((c for c in listed if c.name == name), Choice(name)) for name in names) if names else tuple(listed)
    suggested = content.get("suggested") or {}
    if not isinstance(suggested, dict) or not all(isinstance(one, dict) for one in suggested.values()):
        raise RecipeError("'suggested' must map stage:name to options.", "Leave it out: it is written by ftx.")
    changed = [stage for stage in SINGLE if content.get(stage) is not None and values[stage].name != _choice(content[stage], stage).name]
    suggested = {by: {path: value for path, value in said.items() if _target(path)[0] not in changed} for by, said in suggested.items()}
    recipe = Recipe(**values, suggested={by: said for by, said in suggested.items() if said})
    for assignment in assignments:
        recipe = _assign(recipe, assignment)
    return recipe


def _plain(value: Any, key: str) -> Any:
    """A value that is no stage's; OptionError for one that could only fail later, or mean something else."""
    if isinstance(value, str) and not value.strip():
        raise OptionError(f"{key} is empty.", "Give a value, or leave it out: a variable of the shell may not be set.")
    if key == "seed" and not 0 <= value < 1 << 32:
        raise OptionError(f"seed must be from 0 to {(1 << 32) - 1}, got {value}.", "For example: --seed 42")
    return value


def _observers(listed: list[Choice], names: Sequence[str]) -> tuple[Choice, ...]:
    """What the recipe lists, or the default ones, and those named on the command line behind them; `none` drops the listed."""
    kept = [] if NONE in names else [replace(choice, by_default=choice.by_default and choice.name not in names) for choice in listed]
    more = [name for name in names if name != NONE and name not in [choice.name for choice in kept]]
    return (*kept, *(next((choice for choice in listed if choice.name == name and not choice.by_default), Choice(name)) for name in more))


def _assign(recipe: Recipe, assignment: str) -> Recipe:
    path, equals, text = assignment.strip().partition("=")
    chosen = [choice.name for key in REPEATED for choice in getattr(recipe, key)]
    head = next((name for name in chosen if path.startswith(f"{name}.")), path.partition(".")[0])  # my.module:Class has dots of its own
    dot, option = path[len(head) : len(head) + 1], path[len(head) + 1 :].strip()
    if not equals or not dot or not option:
        raise OptionError(f"-o {assignment}: not of the form STAGE.OPTION=VALUE.", "For example: -o adapter.r=8, or -o exact-match.max_new_tokens=64")
    if head in SINGLE:
        choice = getattr(recipe, head)
        if choice is None:
            raise OptionError(f"-o {assignment}: no {head} is chosen.", f"Add --{head} NAME.")
        changed: dict[str, Any] = {head: Choice(choice.name, {**_without(choice.options, option), option: Text(text)})}
        return replace(recipe, **changed)
    for key in REPEATED:
        choices = getattr(recipe, key)
        if any(choice.name == head for choice in choices):
            changed = {key: tuple(Choice(c.name, {**_without(c.options, option), option: Text(text)}) if c.name == head else c for c in choices)}
            return replace(recipe, **changed)
    known = [*SINGLE, *chosen]
    raise OptionError(
        f"-o {assignment}: '{head}' is neither a stage nor a chosen evaluator or observer.{did_you_mean(head, known)}", f"Possible: {', '.join(known)}."
    )


def _without(options: dict[str, Any], name: str) -> dict[str, Any]:
    """`options` less `name`; for `args.lr` also less the entry `lr` of the mapping `args`."""
    head, dot, tail = name.partition(".")
    kept = {key: value for key, value in options.items() if key != name}
    if dot and isinstance(kept.get(head), dict):
        kept[head] = {key: value for key, value in kept[head].items() if key != tail}
    return kept


def resolve(recipe: Recipe, catalogue: Catalogue, *, training: bool = True) -> tuple[Recipe, Hooks]:
    """Load every chosen plugin, apply suggestions and options, register them: the Recipe with all values, and the hooks.

    Default < suggestion < recipe < -o. Raises PluginError or OptionError; nothing heavy is imported. Observers that nobody
    named and that are not installed are left out.
    """
    here = catalogue.names("observer") if any(choice.by_default for choice in recipe.observers) else []
    recipe = replace(recipe, observers=tuple(choice for choice in recipe.observers if not choice.by_default or choice.name in here))
    classes = {(stage, choice.name): catalogue.load(stage, choice.name) for stage, choice in recipe.choices()}
    suggestions, authors = _suggestions(recipe, classes)
    hooks, complete = Hooks(), {}
    for stage, choice in recipe.choices():
        cls = classes[stage, choice.name]
        advised = {k: v for k, v in suggestions.get(stage, {}).items() if k in fields(cls) and k not in choice.options}
        plugin = build(cls, {**advised, **choice.options}, stage=stage, name=choice.name, key=stage if stage in SINGLE else choice.name)
        hooks.add(plugin, stage, choice.name)
        complete[stage, choice.name] = Choice(choice.name, as_dict(plugin))
        for option in advised:
            authors.setdefault((stage, option), {})["used"] = True
    hooks.check()
    if training:
        for stage in REQUIRED_STAGES:
            if getattr(recipe, stage) is None:
                raise RecipeError(f"no {stage} is chosen.", f"Add --{stage} NAME.")
    used: dict[str, dict[str, Any]] = {}
    for (stage, option), about in authors.items():
        if about.get("used"):
            used.setdefault(about["by"], {})[about["path"]] = suggestions[stage][option]
    single: dict[str, Any] = {stage: complete[stage, choice.name] for stage, choice in recipe.choices() if stage in SINGLE}
    repeated: dict[str, Any] = {key: tuple(complete[stage, choice.name] for choice in getattr(recipe, key)) for key, stage in REPEATED.items()}
    return replace(recipe, **single, **repeated, suggested=used), hooks


def _suggestions(recipe: Recipe, classes: dict[tuple[str, str], type[Any]]) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, str], dict[str, Any]]]:
    """stage -> option -> suggested value, and who suggests it. A written recipe's own suggestions hold for the plugins
    that are still chosen, so that a repeat does not follow a plugin that has changed its mind."""
    values: dict[str, dict[str, Any]] = {}
    authors: dict[tuple[str, str], dict[str, Any]] = {}
    for (stage, name), cls in classes.items():
        said = recipe.suggested[f"{stage}:{name}"] if f"{stage}:{name}" in recipe.suggested else suggestions_of(cls, recipe.device)
        for path, value in sorted(said.items(), key=lambda one: bool(_target(one[0])[1])):  # what is said for one plugin goes before
            target, only, option = _target(path)
            if only and only != getattr(getattr(recipe, target, None), "name", None):
                continue
            earlier = authors.get((target, option))
            explicit = option in getattr(getattr(recipe, target, None), "options", {})
            if earlier and earlier["by"] != f"{stage}:{name}" and values[target][option] != value and not explicit:
                raise OptionError(
                    f"{earlier['by']} suggests {path}={values[target][option]} and {stage}:{name} suggests {value}.",
                    f"Say which: -o {path}=VALUE",
                )
            values.setdefault(target, {})[option] = value
            authors[target, option] = {"by": f"{stage}:{name}", "path": path}
    return values, authors


def _target(path: str) -> tuple[str, str, str]:
    """`trainer.learning_rate` and `trainer:dpo.learning_rate` -> stage, the one plugin that is meant or "", option."""
    head, _, option = path.partition(".")
    stage, _, only = head.partition(":")
    return stage, only, option


def to_yaml(recipe: Recipe) -> str:
    """A resolved recipe as YAML that runs again to the same result. Suggested values stand under `suggested` only."""
    content: dict[str, Any] = {key: getattr(recipe, "start" if key == "from" else key) for key in PLAIN}
    for key in PATHS:
        if content[key] is None or (key == "model" and content[key] in installed()):
            continue  # an installed model's name means the same everywhere
        content[key] = absolute(content[key]) or content[key]
    hidden = {_target(path)[::2] for said in recipe.suggested.values() for path in said}
    for stage in SINGLE:
        choice = getattr(recipe, stage)
        if choice is not None:
            content[stage] = {"name": choice.name, **{k: v for k, v in choice.options.items() if (stage, k) not in hidden}}
    for key in REPEATED:
        content[key] = [{"name": choice.name, **choice.options} for choice in getattr(recipe, key)]
    if recipe.suggested:
        content["suggested"] = recipe.suggested
    return yaml.safe_dump({k: v for k, v in content.items() if v is not None}, sort_keys=False, allow_unicode=True)
