"""When memory runs out: what was in use, what was planned, what to change, and a resume with that change."""

from __future__ import annotations

import errno
import hashlib
import re
import traceback
from collections.abc import Iterator
from typing import Any

from ftx.catalogue import Catalogue
from ftx.errors import RecipeError, RunError
from ftx.machine import said
from ftx.manifest import sha256
from ftx.measure import resident
from ftx.recipe import Recipe, merge, read_recipe, resolve, to_yaml
from ftx.run import Run, RunDir, write_text

BATCH, ACCUMULATION, CHECKPOINTING = "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"
#: Trainer options (transformers' names) that change how much memory a run takes and not what it trains.
HARMLESS = (BATCH, ACCUMULATION, CHECKPOINTING, "per_device_eval_batch_size")
#: Words in which torch, the operating system and bitsandbytes say it.
SAID = re.compile(r"out of memory|can't allocate memory|not enough memory|cannot allocate memory|unable to allocate|cudaErrorMemoryAllocation", re.IGNORECASE)
ASKED = re.compile(r"tried to allocate ([\d.]+) ?(bytes|KiB|MiB|GiB)?", re.IGNORECASE)
UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def ran_out(error: BaseException) -> BaseException | None:
    """The error in the chain of causes that says there was no memory, or None."""
    for one in causes(error):
        named = isinstance(one, MemoryError) or type(one).__name__ == "OutOfMemoryError" or getattr(one, "errno", None) == errno.ENOMEM
        if named or (isinstance(one, RuntimeError) and SAID.search(str(one))):
            return one
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    seen = set[int]()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        one = one.__cause__ or one.__context__


def memory_error(error: BaseException, directory: RunDir, run: Run) -> RunError | None:
    """What to tell a person whose run found no memory: the plan beside what was in use, and the change; None for another error.

    Whatever the failed step still holds is let go first: writing the message takes memory too.
    """
    cause = ran_out(error)
    if cause is None:
        return None
    while_ = stage_of(error)
    for one in causes(error):
        traceback.clear_frames(one.__traceback__)
    used, limit = in_use(run.device)
    asked = ASKED.search(str(cause))
    wanted = f"{said(float(asked[1]) * UNITS[(asked[2] or 'bytes').lower()])} more were asked for; " if asked else ""
    plan = directory.read_json("plan.json", {}).get("predicted", {})
    lines = [f"out of memory {while_}: {wanted}{used}{limit}."]
    if "peak_memory" in plan:
        kinds = ", ".join(f"{kind} {said(size)}" for kind, size in sorted(plan.get("by_kind", {}).items(), key=lambda one: -one[1])[:4])
        lines.append(f"The plan was {said(plan['peak_memory'])} of tensors" + (f" ({kinds})" if kinds else "") + ", beside the program itself.")
    return RunError("\n".join(lines), "\n".join(remedies(while_, directory, run)))


def stage_of(error: BaseException) -> str:
    """Where the run was, told from the functions of the pipeline that the error came through."""
    names = {frame.name for one in causes(error) for frame in traceback.extract_tb(one.__traceback__)}
    for name, words in (("load_base", "while the model was loaded"), ("fit", "while training"), ("base_scores", "while the base was evaluated")):
        if name in names:
            return words
    return "after the training" if "save_model" in names else "during the run"


def in_use(device: str) -> tuple[str, str]:
    """What was in use, and what limits it, in words."""
    if device == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info()
        return f"{said(torch.cuda.max_memory_allocated())} of tensors were in use", f" on a device of {said(total)}, of which {said(free)} are free now"
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    bound = f", and the process may have {said(soft)} of addresses (ulimit -v)" if soft != resource.RLIM_INFINITY else ""
    return f"the process had {said(resident())} resident at most", bound


def remedies(while_: str, directory: RunDir, run: Run) -> list[str]:
    """What to do, the cheapest change first."""
    options = run.recipe.trainer.options if run.recipe.trainer else {}
    if "loaded" in while_:
        return ["Quantise the base (--adapter qlora, or --quantizer nf4), take a smaller model, or see what fits: ftx plan"]
    if "training" not in while_ or BATCH not in options:
        return [f"Make room, then: ftx resume {directory}"]
    smaller = smaller_batch(options)
    changes = [f"-o trainer.{BATCH}={smaller}"] if smaller else []
    if not smaller and not options.get(CHECKPOINTING):
        changes = [f"-o trainer.{CHECKPOINTING}=true"]
    if changes:
        kept = "The effective batch stays as it is" if smaller else "Activations are computed again instead of kept"
        return [f"{kept}: ftx resume {directory} {' '.join(changes)}"]
    return [f"Start again with shorter rows or a quantised base: ftx run {directory.recipe} -o trainer.max_length=N --adapter qlora --output NEW"]


def smaller_batch(options: dict[str, Any]) -> int | None:
    """The next smaller micro-batch that keeps the effective batch: its largest divisor of at most half; None at 1."""
    size, rows = options[BATCH], options[BATCH] * options.get(ACCUMULATION, 1)
    return next((one for one in range(size // 2, 0, -1) if rows % one == 0), None)


# ---- Resume with a change


def with_changes(directory: RunDir, assignments: tuple[str, ...], catalogue: Catalogue) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a run with `-o` assignments, and what they change: option -> [before, after].

    Only HARMLESS options may change. A new micro-batch brings the accumulation that keeps the effective batch. RecipeError.
    """
    content = read_recipe(directory.recipe)
    before, _ = resolve(merge(content, {}), catalogue)
    after, _ = resolve(merge(content, {}, assignments), catalogue)
    changes = differences(before, after)
    if refused := [name for name in changes if name.partition(".")[2] not in HARMLESS or not name.startswith("trainer.")]:
        raise RecipeError(
            f"a run cannot go on with another {refused[0]}: it would train something else.",
            f"These may change: {', '.join(f'trainer.{name}' for name in HARMLESS)}. For the rest start anew: ftx run {directory.recipe} --output NEW",
        )
    old, new = (one.trainer.options if one.trainer else {} for one in (before, after))
    if f"trainer.{BATCH}" in changes and f"trainer.{ACCUMULATION}" not in changes:
        rows = old[BATCH] * old.get(ACCUMULATION, 1)
        if rows % new[BATCH] == 0:
            after, _ = resolve(merge(content, {}, (*assignments, f"trainer.{ACCUMULATION}={rows // new[BATCH]}")), catalogue)
            changes, new = differences(before, after), after.trainer.options if after.trainer else {}
    if old.get(BATCH, 1) * old.get(ACCUMULATION, 1) != new.get(BATCH, 1) * new.get(ACCUMULATION, 1):
        rows = old.get(BATCH, 1) * old.get(ACCUMULATION, 1)
        raise RecipeError(
            f"{new[BATCH]} rows a pass and {new[ACCUMULATION]} passes a step are not the {rows} rows a step that the run began with.",
            f"Give a {BATCH} that divides {rows}; {ACCUMULATION} follows.",
        )
    return after, changes


def record(directory: RunDir, recipe: Recipe, changed: dict[str, Any], run: Run) -> None:
    """Write what a resume changes into recipe.yaml, and with what earlier ones changed into the manifest's `changed`. The manifest
    says first what recipe.yaml is about to be (`changing`): killed between the two, it is no edit."""
    manifest = settled(directory.read_json("manifest.json", {}), directory)
    earlier = manifest.get("changed", [])
    if changed:
        text = to_yaml(recipe)
        begun = {"recipe": hashlib.sha256(text.encode()).hexdigest(), "changed": changed}
        directory.write_json("manifest.json", manifest | {"changing": begun})
        write_text(directory.recipe, text)
        for name, (before, after) in changed.items():
            run.say(f"{name}: {before} -> {after}")
    if earlier or changed:
        run.notes["changed"] = [*earlier, *([changed] if changed else [])]


def settled(manifest: dict[str, Any], directory: RunDir) -> dict[str, Any]:
    """A run's manifest, with the change of recipe.yaml that a process wrote and was killed behind."""
    begun = manifest.get("changing")
    if not begun or sha256(directory.recipe) != begun["recipe"]:
        return manifest
    return manifest | {"recipe": begun["recipe"], "changed": [*manifest.get("changed", []), begun["changed"]]}


def differences(before: Recipe, after: Recipe) -> dict[str, Any]:
    """stage.option -> [before, after] of every option that is not equal in two resolved recipes of the same plugins."""
    pairs = [{(stage, choice.name): choice.options for stage, choice in recipe.choices()} for recipe in (before, after)]
    return {
        f"{stage}.{option}": [pairs[0].get((stage, name), {}).get(option), value]
        for (stage, name), options in pairs[1].items()
        for option, value in options.items()
        if pairs[0].get((stage, name), {}).get(option) != value
    }
