"""From a recipe to its plan: what it needs on one machine and one data set, what may be decided, and what would make it fit."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftx.authoring import declared
from ftx.catalogue import Catalogue
from ftx.errors import FtxError, first_line
from ftx.hooks import Hooks
from ftx.machine import Machine, compute_bytes, said
from ftx.plan import Prediction, predict, shaped, steps_of
from ftx.recipe import Choice, Recipe, resolve
from ftx.rows import Rows, computed, largest_batches, largest_packs, packed, typical_batch
from ftx.shape import Shape, read_shape
from ftx.speed import known

if TYPE_CHECKING:
    from ftx.run import Run

log = logging.getLogger("ftx")

MICRO, TIMES, AGAIN = "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"
LENGTH, PACKING = "max_length", "packing"
#: Lengths are tried in multiples of this, and none below SHORTEST is advised.
GRAIN, SHORTEST = 64, 128
#: transformers' name of Adam with states in 8 bits, which bitsandbytes has for GPUs.
SMALL_OPTIMIZER = "adamw_8bit"
FALLBACK_LENGTH = 1024


@dataclass(frozen=True)
class Case:
    """One recipe, resolved, with its prediction. `wanted` is the recipe before it was resolved."""

    wanted: Recipe
    recipe: Recipe
    hooks: Hooks
    prediction: Prediction


@dataclass(frozen=True)
class Change:
    """A change that makes a plan smaller: what it is, how a recipe says it, and what the run needs with it and all before it."""

    what: str
    option: str
    case: Case


@dataclass(frozen=True)
class Planner:
    """Predicts a recipe and its variants for one machine, with one model and one data set (or none)."""

    catalogue: Catalogue
    run: Run
    machine: Machine
    config: Path
    rows: Rows | None = None

    def case(self, wanted: Recipe, *, length: int | None = None) -> Case:
        """The prediction for a recipe; without data on sequences of `length`, or of its max_length."""
        recipe, hooks = resolve(wanted, self.catalogue)
        prediction = self.at(recipe, hooks, length)
        if self.rows is not None:
            prediction = self._with_data(recipe, hooks, prediction)
        return Case(wanted, recipe, hooks, prediction)

    def at(self, recipe: Recipe, hooks: Hooks, length: int | None = None) -> Prediction:
        """The prediction for a resolved recipe on rows of at most `length` tokens, if that is given."""
        run = replace(self.run, recipe=recipe, hooks=hooks)
        found = [predict(run, hooks, shape) for shape in self.shapes(recipe, hooks, length)]
        return replace(max(found, key=lambda one: one.peak_memory), evaluation=max(one.evaluation for one in found))

    def longest(self, recipe: Recipe, hooks: Hooks, most: int) -> int:
        """The longest rows, up to `most` tokens, with which a resolved recipe fits; 0 if none do."""
        return longest_fitting(lambda length: self.has_room(self.at(recipe, hooks, length)), most)

    def shapes(self, recipe: Recipe, hooks: Hooks, length: int | None = None) -> Iterator[Shape]:
        """The model with each batch that may need most."""
        size = compute_bytes(recipe.dtype, self.machine.device)
        shape = replace(self.model, device=self.machine.device, loaded=size, compute=size)
        options = _options(recipe)
        micro, longest = options.get(MICRO, 1), length or options.get(LENGTH)
        if self.rows is None:
            trainer = next(plugin for key, plugin in hooks.list_name_plugin() if key.startswith("trainer:"))
            length = longest or min(FALLBACK_LENGTH, shape.context or FALLBACK_LENGTH)
            yield shape.with_batch((length,) * micro * declared(type(trainer), "sequences"))
        elif options.get(PACKING) and longest:
            yield shape.with_batch(*largest_packs(self.rows.lengths.sum(1).tolist(), self.rows.supervised.tolist(), micro, longest))
        else:
            for batch in largest_batches(self.rows, micro, longest):
                yield shape.with_batch(*batch)

    @functools.cached_property
    def model(self) -> Shape:
        return read_shape(self.config)

    def fits(self, case: Case) -> bool:
        return self.has_room(case.prediction)

    def has_room(self, prediction: Prediction) -> bool:
        room = self.machine.room()
        return room is None or prediction.needed <= room

    def _with_data(self, recipe: Recipe, hooks: Hooks, prediction: Prediction) -> Prediction:
        assert self.rows is not None
        options, rows = _options(recipe), self.rows
        packs = len(packed(rows.lengths.sum(1).tolist(), options[LENGTH])) if options.get(PACKING) and options.get(LENGTH) else len(rows.lengths)
        steps = steps_of(packs, options)
        passes = (
            steps * options.get(MICRO, 1) * options.get(TIMES, 1) / max(1, packs) if options.get("max_steps", -1) > 0 else options.get("num_train_epochs", 1)
        )
        speed = known(recipe, prediction.shape, self.machine)
        return replace(
            prediction,
            seconds=None if speed is None else speed * passes * self._positions(recipe, hooks, prediction),
            tokens=round(rows.tokens * passes),
            supervised_tokens=round(int(rows.supervised.sum()) * passes),
            steps=steps,
            disk=disk_of(self.config, options, steps, prediction),
        )

    def _positions(self, recipe: Recipe, hooks: Hooks, prediction: Prediction) -> float:
        """That one pass over the rows computes. Whether batches are joined or share what they begin with a typical one says: the largest has
        rows of one length, with nothing to gain."""
        assert self.rows is not None
        options = _options(recipe)
        if options.get(PACKING):
            return self.rows.tokens
        micro, run = options.get(MICRO, 1), replace(self.run, recipe=recipe, hooks=hooks)
        shape = shaped(run, hooks, prediction.asked.with_batch(*typical_batch(self.rows, micro)))
        return computed(self.rows, micro, joined=shape.joined, shared=shape.shared > 0)


def disk_of(model: Path, options: dict[str, Any], steps: int, prediction: Prediction) -> int:
    """Bytes of the run directory at its end: the model in float32 as the adapter saves it, and each checkpoint that is kept
    with its optimizer, all with the tokenizer's files."""
    shape, parts = prediction.shape, prediction.parts
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "tokenizer_config.json", "chat_template.jinja")
    tokenizer = sum((model / name).stat().st_size for name in names if (model / name).is_file())
    trained = 4 * shape.trained + tokenizer
    every = {"no": 0, "steps": options.get("save_steps") or 500}.get("steps" if options.get("save_steps") else options.get("save_strategy", "no"), -1)
    saved = steps // every if every > 0 else math.ceil(options.get("num_train_epochs", 1)) if every < 0 else 0
    kept = min(saved, options.get("save_total_limit") or saved)
    return trained + kept * (trained + parts.get("optimizer", 0))


# ---- what may be changed


def changes(planner: Planner, case: Case, *, chosen: dict[str, Any] | None = None) -> Iterator[Change]:
    """Changes one after the other, each on top of those before it, cheapest first; the effective batch stays what it is.

    Smaller micro-batch, checkpointing, shorter rows, a quantizer, an 8-bit optimizer. With `chosen`, options that the
    recipe names itself, only the first two, which change no result, and only where they are not among those.
    """
    options, kept = _options(case.recipe), chosen or {}
    if {MICRO, TIMES} <= options.keys() and not {MICRO, TIMES} & kept.keys():
        while options[MICRO] > 1 and not planner.fits(case):
            micro = next(size for size in range(options[MICRO] // 2, 0, -1) if options[MICRO] % size == 0)
            times = options[TIMES] * options[MICRO] // micro
            case = planner.case(with_options(case.wanted, **{MICRO: micro, TIMES: times}))
            options = _options(case.recipe)
            if planner.fits(case) or micro == 1:
                yield Change(f"{micro} rows at a time, {times} times a step", f"-o trainer.{MICRO}={micro} -o trainer.{TIMES}={times}", case)
    if AGAIN in options and not options[AGAIN] and kept.get(AGAIN) is None and not planner.fits(case):
        case = planner.case(with_options(case.wanted, **{AGAIN: True}))
        yield Change("recomputed activations", f"-o trainer.{AGAIN}=true", case)
    if chosen is not None or planner.fits(case):
        return
    shorter = _shorter(planner, case)
    if shorter is not None:
        yield shorter
        return
    packed = _quantized(planner, case)
    if packed is not None:
        case = packed.case
        yield packed
    optim = _options(case.recipe).get("optim")
    if optim is not None and "8bit" not in optim and planner.machine.device == "cuda" and not planner.fits(case):
        case = planner.case(with_options(case.wanted, optim=SMALL_OPTIMIZER))
        yield Change("an optimizer with 8-bit states", f"-o trainer.optim={SMALL_OPTIMIZER}", case)
    if not planner.fits(case) and (shorter := _shorter(planner, case)) is not None:
        yield shorter


def _shorter(planner: Planner, case: Case) -> Change | None:
    """The longest max_length below the present one with which the plan fits."""
    options = _options(case.recipe)
    if LENGTH not in options:
        return None
    longest = options[LENGTH] if options.get(PACKING) else case.prediction.asked.longest
    best = planner.longest(case.recipe, case.hooks, longest - 1)
    if best < SHORTEST:
        return None
    cut = int((planner.rows.lengths.max(1) > best).sum()) if planner.rows else 0
    what = f"{'packs' if options.get(PACKING) else 'rows'} of at most {best} tokens" + (f" (cuts {cut} rows)" if cut else "")
    return Change(what, f"-o trainer.{LENGTH}={best}", planner.case(with_options(case.wanted, **{LENGTH: best})))


def longest_fitting(fits: Callable[[int], bool], most: int) -> int:
    """The largest multiple of GRAIN up to `most` that fits, by bisection; 0 if none does."""
    low, high = 0, most // GRAIN
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * GRAIN) else (low, middle - 1)
    return low * GRAIN


def _quantized(planner: Planner, case: Case) -> Change | None:
    """The installed quantizer with which the run needs least (of equals the last by name), if it has none yet and its plugins
    do not refuse one."""
    if case.recipe.quantizer is not None or case.hooks.owners("quantization_config"):
        return None
    found = []
    for name in planner.catalogue.names("quantizer"):
        try:
            one = planner.case(replace(case.wanted, quantizer=Choice(name)))
            run = replace(planner.run, recipe=one.recipe, hooks=one.hooks)
            if planner.machine.here and any(reasons for _, reasons in one.hooks.each("preflight", run=run)):
                continue
        except FtxError:
            continue
        except Exception as error:  # nobody named it, so a run does not fail for it
            log.warning("quantizer %s is not advised: %s: %s", name, type(error).__name__, first_line(error))
            continue
        if one.prediction.needed < case.prediction.needed and one.prediction.shape.trains_base is False:
            found.append((one.prediction.needed, name, one))
    if not found:
        return None
    _, name, best = min(reversed(found), key=lambda one: one[0])
    return Change(f"weights packed by {name}", f"--quantizer {name}", best)


def settle(planner: Planner, wanted: Recipe, *, fit: bool = False) -> tuple[Case, list[Change], list[Change]]:
    """The case that is run, the changes that were made for it, and, where it does not fit, the changes that would help.

    What the recipe leaves open (checkpointing, and micro-batch with accumulation) is decided here: no activation is computed
    twice unless memory asks for it. `fit` changes what it does not leave open, too.
    """
    chosen = _options(wanted)
    if _options(resolve(wanted, planner.catalogue)[0]).get(AGAIN, False) is None:
        wanted = with_options(wanted, **{AGAIN: False})
    case = planner.case(wanted)
    made: list[Change] = []
    if not planner.fits(case):
        tried = list(changes(planner, case, chosen=None if fit else chosen))
        if tried and planner.fits(tried[-1].case):
            made, case = tried, tried[-1].case
    advice = [] if planner.fits(case) else list(changes(planner, case))
    return case, made, advice


def refusal(planner: Planner, case: Case, advice: Sequence[Change]) -> FtxError:
    """The error of a run that would not fit: what it needs, what there is, and what to change."""
    needs, there = said(case.prediction.needed), said(planner.machine.memory or 0)
    lines = [f"{'and ' if number else ''}{change.option}   ({change.what}: {said(change.case.prediction.needed)})" for number, change in enumerate(advice)]
    if not advice or not planner.fits(advice[-1].case):
        lines.append("That is not enough: use a smaller model, or more memory." if advice else "Use a smaller model, or more memory.")
    lines.append("To try it all the same: --force")
    return FtxError(f"the run needs {needs}, and {planner.machine.device} has {there} here.", "\n".join(lines))


# ---- recipes


def with_options(recipe: Recipe, **options: Any) -> Recipe:
    """The recipe with other options of its trainer."""
    trainer = recipe.trainer or Choice("sft")
    return replace(recipe, trainer=Choice(trainer.name, {**trainer.options, **options}))


def _options(recipe: Recipe) -> dict[str, Any]:
    return recipe.trainer.options if recipe.trainer else {}
