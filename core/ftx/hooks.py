"""The plugins of one run, registered with pluggy and checked before anything is loaded."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterable, Iterator
from typing import Any

import pluggy

from ftx import hookspecs
from ftx.authoring import PROJECT, declared
from ftx.errors import PluginError, did_you_mean

#: Stages whose hooks must be answered in every training run.
REQUIRED_STAGES = ("formatter", "adapter", "trainer")
#: Stage -> the hooks that every plugin there must implement; without them a run would fail late, or score nothing.
OWN_HOOKS = {
    "formatter": ("format_dataset",),
    "adapter": ("adapt_model", "save_adapted", "load_adapted"),
    "trainer": ("encode_dataset", "make_trainer"),
    "evaluator": ("evaluate_model",),
    "exporter": ("export_model",),
}


class Hooks(pluggy.PluginManager):
    """One run's plugins, each registered as `stage:name`. Call `check()` once all are in."""

    def __init__(self) -> None:
        super().__init__(PROJECT)
        self.add_hookspecs(hookspecs)

    def add(self, plugin: Any, stage: str, name: str) -> None:
        key = f"{stage}:{name}"
        if self.has_plugin(key):
            raise PluginError(f"{stage} '{name}' is named twice.", "Name it once.")
        try:
            self.register(plugin, name=key)
        except pluggy.PluginValidationError as error:
            raise PluginError(f"{stage} '{name}' does not fit its hooks: {_problem(error)}", "See docs/hooks.md for the arguments of each hook.") from error

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        """Look at functions only (pluggy would run properties), and refuse a hook's name without its mark."""
        member = inspect.getattr_static(plugin, name, None)
        if not isinstance(member, types.FunctionType | staticmethod | classmethod | types.MethodType):
            if f"{PROJECT}_impl" in getattr(member, "__dict__", {}):  # @hookimpl over lru_cache or the like: pluggy would pass it by
                raise PluginError(f"{type(plugin).__name__}.{name} is marked @hookimpl but is no plain method.", "Write the hook as a method of its own.")
            return None
        options = super().parse_hookimpl_opts(plugin, name)
        if options is None and not name.startswith("_") and hasattr(self.hook, name):
            raise PluginError(f"{type(plugin).__name__}.{name} looks like a hook but is not marked @hookimpl.", "Mark it, or give the method another name.")
        if options is not None:
            _check_arguments(type(plugin).__name__, name, member)
        return options

    def check(self) -> None:
        """Refuse unknown hooks, two owners of a stage hook, a stage without its hooks, unmet `requires`, met `conflicts`."""
        for key, plugin in self.list_name_plugin():
            self._check_unknown(key, plugin)
        for name in stage_hooks():
            owners = self.owners(name)
            if len(owners) > 1:
                raise self._two_owners(name, owners)
        for key, _ in self.list_name_plugin():
            for name in OWN_HOOKS.get(key.partition(":")[0], ()):
                if key not in self.owners(name):
                    raise PluginError(f"{_said(key)} does not implement {name}.", "Without it the run cannot go on: see docs/hooks.md.")
        chosen = {key for key, _ in self.list_name_plugin()}
        for key, plugin in self.list_name_plugin():
            for needed in declared(type(plugin), "requires"):
                if needed not in chosen:
                    raise PluginError(f"{_said(key)} requires {_said(needed)}.", f"Add it: {_as_argument(needed)}")
            for other in declared(type(plugin), "conflicts"):
                if other in chosen:
                    raise PluginError(f"{_said(key)} does not go with {_said(other)}.", "Drop one of the two.")

    def owners(self, hook: str) -> list[str]:
        """The keys of the plugins whose own answer a hook is, in pluggy's order; wrappers around it do not count."""
        return [impl.plugin_name for impl in getattr(self.hook, hook).get_hookimpls() if not (impl.wrapper or impl.hookwrapper)]

    def call(self, hook: str, **arguments: Any) -> Any:
        """A stage hook whose owner must answer: None is an error that names the plugin."""
        owners = self.owners(hook)
        if not owners:
            raise PluginError(f"no chosen plugin implements {hook}.", f"Chosen: {', '.join(sorted(k for k, _ in self.list_name_plugin()))}.")
        result = getattr(self.hook, hook)(**arguments)
        if result is None:
            raise PluginError(f"{_said(owners[0])} returned nothing from {hook}.", "The hook must return its result: see docs/hooks.md.")
        return result

    def implementers(self, hook: str) -> list[str]:
        """The keys of the plugins that implement a hook, in the order in which they were named; wrappers do not count."""
        answering = set(self.owners(hook))
        return [key for key, _ in self.list_name_plugin() if key in answering]

    def ask(self, key: str, hook: str, **arguments: Any) -> Any:
        """A gathering hook of one plugin, inside the wrappers of others; None if it has nothing to say."""
        answering = self.implementers(hook)
        others = [plugin for other, plugin in self.list_name_plugin() if other != key and other in answering]
        results = self.subset_hook_caller(hook, others)(**arguments)
        return results[0] if results else None

    def without(self, keys: Iterable[str]) -> Hooks:
        """The same plugins, less those of these keys."""
        fewer, left_out = Hooks(), set(keys)
        for key, plugin in self.list_name_plugin():
            if key not in left_out:
                fewer.register(plugin, name=key)
        return fewer

    def each(self, hook: str, **arguments: Any) -> Iterator[tuple[str, Any]]:
        """A gathering hook, plugin by plugin in the order they were named: (author, result). pluggy would call the last
        one first, lose the author, and lose every result to one exception."""
        for key in self.implementers(hook):
            yield key, self.ask(key, hook, **arguments)

    def _check_unknown(self, key: str, plugin: Any) -> None:
        for caller in self.get_hookcallers(plugin) or []:
            optional = all(impl.optionalhook for impl in caller.get_hookimpls() if impl.plugin is plugin)
            if not caller.has_spec() and not optional:  # optional: a hook of a newer core, see docs/hooks.md
                raise PluginError(
                    f"{_said(key)} implements an unknown hook '{caller.name}'.{did_you_mean(caller.name, hook_names())}",
                    "See docs/hooks.md for the hooks there are.",
                )

    def _two_owners(self, hook: str, owners: list[str]) -> PluginError:
        order = [key for key, _ in self.list_name_plugin()]
        first, second = sorted(owners, key=order.index)[:2]
        verb = "set" if hook == "quantization_config" else "implement"
        said = [declared(type(self.get_plugin(key)), "owns").get(hook) for key in (first, second)]
        remedy = next((text for text in said if text), "Name only one of the two.")
        return PluginError(f"{_said(first)} and {_said(second)} both {verb} {hook}.", remedy)


def hook_names() -> list[str]:
    """Every hook, in the order of hookspecs.py."""
    return [name for name, member in vars(hookspecs).items() if hasattr(member, f"{PROJECT}_spec")]


def stage_hooks() -> list[str]:
    """The hooks that have at most one owner in a run."""
    return [name for name in hook_names() if getattr(getattr(hookspecs, name), f"{PROJECT}_spec")["firstresult"]]


def _check_arguments(owner: str, name: str, member: Any) -> None:
    """pluggy passes no defaulted argument as default, and keyword-only, positional-only and ** arguments fail or stay empty."""
    function = member.__func__ if isinstance(member, staticmethod | classmethod | types.MethodType) else member
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD or parameter.default is not inspect.Parameter.empty:
            raise PluginError(
                f"{owner}.{name} has an argument '{parameter}' that a hook cannot have.", "Hooks take plain arguments without defaults: see docs/hooks.md."
            )


def _said(key: str) -> str:
    stage, _, name = key.partition(":")
    return f"{stage} '{name}'"


def _as_argument(key: str) -> str:
    stage, _, name = key.partition(":")
    return f"--{stage} {name}"


def _problem(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[1:3] or lines) if lines else type(error).__name__
