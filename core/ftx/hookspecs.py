"""Every hook on one page, in the order of a run: the reference for authors of plugins.

A plugin implements a hook by a method of the same name marked `@hookimpl`, and lists only the arguments it uses.
`run` (ftx.Run) comes last. Stage hooks have one owner in a run and their result is used; gathering hooks are asked of
every chosen plugin.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from ftx.authoring import PROJECT

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from ftx.audit import Finding
    from ftx.generate import Generate
    from ftx.run import Evaluation, Run, RunDir, Score
    from ftx.shape import Shape

hookspec = pluggy.HookspecMarker(PROJECT)
stage_hook = hookspec(firstresult=True)

# --------------------------------------------------------------------------------------------------------------------
# Before anything is loaded
# --------------------------------------------------------------------------------------------------------------------


@hookspec
def preflight(run: Run) -> list[str] | None:
    """Reasons why this run cannot work on this machine or with these options; all are printed at once.

    Called before data or model are read; import nothing heavier than the answer needs. Exit status 2.
    """


@stage_hook
def format_dataset(dataset: Dataset, run: Run) -> Dataset:
    """Rows as they stand in the file -> rows of one row type. Owner: the formatter, once for each file set.

    `dataset`: the columns of the file and `_file`, `_line` (where each row came from). Result: the columns of one row
    type (`prompt`, `completion`; `messages`; `prompt`, `chosen`, `rejected`; `prompt`, `completion`, `label`; `text`).
    A prompt or completion is a string or a list of `{"role", "content"}` messages. Use `ftx.format_rows`, which keeps
    `_file` and `_line` and turns a RowError into an error, or a ledger entry, that names them.
    """


@stage_hook
def unformat_row(row: dict[str, Any], run: Run) -> Any:
    """One formatted row -> the row of a file that this formatter reads as just that. Owner: the formatter, which may lack it.

    `row`: the columns of one row type as `format_dataset` gives them, of this formatter or of another, without `_file`
    and `_line`. Raises RowError where the format cannot hold the row, or would make something else of it. With it `ftx
    data convert` writes a file anew, and `ftx chat` saves a turn.
    """


@stage_hook
def encode_dataset(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, run: Run) -> Dataset:
    """Formatted rows -> token ids and labels. Owner: the trainer, once for each split.

    Result: `input_ids` and `labels` (lists of int, equal length, -100 where the loss does not count), or a pair of each
    prefixed `chosen_` and `rejected_`; `cut` (int: supervised tokens lost to truncation) and, if it is known, `crossed`
    (int: answers with a token across their border); `_file`, `_line` and `_part` where the rows have them. Must be row for row: the core checks the count.
    """


@hookspec
def audit_dataset(dataset: Dataset, rows: Dataset, train_rows: Dataset | None, split: str, run: Run) -> list[Finding] | None:
    """Findings about the rows of one split (`train` or `eval`): what, which rows, refuse or warn.

    `dataset`: token ids and labels, as `encode_dataset` gave them; `rows`: the formatted rows behind them, row for row.
    `train_rows`: in the split `eval` the formatted training rows that are used, else None.
    """


@hookspec
def plan_shape(shape: Shape, run: Run) -> Shape | None:
    """The shape that is planned for, as this plugin makes it: what the others' `memory_use` must know of it.

    Asked in the order formatter, quantizer, adapter, trainer; each gets what those before it made. An adapter says how
    many numbers train (`trained`) and whether it drops something of each row's own (`dropout`), a trainer what a forward
    pass holds (`lengths`, `shared`) and what it computes otherwise than transformers (`fused`, `autocast`, `joined`):
    `dataclasses.replace(shape, trained=...)`. Must not import torch.
    """


@hookspec
def memory_use(shape: Shape, run: Run) -> dict[str, int] | None:
    """Bytes that this plugin adds to the plan, by kind; below 0 where it saves some.

    Kinds: `weights`, `adapter`, `optimizer`, `reference` (a second model) stand through all steps; `gradients` from a
    step's first backward pass to its end; `activations` are kept by all layers together for the backward pass (with
    checkpointing the core counts one layer of them); `head` is needed while the loss is computed, beside the
    activations; `buffers` while the backward pass goes through one layer. `run.dtype` may be None: sizes stand in
    `shape`. Called before anything is loaded, also for a machine that is not this one. Must not import torch.
    """


@hookspec
def run_started(run: Run) -> None:
    """The run directory stands and the recipe is in it; nothing is loaded yet."""


@hookspec
def dataset_encoded(dataset: Dataset, split: str, run: Run) -> None:
    """One split is encoded and has passed the audit. Called for `train`, then for `eval` if there is one."""


# --------------------------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------------------------


@stage_hook
def quantization_config(run: Run) -> Any:
    """A transformers quantisation config for `from_pretrained`, or None. Owner: a quantizer, or an adapter like qlora."""


@stage_hook
def base_dtype(run: Run) -> torch.dtype | None:
    """The dtype of the base's weights as they are loaded, where it is not the run's. Owner: the adapter, which may lack it.

    For weights that train: of those that were rounded to the run's dtype first, a step below half of its spacing there changes no
    number that is computed with. Must agree with `Shape.loaded` as the adapter's `plan_shape` leaves it.
    """


@hookspec
def model_loaded(model: PreTrainedModel, run: Run) -> None:
    """The base model is loaded, before its evaluation. Also called when a finished run is read back."""


@hookspec
def around_generation(model: Any, run: Run) -> AbstractContextManager[Any] | None:
    """A context manager in which the model generates for an evaluator, faster or otherwise; what it does ends with it.

    Called each time that an evaluator generates, with the base and with the tuned model. Answers in float32 must be the same
    token for token, and the model's weights afterwards the same bits.
    """


@stage_hook
def adapt_model(model: PreTrainedModel, run: Run) -> Any:
    """The base model -> the model to train, with `requires_grad` set on what trains. Owner: the adapter."""


@stage_hook
def adapter_off(model: Any, run: Run) -> AbstractContextManager[Any] | None:
    """A context manager inside which the adapted model is the base, or None if that cannot be. Owner: the adapter."""


@stage_hook
def save_adapted(model: Any, path: Path, run: Run) -> None:
    """Write what was trained into the directory `path`, as safetensors. Owner: the adapter."""


@stage_hook
def load_adapted(base: PreTrainedModel, path: Path, run: Run) -> Any:
    """The base model and what `save_adapted` wrote -> the tuned model, in eval mode. Owner: the adapter."""


@stage_hook
def merge_adapted(model: Any, run: Run) -> PreTrainedModel:
    """The tuned model -> a plain transformers model with the adapter in its weights. Owner: the adapter."""


# --------------------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------------------


@hookspec
def trainer_callbacks(run: Run) -> list[TrainerCallback] | None:
    """transformers callbacks to add to the trainer."""


@stage_hook
def make_trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    callbacks: list[TrainerCallback],
    run: Run,
) -> Any:
    """Anything with `.train(resume_from_checkpoint=None)`, `.save_model(path)` and `.model`. Owner: the trainer.

    The datasets are what `encode_dataset` gave. Checkpoints go to `run.directory.checkpoints`. `callbacks` must be
    called with transformers' events; the numbers that it logs become `metrics.jsonl`.
    """


# --------------------------------------------------------------------------------------------------------------------
# Evaluation and after
# --------------------------------------------------------------------------------------------------------------------


@hookspec
def evaluate_model(generate: Generate, dataset: Dataset | None, run: Run) -> Evaluation | None:
    """Scores and items of one phase, the headline metric first.

    Called with the base model, then with the tuned one, one evaluator at a time in the order they were named. `dataset`
    is the formatted evaluation data (None without `--eval-data`). The core stamps evaluator and phase and writes the
    items, unless there are no scores (a dry run). One that raises costs only its own scores, and the run ends with status 1.
    """


@hookspec
def compare_answers(base_items: list[dict[str, Any]], tuned_items: list[dict[str, Any]], run: Run) -> list[Score] | Evaluation | None:
    """Scores of phase `change` from one evaluator's own items of both phases (same order, same length).

    An Evaluation instead of a list has items of its own (a judge's verdicts on pairs), which become `change.jsonl`.
    """


@stage_hook
def exported_form(model: Any, run: Run) -> Any:
    """The tuned model as it was read back -> the model that is exported. Owner: the exporter; without one, `merge_adapted`.

    May use `model` up. A form that says something else than the run on purpose (merged into another base) is given as
    `ftx.export.Departure(model, why)`: how far it departs is measured and printed, and the export is held to the form.
    """


@stage_hook
def export_model(model: Any, tokenizer: PreTrainedTokenizerBase, path: Path, run: Run) -> Any:
    """Write the model that `exported_form` gave into the empty directory `path`. Owner: the exporter.

    The result says what was written: a text, or `ftx.export.Exported(what, load)`, whose `load` tells the reader of the
    model card how to load it.
    """


@stage_hook
def read_exported(path: Path, run: Run) -> Any:
    """The export in `path` as a program that did not write it reads it: an `ftx.parity.Reader`. Owner: the exporter.

    Without one, plain transformers reads the directory. Whatever the reader lacks or does not use is an error.
    """


@hookspec
def export_checked(path: Path, report: dict[str, Any], run: Run) -> None:
    """The export agrees with the run, and lies in `path` with its README.md and export.json, whose content is `report`."""


@hookspec
def run_finished(run: Run, scores: list[Score]) -> None:
    """Everything is on disk."""


@hookspec
def run_failed(run: Run, error: BaseException) -> None:
    """The run ended in `error`. What this raises is logged and does not mask it."""


@hookspec
def render_runs(directories: list[RunDir]) -> str | None:
    """One page about one run or several, whole or not, as the text of an HTML file. Called by `ftx report`.

    All that it shows is read from the directories: no model is loaded, and a file that is not there yet costs only its part.
    """


@hookspec
def check_environment() -> list[str] | None:
    """Lines for `ftx doctor`: each begins with `ok: `, `warning: ` or `failure: `; what to do stands behind `; `."""
