"""TRL's SFTTrainer as ftx runs it: one loss, one denominator, and a model that is handed back as it came."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, List, Value
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerCallback
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ftx.columns import lengths
from ftx.encode import IGNORE
from ftx.errors import RunError
from ftx_fast import parts_of
from ftx_fast_prefixes import tree_of
from ftx_sft_args import arguments
from ftx_sft_loan import Loan, OnLoan, Supervised, autocasts, inner_model, needs_checkpointing
from ftx_sft_loss import kept_logits, next_is_supervised, supervised_tokens, takes, takes_mask

if TYPE_CHECKING:
    from ftx import Run
    from ftx_sft import SFT

#: Micro-batches at the start of a process whose labels are compared with the audited rows.
CHECKED = 8
#: Batch entries that are no arguments of the model.
BOOKKEEPING = ("labels", "attention_mask", "rows", "lengths", "tree", "tokens", "supervised_tokens")


def make_trainer(
    options: SFT,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    callbacks: list[TrainerCallback],
    run: Run,
) -> SupervisedTrainer:
    """The trainer of one run, for encoded datasets and an adapted model."""
    inner = inner_model(model)
    checkpointing = options.gradient_checkpointing
    if checkpointing is None:
        checkpointing = run.device == "cuda" and needs_checkpointing(inner, options.per_device_train_batch_size * longest(train_dataset, options))
    config = SFTConfig(**arguments(options, run, autocast=autocasts(model, run.dtype), checkpointing=checkpointing))
    config._n_gpu = min(config.n_gpu, 1)  # one process uses one GPU: several would go through DataParallel
    if options.early_stopping_patience is not None:
        callbacks = [*callbacks, EarlyStoppingCallback(options.early_stopping_patience)]
    pack_length = options.max_length if options.packing else None
    held_out = eval_dataset if options.evaluates != "no" else None
    return SupervisedTrainer(model, config, tokenizer, train_dataset, held_out, callbacks, pack_length, parts_of(options.fast))


def longest(dataset: Dataset, options: SFT) -> int:
    """Tokens of the longest sequence of a batch."""
    return options.max_length if options.packing and options.max_length else int(lengths(dataset, "input_ids").max())


def numbered(encoded: Dataset, pack_length: int | None = None) -> Dataset:
    """`input_ids` and `labels` with the number of the row that each sequence (packed: each token) comes from, in `rows`.

    Packed, best fit decreasing, it has as many rows as there are packs, and `seq_lengths`.
    """
    tokens = encoded.select_columns(["input_ids", "labels"])
    counts = np.ones(len(tokens), dtype=np.int64) if pack_length is None else lengths(tokens, "input_ids")
    offsets = pa.array(np.concatenate([[0], counts.cumsum()]).astype(np.int32))
    rows = pa.ListArray.from_arrays(offsets, pa.array(np.repeat(np.arange(len(tokens), dtype=np.int32), counts)))
    tokens = tokens.add_column("rows", pa.chunked_array([rows]), feature=List(Value("int32")))
    return tokens if pack_length is None else pack_dataset(tokens, pack_length, strategy="bfd")


class Collator:
    """Rows -> one batch, padded right (packed: joined into one sequence with position ids that start anew for each row).

    Besides the tensors a batch has what was counted on the CPU, so that no GPU need wait for it: `tokens` (without
    padding), `supervised_tokens`, in `rows` the numbers of the dataset's rows in each row of the batch, and the
    `tree` of their tokens if they share what they begin with.
    """

    def __init__(self, pad: int, packed: bool, multiple: int | None, shares: bool) -> None:
        self.packed, self.shares = packed, shares
        self.join = DataCollatorForLanguageModeling(pad_token_id=pad, padding_free=packed, pad_to_multiple_of=multiple)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self.join(examples))
        rows = [list(dict.fromkeys(example["rows"])) for example in examples]
        batch["rows"] = [[number for one in rows for number in one]] if self.packed else rows
        batch["lengths"] = [len(example["input_ids"]) for example in examples]
        batch["tokens"] = sum(batch["lengths"])
        batch["supervised_tokens"] = supervised_tokens(batch["labels"])
        if self.shares and not self.packed:
            batch["tree"] = tree_of(batch["input_ids"], batch["labels"], batch["lengths"])
        return batch


def check_labels(batch: dict[str, Any], encoded: Dataset, packed: bool) -> None:
    """RunError unless the batch holds exactly the tokens and labels of its rows of `encoded`, as they were audited."""
    for ids, labels, numbers in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), batch["rows"], strict=True):
        wanted_ids: list[int] = []
        wanted: list[int] = []
        for row in (encoded[number] for number in numbers):
            wanted_ids += row["input_ids"]
            wanted += [IGNORE, *row["labels"][1:]] if packed else row["labels"]  # no row of a pack predicts the next one's start
        wanted += [IGNORE] * (len(labels) - len(wanted))
        if labels != wanted or ids[: len(wanted_ids)] != wanted_ids:
            raise RunError(
                f"the batch does not hold the audited tokens and labels of the rows {numbers}.",
                "A plugin changes the data on its way to the model: leave it out.",
            )


class SupervisedTrainer(OnLoan, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with the loss of supervised tokens only, divided by their count over the whole optimizer step.

    TRL's own loss scores every position on a CPU and adds entropy and accuracy over the vocabulary at each step. Here
    the model's own forward runs its head on the kept positions (`logits_to_keep`), so that whatever belongs to a head
    (soft-capping, scaling, an adapter) holds.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        tokenizer: PreTrainedTokenizerBase,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        callbacks: list[TrainerCallback],
        pack_length: int | None,
        parts: Sequence[str] = (),
    ) -> None:
        self.parts = parts
        self.encoded, self.packed = train_dataset, pack_length is not None
        self.inner = inner_model(model)
        self.seen, self.counts = 0, {"tokens": 0, "supervised_tokens": 0}
        self.loan = Loan(model, self.inner)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        with self.loan.for_constructor():
            super().__init__(
                model=model,
                args=args,
                data_collator=Collator(pad, self.packed, args.pad_to_multiple_of, "prefixes" in parts),
                train_dataset=numbered(train_dataset, pack_length),
                eval_dataset=numbered(eval_dataset) if eval_dataset is not None else None,
                processing_class=tokenizer,
                callbacks=callbacks,
            )
        self.settle()
        self.masked_head = takes_mask(model, self.inner)

    def get_batch_samples(self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device) -> tuple[list[dict[str, Any]], int]:
        """The micro-batches of one optimizer step, and the denominator: their supervised tokens, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(batch["supervised_tokens"] for batch in batches)
        if self.accelerator.num_processes > 1:
            count = int(self.accelerator.reduce(torch.tensor(count, device=device)))
        return batches, count

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: int | None = None) -> Any:
        """Summed loss of a micro-batch over `num_items_in_batch`; without that (in evaluation) over its own count."""
        training, labels = self.model.training, inputs["labels"]
        if training:
            self._watch(inputs)
        if return_outputs:  # whoever asks for outputs wants logits
            keep = next_is_supervised(labels)
            outputs = model(**self._arguments(inputs), **({"logits_to_keep": keep} if self.masked_head else {}))
            found = Supervised(kept_logits(outputs.logits, keep, only=self.masked_head), labels[:, 1:][keep[:, :-1]], None, outputs)
        else:
            whole = self.packed or self.aux_loss_enabled  # packed already, or with routers that balance each row's tokens
            lengths, tree = (None, None) if whole else (inputs.get("lengths"), inputs.get("tree"))
            found = self.supervised(model, self._arguments(inputs), labels, lengths, tree=tree)
        logps = found.logps()
        loss = -logps.sum() / max(len(logps) if num_items_in_batch is None else int(num_items_in_batch), 1)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the count is of all processes, and DDP averages their gradients
        if self.aux_loss_enabled:  # a mixture of experts: a mean of each micro-batch, averaged over the step
            loss = loss + self.router_aux_loss_coef * found.outputs.aux_loss / (self.current_gradient_accumulation_steps if training else 1)
        return (loss, found.outputs) if return_outputs else loss

    def _arguments(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """What the model gets. No attention mask: padding is on the right, where no real token looks, and without a mask
        attention takes its fast causal path; in a pack, position ids that start anew keep the rows apart."""
        given = {name: value for name, value in inputs.items() if name not in BOOKKEEPING}
        if takes(self.model, "use_cache"):
            given["use_cache"] = False
        if self.aux_loss_enabled:
            given["output_router_logits"] = True
            given |= {name: inputs[name] for name in ("attention_mask",) if name in inputs}  # routers do not balance padding
        return given

    def _watch(self, inputs: dict[str, Any]) -> None:
        for name in self.counts:
            self.counts[name] += inputs.get(name, 0)
        if self.seen < CHECKED and "rows" in inputs:
            check_labels(inputs, self.encoded, self.packed)
        self.seen += 1
