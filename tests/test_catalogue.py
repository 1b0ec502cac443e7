"""Installed plugins: found without importing them, told apart, and each broken one refused by its own name."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata

import pytest
from shelf import GOOD, install, points_in

from ftx import __version__
from ftx.catalogue import KINDS, Catalogue
from ftx.errors import PluginError


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder on the module path whose modules are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def catalogue(*folders) -> Catalogue:
    return Catalogue(points_in(*folders))


def refusal(found: Catalogue, stage: str, name: str) -> list[str]:
    with pytest.raises(PluginError) as error:
        found.load(stage, name)
    assert error.value.status == 2
    return [error.value.problem, error.value.remedy]


# ---- finding -------------------------------------------------------------------------------------------------------


def test_metadata_is_enough_to_list(place):
    install(place, "acme-lora", {"adapter:lora": "acme_lora:LoRA", "evaluator:judge": "acme_lora:Judge"}, acme_lora="raise RuntimeError")
    found = catalogue(place)
    assert [(e.stage, e.name, e.distribution, e.version, e.summary, e.location) for e in found.entries] == [
        ("adapter", "lora", "acme-lora", "1.0", "A test.", str(place)),
        ("evaluator", "judge", "acme-lora", "1.0", "A test.", str(place)),
    ]
    assert "acme_lora" not in sys.modules


def test_only_the_named_module_is_imported(place):
    install(place, "good", {"adapter:good": "good_one:Good"}, good_one=GOOD.format(name="Good"))
    install(place, "other", {"adapter:other": "other_one:Other"}, other_one=GOOD.format(name="Other"))
    cls = catalogue(place).load("adapter", "good")
    assert cls.__name__ == "Good" and "other_one" not in sys.modules


def test_other_groups_are_not_plugins(place):
    info = install(place, "mixed", {"adapter:mine": "mixed:Mine"})
    (info / "entry_points.txt").write_text("[ftx.adapter]\nmine = m:M\n[ftx.model]\nsmall = m:f\n[ftx.nothing]\nx = m:X\n[console_scripts]\ny = m:y\n")
    assert [(e.stage, e.name) for e in catalogue(place).entries] == [("adapter", "mine")]


def test_the_order_is_that_of_the_stages_then_names(place):
    install(place, "many", {"observer:a": "m:A", "adapter:z": "m:Z", "adapter:b": "m:B", "formatter:q": "m:Q"})
    assert [(e.stage, e.name) for e in catalogue(place).entries] == [("formatter", "q"), ("adapter", "b"), ("adapter", "z"), ("observer", "a")]


def test_an_unknown_name(place):
    install(place, "some", {f"adapter:{name}": "m:M" for name in ("full", "lora", "dora", "qlora")})
    found = catalogue(place)
    assert refusal(found, "adapter", "qlroa") == ["no adapter is called 'qlroa'. Did you mean 'qlora'?", "Installed: dora, full, lora, qlora."]
    assert refusal(found, "adapter", "zzz") == ["no adapter is called 'zzz'.", "Installed: dora, full, lora, qlora."]
    assert refusal(found, "quantizer", "nf4") == ["no quantizer is called 'nf4'.", "No quantizer is installed: pip install one."]


# ---- the same name more than once ----------------------------------------------------------------------------------


def test_two_plugins_of_one_name_are_refused_by_name(place):
    before = set(sys.modules)
    install(place, "ftx-lora", {"adapter:lora": "ftx_lora:LoRA"}, version="0.1.0")
    install(place, "between", {"adapter:middle": "between:Middle"})
    install(place, "acme-lora", {"adapter:lora": "acme.lora:LoRA"}, version="2.0")
    points = sorted(points_in(place), key=lambda point: ["ftx-lora", "between", "acme-lora"].index(point.dist.metadata["Name"]))
    for order in (points, points[::-1], [points[0], points[2], points[1]]):
        problem, remedy = refusal(Catalogue(order), "adapter", "lora")
        assert problem == "two adapters are called 'lora': ftx-lora 0.1.0 (ftx_lora:LoRA) and acme-lora 2.0 (acme.lora:LoRA)."
        assert remedy == "Uninstall one, or name the class: --adapter acme.lora:LoRA"
    assert not {"ftx_lora", "acme"} & (set(sys.modules) - before), "neither was imported"


def test_the_way_out_of_two_of_one_name_works(place):
    install(place, "first", {"adapter:good": "good_a:Good"}, good_a=GOOD.format(name="Good"))
    install(place, "second", {"adapter:good": "good_b:Good"}, good_b=GOOD.format(name="Good"))
    found = catalogue(place)
    assert "two adapters" in refusal(found, "adapter", "good")[0]
    assert found.load("adapter", "good_b:Good").__module__ == "good_b"
    install(place, "third", {"adapter:good": "good_c:Good"})
    assert refusal(catalogue(place), "adapter", "good")[0].startswith("3 adapters are called 'good': ")


def test_the_same_name_in_two_stages_is_fine(place):
    install(place, "both", {"quantizer:int8": "good_a:Good", "exporter:int8": "good_a:Good"}, good_a=GOOD.format(name="Good"))
    assert catalogue(place).load("exporter", "int8") is catalogue(place).load("quantizer", "int8")


def test_one_distribution_listed_twice_is_one(place):
    """An editable install leaves a second metadata directory; lib64 may be a link to lib."""
    points = {"adapter:good": "good_a:Good"}
    install(place / "a", "some-plugin", points)
    install(place / "b", "some_plugin", points)
    install(place / "c", "Some.Plugin", points, version="1.1")
    install(place, "modules", {}, good_a=GOOD.format(name="Good"))
    found = catalogue(place / "a", place / "b", place / "a", place / "c")
    assert [entry.name for entry in found.entries] == ["good"] and found.load("adapter", "good").__name__ == "Good"


# ---- broken ones, each by its own name -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "why", "remedy"),
    [
        ("import not_there_at_all", "No module named 'not_there_at_all'", "pip install not_there_at_all, or see it all with --traceback."),
        ("import not_there.deeper", "No module named 'not_there'", "pip install not_there, or see it all with --traceback."),
        ("raise RuntimeError('no luck\\nat all')", "no luck", "See it all with --traceback."),
        ("raise RuntimeError", "RuntimeError", "See it all with --traceback."),
        ("raise AssertionError('never')", "never", "See it all with --traceback."),
        ("raise AttributeError('half')", "half", "See it all with --traceback."),
        ("import sys; sys.exit(3)", "it ends the program on import (SystemExit: 3)", "See it all with --traceback."),
        ("def broken(:", "invalid syntax (broken_one.py, line 1)", "See it all with --traceback."),
        ("from ftx import nothing", "cannot import name 'nothing' from 'ftx'", "See it all with --traceback."),
        ("x = 1", "module 'broken_one' has no attribute 'Plugin'", "See it all with --traceback."),
    ],
)
def test_a_module_that_does_not_import(place, module, why, remedy):
    install(place, "ftx-broken", {"adapter:broken": "broken_one:Plugin"}, version="0.1.0", broken_one=module)
    problem, said = refusal(catalogue(place), "adapter", "broken")
    assert problem.startswith(f"adapter 'broken' (ftx-broken 0.1.0) could not be loaded: {why}") and said == remedy


def test_a_module_that_is_gone(place):
    install(place, "ftx-gone", {"adapter:gone": "gone_one:Plugin"})
    assert refusal(catalogue(place), "adapter", "gone") == [
        "adapter 'gone' (ftx-gone 1.0) could not be loaded: No module named 'gone_one'",
        "Install it again: pip install --force-reinstall ftx-gone",
    ]


@pytest.mark.parametrize("value", ["my-module:Class", "module::Class", "module:", ":Class", "module:Class()", "module.py:Class:more"])
def test_a_malformed_value(place, value):
    install(place, "ftx-odd", {"adapter:odd": value})
    assert refusal(catalogue(place), "adapter", "odd")[0] == (
        f"adapter 'odd' (ftx-odd 1.0) could not be loaded: its entry point '{value}' is not of the form module:Class"
    )


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("class Plugin: ...", "a class without @plugin"),
        ("def Plugin(): ...", "a function, not a class"),
        ("from ftx import plugin\n@plugin\nclass Base: ...\nclass Plugin(Base): ...", "a class without @plugin"),
        ("from ftx import plugin\n@plugin\nclass Base: ...\nPlugin = Base()", "a Base, not a class"),
        ("import dataclasses\n@dataclasses.dataclass\nclass Base: ...\nPlugin = {}", "a dict, not a class"),
    ],
)
def test_something_that_is_no_plugin(place, body, what):
    install(place, "ftx-odd", {"adapter:odd": "odd_one:Plugin"}, odd_one=body)
    assert refusal(catalogue(place), "adapter", "odd") == [
        f"adapter 'odd' (ftx-odd 1.0): odd_one:Plugin is {what}.",
        "Decorate the class with @ftx.plugin and name it in the entry point.",
    ]


def test_an_entry_point_that_names_a_module_only(place):
    install(place, "ftx-odd", {"adapter:odd": "odd_one"}, odd_one="x = 1")
    assert refusal(catalogue(place), "adapter", "odd")[0] == "adapter 'odd' (ftx-odd 1.0): odd_one is a module, not a class."


@pytest.mark.parametrize(
    ("requirement", "fits"),
    [
        ("ftx-core>=9", False),
        ("ftx_core>=0.1,<0.1", False),
        ("FTX.Core==99", False),
        ("ftx-core>=0.1,<0.2", True),
        ("ftx-core[testing]>=9; extra == 'test'", True),
        ("ftx-core>=9; python_version < '3'", True),
        ("not a requirement at all ???", True),
        ("other>=9", True),
    ],
)
def test_a_plugin_for_another_core(place, requirement, fits):
    install(place, "ftx-new", {"adapter:new": "new_one:New"}, requires=(requirement,), new_one=GOOD.format(name="New"))
    found = catalogue(place)
    if fits:
        assert found.load("adapter", "new").__name__ == "New"
    else:
        problem, remedy = refusal(found, "adapter", "new")
        assert problem.startswith("adapter 'new' (ftx-new 1.0) needs ftx-core") and problem.endswith(f", this is ftx-core {__version__}.")
        assert remedy == "pip install -U ftx-core ftx-new" and "new_one" not in sys.modules


def test_metadata_that_cannot_be_read_costs_only_its_own(place):
    install(place, "good", {"adapter:good": "good_a:Good"}, good_a=GOOD.format(name="Good"))
    (install(place, "latin", {"adapter:latin": "latin_a:L"}) / "METADATA").write_bytes(b"Name: l\xe4tin\nVersion: 1\n")
    (install(place, "empty", {"adapter:empty": "empty_a:E"}) / "METADATA").unlink()
    found = catalogue(place)
    assert found.names("adapter") == ["empty", "good", "latin"] and found.load("adapter", "good").__name__ == "Good"
    assert found.find("adapter", "empty").location == str(place), "the listing says where it lies"


def test_an_entry_points_file_that_cannot_be_read_costs_only_its_own(place):
    install(place, "good", {"adapter:good_here": "good_a:Good"}, good_a=GOOD.format(name="Good"))
    (install(place, "torn", {}) / "entry_points.txt").write_text("[ftx.adapter]\nno equals sign here\n")
    names = Catalogue().names("adapter")
    assert "good_here" in names and "torn" not in names


# ---- a class that is not packaged ----------------------------------------------------------------------------------


def test_module_colon_class(place):
    install(place, "modules", {}, by_hand=GOOD.format(name="Sparse") + "\nclass Plain: ...\n")
    found = Catalogue([])
    assert found.load("adapter", "by_hand:Sparse").__name__ == "Sparse"
    assert refusal(found, "adapter", "by_hand:Nothing")[0] == ("adapter 'by_hand:Nothing' could not be loaded: module 'by_hand' has no attribute 'Nothing'")
    assert refusal(found, "adapter", "by_hand:Plain")[0] == "adapter 'by_hand:Plain' (not packaged): by_hand:Plain is a class without @plugin."
    assert refusal(found, "adapter", "no_such:Class") == [
        "adapter 'no_such:Class' could not be loaded: No module named 'no_such'",
        "The module must lie here or be installed.",
    ]


def test_a_class_in_the_current_directory(tmp_path, process, monkeypatch):
    (tmp_path / "beside_me.py").write_text(GOOD.format(name="Mine"))
    monkeypatch.chdir(tmp_path)
    done = process("plugins", "show", "adapter", "beside_me:Mine")
    assert done.returncode == 0 and done.stdout.startswith("adapter beside_me:Mine (beside_me:Mine)\nThe plugin Mine.\n"), done.stderr


# ---- stevedore without its cache -----------------------------------------------------------------------------------


def test_four_cold_starts_at_once_write_no_cache(tmp_path):
    install(tmp_path / "here", "good", {"adapter:good": "good_a:Good"}, good_a=GOOD.format(name="Good"))
    home = tmp_path / "home"
    home.mkdir()
    env = {**os.environ, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache"), "PYTHONPATH": str(tmp_path / "here"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "ftx", "plugins", "show", "adapter", "good"]
    running = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    ended = [(*one.communicate(timeout=60), one.returncode) for one in running]
    assert all(status == 0 and "adapter good (good 1.0)" in out for out, _, status in ended), ended
    assert [str(file) for file in home.rglob("*")] == [], "stevedore's cache of entry points is written by several processes at once"


def test_a_plugin_that_comes_or_goes_is_seen_at_once(tmp_path, process):
    path = {"PYTHONPATH": str(tmp_path)}
    assert process("plugins", "show", "adapter", "late", **path).returncode == 2
    info = install(tmp_path, "late", {"adapter:late": "late_one:Late"}, late_one=GOOD.format(name="Late"))
    assert process("plugins", "show", "adapter", "late", **path).returncode == 0
    (info / "entry_points.txt").unlink()
    assert process("plugins", "show", "adapter", "late", **path).returncode == 2


def test_the_scan_finds_what_is_installed_here():
    installed = {(e.stage, e.name) for e in Catalogue().entries}
    wanted = {(kind, point.name) for kind in KINDS for point in metadata.entry_points(group=f"ftx.{kind}")}
    assert installed == wanted and ("trainer", "sft") in installed
