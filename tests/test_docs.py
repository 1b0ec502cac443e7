"""The docs against the code: commands are parsed or run, recipes resolved, errors produced, tables compared."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import itertools
import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from support import REPO, read_rows, write_rows

DOCS = REPO / "docs"
PAGES = [REPO / "README.md", *sorted(DOCS.glob("*.md"))]
ANSWERS = re.compile(r"^answers \d+/\d+")


def page(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The contents of the fenced blocks whose info string is `language`."""
    return [found[2] for found in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if found[1] == language]


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of any level."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no heading '{heading}'"
    return found[1]


def table(text: str) -> list[list[str]]:
    """The rows of the first table in a text, without its header."""
    lines = [line.strip() for line in text.splitlines()]
    start = next(i for i, line in enumerate(lines) if re.fullmatch(r"\|(---\|)+", line))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def named(cell: str) -> list[str]:
    """The words in backticks."""
    return re.findall(r"`([^`]+)`", cell)


def keys_of(text: str) -> set[str]:
    """The names in the first column of a section's table."""
    return {name for row in table(text) for name in named(row[0])}


def module(file: Path):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


# ---- generated parts -----------------------------------------------------------------------------------------------


def test_generated_parts_are_fresh():
    stale = [str(file.relative_to(REPO)) for file in module(DOCS / "generate.py").stale()]
    assert not stale, f"{', '.join(stale)}: stale. Write anew with: python docs/generate.py"


def test_every_official_plugin_has_its_options_on_the_page():
    from ftx.describe import described

    generate = module(DOCS / "generate.py")
    assert generate.official()
    for stage, name, distribution in generate.official():
        if stage == "command":
            continue  # its options stand in commands.md
        text = section(page("options.md"), f"{stage} {name}")
        assert f"`{distribution}`" in text
        options = [one["name"] for one in described(stage, name)["options"]]
        assert ([named(row[0])[0] for row in table(text)] if options else []) == options


# ---- hooks and public names ----------------------------------------------------------------------------------------


def test_every_hook_has_a_heading_with_its_arguments():
    from ftx import hookspecs
    from ftx.hooks import hook_names, stage_hooks

    text = page("hooks.md")
    after = text.partition("\n## Every hook\n")[2]
    assert re.findall(r"^### (.*)$", after, re.MULTILINE) == [
        f"{name}({', '.join(inspect.signature(getattr(hookspecs, name)).parameters)})" for name in hook_names()
    ]
    for name in hook_names():
        about = re.search(rf"^### {name}\(.*?(?=^### |\Z)", after, re.MULTILINE | re.DOTALL)[0]
        assert ("Owner: " in about) == (name in stage_hooks()), f"{name}: a stage hook says who owns it, and only a stage hook"
        assert "Implemented by: " in about


def test_every_public_name_and_field_is_documented():
    import ftx
    from ftx.audit import Finding
    from ftx.authoring import DECLARATIONS

    text = page("hooks.md")
    assert keys_of(section(text, "What a plugin imports")) == set(ftx.__all__)
    assert keys_of(section(text, "What a class says of itself")) == set(DECLARATIONS)
    for heading, cls in (("Score", ftx.Score), ("Evaluation", ftx.Evaluation), ("Finding", Finding), ("Run", ftx.Run)):
        fields = {field.name for field in dataclasses.fields(cls)} | ({"is_main"} if cls is ftx.Run else set())
        assert keys_of(section(text, heading)) == fields, heading


def test_the_order_of_hooks_is_that_of_a_run(real_run):
    documented = [line.split()[0] for line in blocks(section(page("hooks.md"), "The order of a run"), "text")[0].splitlines()]
    assert real_run["hooks"] == documented


def test_the_generator_has_the_arguments_that_hooks_md_gives():
    from ftx.generate import Generate

    arguments = [str(one).partition(":")[0] for one in inspect.signature(Generate.__call__).parameters.values()]
    shown = re.search(r"`generate\((.*?)\)`", section(page("hooks.md"), "generate"))[1]
    assert [one.partition("=")[0] for one in shown.replace("*, ", "").split(", ")] == arguments[1:]


# ---- commands ------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """The `$ ` lines of a console block, continuation lines joined."""
    return [line.removeprefix("$ ") for line in text.replace("\\\n", " ").splitlines() if line.startswith("$ ")]


def console_commands():
    for file in PAGES:
        for block in blocks(file.read_text("utf-8"), "console"):
            for line in commands(block):
                if line.startswith("ftx "):
                    yield pytest.param(line, "\nError: " in f"\n{block}", id=f"{file.stem}: {line}")


def parsed(line: str):
    """The click context of a command line; raises click's UsageError."""
    from ftx.cli import main

    words = shlex.split(line)[1:]
    command, name = main, "ftx"
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, context = words[0], click.Context(command, info_name=name)
        following = command.get_command(context, name)
        assert following is not None, f"no command is called '{name}'"
        command, words = following, words[1:]
    return command.make_context(name, words)


@pytest.mark.parametrize(("line", "fails"), list(console_commands()))
def test_commands_parse_and_their_plugins_and_options_exist(line, fails):
    from ftx.catalogue import Catalogue
    from ftx.commands.run import given_recipe
    from ftx.recipe import resolve

    try:
        context = parsed(line)
    except click.exceptions.Exit:
        return  # --help, --version
    if context.info_name != "run" or fails:
        return
    given = {key: value for key, value in context.params.items() if key not in ("recipe", "assignments", "output", "quiet", "as_json", "traceback")}
    recipe = context.params["recipe"]
    known = recipe and (REPO / recipe).is_file()
    evaluators = {one.partition(".")[0] for one in context.params["assignments"]} - {"formatter", "quantizer", "adapter", "trainer"}
    if recipe and not known:  # a recipe of the reader's: it names the evaluators whose options are given
        given["evaluator"] = given.get("evaluator") or tuple(evaluators)
    unresolved = given_recipe(str(REPO / recipe) if known else None, context.params["assignments"], given)
    if any(":" in choice.name for _, choice in unresolved.choices()):
        return  # a class that the reader writes
    resolve(unresolved, Catalogue())


def test_ftx_plugins_lists_what_commands_md_says(cli):
    """Among what else may be installed."""
    real = {" ".join(line.split()) for line in cli("plugins").stdout.splitlines()}
    documented = blocks(page("commands.md").partition("With the official plugins it prints:")[2], "text")[0]
    assert {" ".join(line.split()) for line in documented.splitlines()} <= real


def test_commands_md_has_the_exit_statuses():
    from ftx.errors import FAILED, INTERRUPTED, REFUSED

    assert [int(row[0]) for row in table(page("commands.md"))] == sorted([0, FAILED, REFUSED, INTERRUPTED])


def test_design_md_calls_no_command_missing_that_is_there():
    from ftx.cli import COMMANDS

    assert not set(COMMANDS) & {word.removeprefix("ftx ") for word in named(section(page("design.md"), "Not there yet"))}
    missing = [
        name for name in named(section(page("design.md"), "More modules in the core")) if name.endswith(".py") and not (REPO / "core/ftx" / name).is_file()
    ]
    assert not missing


# ---- recipes -------------------------------------------------------------------------------------------------------


def recipes():
    for file in sorted((REPO / "examples" / "recipes").glob("*.yaml")):
        yield pytest.param(file.read_text("utf-8"), id=file.name)
    for file in PAGES:
        for number, block in enumerate(blocks(file.read_text("utf-8"), "yaml recipe")):
            yield pytest.param(block, id=f"{file.stem} {number + 1}")


@pytest.mark.parametrize("text", list(recipes()))
def test_recipes_resolve_and_pass_their_preflight(text, tmp_path):
    import torch

    from ftx.catalogue import Catalogue
    from ftx.ledger import Ledger
    from ftx.prepare import check_row_types
    from ftx.recipe import merge, read_recipe, resolve
    from ftx.run import Run

    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    recipe, hooks = resolve(merge(read_recipe(file), {}), Catalogue())
    check_row_types(hooks)
    assert recipe.data, "a recipe in the docs names its data"
    run = Run(recipe=recipe, ledger=Ledger(), dtype=torch.float32, model=recipe.model)
    assert [reason for _, reasons in hooks.each("preflight", run=run) for reason in reasons or []] == []


def test_every_other_yaml_block_is_yaml():
    for file in PAGES:
        for block in blocks(file.read_text("utf-8"), "yaml"):
            yaml.safe_load(block)


def test_recipes_md_has_every_key_with_its_default_and_option():
    from ftx.commands.run import command
    from ftx.recipe import DEFAULTS, OBSERVERS, PLAIN, REPEATED, SINGLE, Recipe

    rows = {named(row[0])[0]: row for row in table(section(page("recipes.md"), "Keys"))}
    assert list(rows) == [*PLAIN, *SINGLE, *REPEATED, "suggested"]
    defaults = {field.name: field.default for field in dataclasses.fields(Recipe) if field.default is not dataclasses.MISSING} | DEFAULTS
    defaults["observers"] = f"[{', '.join(OBSERVERS)}]"
    flags = {flag for parameter in command.params for flag in parameter.opts}
    for key, (_, default, flag, _) in rows.items():
        value = defaults.get(key)
        shown = str(value).lower() if isinstance(value, bool) else str(value)
        assert default == (f"`{shown}`" if value not in (None, ()) else "none"), key
        assert set(named(flag)) <= flags and (named(flag) or key == "suggested"), key


# ---- data ----------------------------------------------------------------------------------------------------------


def test_data_md_has_the_file_kinds_and_row_types():
    from ftx.data import ROW_TYPES
    from ftx.files import SUFFIXES

    assert {*SUFFIXES, ".gz"} <= keys_of(section(page("data.md"), "Files"))
    rows = {named(row[0])[0]: tuple(name for name in named(row[1])) for row in table(section(page("data.md"), "Row types"))}
    assert rows.keys() == ROW_TYPES.keys()
    for name, columns in ROW_TYPES.items():
        assert rows[name][: len(columns)] == columns


SAMPLES = {
    "messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}],
    "conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}],
    "instances": [{"input": "a", "output": "b"}],
    "label": True,
}


@pytest.mark.parametrize("row", table(section(page("data.md"), "Formatters")), ids=lambda row: row[0])
def test_auto_chooses_what_data_md_says(row):
    from ftx.data import to_dataset
    from ftx_formats_fields import guesses

    cells, formatter, options = row
    inner = {"messages": 1, "conversations": 1}
    names = named(cells)[: inner.get(named(cells)[0], 99)]
    sample = {name: SAMPLES.get(name, "some text") for name in names}
    if "tree" in cells:
        sample = {"prompt": {"role": "prompter", "text": "a?", "replies": []}}
    (guess,) = guesses(to_dataset([sample]))
    assert guess.formatter == named(formatter)[0]
    wanted = {name.partition("=")[0]: name.partition("=")[2] for name in named(options)}
    assert guess.options.keys() == wanted.keys()
    assert all(guess.options[name] == value for name, value in wanted.items() if value)


def test_data_md_has_every_finding_of_the_gate():
    from ftx.audit import audit_tokens
    from ftx.data import to_dataset
    from ftx.testing import make_run, tiny_tokenizer

    end, bos, a, no = 2, 1, 10, -100
    rows = [
        {"input_ids": [a, a], "labels": [no, no], "cut": 0},
        {"input_ids": [a, end], "labels": [no, end], "cut": 0},
        {"input_ids": [a, a + 1], "labels": [no, a + 1], "cut": 3},
        {"input_ids": [a, a, a], "labels": [no, a, a], "cut": 0},
        {"input_ids": [bos, bos, a, end], "labels": [no, no, a, end], "cut": 0},
    ]
    findings, _ = audit_tokens(to_dataset(rows), tiny_tokenizer(), make_run())
    equal = {f"{side}_{what}": [a, end] for side in ("chosen", "rejected") for what in ("input_ids", "labels")}
    findings += audit_tokens(to_dataset([equal]), tiny_tokenizer(), make_run())[0]
    assert all(finding.refuse for finding in findings)
    documented = [row[0] for row in table(section(page("data.md"), "The gate"))]
    assert documented == [*(finding.what for finding in findings), "rows that stand in the training data"]


def test_audit_md_says_what_refuses_and_what_warns():
    from ftx.audit import audit_tokens
    from ftx.data import to_dataset
    from ftx.testing import make_run, tiny_tokenizer
    from ftx_audit import CHECKS, Audit
    from ftx_audit_task import SIZES

    end, bos, a, no = 2, 1, 10, -100
    rows = [
        {"input_ids": [a, a], "labels": [no, no], "cut": 0, "crossed": 0},
        {"input_ids": [a, a], "labels": [no, no], "cut": 3, "crossed": 1},
        {"input_ids": [a, end], "labels": [no, end], "cut": 0, "crossed": 0},
        {"input_ids": [a, a + 1], "labels": [no, a + 1], "cut": 3, "crossed": 0},
        {"input_ids": [a, a, a], "labels": [no, a, a], "cut": 0, "crossed": 0},
        {"input_ids": [bos, bos, a, end], "labels": [no, no, a, end], "cut": 0, "crossed": 1},
    ]
    equal = {f"{side}_{what}": [a, end] for side in ("chosen", "rejected") for what in ("input_ids", "labels")}
    refused: dict[bool, dict[str, bool]] = {}
    for allowed in (False, True):
        run = make_run(allow_truncation=allowed)
        found = [finding for one in (rows, [equal]) for finding in audit_tokens(to_dataset(one), tiny_tokenizer(), run)[0]]
        refused[allowed] = {finding.what: finding.refuse for finding in found}
    documented = {row[0]: row[1] for row in table(section(page("audit.md"), "What the core finds"))}
    assert set(documented) == {*refused[False], *refused[True], "rows that stand in the training data"}
    for what, text in documented.items():
        if what != "rows that stand in the training data":
            assert text.startswith("refuses" if refused[False].get(what) else "warns"), what
            assert ("warns with `--allow-truncation`" in text) == (refused[False].get(what) is True and refused[True][what] is False), what
    checks = {named(row[0])[0]: row[1:] for row in table(section(page("audit.md"), "What the observer finds"))}
    assert checks == {name: [", ".join(one.splits), "refuses" if name in Audit().refuse else "warns", one.finds] for name, one in CHECKS.items()}
    sizes = {row[0]: tuple(int(cell.replace(",", "")) for cell in row[1:]) for row in table(section(page("audit.md"), "How many rows"))}
    assert sizes == SIZES


def test_data_md_has_the_ledgers_keys():
    from ftx.ledger import Entry

    assert keys_of(section(page("data.md"), "The ledger")) == {field.name for field in dataclasses.fields(Entry)}


# ---- the run directory ---------------------------------------------------------------------------------------------


WATCHER = '''
from ftx import hookimpl, plugin

@plugin
class Watcher:
    """Has the gathering hooks that no official plugin has yet."""

    @hookimpl
    def audit_dataset(self, dataset, split, run):
        return []

    @hookimpl
    def trainer_callbacks(self, run):
        return []
'''


@pytest.fixture(scope="module")
def real_run(tmp_path_factory, tiny):
    """A small run through the command line with LoRA and an evaluator: its directory, and the hooks in the order called."""
    from ftx.hooks import Hooks
    from ftx.testing import ftx

    folder = tmp_path_factory.mktemp("docs")
    rows = [{"instruction": f"what is {i}?", "input": "", "output": f"it is {i}"} for i in range(10)]
    train, test = write_rows(folder / "train.jsonl", rows[:8]), write_rows(folder / "test.jsonl", rows[8:])
    (folder / "watcher.py").write_text(WATCHER)
    called: list[tuple[str, str | None]] = []
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(folder))
    check = Hooks.check

    def watched(self):
        self.add_hookcall_monitoring(lambda name, impls, arguments: called.append((name, arguments.get("split"))), lambda *_: None)
        check(self)

    patch.setattr(Hooks, "check", watched)
    answer = ftx(
        *("run", "--model", tiny, "--data", train, "--eval-data", test, "--formatter", "alpaca", "--evaluator", "exact-match", "--observer", "watcher:Watcher"),
        *("-o", "exact-match.max_new_tokens=4", "-o", "trainer.max_steps=2", "-o", "trainer.per_device_train_batch_size=2", "--dtype", "float32"),
        *("--output", folder / "run"),
    )
    patch.undo()
    assert answer.exit_code == 0, answer.output
    once = [name for (name, _), _ in itertools.groupby(called)]  # a gathering hook is called for each plugin that has it
    return {"directory": folder / "run", "hooks": once}


def test_run_directory_md_lists_what_a_run_leaves(real_run):
    run = real_run["directory"]
    listed = [named(row[0])[0] for row in table(page("run-directory.md"))]
    assert sorted(listed) == sorted(file.name + "/" * file.is_dir() for file in run.iterdir())
    assert sorted(file.name for file in (run / "model").iterdir()) == blocks(section(page("run-directory.md"), "model/"), "text")[0].split()
    kept = [file.relative_to(run).as_posix() for file in sorted((run / "eval").rglob("*.jsonl"))]
    assert kept == [name.replace("EVALUATOR", "exact-match") for name in named(section(page("run-directory.md"), "eval/"))[:2]]
    assert all(file.name.startswith("checkpoint-") and (file / "ftx-complete.json").is_file() for file in (run / "checkpoints").iterdir())


def test_run_directory_md_names_every_field(real_run):
    run, text = real_run["directory"], page("run-directory.md")
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    assert keys_of(section(text, "manifest.json")) == set(manifest)
    inner = {name: set(named(row[1])) for row in table(section(text, "manifest.json")) for name in named(row[0])}
    for key in ("model", "hardware", "parameters"):
        assert set(manifest[key]) <= inner[key] <= set(manifest[key]) | {"gpu"}, key
    assert set(manifest["plugins"]["adapter:lora"]) < inner["plugins"]
    audit = json.loads((run / "audit.json").read_text("utf-8"))
    assert keys_of(section(text, "audit.json")) == set(audit["train"]) and set(audit) == {"train", "eval", "overlap"}
    assert set(named(section(text, "audit.json").partition("|")[0])) == {*audit, *audit["overlap"]}
    metrics = read_rows(run / "metrics.jsonl")
    assert keys_of(section(text, "metrics.jsonl")) == set(metrics[-1])
    items = read_rows(run / "eval" / "exact-match" / "tuned.jsonl")
    assert keys_of(section(text, "eval/")) | {"f1"} == set(items[0])
    scores = json.loads((run / "scores.json").read_text("utf-8"))
    assert keys_of(section(text, "scores.json")) == set(scores[0])
    assert list(dict.fromkeys(score["phase"] for score in scores)) == ["base", "tuned", "change"]


# ---- errors --------------------------------------------------------------------------------------------------------

VERSION = re.compile(r"(ftx-[a-z-]+) \d+\.\d+\.\d+")
#: Distributions that stand in the way on purpose: name -> (version, adapter, its class, requirements, module, its text)
STRANGERS = {
    "acme-sparse": ("0.3", "sparse", "acme_sparse:Sparse", [], "acme_sparse.py", "import sparsity\n"),
    "acme-lora": ("2.0", "lora", "acme.lora:LoRA", [], "acme/lora.py", ""),
    "acme-old": ("1.0", "old", "acme_old:Old", ["ftx-core>=0.9"], "acme_old.py", ""),
}
MINE = '''
from ftx import format_rows, hookimpl, plugin

def convert(row):
    return {"prompt": row["instruction"], "completion": row["output"]}

@plugin
class Unmarked:
    """A hook without its mark."""

    def format_dataset(self, dataset, run):
        return format_rows(dataset, convert, run)

@plugin
class Misspelt:
    """A hook under another name."""

    @hookimpl
    def format_datset(self, dataset, run):
        return format_rows(dataset, convert, run)

@plugin
class Losing:
    """Every second row is gone."""

    @hookimpl
    def format_dataset(self, dataset, run):
        return format_rows(dataset, convert, run).select(range(0, len(dataset), 2))

@plugin
class Silent:
    """The result is forgotten."""

    @hookimpl
    def format_dataset(self, dataset, run):
        format_rows(dataset, convert, run)
'''
JUDGE = '''
from ftx import hookimpl, plugin

@plugin
class Judge:
    """A judge that is not there."""

    @hookimpl
    def evaluate_model(self, generate, dataset, run):
        raise ConnectionError("the judge does not answer")
'''


@pytest.fixture
def workshop(tmp_path, monkeypatch, tiny):
    """The working directory of errors.md: a model, good data and bad, recipes, an unfinished run."""
    rows = [{"instruction": f"what is {i}?", "input": "", "output": f"it is {i}"} for i in range(8)]
    write_rows(tmp_path / "train.jsonl", rows)
    lines = [json.dumps(row) + "\n" for row in rows]
    (tmp_path / "broken.jsonl").write_text("".join([*lines[:2], lines[2].partition(', "output"')[0] + "\n", *lines[3:]]))
    write_rows(tmp_path / "empty-answer.jsonl", [rows[0], {**rows[1], "output": ""}])
    write_rows(tmp_path / "other.jsonl", [{"city": "Bern", "country": "Switzerland"}])
    write_rows(tmp_path / "long.jsonl", [*rows[:2], {**rows[2], "output": "so long " * 200}])
    write_rows(tmp_path / "overlap.jsonl", [{**rows[1], "output": "it is 9"}, {**rows[1], "instruction": "What  is 1?"}])
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "misspelt.yaml").write_text("modle: smollm2\ndata: train.jsonl\n")
    (tmp_path / "output.yaml").write_text("data: train.jsonl\noutput: runs/a\n")
    (tmp_path / "torn.yaml").write_text("data: [train.jsonl\nseed: 3\n")
    (tmp_path / "tiny").symlink_to(tiny)
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text("{}")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "recipe.yaml").write_text("data: ../../train.jsonl\n")
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "judge.py").write_text(JUDGE)
    for name, (version, adapter, value, needs, file, text) in STRANGERS.items():
        place = tmp_path / "site" / name
        about = place / f"{name.replace('-', '_')}-{version}.dist-info"
        about.mkdir(parents=True)
        requires = "".join(f"Requires-Dist: {one}\n" for one in needs)
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
        (about / "entry_points.txt").write_text(f"[ftx.adapter]\n{adapter} = {value}\n")
        (place / file).parent.mkdir(exist_ok=True)
        (place / file).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def produced(block: str, workshop: Path, monkeypatch) -> tuple[str, str]:
    """The documented standard error of a block and the real one."""
    from ftx.testing import ftx

    lines = block.splitlines()
    words = shlex.split(lines[0].removeprefix("$ ftx "))
    if words[0] == "run" and "--model" not in words:
        words += ["--model", "tiny"] if len(words) > 1 and not words[1].endswith(".yaml") else []
    if "^C" in lines:
        words += ["--observer", "ftx.testing.own:CtrlC"]
    for name in STRANGERS:
        if name in block:
            monkeypatch.syspath_prepend(str(workshop / "site" / name))
    output = ftx(*words).output
    return "\n".join(line for line in lines[1:] if line != "^C"), output[output.index("Error: ") :].replace(f"{workshop}/", "").strip()


@pytest.mark.parametrize("block", blocks(page("errors.md"), "console"), ids=lambda block: block.splitlines()[0].removeprefix("$ ftx "))
def test_errors_read_as_errors_md_says(block, workshop, monkeypatch):
    import torch

    if "--device cuda" in block and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    wanted, real = produced(block, workshop, monkeypatch)
    for ours, theirs in zip(wanted.splitlines(), real.splitlines(), strict=True):
        if "Installed: " in ours:  # more may be installed than what is official
            assert set(re.findall(r"[\w-]+", ours)) <= set(re.findall(r"[\w-]+", theirs))
        else:
            assert VERSION.sub(r"\1", ours) == VERSION.sub(r"\1", theirs)


# ---- README and tutorial -------------------------------------------------------------------------------------------


def test_the_readmes_plugin_works(workshop, monkeypatch):
    from ftx.testing import ftx

    (source,) = blocks((REPO / "README.md").read_text("utf-8"), "python faq.py")
    assert sum(map(bool, source.splitlines())) <= 10
    (workshop / "faq.py").write_text(source)
    write_rows(workshop / "faq.jsonl", [{"question": f"What is {i}?", "a": f"It is {i}."} for i in range(8)])
    (line,) = (line for file in PAGES[:1] for block in blocks(file.read_text("utf-8"), "console") for line in commands(block) if "faq:Faq" in line)
    answer = ftx(*shlex.split(line)[1:], "--model", "tiny", "-o", "trainer.max_steps=1", "--output", "run")
    assert answer.exit_code == 0, answer.output


def tutorial() -> list[tuple[str, str]]:
    """Every command of the tutorial and the output under it."""
    steps = []
    for block in blocks(page("tutorial.md"), "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, output = re.fullmatch(r"((?:[^\n]*\\\n)*[^\n]*)\n(.*)", part, re.DOTALL).groups()
            steps.append((command.replace("\\\n", " "), output))
    return steps


def test_the_tutorials_data_are_what_its_script_writes(tmp_path, monkeypatch):
    (source,) = blocks(page("tutorial.md"), "python make_dates.py")
    (tmp_path / "make_dates.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(tmp_path / "make_dates.py"))
    shown = next(output for command, output in tutorial() if command == "head -2 dates-train.jsonl")
    assert (tmp_path / "dates-train.jsonl").read_text().startswith(shown)
    first = next(output for command, output in tutorial() if command.startswith("ftx run"))
    for name, file in (("train", "dates-train.jsonl"), ("eval", "dates-test.jsonl")):
        count = len(read_rows(tmp_path / file))
        assert f"{name}: {count} rows of {count} in {file}" in first


def masked(text: str) -> list[str]:
    """Lines of output with the digits masked; without progress lines, which depend on the machine's speed."""
    lines = [re.sub(r"in b?float(16|32) on \w+$", "", line).strip() for line in text.splitlines()]
    return [re.sub(r"[-+]?\d[\d.,e+-]*", "#", re.sub(r" +", " ", line)) for line in lines if line and not ANSWERS.match(line) and not line.startswith("step ")]


def talk_as_shown(words: list[str], output: str) -> None:
    """What stands behind a prompt is typed; each line of an answer and each remark of the program comes, less what is said."""
    prompt = re.compile(r"^(?:base|tuned|base\+tuned)> ?")
    typed = "".join(prompt.sub("", line) + "\n" for line in output.splitlines() if prompt.match(line))
    done = subprocess.run([sys.executable, "-m", "ftx", *words[1:]], input=typed, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr

    def shape(text: str) -> list[str]:
        lines = [line for line in text.splitlines() if re.match(r"(base|tuned): |\(", line)]
        return [line if line.startswith("(") else line.partition(":")[0] for line in lines]

    assert shape(done.stdout) == shape(output)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_tutorial_runs(tmp_path, process, monkeypatch):
    """All commands in their order; what they print, less numbers and progress. Ctrl-C is pressed behind step 4."""
    (tmp_path / "make_dates.py").write_text(blocks(page("tutorial.md"), "python make_dates.py")[0])
    monkeypatch.chdir(tmp_path)
    runpy.run_path("make_dates.py")
    checked = 0
    for command, output in tutorial():
        words = shlex.split(command)
        if words[0] != "ftx" or words[1] in ("plugins", "doctor") or "more.jsonl" in words:
            continue
        if "^C" in output:
            words += ["--observer", "ftx.testing.own:CtrlC", "-o", "ftx.testing.own:CtrlC.after=4"]
        if words[1] == "chat":
            talk_as_shown(words, output)
            checked += 1
            continue
        done = process(*words[1:], timeout=1200)
        real = masked((done.stdout + done.stderr).replace(f"{tmp_path}/", ""))
        wanted = masked("\n".join(line for line in output.splitlines() if line != "^C"))
        assert [line for line in real if "CtrlC" not in line] == wanted, command
        checked += 1
    assert checked >= 4


# ---- links ---------------------------------------------------------------------------------------------------------


def anchors(file: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", file.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_links_lead_somewhere(file):
    text = re.sub(r"^```.*?^```$", "", file.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        to = (file.parent / path).resolve() if path else file
        assert to.exists(), f"{file.name}: {target}"
        assert not anchor or anchor in anchors(to), f"{file.name}: {target}"


def test_every_page_is_on_the_map():
    assert {file.name for file in DOCS.glob("*.md")} - {"index.md"} <= set(re.findall(r"\(([\w-]+\.md)\)", page("index.md")))


@pytest.mark.parametrize("file", PAGES, ids=lambda file: file.name)
def test_nothing_is_left_to_be_filled_in(file):
    assert not re.findall(r"@@\w+@@|\bTODO\b|\bTBD\b|\bFIXME\b|\bXXX\b", file.read_text("utf-8"))
