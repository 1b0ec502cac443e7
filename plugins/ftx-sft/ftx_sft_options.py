"""The options that trainers on TRL share, and what contradicts what among them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

from ftx import hookimpl, option, plugin
from ftx_fast import parts_of

if TYPE_CHECKING:
    from ftx import Run
    from ftx.shape import Shape

#: transformers' default, which needs no look at its list of optimizers.
OPTIM = "adamw_torch_fused"

#: Schedules that are driven by the evaluation loss.
BY_EVALUATION = ("reduce_lr_on_plateau", "greedy")

Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]


@plugin
class Training:
    """What every trainer on transformers' Trainer takes; `trl_config` names TRL's config class for the rest, `trl_owned` what
    `args` may not set beside ftx_sft_args.OWNED, and why."""

    trl_config = "SFTConfig"
    trl_owned = {}

    num_train_epochs: float = option(3.0, "Passes over the training data.")
    max_steps: int = option(-1, "Optimizer steps; overrides num_train_epochs when positive.")
    per_device_train_batch_size: int = option(4, "Rows (with packing: packs) in one forward pass.")
    per_device_eval_batch_size: int = option(8, "Rows in one forward pass of the evaluation loss.")
    gradient_accumulation_steps: int = option(4, "Forward passes for one optimizer step; the loss is the same as with one big batch.")
    learning_rate: float = option(2e-5, "Peak learning rate. Adapters suggest their own.")
    lr_scheduler_type: Scheduler = option("cosine", "How the learning rate moves after the warm-up.")
    warmup_steps: float = option(0.03, "Steps of warm-up; below 1 a share of all steps.")
    weight_decay: float = option(0.0, "Decay of the weights, not of biases and norms.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0 clips nothing.")
    optim: str = option(OPTIM, "Optimizer, by transformers' name.")
    max_length: int | None = option(1024, "Longer rows are cut at their end (the audit refuses cut answers); none cuts nothing.")
    gradient_checkpointing: bool | None = option(
        None,
        "Recompute activations instead of keeping them. none: the plan decides, which recomputes nothing unless the run would not fit otherwise.",
    )
    logging_steps: int = option(10, "Steps between two lines of metrics; the first step is always one.")
    save_strategy: Literal["no", "steps", "epoch"] = option("epoch", "When to write a checkpoint; save_steps means 'steps'.")
    save_steps: int | None = option(None, "Steps between two checkpoints; giving it means saving by steps.")
    save_total_limit: int = option(2, "Checkpoints to keep, beside the best one.")
    eval_strategy: Literal["auto", "no", "steps", "epoch"] = option(
        "auto",
        "When to take the evaluation loss; auto: with each checkpoint, but only if eval_steps, early_stopping_patience or load_best_model_at_end asks for it.",
    )
    eval_steps: int | None = option(None, "Steps between two evaluation losses; giving it means evaluating by steps.")
    early_stopping_patience: int | None = option(None, "Stop after so many evaluations without a lower loss; needs evaluation data.")
    load_best_model_at_end: bool = option(False, "End with the checkpoint of the lowest evaluation loss; needs evaluation data.")
    dataloader_num_workers: int = option(0, "Processes that prepare batches; 0 does it in the main one.")
    dataloader_drop_last: bool = option(False, "Leave out the last batch of an epoch if it is not full.")
    fast: bool | list[str] | str = option(
        "auto",
        "Exact shortcuts of ftx-fast: auto (all that apply), off, or some of head, attention, rows, prefixes, layers, lora, products, memory; "
        "[auto,graphs]: all, and the layers of a small model as CUDA graphs; [auto,compile]: torch's compiler in place of layers.",
    )
    args: dict[str, Any] = option({}, "Any other field of TRL's config class, as trainer.args.NAME=VALUE.")

    def __post_init__(self) -> None:
        """Refuse what SFTConfig would take and misread: it accepts a batch size of 0."""
        parts_of(self.fast)
        counts = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "logging_steps", "save_total_limit")
        optional = ("max_length", "save_steps", "eval_steps", "early_stopping_patience")
        for name in (*counts, *(name for name in optional if getattr(self, name) is not None)):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must not be negative or infinite, got {getattr(self, name)}")
        if not 0 < self.num_train_epochs < float("inf"):
            raise ValueError(f"num_train_epochs must be greater than 0, got {self.num_train_epochs}")
        if self.max_steps < 1 and self.max_steps != -1:
            raise ValueError(f"max_steps must be at least 1, or -1 for num_train_epochs, got {self.max_steps}")
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(f"warmup_steps must be a share below 1 or a whole number of steps, got {self.warmup_steps}")
        if self.save_steps is not None and self.save_strategy == "no":
            raise ValueError("save_strategy 'no' and save_steps contradict each other: drop one")
        if self.eval_steps is not None and self.eval_strategy in ("no", "epoch"):
            raise ValueError(f"eval_strategy '{self.eval_strategy}' and eval_steps contradict each other: drop one")
        self._check_evaluation()

    def _check_evaluation(self) -> None:
        if self.early_stopping_patience is not None and self.eval_strategy == "no":
            raise ValueError("early_stopping_patience needs the evaluation loss: drop eval_strategy 'no'")
        if self.lr_scheduler_type in BY_EVALUATION and self.evaluates == "no":
            raise ValueError(f"lr_scheduler_type '{self.lr_scheduler_type}' needs the evaluation loss: set eval_strategy to 'epoch' or 'steps'")
        if not self.load_best_model_at_end:
            return
        if self.saves == "no":
            raise ValueError("load_best_model_at_end needs checkpoints: drop save_strategy 'no'")
        if self.evaluates != self.saves:
            raise ValueError(
                f"load_best_model_at_end needs an evaluation at each checkpoint: eval_strategy is '{self.evaluates}', save_strategy is '{self.saves}'"
            )
        if self.saves == "steps" and self.steps_between_saves % self.steps_between_evaluations:
            raise ValueError(
                f"load_best_model_at_end needs save_steps to be a multiple of eval_steps, got {self.steps_between_saves} and {self.steps_between_evaluations}"
            )

    @property
    def saves(self) -> str:
        """When checkpoints are written: no, steps or epoch."""
        return "steps" if self.save_steps is not None else self.save_strategy

    @property
    def evaluates(self) -> str:
        """When the evaluation loss is taken: no, steps or epoch."""
        if self.eval_strategy != "auto":
            return self.eval_strategy
        if self.eval_steps is not None:
            return "steps"
        if self.early_stopping_patience is None and not self.load_best_model_at_end:
            return "no"
        return "epoch" if self.saves == "no" else self.saves

    @property
    def steps_between_saves(self) -> int:
        return self.save_steps or 500  # transformers' default

    @property
    def steps_between_evaluations(self) -> int:
        return self.eval_steps or (self.steps_between_saves if self.saves == "steps" else self.logging_steps)

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        from ftx_fast_imports import postpone

        postpone()
        reasons = []
        if self.evaluates != "no" and run.recipe.eval_data is None:
            asking = (
                "early_stopping_patience"
                if self.early_stopping_patience is not None
                else "load_best_model_at_end"
                if self.load_best_model_at_end
                else "eval_strategy"
            )
            reasons.append(f"trainer.{asking} needs evaluation data: add --eval-data FILE")
        if self.args or self.optim != OPTIM:  # only these are worth importing trl for
            from ftx_sft_args import read_args, unknown_optimizer

            reasons += unknown_optimizer(self.optim) + read_args(self)[1]
        return reasons

    @hookimpl
    def run_started(self, run: Run) -> None:
        from ftx_fast_imports import import_losses

        import_losses()

    @hookimpl
    def around_generation(self, model: Any, run: Run) -> AbstractContextManager[Any]:
        from ftx_fast import generating

        return generating(model, parts_of(self.fast))

    @hookimpl
    def plan_shape(self, shape: Shape, run: Run) -> Shape:
        from ftx_sft_plan import shaped

        return shaped(self, shape)

    @hookimpl
    def memory_use(self, shape: Shape, run: Run) -> dict[str, int]:
        from ftx_sft_plan import memory

        return memory(self, shape)
