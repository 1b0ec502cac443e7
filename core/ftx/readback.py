"""Reading a finished run back: its base, and its tuned model through the adapter's own hooks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftx import models, pipeline
from ftx.catalogue import Catalogue
from ftx.console import Console, file_table, score_table
from ftx.drift import heed_base
from ftx.errors import ModelError, RecipeError, RunError
from ftx.evaluate import compare_phases, evaluate_phase, write_items
from ftx.hooks import Hooks
from ftx.ledger import Ledger
from ftx.manifest import add_notes, fingerprints
from ftx.prepare import read_questions
from ftx.recipe import Recipe, merge, read_recipe, resolve
from ftx.run import Run, RunDir, Score, write_text

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def recipe_of(directory: RunDir) -> Recipe:
    """The recipe of a run; RecipeError if the directory is not one."""
    if not directory.recipe.is_file():
        raise RecipeError(f"{directory}: not a run (it has no recipe.yaml).", "Give the directory that `ftx run` printed.")
    return merge(read_recipe(directory.recipe), {})


def reopen(directory: RunDir, recipe: Recipe, catalogue: Catalogue, console: Console) -> tuple[Run, Hooks]:
    """The Run and the hooks of a finished run, with `recipe` (its own, or with other evaluators)."""
    resolved, hooks = resolve(recipe, catalogue)
    try:
        run = pipeline.open_run(resolved, hooks, console)
    except ModelError as error:
        raise ModelError(error.problem, f"{error.remedy}\nIf the base lies elsewhere now, name it under `model:` in {directory.recipe}") from error
    models.refuse_pickles(directory.model)
    heed_base(directory, fingerprints(run))
    run.directory = directory
    return run, hooks


def evaluate_again(
    path: str, evaluators: tuple[str, ...], eval_data: str | None, assignments: tuple[str, ...], catalogue: Catalogue, console: Console
) -> pipeline.Outcome:
    """Evaluate a finished run's base and tuned model; its scores and items get the new ones in place of the old ones.

    An evaluator's are replaced as a whole, and only where it gave scores and failed nowhere: one that raises, or a dry run,
    leaves what there was. Where there was nothing, what it gave before it failed is kept.
    """
    directory = RunDir(path)
    recipe_of(directory)
    if not pipeline.finished_training(directory):
        raise RecipeError(f"{directory} has no trained model yet.", f"Go on with it: ftx resume {path}")
    recipe = merge(read_recipe(directory.recipe), {"evaluator": evaluators, "eval_data": eval_data}, assignments)
    if not recipe.evaluators:
        raise RecipeError("no evaluator is named, and the run has none of its own.", "Add --evaluator NAME: ftx plugins")
    run, hooks = reopen(directory, replace(recipe, observers=()), catalogue, console)
    pipeline.preflight(hooks, run)
    tokenizer = models.load_tokenizer(directory.model, code=run.recipe.trusts_model)
    questions = read_questions(hooks, run)

    model = pipeline.load_base(hooks, catalogue, run)
    try:
        base, failed = evaluate_phase("base", hooks, pipeline.generator(model, tokenizer, console), questions, run, hold=True)
        model = hooks.call("load_adapted", base=model, path=directory.model, run=run)
        tuned, failed_tuned = evaluate_phase("tuned", hooks, pipeline.generator(model, tokenizer, console), questions, run, hold=True)
        changes, failed_changes = compare_phases(hooks, [], run, hold=True)
    finally:
        add_notes(directory, run.notes)  # what was asked has been paid for, whatever came of it
    failed |= failed_tuned | failed_changes

    before = [Score(**entry) for entry in directory.read_json("scores.json", [])]
    kept = {score.evaluator for score in before} & set(failed)
    scores = [score for score in base + tuned + changes if score.evaluator not in kept]
    replaced = {score.evaluator for score in scores}
    for name in replaced:
        write_items(name, run)
    pipeline.write_scores(directory, [score for score in before if score.evaluator not in replaced] + scores)
    console.table(*score_table(scores))
    if failed:
        raise RunError(f"evaluator '{next(iter(failed))}' failed: {next(iter(failed.values()))}", "The scores that there were are kept.")
    return pipeline.Outcome(directory, scores, notes=run.notes)


def evaluate_files(evaluators: tuple[str, ...], assignments: tuple[str, ...], catalogue: Catalogue, console: Console) -> list[Score]:
    """Scores of evaluators that read files of answers or judgments and need no model (`generate` is None for them)."""
    if not evaluators:
        raise RecipeError("neither a run nor an evaluator is given.", "ftx eval RUN, or --evaluator NAME with options that name its files.")
    recipe, hooks = resolve(Recipe(evaluators=merge({}, {"evaluator": evaluators}, assignments).evaluators), catalogue, training=False)
    run = Run(recipe=recipe, ledger=Ledger(), hooks=hooks, say=console.say)
    pipeline.preflight(hooks, run)
    scores: list[Score] = []
    for key, evaluation in hooks.each("evaluate_model", generate=None, dataset=None, run=run):
        scores += [score.stamped(key.partition(":")[2], score.phase) for score in evaluation.scores] if evaluation else []
    console.table(*file_table(scores))
    return scores


def render(paths: Sequence[str], observer: str, assignments: tuple[str, ...], catalogue: Catalogue, output: Path | None) -> Path:
    """Write the page that `observer` makes of one run or of several; the file. RecipeError if a path is no run or there is no page."""
    directories = [RunDir(path) for path in paths]
    recipes = [recipe_of(directory) for directory in directories]
    own = [choice for choice in recipes[0].observers if choice.name == observer] if len(recipes) == 1 else []
    listed = {"observers": [{"name": choice.name, **choice.options} for choice in own]}
    wanted = Recipe(observers=merge(listed, {"observer": (observer,)}, assignments).observers)
    _, hooks = resolve(wanted, catalogue, training=False)
    page = next((page for _, page in hooks.each("render_runs", directories=directories) if page is not None), None)
    if page is None:
        raise RecipeError(f"observer '{observer}' makes no page of runs.", "Name one that implements render_runs: see docs/hooks.md.")
    file = (output.expanduser() if output else directories[0] / ("report.html" if len(directories) == 1 else "compare.html")).absolute()
    try:
        write_text(file, page)
    except OSError as error:
        raise RunError(f"{file} cannot be written ({error.strerror}).", "Give another --output.") from error
    return file


def load_merged(directory: RunDir, catalogue: Catalogue, run: Run, dtype: torch.dtype) -> PreTrainedModel:
    """The tuned model of a run as a plain model, to start another run from, its weights in `dtype`."""
    recipe = replace(recipe_of(directory), evaluators=(), observers=(), device=run.device, dtype=str(dtype).removeprefix("torch."))
    resolved, hooks = resolve(recipe, catalogue)
    earlier = pipeline.open_run(resolved, hooks, Console(quiet=True))  # what it stands on has been compared for `run`: see heed_base
    earlier.directory = directory
    model: Any = pipeline.load_base(hooks, catalogue, earlier)
    model = hooks.call("load_adapted", base=model, path=directory.model, run=earlier)
    merged: PreTrainedModel = hooks.call("merge_adapted", model=model, run=earlier)
    return merged
