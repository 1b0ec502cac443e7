"""What @plugin makes of a class, and what it refuses."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import ftx
from ftx import hookimpl, option, plugin
from ftx.authoring import declared, is_plugin


@plugin
class Parent:
    """Scales."""

    accepts = ("text",)

    scale: int = option(2, "How much.")
    names: list[str] = option([], "Which.")

    @hookimpl
    def merge_adapted(self, model, run):
        return model * self.scale


def test_a_plugin_is_a_frozen_dataclass_of_keywords_compared_by_identity():
    made = Parent(scale=3)
    assert dataclasses.is_dataclass(made) and made.scale == 3 and [field.name for field in dataclasses.fields(made)] == ["scale", "names"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.scale = 4
    with pytest.raises(TypeError):
        Parent(3)
    assert Parent() != Parent() and len({Parent(), Parent()}) == 2, "pluggy keeps plugins in sets"


def test_options_carry_their_help():
    (scale, names) = dataclasses.fields(Parent)
    assert scale.metadata["help"] == "How much." and scale.default == 2
    assert names.default_factory() == [] and Parent().names is not Parent().names


def test_a_subclass_inherits_options_hooks_and_declarations():
    @plugin
    class Child(Parent):
        """Scales and adds."""

        more: int = option(1, "How much more.")

        @hookimpl
        def merge_adapted(self, model, run):
            return super().merge_adapted(model, run) + self.more

    assert Child(scale=5, more=7).merge_adapted(2, None) == 17
    assert declared(Child, "accepts") == ("text",) and declared(Child, "requires") == () and declared(Child, "suggests") == {}


def test_a_subclass_without_the_decorator_is_no_plugin():
    class Forgot(Parent):
        more: int = option(1, "How much more.")

    assert is_plugin(Parent) and not is_plugin(Forgot) and not is_plugin(Parent()) and not is_plugin(dict) and not is_plugin(None)
    assert isinstance(Forgot().more, dataclasses.Field), "the trap: the option is a Field object"


@pytest.mark.parametrize("name", ["accepts", "produces", "conflicts", "requires", "suggests", "owns"])
def test_a_declaration_with_an_annotation_would_be_an_option(name):
    body = {"__annotations__": {name: tuple}, name: option((), "x"), "__module__": __name__}
    with pytest.raises(TypeError, match=rf"^Some\.{name} must have no annotation: with one it would be an option$"):
        plugin(type("Some", (), body))


def test_a_declaration_must_not_be_a_bare_text():
    with pytest.raises(TypeError, match=r"^Some\.requires must be a tuple of texts, not a text$"):

        @plugin
        class Some:
            requires = "quantizer:nf4"


def test_an_option_without_option_has_no_help():
    with pytest.raises(TypeError, match=r"^Some\.r must be declared with option\(default, 'help'\)$"):

        @plugin
        class Some:
            r: int = 8


def test_an_option_without_a_type_is_refused():
    with pytest.raises(TypeError, match="no type annotation"):

        @plugin
        class Some:
            r = option(8, "Rank.")


def test_an_option_cannot_be_called_name():
    with pytest.raises(TypeError, match="must not have an option called 'name'"):

        @plugin
        class Some:
            name: str = option("x", "A name.")


def test_an_option_without_a_default_is_required():
    @plugin
    class Some:
        path: str = option(help="Where.")

    assert Some(path="x").path == "x"
    with pytest.raises(TypeError, match="path"):
        Some()


def test_cached_properties_work_on_a_frozen_plugin():
    from functools import cached_property

    @plugin
    class Some:
        r: int = option(2, "Rank.")

        @cached_property
        def square(self) -> Any:
            return self.r**2

    made = Some(r=3)
    assert made.square == 9 and made.square == 9


def test_every_public_name_loads():
    for name in ftx.__all__:
        assert getattr(ftx, name) is not None
    with pytest.raises(AttributeError, match="module 'ftx' has no attribute 'nothing'"):
        _ = ftx.nothing


def test_no_module_has_the_name_of_a_public_object():
    from pathlib import Path

    modules = {file.stem for file in Path(ftx.__file__).parent.iterdir()}
    assert not modules & set(ftx.__all__), "`from ftx import plugin` would give the module"
