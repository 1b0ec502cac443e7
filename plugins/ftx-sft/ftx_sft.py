"""The trainer `sft`: its options, and the hooks that hand over to the modules beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ftx import hookimpl, option, plugin
from ftx_sft_options import Training

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from ftx import Run


@plugin
class SFT(Training):
    """Supervised fine-tuning with TRL's SFTTrainer: next-token loss on the answers."""

    accepts = ("prompt-completion", "conversation", "text")
    encodes_with = ("max_length",)

    packing: bool = option(False, "Put several rows into one sequence of max_length tokens; none sees another.")
    args: dict[str, Any] = option({}, "Any other field of trl.SFTConfig, as trainer.args.NAME=VALUE.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.packing and self.max_length is None:
            raise ValueError("packing needs max_length: it is the length of a pack")

    @hookimpl
    def encode_dataset(self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, run: Run) -> Dataset:
        """`input_ids` and `labels` of each row, cut to max_length; `cut` counts the supervised tokens that this loses."""
        from ftx.data import format_batches
        from ftx.encode import Encoded, encode_rows

        def encode(rows: list[dict[str, Any]]) -> Iterator[Any]:
            for one in encode_rows(rows, tokenizer):
                if isinstance(one, Encoded):
                    kept = one.truncated(self.max_length)
                    yield {"input_ids": kept.input_ids, "labels": kept.labels, "cut": kept.cut, "crossed": kept.crossed}
                else:
                    yield one

        return format_batches(dataset, encode, run)

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
        from ftx_sft_trainer import make_trainer

        return make_trainer(self, model, tokenizer, train_dataset, eval_dataset, callbacks, run)
