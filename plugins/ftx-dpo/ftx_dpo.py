"""The trainer `dpo`: its options, and the hooks that hand over to the module beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftx import RowError, hookimpl, option, plugin
from ftx_sft_options import Training

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from ftx import Run
    from ftx.encode import Encoded
    from ftx.shape import Shape

#: TRL's loss types (trl/trainer/dpo_trainer.py, 1.16).
LOSSES = tuple("sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft sigmoid_norm".split())
#: Those that read label_smoothing.
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
#: Those that weigh chosen against rejected by the difference of their rewards, and so go with any divergence.
OF_DIFFERENCES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft", "sigmoid_norm")
#: Those that sort the pairs of a batch, so that a pair has no weight of its own.
SORTING = ("aot", "aot_unpaired")
#: What trainer.args.f_divergence_type may be.
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@plugin
class DPO(Training):
    """Direct preference optimization (Rafailov et al., 2023) with TRL's DPOTrainer: chosen above rejected, against the starting model."""

    accepts = ("preference",)
    encodes_with = ("max_length",)
    sequences = 2
    trl_config = "DPOConfig"
    trl_owned = {
        "disable_dropout": "the reference has no dropout, so the policy has none",
        "precompute_ref_batch_size": "use trainer.per_device_eval_batch_size",
    }

    beta: float = option(0.1, "How strongly the model is held to the reference; for ipo the paper's tau.")
    loss_type: list[str] | str = option("sigmoid", f"One of TRL's losses, or a list of them to add up: {', '.join(LOSSES)}.")
    loss_weights: list[float] | None = option(None, "The weight of each loss of the list; none: 1 each.")
    label_smoothing: float = option(
        0.0, "Share of labels taken to be flipped (robust, aot, aot_unpaired), or exo_pair's epsilon (1e-3 is usual); no other loss reads it."
    )
    precompute_ref_log_probs: bool = option(
        False, "Take the reference's log-probabilities once before training: no second model in memory, and no KL in the metrics."
    )
    args: dict[str, Any] = option({}, "Any other field of trl.DPOConfig, as trainer.args.NAME=VALUE.")

    def __post_init__(self) -> None:
        super().__post_init__()
        from ftx.errors import did_you_mean

        for name in self.losses:
            if name not in LOSSES:
                raise ValueError(f"loss_type: '{name}' is none of TRL's losses.{did_you_mean(name, LOSSES)} Losses: {', '.join(LOSSES)}")
        if not self.losses:
            raise ValueError("loss_type must name a loss")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.losses):
            raise ValueError(f"loss_weights must have one weight for each of the {len(self.losses)} losses, got {len(self.loss_weights)}")
        if not 0 < self.beta < float("inf"):
            raise ValueError(f"beta must be greater than 0, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be at least 0 and below 0.5, got {self.label_smoothing}")
        if "exo_pair" in self.losses and self.label_smoothing == 0:
            raise ValueError("loss_type 'exo_pair' needs label_smoothing above 0; its paper takes 0.001")
        if self.label_smoothing and not set(self.losses) & set(SMOOTHED):
            raise ValueError(f"label_smoothing counts only in the losses {', '.join(SMOOTHED)}; {', '.join(self.losses)} would ignore it")

    @property
    def losses(self) -> list[str]:
        """The losses that are added up."""
        return [self.loss_type] if isinstance(self.loss_type, str) else list(self.loss_type)

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        """As every trainer on TRL, and what contradicts what among `args`, which TRL would say of a loaded model or not at all."""
        reasons: list[str] = super().preflight(run)
        return reasons + self._contradictions() if self.args and not reasons else reasons

    def _contradictions(self) -> list[str]:
        from ftx.errors import did_you_mean
        from ftx_sft_args import read_args

        args, _ = read_args(self)
        divergence, share = args.get("f_divergence_type", "reverse_kl"), args.get("ld_alpha")
        others = [loss for loss in self.losses if loss not in OF_DIFFERENCES]
        sorting = [loss for loss in self.losses if loss in SORTING]
        reasons = []
        if divergence not in DIVERGENCES:
            known = f"Choices: {', '.join(DIVERGENCES)}."
            reasons.append(f"trainer.args.f_divergence_type cannot be '{divergence}'.{did_you_mean(divergence, DIVERGENCES)} {known}")
        elif divergence != "reverse_kl" and others:
            reasons.append(f"trainer.args.f_divergence_type '{divergence}' goes with the losses {', '.join(OF_DIFFERENCES)}, not with {', '.join(others)}")
        if args.get("use_weighting") and sorting:
            reasons.append(f"trainer.args.use_weighting does not go with {', '.join(sorting)}, which sorts the pairs: drop one of the two")
        if share is not None and not 0 <= share <= 1:
            reasons.append(f"trainer.args.ld_alpha must lie in 0..1, got {share}")
        if args.get("sync_ref_model") and self.precompute_ref_log_probs:
            reasons.append("trainer.args.sync_ref_model moves the reference, and trainer.precompute_ref_log_probs asks it once before training: drop one")
        if args.get("ref_model_sync_steps", 1) < 1:
            reasons.append(f"trainer.args.ref_model_sync_steps must be at least 1, got {args['ref_model_sync_steps']}")
        return reasons

    @hookimpl
    def encode_dataset(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, run: Run) -> Dataset:
        """`chosen_` and `rejected_` `input_ids` and `labels` of each pair, cut to max_length; `cut` counts the supervised
        tokens that this loses."""
        from ftx.data import format_batches
        from ftx.encode import encode_rows

        def encode(rows: list[dict[str, Any]]) -> Iterator[Any]:
            pairs = [_sides(row) for row in rows]
            encoded = iter(encode_rows([row for pair in pairs if not isinstance(pair, RowError) for row in pair], tokenizer))
            for pair in pairs:
                sides = [pair] if isinstance(pair, RowError) else [next(encoded), next(encoded)]
                fault = next((one for one in sides if isinstance(one, RowError)), None)
                yield fault or joined(*(one.truncated(self.max_length) for one in sides))

        return format_batches(dataset, encode, run)

    @hookimpl
    def memory_use(self, shape: Shape, run: Run) -> dict[str, int]:
        """As every trainer on TRL, and the frozen copy of a model whose adapter cannot be switched off."""
        from ftx_sft_plan import memory

        found = memory(self, shape, compared=not self.precompute_ref_log_probs)
        if shape.reference and not self.precompute_ref_log_probs:
            found["reference"] = 4 * shape.parameters
        return found

    @hookimpl
    def make_trainer(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        callbacks: list[TrainerCallback],
        run: Run,
    ) -> Any:
        from ftx_fast_imports import import_trl

        import_trl()
        from ftx_dpo_trainer import make_trainer

        return make_trainer(self, model, tokenizer, train_dataset, eval_dataset, callbacks, run)


def _sides(row: dict[str, Any]) -> list[dict[str, Any]] | RowError:
    """A pair as two rows of type prompt-completion, or why it is none."""
    try:
        row = split_prompt(row) if row.get("prompt") is None else row
    except RowError as error:
        return error
    return [{**row, "completion": row[side]} for side in ("chosen", "rejected")]


def joined(chosen: Encoded, rejected: Encoded) -> dict[str, Any]:
    """Two encoded answers as one row."""
    sides = {"chosen": chosen, "rejected": rejected}
    columns = {f"{name}_{what}": getattr(one, what) for name, one in sides.items() for what in ("input_ids", "labels")}
    return {**columns, "cut": chosen.cut + rejected.cut, "crossed": chosen.crossed + rejected.crossed}


def split_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """A pair of whole conversations -> the turns that both share as the prompt, and how each goes on."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise RowError("a pair of texts needs a prompt: what both share is not surely one")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return {**row, "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}
