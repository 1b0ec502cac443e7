"""What every plugin must keep, whatever its stage: it is installed, light, described, and its hooks can be called."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, ClassVar

import pytest
import yaml

from ftx.authoring import declared, is_plugin, suggestions
from ftx.catalogue import STAGES, Catalogue
from ftx.data import ROW_TYPES
from ftx.errors import OptionError
from ftx.hooks import Hooks
from ftx.options import as_dict, build, coerce, describe, fields, option_types, supported
from ftx.recipe import Choice, Recipe, to_yaml
from ftx.run import Run

#: What importing a plugin must not load: together they take seconds, and a refused run needs none of them.
HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "evaluate", "accelerate")


class Contract:
    """Subclass the contract of your stage in a test file, and name your class.

    `plugin`: the class. `options`: the options to examine it with, one test each. `packaged = False`: the class has no
    entry point (an example in a test file). Whatever stands in the plugin's own unannotated class attribute `exam`, a
    dict of the contract's attributes, holds unless the test class says otherwise; `ftx plugins check` knows only that.
    A standard test may be overridden only by one that is marked `pytest.mark.xfail(reason=...)`.
    """

    stage: ClassVar[str]
    plugin: ClassVar[type[Any]]
    options: ClassVar[list[dict[str, Any]]] = [{}]
    packaged: ClassVar[bool] = True
    #: The hooks that a plugin of the stage cannot do without.
    needs: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        for name, value in getattr(vars(cls).get("plugin"), "exam", {}).items():
            if name not in vars(cls):
                setattr(cls, name, value)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test for each of `options`."""
        if "given" in metafunc.fixturenames:
            metafunc.parametrize("given", self.options, ids=[_label(one) for one in self.options])

    # ---- for the contracts of the stages ---------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The entry point's name, or the class's for one that is not packaged."""
        return next(iter(entry_names(self.stage, self.plugin)), self.plugin.__name__.lower())

    def choice(self, given: dict[str, Any]) -> Choice:
        """The plugin with all its options, as a resolved recipe has it."""
        return Choice(self.name, as_dict(self.build(given)))

    def build(self, given: dict[str, Any]) -> Any:
        """The plugin with options as from YAML."""
        return build(self.plugin, dict(given), stage=self.stage, name=self.name)

    def hooks(self, given: dict[str, Any]) -> Hooks:
        """The plugin alone, ready to be called."""
        hooks = Hooks()
        hooks.add(self.build(given), self.stage, self.name)
        return hooks

    def skip_if_refused(self, hooks: Hooks, run: Run) -> None:
        """A plugin that says in preflight why it cannot work here need not work here."""
        reasons = [reason for _, found in hooks.each("preflight", run=run) for reason in found or []]
        assert all(isinstance(reason, str) and reason.strip() for reason in reasons), "preflight must return a list of texts"
        if reasons:
            pytest.skip(f"preflight refuses: {'; '.join(reasons)}")

    # ---- the standard tests ----------------------------------------------------------------------------------------

    def test_nothing_was_removed(self) -> None:
        """A standard test is overridden only where it is marked xfail with a reason."""
        for name in dir(type(self)):
            home = next((c for c in type(self).__mro__ if name in vars(c) and c.__module__.startswith("ftx.testing.")), None)
            if home is None or not name.startswith("test_"):
                continue
            mine = getattr(type(self), name)
            marks = getattr(mine, "pytestmark", [])
            excused = any(mark.name == "xfail" and mark.kwargs.get("reason") for mark in marks)
            assert mine is vars(home)[name] or excused, f"{name} is a standard test: override it only marked with pytest.mark.xfail(reason=...)"

    def test_it_is_installed(self) -> None:
        """An entry point of the stage's group leads to the class."""
        if not self.packaged:
            pytest.skip("not packaged: a class without an entry point")
        value = f"{self.plugin.__module__}:{self.plugin.__qualname__}"
        names = entry_names(self.stage, self.plugin)
        assert names, f'no entry point in the group ftx.{self.stage} leads to "{value}": is the distribution installed (pip install -e .)?'
        assert Catalogue().load(self.stage, names[0]) is self.plugin, f"the {self.stage} '{names[0]}' is another class"

    def test_its_import_is_light(self) -> None:
        """Importing the module loads no machine-learning library."""
        if not self.packaged:
            pytest.skip("not packaged: its module is a test's own")
        code = f"import sys, importlib; importlib.import_module({self.plugin.__module__!r}); print(*(n for n in {HEAVY!r} if n in sys.modules))"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"importing {self.plugin.__module__} fails:\n{result.stderr}"
        assert not result.stdout.split(), f"importing {self.plugin.__module__} loads {', '.join(result.stdout.split())}: import them inside the hooks"

    def test_it_is_a_plugin(self) -> None:
        """@plugin decorates the class itself, and the docstring's first line says what it is."""
        assert is_plugin(self.plugin), f"decorate {self.plugin.__name__} itself with @ftx.plugin (a base class's does not count)"
        doc = vars(self.plugin).get("__doc__") or ""
        # dataclass writes the signature where there is no docstring
        assert doc.strip() and not doc.startswith(f"{self.plugin.__name__}("), f"{self.plugin.__name__} needs a docstring: its first line says what it is"
        assert doc.splitlines()[0].strip(), f"{self.plugin.__name__}'s docstring must say in its first line what it is"

    def test_its_declarations(self) -> None:
        """accepts and produces are row types, requires and conflicts are stage:name, suggests is {stage.option: value}
        or {stage:name.option: value}."""
        for what in ("accepts", "produces"):
            unknown = set(declared(self.plugin, what)) - set(ROW_TYPES)
            assert not unknown, f"{what}: {', '.join(sorted(unknown))} is no row type; there are {', '.join(ROW_TYPES)}"
        for what in ("requires", "conflicts"):
            assert not isinstance(declared(self.plugin, what), str), f"{what} must be a tuple of texts"
            for key in declared(self.plugin, what):
                assert key.partition(":")[0] in STAGES and key.partition(":")[2], f"{what}: '{key}' is not of the form stage:name"
        for path in suggestions(self.plugin):
            assert path.partition(".")[0].partition(":")[0] in STAGES and path.partition(".")[2], f"suggests: '{path}' is not of the form stage.option"

    def test_its_options(self) -> None:
        """Every option has a type that YAML and the command line can give, a default of that type or none, and help."""
        types = option_types(self.plugin)
        for name, field in fields(self.plugin).items():
            assert supported(types[name]), f"{name}: options cannot have the type {types[name]}"
            assert field.metadata.get("help", "").strip(), f"{name} has no help"
            required = field.default is field.default_factory  # both are MISSING
            default = None if required else field.default_factory() if callable(field.default_factory) else field.default
            try:
                assert required or coerce(default, types[name], name) == default, f"{name}: its default {default!r} is not {describe(types[name])}"
            except OptionError as error:
                raise AssertionError(f"{name}: its default {default!r} is not {describe(types[name])}") from error

    def test_its_options_survive_yaml(self, given: dict[str, Any]) -> None:
        """A written recipe gives the same plugin again."""
        before = as_dict(self.build(given))
        # any single stage of a recipe writes options in the same way
        written = yaml.safe_load(to_yaml(Recipe(adapter=Choice(self.name, before))))["adapter"]
        after = as_dict(self.build({key: value for key, value in written.items() if key != "name"}))
        assert after == before, f"options change on their way through YAML: {before} becomes {after}"
        for key in before:
            assert type(after[key]) is type(before[key]), f"{key} becomes {after[key]!r} on its way through YAML"

    def test_its_hooks(self, given: dict[str, Any]) -> None:
        """Hooks are known, marked, and take plain arguments of their specification; those of the stage are there."""
        hooks = self.hooks(given)
        mine = hooks.get_plugin(f"{self.stage}:{self.name}")
        implemented = [caller.name for caller in hooks.get_hookcallers(mine) or []]
        unknown = [name for name in implemented if not getattr(hooks.hook, name).has_spec()]
        assert not unknown, f"there is no hook called {', '.join(unknown)}: see docs/hooks.md"
        missing = [name for name in self.needs if name not in implemented]
        assert not missing, f"{self.stage}s implement {', '.join(self.needs)}; missing: {', '.join(missing)}"
        assert implemented, "it implements no hook, so it does nothing"


def entry_names(stage: str, cls: Any) -> tuple[str, ...]:
    """The names under which a class is installed in a stage; of the other plugins, only those of its own package are
    imported to see."""
    package = cls.__module__.partition(".")[0]
    near = [entry for entry in Catalogue().entries if entry.stage == stage and entry.value.partition(":")[0].partition(".")[0].strip() == package]
    return tuple(entry.name for entry in near if _loads_to(entry.point, cls))


def _loads_to(point: Any, cls: type[Any]) -> bool:
    try:
        return point.load() is cls
    except Exception:
        return False


def _label(given: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in given.items()) or "defaults"
