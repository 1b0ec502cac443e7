"""The run, top to bottom."""

from __future__ import annotations

import logging
import math
import os
import shutil
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ftx import models
from ftx.catalogue import Catalogue
from ftx.checkpoints import sync
from ftx.console import Console, score_table
from ftx.device import best_dtype, pick_device
from ftx.directory import new_directory, writing
from ftx.drift import heed_base, heed_drift
from ftx.errors import FtxError, Interrupted, PluginError, RecipeError, RunError
from ftx.evaluate import compare_phases, evaluate_phase
from ftx.foresight import decide
from ftx.generate import Generate
from ftx.hooks import Hooks
from ftx.ledger import Ledger
from ftx.lock import locked
from ftx.manifest import fingerprints, weights_of, write_manifest
from ftx.memory import record
from ftx.prepare import Split, check_row_types, prepare, settle
from ftx.recipe import Recipe, resolve, to_yaml
from ftx.run import Run, RunDir, Score, write_lines, write_text

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class Outcome:
    """What a run came to: its directory, all scores, and evaluators that failed (name -> error)."""

    directory: RunDir
    scores: list[Score]
    failed: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"run": str(self.directory), "scores": [score.as_dict() for score in self.scores], **self.notes}


def train(
    recipe: Recipe,
    *,
    catalogue: Catalogue,
    console: Console,
    output: str | None = None,
    resume: RunDir | None = None,
    accept_drift: bool = False,
    changed: dict[str, Any] | None = None,
    force: bool = False,
) -> Outcome:
    """Run a recipe into a new directory (`output`), or go on with one (`resume`), whose recipe is `changed` in these options.
    One that would not fit into memory is refused, unless `force`. Raises FtxError of every kind."""
    asked, wanted = recipe, [choice.name for choice in recipe.observers]
    recipe, hooks = resolve(recipe, catalogue)
    check_row_types(hooks)
    directory = resume or new_directory(output, recipe)
    run = begin(recipe, hooks, console)
    asked, recipe = replace(asked, dtype=run.recipe.dtype), run.recipe
    preflight(hooks, run)
    drifted = resume is not None and heed_drift(resume, run, catalogue, accept=accept_drift)
    if resume is None and recipe.start is not None:
        heed_base(RunDir(recipe.start), fingerprints(run)[1:])
    if left_out := [name for name in wanted if name not in [choice.name for choice in recipe.observers]]:
        console.say(f"not installed, so the run goes without: observer {', '.join(left_out)}")

    tokenizer = models.load_tokenizer(run.model_path, code=run.recipe.trusts_model)
    splits, report = prepare(hooks, tokenizer, run)
    predicted: dict[str, Any] = {}
    if resume is None:
        case = decide(asked, splits["train"].tokens, run, catalogue, force=force)
        if case is not None:
            recipe, hooks, predicted = case.recipe, case.hooks, case.prediction.as_dict()

    with locked(directory, make=resume is None), writing(directory, hooks, run, fresh=resume is None), console:
        if resume is not None:
            if drifted:
                forget_scores(resume)
            record(directory, recipe, changed or {}, run)
        write_manifest(directory, run, catalogue)
        directory.write_json("audit.json", report)
        write_lines(directory / "ledger.jsonl", run.ledger.as_rows())
        if resume is None:
            directory.write_json("plan.json", {"predicted": predicted})
            write_text(directory.recipe, to_yaml(recipe))  # last: a directory with a recipe has all of these
        hooks.hook.run_started(run=run)
        for name, split in splits.items():
            hooks.hook.dataset_encoded(dataset=split.tokens, split=name, run=run)

        model = load_base(hooks, catalogue, run)
        questions = splits["eval"].rows if "eval" in splits else None
        scores, failed = base_scores(hooks, model, tokenizer, questions, run, console)

        seed_everything(run.seed)
        if resume is not None and finished_training(directory):
            console.say("The training was finished; evaluating what it gave.")
            model = hooks.call("load_adapted", base=model, path=directory.model, run=run)
        else:
            model = hooks.call("adapt_model", model=model, run=run)
            describe_trainable(model, run)
            model = fit(hooks, model, tokenizer, splits, run, console, resume)
            save_model(hooks, model, tokenizer, run)

        tuned, failed_tuned = evaluate_phase("tuned", hooks, generator(model, tokenizer, console), questions, run)
        changes, failed_changes = compare_phases(hooks, [score.evaluator for score in tuned], run)
        scores += tuned + changes
        failed |= failed_tuned | failed_changes
        write_scores(directory, scores)
        run.notes |= {"weights": weights_of(directory.model), "source_rows": settle(splits, run), "finished": True}
        write_manifest(directory, run, catalogue)
        finish_plan(run)
        hooks.hook.run_finished(run=run, scores=scores)

    console.table(*score_table(scores))
    console.say(f"Run: {directory}")
    if failed:
        raise RunError(
            f"evaluator '{next(iter(failed))}' failed: {next(iter(failed.values()))}", f"The model is trained and kept. Evaluate again: ftx eval {directory}"
        )
    return Outcome(directory, scores, failed, run.notes)


# --------------------------------------------------------------------------------------------------------------------
# Before the directory: whatever fails here leaves nothing behind
# --------------------------------------------------------------------------------------------------------------------


def begin(recipe: Recipe, hooks: Hooks, console: Console) -> Run:
    """The Run before anything is read: device, dtype and the model's files."""
    if recipe.data is None:
        raise RecipeError("no training data is given.", "Add --data FILE.")
    return open_run(recipe, hooks, console)


def open_run(recipe: Recipe, hooks: Hooks, console: Console) -> Run:
    """A Run for a recipe, whether it trains or reads back."""
    quiet_libraries()
    if recipe.trust_remote_code is not None and not recipe.trusts_model:
        problem = f"trust_remote_code is granted to '{recipe.trust_remote_code}', but the model is '{recipe.start or recipe.model}'."
        raise RecipeError(problem, "It holds for one model, by name. Drop it, or name the model whose code you have read.")
    start = None
    if recipe.start is not None:
        start = RunDir(recipe.start)
        if not finished_training(start):
            raise RecipeError(f"{recipe.start}: no run with a trained model.", "Give the directory of a finished run.")
        models.refuse_pickles(start.model)
    path = start.model if start else models.resolve(recipe.model, console.say, code=recipe.trusts_model)
    device = pick_device(recipe.device)
    if recipe.dtype == "auto":  # from here on it is a name: a repeat does not depend on what this machine is good at
        recipe = replace(recipe, dtype=str(best_dtype(device)).removeprefix("torch."))
    return Run(
        recipe=recipe,
        ledger=Ledger(skip_bad_rows=recipe.skip_bad_rows),
        seed=recipe.seed,
        device=device,
        dtype=getattr(__import__("torch"), recipe.dtype),
        model=str(start) if start else recipe.model,
        model_path=path,
        hooks=hooks,
        say=console.say,
    )


def preflight(hooks: Hooks, run: Run) -> None:
    """Every reason why the run cannot work, at once."""
    reasons = [reason for _, found in hooks.each("preflight", run=run) for reason in found or []]
    if run.recipe.start and hooks.owners("quantization_config"):
        reasons.append("--from starts from a merged model, which is not quantised again: drop the quantizer, or use --adapter lora.")
    if reasons:
        raise FtxError("\n       ".join(reasons), "Nothing was loaded or written.")


# --------------------------------------------------------------------------------------------------------------------
# Inside the directory
# --------------------------------------------------------------------------------------------------------------------


def load_base(hooks: Hooks, catalogue: Catalogue, run: Run) -> Any:
    """The model that the run starts from, as its base phase sees it."""
    if run.recipe.start is not None:
        from ftx.readback import load_merged

        model = load_merged(RunDir(run.recipe.start), catalogue, run, base_dtype(hooks, run))
    else:
        quantized = hooks.hook.quantization_config(run=run)
        model = models.load_model(run.model_path, dtype=base_dtype(hooks, run), device=run.device, quantization_config=quantized, code=run.recipe.trusts_model)
    hooks.hook.model_loaded(model=model, run=run)
    return model


def base_dtype(hooks: Hooks, run: Run) -> Any:
    """Of the base's weights: the adapter's wish, or the run's dtype, in which the run computes."""
    return hooks.hook.base_dtype(run=run) or run.dtype


def base_scores(hooks: Hooks, model: Any, tokenizer: Any, questions: Dataset | None, run: Run, console: Console) -> tuple[list[Score], dict[str, str]]:
    """Evaluate the base by every evaluator that has not measured it before the run was interrupted."""
    assert run.directory is not None
    kept = [Score(**entry) for entry in run.directory.read_json("scores.json", []) if entry["phase"] == "base"]
    measured = {score.evaluator for score in kept}
    asked = hooks.without(key for key in hooks.implementers("evaluate_model") if key.partition(":")[2] in measured) if measured else hooks
    scores, failed = evaluate_phase("base", asked, generator(model, tokenizer, console), questions, run)
    write_scores(run.directory, kept + scores)
    return kept + scores, failed


def fit(hooks: Hooks, model: Any, tokenizer: Any, splits: dict[str, Split], run: Run, console: Console, resume: RunDir | None) -> Any:
    """Train; the trained model."""
    from ftx.callbacks import Checkpoints, Interrupt, Metrics
    from ftx.checkpoints import rewind, step_of
    from ftx.peak import Peak
    from ftx.watch import Watch

    assert run.directory is not None
    checkpoint = rewind(run.directory, console.say)
    if resume is not None:
        console.say(f"Going on from step {step_of(checkpoint)}." if checkpoint else "There was no checkpoint: starting over.")
    interrupt, peak = Interrupt(console), Peak(run, checkpoint=checkpoint)
    callbacks = [interrupt, Metrics(run, console), Watch(run), peak, Checkpoints(run)]  # the last marks what the others put into a checkpoint
    for _, more in hooks.each("trainer_callbacks", run=run):
        callbacks += more or []
    evaluation = splits["eval"].tokens if "eval" in splits else None
    trainer = hooks.call(
        "make_trainer", model=model, tokenizer=tokenizer, train_dataset=splits["train"].tokens, eval_dataset=evaluation, callbacks=callbacks, run=run
    )
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        interrupt.restore()
        peak.close()
    if interrupt.asked:
        raise Interrupted("interrupted.", f"Go on with: ftx resume {run.directory}")
    return trainer.model


def save_model(hooks: Hooks, model: Any, tokenizer: Any, run: Run) -> None:
    """Write model/ atomically: the adapter or the full weights, with tokenizer and chat template."""
    assert run.directory is not None
    temporary = run.directory / f".model.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        hooks.hook.save_adapted(model=model, path=temporary, run=run)
        tokenizer.save_pretrained(temporary)
        pickles = [file.name for file in temporary.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
        if pickles or not any(temporary.rglob("*.safetensors")):
            author = next(key.partition(":")[2] for key, _ in hooks.list_name_plugin() if key.startswith("adapter:"))
            raise PluginError(f"adapter '{author}' saved {', '.join(pickles) or 'no safetensors'}.", "save_adapted must write safetensors and no pickle.")
        for path in [*temporary.rglob("*"), temporary]:
            sync(path)
        shutil.rmtree(run.directory.model, ignore_errors=True)
        os.replace(temporary, run.directory.model)
        sync(run.directory.path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def finish_plan(run: Run) -> None:
    from ftx.peak import finish

    finish(run)


def finished_training(directory: RunDir) -> bool:
    return directory.model.is_dir()


def generator(model: Any, tokenizer: Any, console: Console) -> Generate:
    """The generator of one phase, with progress on the console."""
    bars: list[Any] = []

    def progress(done: int, total: int) -> None:
        if not bars:
            bars.append(console.begin("answers", total))
        bars[0].update(done)
        if done >= total:
            bars.pop().end()

    return Generate(model, tokenizer, progress=progress, say=console.say)


def write_scores(directory: RunDir, scores: list[Score]) -> None:
    directory.write_json("scores.json", [score.as_dict() for score in scores])


def forget_scores(directory: RunDir) -> None:
    """What was measured of another model, by other rules or on other data is not put beside what is measured from now on."""
    shutil.rmtree(directory / "eval", ignore_errors=True)
    directory.scores.unlink(missing_ok=True)


def describe_trainable(model: Any, run: Run) -> None:
    """Print how much trains, and refuse a model in which nothing does."""
    parameters = list(model.parameters())
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise PluginError("the adapter left nothing to train.", "Check its target_modules against the model's module names.")
    count, total = sum(map(_numbers, trainable)), sum(map(_numbers, parameters))
    size = sum(p.numel() * p.element_size() for p in trainable)
    run.notes["parameters"] = {"trainable": count, "stored": total, "trainable_bytes": size}
    stands, computes = (str(dtype).removeprefix("torch.") for dtype in (getattr(model, "dtype", run.dtype), run.dtype))
    kept = f"base in {stands}" if stands == computes else f"base in {stands}, computing in {computes}"
    run.say(f"trains {count:,} of {total:,} parameters ({count / total:.2%}, {size / 2**20:.1f} MiB), {kept} on {run.device}")


def _numbers(parameter: Any) -> int:
    """How many numbers a parameter stands for: packed quantised ones keep their true shape beside them."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return math.prod(shape) if shape is not None else parameter.numel()


def seed_everything(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def quiet_libraries() -> None:
    """The libraries' own bars and chatter would break plain lines and --json; warnings go to log.txt."""
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("BITSANDBYTES_NOWELCOME", "1")
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.NullHandler())
