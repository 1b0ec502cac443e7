"""A recipe from YAML, defaults, suggestions and the command line, and back again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ftx import hookimpl, option, plugin
from ftx.catalogue import Catalogue
from ftx.errors import FtxError, OptionError, PluginError, RecipeError
from ftx.recipe import Choice, Recipe, merge, read_recipe, resolve, to_yaml
from ftx.testing import catalogue


@plugin
class Auto:
    """A formatter."""

    column: str = option("text", "Which column.")

    @hookimpl
    def format_dataset(self, dataset): ...


@plugin
class LoRA:
    """An adapter that suggests."""

    suggests = {"trainer.learning_rate": 2e-4}

    r: int = option(16, "Rank.")
    target_modules: list[str] | str = option("all-linear", "Where.")

    @hookimpl
    def adapt_model(self): ...
    @hookimpl
    def save_adapted(self): ...
    @hookimpl
    def load_adapted(self): ...


@plugin
class DoRA(LoRA):
    """An adapter that suggests something else."""

    suggests = {"trainer.learning_rate": 1e-4}


@plugin
class Full(LoRA):
    """An adapter that suggests nothing."""

    suggests = {}


@plugin
class SFT:
    """A trainer."""

    learning_rate: float = option(2e-5, "Peak.")
    max_steps: int = option(-1, "Steps.")
    args: dict[str, Any] = option({}, "More.")

    @hookimpl
    def encode_dataset(self): ...
    @hookimpl
    def make_trainer(self): ...


@plugin
class Match:
    """An evaluator."""

    limit: int | None = option(None, "Rows.")
    mode: str = option("exact", "How.")

    @hookimpl
    def evaluate_model(self): ...


@plugin
class Warmup:
    """An observer that suggests."""

    suggests = {"trainer.learning_rate": 3e-4, "trainer.unknown_to_sft": 1}


@pytest.fixture
def shelf() -> Catalogue:
    return catalogue(
        installed=False,
        formatter={"auto": Auto, "text": Auto},
        adapter={"lora": LoRA, "dora": DoRA, "full": Full},
        trainer={"sft": SFT, "dpo": SFT},
        evaluator={"match": Match, "other": Match},
        observer={"warmup": Warmup},
    )


@pytest.fixture
def write(tmp_path):
    """Write a recipe; its path."""

    def written(content: str, name: str = "recipe.yaml") -> Path:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return tmp_path / name

    return written


def plan(shelf: Catalogue, content: dict | None = None, *assignments: str, **given: Any) -> Recipe:
    return resolve(merge(content or {}, given, assignments), shelf)[0]


def again(recipe: Recipe) -> dict:
    """What a written recipe holds."""
    return yaml.safe_load(to_yaml(recipe))


# ---- what wins -----------------------------------------------------------------------------------------------------


def test_defaults(shelf):
    recipe = plan(shelf)
    assert (recipe.model, recipe.seed, recipe.dtype, recipe.device, recipe.quantizer) == ("smollm2", 42, "auto", "auto", None)
    assert [(stage, choice.name) for stage, choice in recipe.choices()] == [("formatter", "auto"), ("adapter", "lora"), ("trainer", "sft")]
    assert recipe.adapter.options == {"r": 16, "target_modules": "all-linear"}


def test_default_below_suggestion_below_recipe_below_command_line(shelf):
    assert plan(shelf, adapter="full").trainer.options["learning_rate"] == 2e-5
    assert plan(shelf).trainer.options["learning_rate"] == 2e-4
    content = {"trainer": {"name": "sft", "learning_rate": 1e-3}}
    assert plan(shelf, content).trainer.options["learning_rate"] == 1e-3
    assert plan(shelf, content, "trainer.learning_rate=5e-3").trainer.options["learning_rate"] == 5e-3
    assert plan(shelf, content, "trainer.learning_rate=5e-3", "trainer.learning_rate=6e-3").trainer.options["learning_rate"] == 6e-3
    assert plan(shelf, {"trainer": {"name": "sft", "learning_rate": 2e-5}}).trainer.options["learning_rate"] == 2e-5, "said, though it is the default"


def test_the_command_line_stands_over_the_recipes_plain_keys(shelf):
    content = {"seed": 1, "model": "a", "allow_overlap": True, "dtype": "float32"}
    recipe = merge(content, {"seed": 2, "model": None})
    assert (recipe.seed, recipe.model, recipe.allow_overlap, recipe.dtype) == (2, "a", True, "float32")
    assert merge({"seed": 7}, {"seed": 0}).seed == 0


def test_naming_another_plugin_discards_the_stages_options_the_same_keeps_them(shelf):
    content = {"adapter": {"name": "lora", "r": 4}}
    assert plan(shelf, content, adapter="lora").adapter.options["r"] == 4
    assert plan(shelf, content, adapter="dora").adapter == Choice("dora", {"r": 16, "target_modules": "all-linear"})
    assert plan(shelf, content, "adapter.r=2", adapter="dora").adapter.options["r"] == 2


def test_evaluators_and_observers_are_lists(shelf):
    content = {"evaluators": ["other", {"name": "match", "limit": 3}]}
    assert plan(shelf, content).evaluators == (Choice("other", {"limit": None, "mode": "exact"}), Choice("match", {"limit": 3, "mode": "exact"}))
    named = plan(shelf, content, evaluator=("match",))
    assert named.evaluators == (Choice("match", {"limit": 3, "mode": "exact"}),), "naming one keeps its options and drops the others"
    assert plan(shelf, content, "match.limit=5", "other.mode=none").evaluators[1].options["limit"] == 5
    assert plan(shelf, content, "match.limit=none").evaluators[1].options["limit"] is None


def test_an_options_mapping_is_filled_from_both_sides(shelf):
    content = {"trainer": {"name": "sft", "args": {"a": 1, "b": 2}}}
    recipe = plan(shelf, content, "trainer.args.b=3", "trainer.args.c=x")
    assert recipe.trainer.options["args"] == {"a": 1, "b": "3", "c": "x"}
    assert content["trainer"]["args"] == {"a": 1, "b": 2}


def test_a_class_by_hand_takes_options_by_its_whole_name():
    recipe = merge({}, {"evaluator": ("my.module:Judge",)}, ("my.module:Judge.mode=strict",))
    assert recipe.evaluators == (Choice("my.module:Judge", {"mode": "strict"}),)


# ---- suggestions ---------------------------------------------------------------------------------------------------


def test_suggestions_that_disagree_are_refused(shelf):
    with pytest.raises(OptionError) as error:
        plan(shelf, observer=("warmup",))
    assert str(error.value).splitlines() == [
        "adapter:lora suggests trainer.learning_rate=0.0002 and observer:warmup suggests 0.0003.",
        "Say which: -o trainer.learning_rate=VALUE",
    ]
    said = plan(shelf, None, "trainer.learning_rate=1e-3", observer=("warmup",))
    assert said.trainer.options["learning_rate"] == 1e-3 and said.suggested == {}


def test_a_suggestion_for_an_option_that_the_trainer_does_not_have_is_let_be(shelf):
    assert plan(shelf, adapter="full", observer=("warmup",)).suggested == {"observer:warmup": {"trainer.learning_rate": 3e-4}}


def test_suggestions_are_written_apart_and_dropped_with_their_plugin(shelf):
    written = again(plan(shelf))
    assert written["suggested"] == {"adapter:lora": {"trainer.learning_rate": 2e-4}}
    assert "learning_rate" not in written["trainer"] and written["trainer"]["max_steps"] == -1
    assert plan(shelf, written).trainer.options["learning_rate"] == 2e-4
    assert plan(shelf, written, adapter="dora").trainer.options["learning_rate"] == 1e-4
    changed = plan(shelf, written, adapter="full")
    assert changed.trainer.options["learning_rate"] == 2e-5 and changed.suggested == {} and "suggested" not in again(changed)
    assert plan(shelf, written, trainer="dpo").trainer.options["learning_rate"] == 2e-4, "the adapter still suggests it"


def test_a_repeat_does_not_follow_a_plugin_that_has_changed_its_mind(shelf):
    written = again(plan(shelf)) | {"suggested": {"adapter:lora": {"trainer.learning_rate": 7e-4}}}
    assert plan(shelf, written).trainer.options["learning_rate"] == 7e-4


def test_an_option_that_was_said_is_not_written_as_a_suggestion(shelf):
    written = again(plan(shelf, None, "trainer.learning_rate=2e-4"))
    assert "suggested" not in written and written["trainer"]["learning_rate"] == 2e-4
    assert plan(shelf, written, adapter="full").trainer.options["learning_rate"] == 2e-4


def test_suggestions_may_be_a_function(shelf):
    @plugin
    class Thinking(Full):
        """Suggests what it finds out."""

        @staticmethod
        def suggests():
            return {"trainer.max_steps": 9}

    assert plan(catalogue(installed=False, formatter={"auto": Auto}, adapter={"lora": Thinking}, trainer={"sft": SFT})).trainer.options["max_steps"] == 9


# ---- there and back ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "assignments"),
    [
        ({}, ()),
        ({"adapter": "full", "evaluators": ["match"]}, ("adapter.target_modules=[q_proj,v_proj]", "match.limit=3")),
        ({"adapter": {"name": "dora", "target_modules": "all-linear"}, "observers": ["warmup"]}, ("trainer.learning_rate=2e-4", "trainer.args.lr=1")),
        ({"seed": 0, "skip_bad_rows": True, "eval_data": "owner/name", "dtype": "bfloat16", "device": "cpu"}, ("match.mode=yes",)),
    ],
)
def test_a_resolved_recipe_written_and_read_resolves_to_the_same(shelf, tmp_path, content, assignments):
    content = {**content, "evaluators": ["match"]}
    recipe = plan(shelf, content, *assignments)
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe), encoding="utf-8")
    repeated, _ = resolve(merge(read_recipe(file), {}), shelf)
    assert repeated == recipe
    assert to_yaml(repeated) == to_yaml(recipe)


def test_output_is_never_in_a_written_recipe(shelf, write):
    assert "output" not in again(plan(shelf, output="somewhere"))
    with pytest.raises(RecipeError) as error:
        read_recipe(write("output: runs/x\n"))
    assert error.value.problem.endswith("'output' does not belong into a recipe: a repeat must not write over the run.")
    assert error.value.remedy == "Give --output DIR on the command line."


def test_paths_are_relative_to_the_recipes_file_and_written_absolute(shelf, write, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("{}\n")
    recipe_file = write("data: ../data/rows.jsonl\neval_data: ../data/none.jsonl\nmodel: owner/model\nfrom: ../earlier\n", "sub/recipe.yaml")
    monkeypatch.chdir("/")
    content = read_recipe(recipe_file)
    assert content["data"] == str(tmp_path / "data" / "rows.jsonl")
    assert content["eval_data"] == str(tmp_path / "data" / "none.jsonl") and content["from"] == str(tmp_path / "earlier")
    assert content["model"] == "owner/model", "a hub id is no path"
    monkeypatch.chdir(tmp_path)
    written = again(plan(shelf, data="data/rows.jsonl", model="owner/model"))
    assert written["data"] == str(tmp_path / "data" / "rows.jsonl") and written["model"] == "owner/model"


def test_a_link_keeps_its_name(shelf, write, tmp_path, monkeypatch):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "d1g3st").write_text("{}\n")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "rows.jsonl").symlink_to("../blobs/d1g3st")
    (tmp_path / "there").symlink_to("here")
    assert read_recipe(write("data: there/rows.jsonl\n"))["data"] == str(tmp_path / "there" / "rows.jsonl")
    monkeypatch.chdir(tmp_path / "blobs")
    written = again(plan(shelf, data="../there/rows.jsonl"))["data"]
    assert written == str(tmp_path / "there" / "rows.jsonl") and read_recipe(write(f"data: {written}\n"))["data"] == written
    assert again(plan(shelf, data="../there/../blobs/d1g3st"))["data"] == str(tmp_path / "blobs" / "d1g3st")


def test_from_is_written_as_from(shelf):
    recipe = plan(shelf, {"from": "runs/earlier"})
    assert recipe.start == "runs/earlier" and again(recipe)["from"] == "runs/earlier"


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "problem", "remedy"),
    [
        ("modle: x\n", "unknown key 'modle'. Did you mean 'model'?", "Keys: model, data, "),
        ("evaluator: [match]\n", "unknown key 'evaluator'. Did you mean 'evaluators'?", "Keys: "),
        ("1: x\n", "unknown key '1'.", "Keys: "),
        ("evaluators: match\n", "'evaluators' must be a list of names.", "evaluators: [match]"),
        ("adapter: [lora]\n", "adapter: a plugin is a name, or a mapping with the key 'name' and its options.", "For example: {name: lora, r: 8}"),
        ("adapter: {r: 8}\n", "adapter: a plugin is a name, or a mapping", "For example"),
        ("evaluators: [{limit: 3}]\n", "evaluators: a plugin is a name, or a mapping", "For example"),
        ("- a\n", "a recipe is a mapping of keys to values.", "See docs/recipes.md for an example."),
        ("", "a recipe is a mapping of keys to values.", "See docs/recipes.md"),
    ],
)
def test_recipes_that_are_none(write, content, problem, remedy):
    file = write(content)
    with pytest.raises(RecipeError) as error:
        read_recipe(file)
    assert error.value.problem.startswith(f"{file}: {problem}") and error.value.remedy.startswith(remedy)


def test_broken_yaml_names_the_line(write):
    file = write("seed: 1\nadapter: {name: lora\ntrainer: sft\n")
    with pytest.raises(RecipeError) as error:
        read_recipe(file)
    assert error.value.problem.startswith(f"{file}:3: not valid YAML (") and error.value.remedy == "Mend the file."


def test_a_key_twice_is_refused(write):
    file = write("seed: 1\ndata: x\nseed: 2\n")
    with pytest.raises(RecipeError) as error:
        read_recipe(file)
    assert error.value.problem == f"{file}:3: not valid YAML (the key 'seed' stands there twice)."


def test_yaml_cannot_make_python_objects(write):
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_recipe(write("model: !!python/object/apply:os.getcwd []\n"))


def test_no_such_recipe_and_a_directory(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        read_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"seed": "1"}, "seed wants int, got '1'."),
        ({"seed": -1}, "seed must be from 0 to 4294967295, got -1."),
        ({"seed": 1 << 32}, "seed must be from 0 to 4294967295, got 4294967296."),
        ({"data": " "}, "data is empty."),
        ({"eval_data": ""}, "eval_data is empty."),
        ({"dtype": "fp8"}, "dtype wants 'auto' or 'float32' or 'bfloat16' or 'float16', got 'fp8'."),
        ({"skip_bad_rows": 1}, "skip_bad_rows wants bool, got 1."),
        ({"data": ["a"]}, "data wants str or none, got ['a']."),
        ({"adapter": {"name": "lora", "rank": 8}}, "adapter 'lora' has no option 'rank'. Did you mean 'r'? Options: r, target_modules."),
        ({"adapter": {"name": "lora", "r": "8"}}, "adapter.r wants int, got '8'."),
        ({"evaluators": [{"name": "match", "limits": 3}]}, "evaluator 'match' has no option 'limits'. Did you mean 'limit'? Options: limit, mode."),
        ({"evaluators": [{"name": "match", "limit": 1.5}]}, "match.limit wants int or none, got 1.5."),
        ({"suggested": ["x"]}, "'suggested' must map stage:name to options."),
        ({"evaluators": ["match", "match"]}, "evaluator 'match' is named twice."),
    ],
)
def test_values_that_do_not_fit(shelf, content, problem):
    with pytest.raises(FtxError) as error:
        plan(shelf, content)
    assert error.value.problem == problem and error.value.status == 2


@pytest.mark.parametrize(
    ("assignment", "problem", "remedy"),
    [
        ("r=8", "-o r=8: not of the form STAGE.OPTION=VALUE.", "For example: -o adapter.r=8"),
        ("adapter.r", "-o adapter.r: not of the form STAGE.OPTION=VALUE.", "For example"),
        ("adapter.=8", "-o adapter.=8: not of the form", "For example"),
        ("adaptor.r=8", "-o adaptor.r=8: 'adaptor' is neither a stage nor a chosen evaluator or observer. Did you mean 'adapter'?", "Possible: formatter, "),
        ("quantizer.x=1", "-o quantizer.x=1: no quantizer is chosen.", "Add --quantizer NAME."),
        ("match.limit=1", "-o match.limit=1: 'match' is neither a stage nor a chosen evaluator or observer.", "Possible: "),
    ],
)
def test_assignments_that_do_not_fit(shelf, assignment, problem, remedy):
    with pytest.raises(OptionError) as error:
        plan(shelf, None, assignment)
    assert error.value.problem.startswith(problem) and error.value.remedy.startswith(remedy)


def test_every_named_plugin_must_exist(shelf):
    with pytest.raises(PluginError, match=r"no adapter is called 'qlroa'\."):
        plan(shelf, adapter="qlroa")


def test_an_installed_models_name_is_no_path(tmp_path, monkeypatch):
    """A directory that happens to have the name must not change what a recipe means."""
    from ftx.recipe import merge, read_recipe, to_yaml

    (tmp_path / "smollm2").mkdir()
    (tmp_path / "recipe.yaml").write_text("model: smollm2\n")
    monkeypatch.chdir(tmp_path)
    content = read_recipe(tmp_path / "recipe.yaml")
    assert content["model"] == "smollm2"
    assert "model: smollm2\n" in to_yaml(merge(content, {}))


# ---- a suggestion for one plugin of a stage ------------------------------------------------------------------------


def test_a_suggestion_for_one_trainer_goes_before_the_one_for_all():
    """2e-4 is LoRA's rate for sft; dpo has half of it."""
    rates = {name: resolve(merge({}, {"trainer": name, "adapter": "lora", "data": "x"}), Catalogue())[0] for name in ("sft", "dpo")}
    assert {name: recipe.trainer.options["learning_rate"] for name, recipe in rates.items()} == {"sft": 2e-4, "dpo": 1e-4}
    assert rates["dpo"].suggested["adapter:lora"] == {"trainer:dpo.learning_rate": 1e-4, "trainer:dpo.num_train_epochs": 1}
    written = yaml.safe_load(to_yaml(rates["dpo"]))
    assert "learning_rate" not in written["trainer"]
    again, _ = resolve(merge(written, {}), Catalogue())
    assert again.trainer.options == rates["dpo"].trainer.options


def test_another_trainer_drops_what_was_suggested_for_the_first():
    """The written sft recipe says trainer.learning_rate=2e-4: run with --trainer dpo, lora's own suggestion for dpo holds."""
    sft, _ = resolve(merge({}, {"trainer": "sft", "adapter": "lora", "data": "x"}), Catalogue())
    other, _ = resolve(merge(yaml.safe_load(to_yaml(sft)), {"trainer": "dpo"}), Catalogue())
    assert other.trainer.options["learning_rate"] == 1e-4


# ---- observers by default ------------------------------------------------------------------------------------------


@plugin
class Watch:
    """An observer."""

    title: str = option("", "Title.")


@pytest.fixture
def watched() -> Catalogue:
    """Both default observers, and another."""
    return catalogue(
        installed=False,
        formatter={"auto": Auto},
        adapter={"lora": LoRA},
        trainer={"sft": SFT},
        observer={"audit": Watch, "report": Watch, "other": Watch},
    )


def observers(catalogue: Catalogue, content: dict | None = None, *named: str, options: tuple[str, ...] = ()) -> list[str]:
    return [choice.name for choice in plan(catalogue, content, *options, observer=named).observers]


def test_a_recipe_that_lists_no_observers_has_the_default_ones(watched):
    assert observers(watched) == ["audit", "report"]
    assert observers(watched, {"observers": []}) == [] and observers(watched, {"observers": ["other"]}) == ["other"]
    assert again(plan(watched))["observers"] == [{"name": "audit", "title": ""}, {"name": "report", "title": ""}], "a repeat names them"


def test_an_observer_on_the_command_line_is_added_and_none_drops_the_others(watched):
    assert observers(watched, None, "other") == ["audit", "report", "other"]
    assert observers(watched, None, "report") == ["audit", "report"]
    assert observers(watched, {"observers": ["other"]}, "report") == ["other", "report"]
    assert observers(watched, None, "none") == [] and observers(watched, None, "none", "report") == ["report"]
    titled = {"observers": [{"name": "report", "title": "mine"}]}
    assert plan(watched, titled, observer=("none", "report")).observers == (Choice("report", {"title": "mine"}),), "naming it keeps its options"
    assert plan(watched, None, "report.title=x").observers[1].options == {"title": "x"}


def test_a_default_observer_that_is_not_installed_is_left_out_and_a_named_one_is_refused(shelf):
    assert observers(shelf) == []
    for content, named, options in ((None, ("report",), ()), ({"observers": ["report"]}, (), ()), (None, (), ("report.title=x",))):
        with pytest.raises(PluginError, match=r"no observer is called 'report'\."):
            observers(shelf, content, *named, options=options)


def test_an_observer_named_twice_is_refused(watched):
    with pytest.raises(PluginError, match=r"observer 'other' is named twice\."):
        observers(watched, None, "other", "other")
