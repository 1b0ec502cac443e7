"""Handing a finished run on: its tuned model in another form, read back by another program and held to the run."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ftx import __version__, models, parity, pipeline
from ftx.card import model_card
from ftx.catalogue import Catalogue
from ftx.console import Console
from ftx.data import read_dataset
from ftx.encode import end_tokens, own_ends
from ftx.errors import DataError, OptionError, PluginError, RecipeError, RunError
from ftx.hooks import Hooks
from ftx.options import Text, as_dict, build
from ftx.readback import recipe_of, reopen
from ftx.recipe import Recipe, merge, read_recipe
from ftx.run import Run, RunDir, write_text

PROMPTS = 50


class Departure(NamedTuple):
    """A model that says something else than the run on purpose, and why: what `exported_form` may give."""

    model: Any
    why: str


class Exported(NamedTuple):
    """What `export_model` wrote, in one line, and how to load it (Markdown for the model card)."""

    what: str
    load: str


def export(
    path: str,
    to: str,
    *,
    assignments: tuple[str, ...] = (),
    output: str | None = None,
    given: dict[str, Any] | None = None,
    prompts: int = PROMPTS,
    least: float | None = None,
    licences: dict[str, str | None] | None = None,
    catalogue: Catalogue,
    console: Console,
) -> dict[str, Any]:
    """Export the run in `path` through the exporter `to`; the content of export.json, and where it lies.

    `given`: dtype, device and eval_data in place of the run's own. The export is written beside `output`, read back and
    held to the run on `prompts` prompts, and moved to its place only if it agrees; else RunError, and it is kept as
    OUTPUT.disagrees. `least`: the share of tokens that must agree, in place of the reader's.
    """
    directory = RunDir(path)
    recipe = _recipe(directory, given or {})
    run, hooks = reopen(directory, recipe, catalogue, console)
    chosen = _add_exporter(hooks, catalogue, to, assignments)
    target = _target(output, directory, to)
    pipeline.preflight(hooks, run)
    tokenizer = models.load_tokenizer(directory.model, code=run.recipe.trusts_model)
    rows = _prompts(hooks, run, prompts)

    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        base = pipeline.load_base(hooks, catalogue, run)
        tuned = [hooks.call("load_adapted", base=base, path=directory.model, run=run)]
        del base
        exported, checked = write_checked(hooks, tuned.pop(), tokenizer, rows, temporary, run, least=least)
        report = {
            "run": directory.path.name,
            "exporter": chosen,
            "ftx": __version__,
            "base": {"reference": _portable(run.model), "fingerprint": models.fingerprint(run.model_path)},
            **checked,
        }
        wrong = report["parity"]["wrong"]
        write_text(temporary / "README.md", model_card(directory, run, exported, report, licences or {}))
        write_text(temporary / "export.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
        place = target if not wrong else target.with_name(f"{target.name}.disagrees")
        shutil.rmtree(place, ignore_errors=True)
        os.replace(temporary, place)
    except OSError as error:
        raise RunError(f"the export could not be written to {target} ({error.strerror or error}).", "Give another --output.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if wrong:
        raise RunError(f"the export does not agree with the run: {'; '.join(wrong)}.", f"It was not put in its place; to look at it: {place}")
    for key in hooks.implementers("export_checked"):
        hooks.ask(key, "export_checked", path=target, report=report, run=run)
    console.say(f"Export: {target}")
    return {"export": str(target), **report}


def write_checked(
    hooks: Hooks, model: Any, tokenizer: Any, prompts: list[Any], path: Path, run: Run, *, least: float | None = None
) -> tuple[Exported, dict[str, Any]]:
    """Write the tuned model into the empty directory `path`, read it back and compare: what was written, and the report of
    it, whose `parity.wrong` lists all that does not agree. Uses `model` up."""
    probe = parity.ask(model, tokenizer, prompts)
    run.say(f"probe: {len(probe.ids)} prompts, {probe.tokens} tokens of the run's answers, in {_dtype(run)} on {run.device}")
    base = _base_agreement(hooks, model, tokenizer, probe, run)
    form, departure, probe = _form(hooks, model, tokenizer, probe, run)
    del model
    written = hooks.call("export_model", model=form, tokenizer=tokenizer, path=path, run=run)
    del form
    gc.collect()  # the reader loads the model once more
    exported = written if isinstance(written, Exported) else Exported(written if isinstance(written, str) else "its weights", LOAD)
    files = _files(path)
    if not any(file["bytes"] for file in files.values()):
        raise PluginError("the exporter wrote nothing.", "export_model must write into the directory that it is given.")
    checked = _check(hooks, path, probe, tokenizer, least, run)
    report = {
        "dtype": _dtype(run),
        "what": exported.what,
        "files": files,
        "base_token_agreement": base,
        "departure": departure,
        "parity": checked,
        "agrees": not checked["wrong"],
    }
    return exported, report


#: How to load what transformers loads.
LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
```"""


# ---- Before anything is loaded


def _recipe(directory: RunDir, given: dict[str, Any]) -> Recipe:
    """The run's own recipe, in the dtype in which it ran; its evaluators and observers have no part in an export."""
    recipe_of(directory)
    if not pipeline.finished_training(directory):
        raise RecipeError(f"{directory} has no trained model yet.", f"Go on with it: ftx resume {directory}")
    ran_in = directory.read_json("manifest.json", {}).get("dtype")
    recipe = merge(read_recipe(directory.recipe), {"dtype": ran_in, **{key: value for key, value in given.items() if value is not None}})
    return replace(recipe, evaluators=(), observers=())


def _add_exporter(hooks: Hooks, catalogue: Catalogue, name: str, assignments: tuple[str, ...]) -> dict[str, Any]:
    """Put the exporter among the run's plugins; what it is, for the report."""
    options: dict[str, Any] = {}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        stage, _, option = path.strip().partition(".")
        if stage != "exporter" or not option or not equals:
            raise OptionError(f"-o {assignment}: not of the form exporter.OPTION=VALUE.", f"See them: ftx plugins show exporter {name}")
        options[option] = Text(text)
    exporter = build(catalogue.load("exporter", name), options, stage="exporter", name=name)
    hooks.add(exporter, "exporter", name)
    hooks.check()
    entry = catalogue.find("exporter", name)
    return {"name": name, "options": as_dict(exporter), "distribution": entry.distribution, "version": entry.version}


def _target(output: str | None, directory: RunDir, name: str) -> Path:
    target = Path(output).expanduser().absolute() if output else directory / "export" / name.replace(":", "-")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RecipeError(f"{target} exists and is not an empty directory.", "Give another --output, or take it away.")
    parent = next(p for p in target.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RecipeError(f"{target} cannot be written: {parent} is {'read-only' if parent.is_dir() else 'a file'}.", "Give another --output.")
    return target


def _prompts(hooks: Hooks, run: Run, count: int) -> list[Any]:
    """Different prompts of the evaluation data, filled up from the training data."""
    found: list[Any] = []
    for reference in (run.recipe.eval_data, run.recipe.data):
        if reference is not None and len(found) < count:
            try:
                rows = hooks.call("format_dataset", dataset=read_dataset(reference, run.ledger), run=run)
            except DataError as error:
                if found:
                    run.say(f"checked with {len(found)} prompts: {error.problem}")
                    break
                raise DataError(error.problem, f"{error.remedy}\nOr give other prompts to check the export with: --eval-data FILE") from error
            found += [prompt for prompt in parity.questions(rows, count) if prompt not in found]
    return found[:count]


# ---- The model, in the form that is exported


def _base_agreement(hooks: Hooks, model: Any, tokenizer: Any, probe: parity.Probe, run: Run) -> float | None:
    """The share of tokens at which the base says the same: where it is all of them, the probe proves nothing about the
    adapter. None where the adapter cannot be switched off."""
    off = hooks.hook.adapter_off(model=model, run=run)
    if off is None:
        return None
    with off:
        share = parity.agreement(parity.TransformersReader(model, tokenizer, name="the base"), probe).share
    run.say(f"the base says the same at {share:.1%} of them")
    if share == 1:
        run.say("note: these prompts do not tell the tuned model from its base: give others with --eval-data")
    return round(share, 6)


def _form(hooks: Hooks, model: Any, tokenizer: Any, probe: parity.Probe, run: Run) -> tuple[Any, dict[str, Any] | None, parity.Probe]:
    """The model to export, how it departs from the run on purpose, and what the export is held to. It stops where the run
    stopped: the base's own configuration may know the end of a text only, and not that of a turn."""
    hook = "exported_form" if hooks.owners("exported_form") else "merge_adapted"
    form = hooks.call(hook, model=model, run=run)
    departs, form = (form.why, form.model) if isinstance(form, Departure) else (None, form)
    ends = sorted(own_ends(form) | end_tokens(tokenizer))
    if ends and getattr(form, "generation_config", None) is not None:
        form.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    if departs is None:
        return form, None, probe
    found = parity.agreement(parity.TransformersReader(form, tokenizer, name="the form"), probe)
    run.say(f"{departs}: against the run, {found}")
    return form, {"why": departs, **found.as_dict()}, parity.ask(form, tokenizer, probe.prompts)


# ---- What was written


def _check(hooks: Hooks, path: Path, probe: parity.Probe, tokenizer: Any, least: float | None, run: Run) -> dict[str, Any]:
    """Read the export back and hold it to the probe: figures for the report, and everything that is `wrong`."""
    reader = hooks.call("read_exported", path=path, run=run) if hooks.owners("read_exported") else parity.read_with_transformers(path, run)
    for method in ("render", "encode", "logits", "answers", "ends"):
        if not callable(getattr(reader, method, None)):
            raise PluginError(f"read_exported gave a {type(reader).__name__}, which has no {method}.", "It must give an ftx.parity.Reader.")
    renderings, texts, wrong = parity.check_text(reader, probe, tokenizer)
    found = parity.agreement(reader, probe)
    equal, ends = parity.check_ends(reader, probe, tokenizer)
    wanted = reader.bounds[0] if least is None else least
    wrong = list(reader.problems) + wrong[:3] + ends
    if found.share < wanted:
        where = f"first in prompt {found.prompt + 1} at token {(found.position or 0) + 1}" if found.prompt is not None else ""
        wrong.append(f"{found.tokens} of {found.total} tokens agree ({found.share:.2%}), at least {wanted:.0%} are wanted, {where}")
    if found.largest_centred > reader.bounds[1] * found.largest_logit:
        wrong.append(f"a logit differs by {found.largest_centred:.3g} (less what all share), and the largest is {found.largest_logit:.3g}")
    report = {
        "reader": reader.name,
        "prompts": len(probe.ids),
        **found.as_dict(),
        "least": wanted,
        "answers_equal": equal,
        "renderings": renderings,
        "texts": texts,
        "wrong": wrong,
    }
    run.say(f"parity: read back by {reader.name}, {found}")
    run.say(f"parity: {equal} of {len(probe.ids)} answers are equal, {renderings} renderings of the chat template and the tokens of {texts} texts compared")
    return report


def _files(path: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for file in sorted(file for file in path.rglob("*") if file.is_file()):
        with open(file, "rb") as stream:
            found[file.relative_to(path).as_posix()] = {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
    return found


def _portable(reference: str) -> str:
    """A reference that says nothing of this machine's directories."""
    return Path(reference).name if Path(reference).expanduser().exists() and reference not in models.installed() else reference


def _dtype(run: Run) -> str:
    return str(run.dtype).removeprefix("torch.")
