"""The plugins of one run: what is refused before anything loads, and how hooks are called."""

from __future__ import annotations

from functools import cached_property, lru_cache

import pluggy
import pytest

from ftx import hookimpl, hookspecs, option, plugin
from ftx.errors import PluginError
from ftx.hooks import Hooks, hook_names, stage_hooks


def hooks_of(**plugins) -> Hooks:
    """`adapter_lora=Cls` registers Cls() as adapter:lora."""
    hooks = Hooks()
    for key, cls in plugins.items():
        stage, _, name = key.partition("_")
        hooks.add(cls(), stage, name)
    return hooks


def refusal(**plugins) -> PluginError:
    with pytest.raises(PluginError) as error:
        hooks_of(**plugins).check()
    assert error.value.status == 2 and error.value.remedy
    return error.value


@plugin
class Whole:
    """An adapter with all that it needs."""

    @hookimpl
    def adapt_model(self, model, run):
        return model

    @hookimpl
    def save_adapted(self, model, path): ...

    @hookimpl
    def load_adapted(self, base):
        return base


# ---- what check() and add() refuse ---------------------------------------------------------------------------------


def test_an_unknown_hook():
    @plugin
    class Typo:
        @hookimpl
        def adpt_model(self, model): ...

    error = refusal(observer_typo=Typo)
    assert error.problem == "observer 'typo' implements an unknown hook 'adpt_model'. Did you mean 'adapt_model'?"
    assert error.remedy == "See docs/hooks.md for the hooks there are."


def test_an_optional_hook_of_a_newer_core_is_let_be():
    @plugin
    class Newer:
        @hookimpl(optionalhook=True)
        def model_warmed_up(self, model): ...

    hooks_of(observer_newer=Newer).check()


def test_a_method_named_like_a_hook_but_unmarked():
    @plugin
    class Forgot:
        def adapt_model(self, model): ...

    error = refusal(adapter_forgot=Forgot)
    assert error.problem == "Forgot.adapt_model looks like a hook but is not marked @hookimpl."
    assert error.remedy == "Mark it, or give the method another name."


@pytest.mark.parametrize("wrap", [staticmethod, classmethod])
def test_unmarked_static_and_class_methods_are_found_too(wrap):
    body = {"preflight": wrap(lambda *_: None), "__module__": __name__}
    assert "looks like a hook" in refusal(observer_x=plugin(type("Odd", (), body))).problem


def test_a_mark_on_something_that_is_no_plain_method():
    @plugin
    class Cached:
        @hookimpl
        @lru_cache  # noqa: B019
        def preflight(self, run): ...

    assert refusal(observer_cached=Cached).problem == "Cached.preflight is marked @hookimpl but is no plain method."


def test_names_of_the_hookspec_module_are_free():
    @plugin
    class Helper:
        def hookspec(self): ...
        def Path(self): ...

    hooks_of(observer_helper=Helper).check()


def test_an_argument_that_the_hook_does_not_have():
    @plugin
    class Wrong:
        @hookimpl
        def adapt_model(self, modle, run): ...

    error = refusal(adapter_wrong=Wrong)
    assert error.problem.startswith("adapter 'wrong' does not fit its hooks: ") and "modle" in error.problem
    assert error.remedy == "See docs/hooks.md for the arguments of each hook."


@pytest.mark.parametrize(
    ("signature", "said"),
    [
        ("self, model, run=None", "run=None"),
        ("self, model, *, run", "run"),
        ("self, model, **more", "**more"),
        ("self, *everything", "*everything"),
        ("self, model, /, run", "self"),
    ],
)
def test_arguments_that_pluggy_would_not_fill(signature, said):
    space: dict = {}
    exec(f"def adapt_model({signature}): ...", space)
    odd = plugin(type("Odd", (), {"adapt_model": hookimpl(space["adapt_model"]), "__module__": __name__}))
    error = refusal(adapter_odd=odd)
    assert error.problem == f"Odd.adapt_model has an argument '{said}' that a hook cannot have."
    assert error.remedy == "Hooks take plain arguments without defaults: see docs/hooks.md."


def test_two_owners_with_the_way_out_that_one_of_them_knows():
    @plugin
    class Int8:
        @hookimpl
        def quantization_config(self): ...

    @plugin
    class QLoRA(Whole):
        owns = {"quantization_config": "qlora brings its own 4-bit base: drop --quantizer, or use --adapter lora."}

        @hookimpl
        def quantization_config(self): ...

    assert str(refusal(quantizer_int8=Int8, adapter_qlora=QLoRA)).splitlines() == [
        "quantizer 'int8' and adapter 'qlora' both set quantization_config.",
        "qlora brings its own 4-bit base: drop --quantizer, or use --adapter lora.",
    ]


def test_two_owners_of_another_hook():
    assert str(refusal(adapter_a=Whole, observer_b=Whole)).splitlines() == [
        "adapter 'a' and observer 'b' both implement adapt_model.",
        "Name only one of the two.",
    ]


def test_a_wrapper_around_a_stage_hook_is_no_owner():
    @plugin
    class Watching:
        @hookimpl(wrapper=True)
        def adapt_model(self, model, run):
            return (yield) + 1

    hooks = hooks_of(adapter_whole=Whole, observer_watching=Watching)
    hooks.check()
    assert hooks.owners("adapt_model") == ["adapter:whole"]
    assert hooks.call("adapt_model", model=1, run=None) == 2


@pytest.mark.parametrize(
    ("stage", "missing"), [("formatter", "format_dataset"), ("adapter", "adapt_model"), ("trainer", "encode_dataset"), ("evaluator", "evaluate_model")]
)
def test_a_plugin_that_does_not_do_what_its_stage_is_for(stage, missing):
    @plugin
    class Idle:
        @hookimpl
        def run_started(self): ...

    assert refusal(**{f"{stage}_idle": Idle}).problem == f"{stage} 'idle' does not implement {missing}."


def test_requires_and_conflicts():
    @plugin
    class Needing:
        requires = ("quantizer:nf4",)

    @plugin
    class Hating:
        conflicts = ("observer:x",)

    @plugin
    class Plain:
        """Nothing."""

    assert str(refusal(observer_needing=Needing)).splitlines() == ["observer 'needing' requires quantizer 'nf4'.", "Add it: --quantizer nf4"]
    hooks_of(observer_needing=Needing, quantizer_nf4=Plain).check()
    assert str(refusal(observer_hating=Hating, observer_x=Plain)).splitlines() == ["observer 'hating' does not go with observer 'x'.", "Drop one of the two."]
    hooks_of(observer_hating=Hating, observer_y=Plain).check()


def test_a_name_twice_and_the_same_name_in_two_stages():
    @plugin
    class Plain:
        """Nothing."""

    hooks = hooks_of(observer_x=Plain, quantizer_x=Plain)
    with pytest.raises(PluginError, match=r"observer 'x' is named twice\."):
        hooks.add(Plain(), "observer", "x")


def test_properties_are_never_run():
    @plugin
    class Lazy:
        @property
        def preflight(self):
            raise AssertionError("a property was run")

        @cached_property
        def adapt_model(self):
            raise AssertionError("a cached property was run")

        r: int = option(1, "Rank.")

    hooks_of(observer_lazy=Lazy).check()


# ---- calling -------------------------------------------------------------------------------------------------------


def test_none_from_a_stage_hook_names_the_plugin():
    @plugin
    class Empty(Whole):
        @hookimpl
        def adapt_model(self, model): ...

    with pytest.raises(PluginError) as error:
        hooks_of(adapter_empty=Empty).call("adapt_model", model=1, run=None)
    assert str(error.value).splitlines() == ["adapter 'empty' returned nothing from adapt_model.", "The hook must return its result: see docs/hooks.md."]
    with pytest.raises(PluginError, match=r"no chosen plugin implements merge_adapted\."):
        hooks_of(adapter_whole=Whole).call("merge_adapted", model=1, run=None)
    assert hooks_of(adapter_whole=Whole).hook.quantization_config(run=None) is None


def saying(answer, *, raises: bool = False):
    @plugin
    class Saying:
        @hookimpl
        def preflight(self, run):
            if raises:
                raise OSError(answer)
            return answer

    return Saying


def test_each_goes_in_the_order_of_naming_and_keeps_the_authors():
    hooks = hooks_of(observer_b=saying(["b"]), observer_a=saying(["a"]), observer_silent=Whole, observer_c=saying(None))
    assert list(hooks.each("preflight", run=None)) == [("observer:b", ["b"]), ("observer:a", ["a"]), ("observer:c", None)]
    assert hooks.implementers("preflight") == ["observer:b", "observer:a", "observer:c"]


def test_one_that_raises_does_not_cost_what_came_before():
    hooks = hooks_of(observer_a=saying(["a"]), observer_b=saying("no disk", raises=True))
    asked = hooks.each("preflight", run=None)
    assert next(asked) == ("observer:a", ["a"])
    with pytest.raises(OSError, match="no disk"):
        next(asked)


def test_a_wrapper_around_a_gathering_hook_wraps_every_answer_and_is_not_asked():
    @plugin
    class Shouting:
        @hookimpl(wrapper=True)
        def preflight(self, run):
            return [[text.upper() for text in found] for found in (yield)]

    hooks = hooks_of(observer_a=saying(["a"]), observer_w=Shouting, observer_b=saying(["b"]))
    assert list(hooks.each("preflight", run=None)) == [("observer:a", ["A"]), ("observer:b", ["B"])]


def test_each_run_has_its_own_hooks():
    first, second = hooks_of(adapter_whole=Whole), Hooks()
    assert first.has_plugin("adapter:whole") and not second.has_plugin("adapter:whole")
    assert isinstance(first, pluggy.PluginManager)


# ---- the page of hooks ---------------------------------------------------------------------------------------------


def test_every_hook_has_words_and_run_comes_last():
    import inspect

    for name in hook_names():
        spec = getattr(hookspecs, name)
        arguments = list(inspect.signature(spec).parameters)
        assert (spec.__doc__ or "").strip(), f"{name} has no docstring"
        assert "run" not in arguments[:-1] or name in ("run_finished", "run_failed"), f"{name}: run comes last"
        assert all(p.default is inspect.Parameter.empty for p in inspect.signature(spec).parameters.values()), name


def test_stage_hooks_are_those_of_the_design():
    assert set(stage_hooks()) == {
        *("format_dataset", "quantization_config", "base_dtype", "adapt_model", "save_adapted", "load_adapted", "merge_adapted", "adapter_off"),
        *("unformat_row", "encode_dataset", "make_trainer", "exported_form", "export_model", "read_exported"),
    }
