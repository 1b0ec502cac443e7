"""Options: text and YAML to typed fields and back, strictly, with the exact texts of what is refused."""

from __future__ import annotations

import math
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ftx import option, plugin
from ftx.errors import OptionError
from ftx.options import Text, as_dict, build, coerce, describe, option_types, supported

Mode = Literal["fast", "slow", 3, True, None]


@plugin
class Everything:
    """One option of every kind."""

    whole: int = option(1, "A whole number.")
    number: float = option(0.5, "A number.")
    flag: bool = option(False, "Yes or no.")
    text: str = option("a", "A text.")
    mode: Mode = option("fast", "One of a few.")
    perhaps: float | None = option(None, "A number or none.")
    word_or_none: str | None = option(None, "A text or none.")
    names: list[str] = option([], "Texts.")
    sizes: list[int] = option([], "Whole numbers.")
    modules: list[str] | str = option("all-linear", "Names, or one word for many.")
    either: int | float | str = option(1, "Whatever it is.")
    args: dict[str, Any] = option({}, "More.")


def made(values: dict[str, Any]) -> Any:
    return build(Everything, values, stage="adapter", name="everything")


def text(**values: str) -> dict[str, Any]:
    return {name: Text(value) for name, value in values.items()}


# ---- text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("whole", "8", 8),
        ("whole", " -3 ", -3),
        ("number", "2e-4", 2e-4),
        ("number", "3", 3.0),
        ("flag", "true", True),
        ("flag", "No", False),
        ("text", "none", "none"),
        ("text", "8", "8"),
        ("text", "true", "true"),
        ("text", "", ""),
        ("mode", "slow", "slow"),
        ("mode", "3", 3),
        ("mode", "true", True),
        ("mode", "none", None),
        ("perhaps", "none", None),
        ("perhaps", "null", None),
        ("perhaps", "1e-3", 1e-3),
        ("word_or_none", "none", None),
        ("word_or_none", "2e-4", "2e-4"),
        ("names", "a,b", ["a", "b"]),
        ("names", "[a, 'b,c']", ["a", "b,c"]),
        ("names", "", []),
        ("names", "[]", []),
        ("names", "[1, true, 2e-4]", ["1", "true", "2e-4"]),
        ("sizes", "[1, 2]", [1, 2]),
        ("sizes", "4", [4]),
        ("modules", "all-linear", "all-linear"),
        ("modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("modules", "[all-linear]", ["all-linear"]),
        ("modules", "q_proj,v_proj", "q_proj,v_proj"),
        ("either", "1", 1),
        ("either", "1.5", 1.5),
        ("either", "one", "one"),
        ("args", "{a: 1, b: {c: no}}", {"a": 1, "b": {"c": False}}),
    ],
)
def test_text_is_read_by_the_type(name, typed, value):
    got = getattr(made(text(**{name: typed})), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "typed", "message"),
    [
        ("whole", "sixteen", "adapter.whole wants int, got 'sixteen'."),
        ("whole", "1.0", "adapter.whole wants int, got '1.0'."),
        ("whole", "", "adapter.whole wants int, got ''."),
        ("number", "fast", "adapter.number wants float, got 'fast'."),
        ("flag", "1", "adapter.flag wants bool, got '1'."),
        ("mode", "medium", "adapter.mode wants 'fast' or 'slow' or 3 or true or none, got 'medium'."),
        ("perhaps", "much", "adapter.perhaps wants float or none, got 'much'."),
        ("sizes", "[1, x]", "adapter.sizes wants int, got 'x'."),
        ("sizes", "[[1], [2]]", "adapter.sizes wants list of int, got '[[1], [2]]'."),
        ("sizes", "[1, 2", "adapter.sizes wants list of int, got '[1, 2'."),
        ("args", "many", "adapter.args wants dict, got 'many'."),
    ],
)
def test_text_that_does_not_fit(name, typed, message):
    with pytest.raises(OptionError) as error:
        made(text(**{name: typed}))
    assert error.value.problem == message and error.value.status == 2


# ---- YAML ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "written", "value"),
    [
        ("whole", "8", 8),
        ("number", "8", 8.0),
        ("number", "2e-4", 2e-4),  # PyYAML reads this as text
        ("number", "2.0e-4", 2e-4),
        ("perhaps", "null", None),
        ("perhaps", "5e-5", 5e-5),
        ("flag", "yes", True),
        ("text", "'8'", "8"),
        ("text", "2e-4", "2e-4"),
        ("word_or_none", "none", "none"),  # YAML's own none is null
        ("mode", "3", 3),
        ("mode", "true", True),
        ("names", "[a]", ["a"]),
        ("sizes", "[]", []),
        ("modules", "all-linear", "all-linear"),
        ("modules", "[all-linear]", ["all-linear"]),
        ("either", "'1'", "1"),
        ("either", "1", 1),
        ("args", "{a: {b: [1, x]}}", {"a": {"b": [1, "x"]}}),
    ],
)
def test_yaml_keeps_its_types(name, written, value):
    got = getattr(made(yaml.safe_load(f"{name}: {written}")), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("name", "written", "message"),
    [
        ("whole", "'8'", "adapter.whole wants int, got '8'."),
        ("whole", "8.0", "adapter.whole wants int, got 8.0."),
        ("whole", "true", "adapter.whole wants int, got True."),
        ("number", "true", "adapter.number wants float, got True."),
        ("flag", "'true'", "adapter.flag wants bool, got 'true'."),
        ("flag", "1", "adapter.flag wants bool, got 1."),
        ("text", "8", "adapter.text wants str, got 8."),
        ("text", "null", "adapter.text wants str, got None."),
        ("mode", "1", "adapter.mode wants 'fast' or 'slow' or 3 or true or none, got 1."),
        ("names", "a", "adapter.names wants list of str, got 'a'."),
        ("names", "[1]", "adapter.names wants str, got 1."),
        ("modules", "7", "adapter.modules wants list of str or str, got 7."),
        ("args", "[1]", "adapter.args wants dict, got [1]."),
    ],
)
def test_yaml_of_another_type(name, written, message):
    with pytest.raises(OptionError) as error:
        made(yaml.safe_load(f"{name}: {written}"))
    assert error.value.problem == message


def test_a_list_of_floats_takes_whole_numbers_from_yaml():
    assert coerce([1, 2.5], list[float], "x") == [1.0, 2.5] and type(coerce([1], list[float], "x")[0]) is float


# ---- names, mappings, what the plugin refuses ----------------------------------------------------------------------


@plugin
class LoRALike:
    """Has the options of the text in the design."""

    r: int = option(16, "Rank.")
    alpha: int = option(32, "Scale.")
    dropout: float = option(0.0, "Share.")
    target_modules: list[str] | str = option("all-linear", "Where.")

    def __post_init__(self):
        if self.r < 1:
            raise ValueError("r must lie in 1..4096, got 0.")


@plugin
class Needy:
    """Needs a model."""

    model: str = option(help="Which.")


@plugin
class Open:
    """Passes on what it does not list."""

    speed: int = option(1, "How fast.")
    more: dict[str, Any] = option({}, "Everything else.", rest=True)


@plugin
class Bare:
    """No options at all."""


@plugin
class Optional:
    """A mapping that may be none."""

    args: dict[str, Any] | None = option(None, "More.")


def test_unknown_option():
    with pytest.raises(OptionError) as error:
        build(LoRALike, {"rank": Text("8")}, stage="adapter", name="lora")
    assert str(error.value).splitlines() == [
        "adapter 'lora' has no option 'rank'. Did you mean 'r'? Options: r, alpha, dropout, target_modules.",
        "ftx plugins show adapter lora",
    ]
    with pytest.raises(OptionError, match=r"adapter 'bare' has no option 'zzz'\. Options: none\."):
        build(Bare, {"zzz": 1}, stage="adapter", name="bare")


def test_an_evaluators_options_are_named_by_its_own_name():
    with pytest.raises(OptionError) as error:
        build(Needy, {}, stage="evaluator", name="judge", key="judge")
    assert (error.value.problem, error.value.remedy) == ("evaluator 'judge' needs the option 'model'.", "-o judge.model=VALUE")
    with pytest.raises(OptionError, match=r"judge\.model wants str, got 3\."):
        build(Needy, {"model": 3}, stage="evaluator", name="judge", key="judge")
    with pytest.raises(OptionError) as error:
        build(Needy, {"modle": "x"}, stage="evaluator", name="judge", key="judge")
    assert error.value.remedy == "ftx plugins show evaluator judge"


def test_what_the_plugin_refuses_keeps_its_words():
    with pytest.raises(OptionError) as error:
        build(LoRALike, {"r": 0}, stage="adapter", name="lora")
    assert error.value.problem == "adapter 'lora': r must lie in 1..4096, got 0."


def test_a_mapping_is_filled_name_by_name():
    given = {"args": {"a": 1, "b": 2}}
    plugin = made({**given, "args.b": Text("3"), "args.c.d": Text("x")})
    assert plugin.args == {"a": 1, "b": "3", "c.d": "x"}
    assert given == {"args": {"a": 1, "b": 2}}, "the recipe's own mapping must stay as it was"
    assert build(Optional, {"args": None, "args.a": Text("1")}, stage="trainer", name="o").args == {"a": "1"}


def test_a_rest_option_takes_what_nobody_lists():
    given = {"more": {"a": 1}}
    plugin = build(Open, {**given, "b": 2, "speed": Text("3")}, stage="trainer", name="open")
    assert (plugin.speed, plugin.more) == (3, {"a": 1, "b": 2}) and given == {"more": {"a": 1}}
    again = build(Open, as_dict(plugin), stage="trainer", name="open")
    assert as_dict(again) == as_dict(plugin)


def test_defaults_are_not_shared():
    first, second = made({}), made({})
    first.args["x"] = 1
    assert second.args == {}


# ---- there and back ------------------------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), max_size=12)
numbers = st.floats(allow_nan=False)
plain = st.recursive(st.none() | st.booleans() | st.integers(-(2**40), 2**40) | numbers | words, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
values = st.fixed_dictionaries(
    {},
    optional={
        "whole": st.integers(),
        "number": numbers,
        "flag": st.booleans(),
        "text": words,
        "mode": st.sampled_from(["fast", "slow", 3, True, None]),
        "perhaps": st.none() | numbers,
        "word_or_none": st.none() | words,
        "names": st.lists(words, max_size=3),
        "sizes": st.lists(st.integers(), max_size=3),
        "modules": words | st.lists(words, max_size=3),
        "either": st.integers() | numbers | words,
        "args": st.dictionaries(words, plain, max_size=3),
    },
)


@settings(max_examples=150, deadline=None)
@given(values)
def test_options_survive_yaml_and_back(given_values):
    plugin = made(given_values)
    written = yaml.safe_load(yaml.safe_dump(as_dict(plugin), allow_unicode=True))
    again = as_dict(made(written))
    assert again == as_dict(plugin)
    assert [type(value) for value in again.values()] == [type(value) for value in as_dict(plugin).values()]
    for name, value in given_values.items():
        assert getattr(plugin, name) == value


@settings(max_examples=150, deadline=None)
@given(st.integers(), numbers, st.lists(st.from_regex(r"[a-z_]+(\.[a-z]+)?", fullmatch=True), max_size=3))
def test_what_is_typed_is_what_is_meant(whole, number, names):
    plugin = made(text(whole=str(whole), number=repr(number), names=f"[{', '.join(names)}]"))
    assert plugin.whole == whole and math.isclose(plugin.number, number, rel_tol=0) and plugin.names == names


# ---- words for types -----------------------------------------------------------------------------------------------


def test_types_in_words():
    said = {name: describe(annotation) for name, annotation in option_types(Everything).items()}
    assert said["whole"] == "int" and said["perhaps"] == "float or none" and said["modules"] == "list of str or str"
    assert said["mode"] == "'fast' or 'slow' or 3 or true or none" and said["args"] == "dict"
    assert all(supported(annotation) for annotation in option_types(Everything).values())
    assert not supported(set[str]) and not supported(complex) and not supported(list[set[str]])
