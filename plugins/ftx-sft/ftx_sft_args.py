"""From a trainer's options to TRL's config class: what ftx sets itself, and what `args` may add."""

from __future__ import annotations

import dataclasses
import enum
import typing
from typing import TYPE_CHECKING, Any

from ftx.errors import OptionError, did_you_mean
from ftx.options import Text, coerce
from ftx_fast import parts_of

if TYPE_CHECKING:
    from ftx import Run
    from ftx_sft_options import Training

_DATA = "the formatter and the encoding decide it before the audit"
_MODEL = "the model is loaded by ftx"
_LOSS = "the trainer computes its own loss"
_HUB = "ftx uploads nothing"
_RESUME = "a checkpoint must be complete to be resumed"

#: Fields of SFTConfig that `args` may not set, and why: they would break the run, or be without effect.
OWNED: dict[str, str] = {
    "output_dir": "use --output",
    "seed": "use --seed",
    "data_seed": "use --seed",
    "use_cpu": "use --device",
    "bf16": "use --dtype",
    "fp16": "use --dtype",
    "bf16_full_eval": "use --dtype",
    "fp16_full_eval": "use --dtype",
    "resume_from_checkpoint": "use ftx resume",
    "activation_checkpointing": "use trainer.gradient_checkpointing",
    "disable_tqdm": "standard output is kept for results",
    "prediction_loss_only": "only the evaluation loss is taken here; evaluators score answers",
    **dict.fromkeys(("save_only_model", "ignore_data_skip", "restore_callback_states_from_checkpoint"), _RESUME),
    **dict.fromkeys(
        ("dataset_kwargs", "dataset_text_field", "dataset_num_proc", "shuffle_dataset", "truncation_mode", "packing_strategy", "padding_free", "eval_packing"),
        _DATA,
    ),
    **dict.fromkeys(
        ("completion_only_loss", "assistant_only_loss", "remove_unused_columns", "label_names", "chat_template_path", "eos_token", "pad_token"), _DATA
    ),
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code", "use_cache", "use_liger_kernel", "liger_kernel_config"), _MODEL),
    **dict.fromkeys(("loss_type", "label_smoothing_factor", "average_tokens_across_devices"), _LOSS),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"), _HUB),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "local_rank"), "it has no effect here"),
}


def config_class(options: Training) -> Any:
    """TRL's config class of a trainer."""
    import trl

    return getattr(trl, options.trl_config)


def read_args(options: Training) -> tuple[dict[str, Any], list[str]]:
    """`args` with every value as SFTConfig's field wants it, and the reasons against those that cannot be.

    Values are text from the command line (and from a recipe that was written for such a run) or typed from YAML.
    """
    if not options.args:
        return {}, []
    config = config_class(options)
    known = {field.name: field for field in dataclasses.fields(config)}
    types = typing.get_type_hints(config)
    listed = {field.name for field in dataclasses.fields(options)}
    owned = OWNED | options.trl_owned
    values, reasons = {}, []
    for name, value in options.args.items():
        label = f"trainer.args.{name}"
        if name in listed:
            reasons.append(f"{label}: '{name}' is an option of its own: use trainer.{name}")
        elif name in owned:
            reasons.append(f"{label} cannot be set: {owned[name]}")
        elif name not in known:
            reasons.append(f"{label}: trl.{options.trl_config} has no field '{name}'.{did_you_mean(name, (known.keys() | listed) - owned.keys())}")
        else:
            try:
                values[name] = coerce(Text(value) if isinstance(value, str) else value, types[name], label)
            except OptionError as error:
                reasons.append(error.problem)
            else:
                reasons += _not_a_choice(label, values[name], types[name], known[name].metadata.get("choices"))
    return values, reasons


def unknown_optimizer(name: str) -> list[str]:
    """A reason if transformers has no optimizer of this name."""
    from transformers.training_args import OptimizerNames

    return _not_a_choice("trainer.optim", name, OptimizerNames, None)


def _not_a_choice(label: str, value: Any, annotation: Any, choices: Any) -> list[str]:
    """A reason if `value` is none of a field's choices: SFTConfig would say so only after the model is loaded."""
    arms = typing.get_args(annotation) or (annotation,)
    allowed = list(choices or [member.value for arm in arms if isinstance(arm, type) and issubclass(arm, enum.Enum) for member in arm])
    if not allowed or value is None or value in allowed:
        return []
    return [f"{label} cannot be '{value}'.{did_you_mean(str(value), map(str, allowed))} Choices: {', '.join(map(str, allowed))}."]


def arguments(options: Training, run: Run, *, autocast: bool, checkpointing: bool) -> dict[str, Any]:
    """The keyword arguments of TRL's config class for one run; `args` last."""
    import torch

    assert run.directory is not None
    known = {field.name for field in dataclasses.fields(config_class(options))}
    own = {"args", "save_steps", "eval_steps", "gradient_checkpointing", "early_stopping_patience", "precompute_ref_log_probs"}
    taken = {field.name for field in dataclasses.fields(options)} - own
    judged = options.early_stopping_patience is not None or options.load_best_model_at_end
    # a thread that pins memory breaks off a CUDA graph that is recorded meanwhile
    pinned = run.device == "cuda" and not (options.dataloader_num_workers and "graphs" in parts_of(options.fast))
    values = {
        **{name: getattr(options, name) for name in taken},
        "output_dir": str(run.directory.checkpoints),
        "seed": run.seed,
        "data_seed": run.seed,  # the order of the rows hangs on the seed alone, not on what drew random numbers before
        "use_cpu": run.device == "cpu",
        "bf16": autocast,
        "fp16": run.dtype is torch.float16,
        "activation_checkpointing": checkpointing,
        # what encode_dataset made is final: TRL must not tokenise, cut or filter it again
        "max_length": None,
        "packing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "save_strategy": options.saves,
        "save_steps": options.steps_between_saves,
        "save_total_limit": None,  # the core prunes, by checkpoints that are complete
        "eval_strategy": options.evaluates,
        "eval_steps": options.steps_between_evaluations,
        "metric_for_best_model": "eval_loss" if judged else None,
        "greater_is_better": False if judged else None,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # a loss that is not a number is shown, and looking for it would sync each micro-step
        "report_to": "none",
        "disable_tqdm": True,
        "push_to_hub": False,
        "dataloader_pin_memory": pinned,
        "accelerator_config": {"non_blocking": pinned},  # else a batch's copy waits for all that the GPU has still to do
        **read_args(options)[0],
    }
    return {name: value for name, value in values.items() if name in known}
