"""TRL's DPOTrainer as ftx runs it: the audited tokens, the adapter's own way back to the starting model, the head where it counts."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerCallback
from trl import DPOConfig, DPOTrainer

from ftx.columns import lengths
from ftx.encode import IGNORE
from ftx.errors import PluginError, RunError
from ftx_fast import Fast, parts_of
from ftx_fast_prefixes import tree_of
from ftx_fast_rows import lengths_of
from ftx_sft_args import arguments
from ftx_sft_loan import Loan, OnLoan, Supervised, autocasts, inner_model, needs_checkpointing
from ftx_sft_loss import next_is_supervised, takes, takes_mask

if TYPE_CHECKING:
    from ftx import Run
    from ftx_dpo import DPO
    from ftx_fast_prefixes import Tree

logger = logging.getLogger(f"ftx.{__name__}")

SIDES = ("chosen", "rejected")
#: Micro-batches at the start of a process whose tokens are compared with the audited pairs.
CHECKED = 8
#: What TRL would log of the whole vocabulary or counts anew at a resume; here it is not computed.
NOT_LOGGED = ("entropy", "num_tokens", "logits/chosen", "logits/rejected", "mean_token_accuracy")


def make_trainer(
    options: DPO,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    train_dataset: Dataset,
    eval_dataset: Dataset | None,
    callbacks: list[TrainerCallback],
    run: Run,
) -> PreferenceTrainer:
    """The trainer of one run, for encoded pairs and a freshly adapted model, which is the reference too."""
    inner = inner_model(model)
    checkpointing = options.gradient_checkpointing
    if checkpointing is None:
        longest = max(int(lengths(train_dataset, f"{side}_input_ids").max()) for side in SIDES)
        checkpointing = run.device == "cuda" and needs_checkpointing(inner, 2 * options.per_device_train_batch_size * longest)
    settings = arguments(options, run, autocast=autocasts(model, run.dtype), checkpointing=checkpointing)
    config = DPOConfig(**{**settings, "loss_type": options.losses})
    config._n_gpu = min(config.n_gpu, 1)  # one process uses one GPU: several would go through DataParallel
    if options.early_stopping_patience is not None:
        callbacks = [*callbacks, EarlyStoppingCallback(options.early_stopping_patience)]
    held_out = eval_dataset if options.evaluates != "no" else None
    return PreferenceTrainer(model, config, tokenizer, train_dataset, held_out, callbacks, run, options.precompute_ref_log_probs, parts_of(options.fast))


class Pairs:
    """Encoded pairs -> one batch: all chosen, then all rejected, padded right to the longest."""

    def __init__(self, pad: int, shares: bool) -> None:
        self.pad, self.shares = pad, shares

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `attention_mask`, `completion_mask` [2 x pairs, length]; counts, row numbers, reference log-probabilities; if rows
        share what they begin with, the `tree` of their tokens."""
        rows = [(example[f"{side}_input_ids"], example[f"{side}_labels"]) for side in SIDES for example in examples]
        width = max(len(ids) for ids, _ in rows)
        batch: dict[str, Any] = {
            "input_ids": torch.tensor([[*ids, *[self.pad] * (width - len(ids))] for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
            "completion_mask": torch.tensor([[int(label != IGNORE) for label in labels] + [0] * (width - len(labels)) for _, labels in rows]),
            "rows": [example["row"] for example in examples],
            "tokens": sum(len(ids) for ids, _ in rows),
            "supervised_tokens": sum(label != IGNORE for _, labels in rows for label in labels[1:]),
        }
        if self.shares:
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE)
            batch["tree"] = tree_of(batch["input_ids"], labels, [len(ids) for ids, _ in rows])
        if "ref_chosen_logps" in examples[0]:
            batch |= {f"ref_{side}_logps": torch.tensor([example[f"ref_{side}_logps"] for example in examples]) for side in SIDES}
        return batch


class NoModel(nn.Module):
    """Stands where TRL would otherwise make a reference of its own: a copy of the adapter, or the base from the disk."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self) -> None:
        raise AssertionError("the reference is asked through the adapter")


class PreferenceTrainer(OnLoan, DPOTrainer):  # type: ignore[misc]
    """DPOTrainer over encoded pairs.

    TRL's losses are computed from log-probabilities of supervised tokens only, in fp32. The reference is the model that
    the run starts from: the adapted model inside the adapter's own `adapter_off`, or a frozen copy where that cannot be.
    """

    def __init__(
        self,
        model: Any,
        args: DPOConfig,
        tokenizer: PreTrainedTokenizerBase,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        callbacks: list[TrainerCallback],
        run: Run,
        precompute: bool,
        parts: Sequence[str] = (),
    ) -> None:
        self.parts = parts
        self.run, self.policy, self.encoded, self.inner = run, model, train_dataset, inner_model(model)
        self.seen, self.counts = 0, {"tokens": 0, "supervised_tokens": 0}
        self.loan = Loan(model, self.inner)
        switchable = self._off() is not None
        if args.sync_ref_model and switchable:
            raise PluginError("trainer.args.sync_ref_model needs a reference of its own.", "Use it with --adapter full, or leave it out.")
        self.frozen = None if switchable or precompute else copy.deepcopy(model).requires_grad_(False).eval()
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        with self.loan.for_constructor():
            super().__init__(
                model=model,
                ref_model=self.frozen if self.frozen is not None else NoModel(self.inner.config),
                args=args,
                data_collator=Pairs(pad, "prefixes" in parts),
                train_dataset=_numbered(train_dataset),
                eval_dataset=_numbered(eval_dataset) if eval_dataset is not None else None,
                processing_class=tokenizer,
                callbacks=callbacks,
            )
        if self.frozen is not None:
            vars(self.frozen).pop("forward", None)
            vars(inner_model(self.frozen)).pop("forward", None)
        self.settle()
        self.masked_head = takes_mask(model, self.inner)
        self.frozen_fast = Fast()
        if precompute:
            self.fast = self.put_on(model)  # the numbers of training, to the last digit
            try:
                self.train_dataset = self._with_reference(self.train_dataset)
                self.eval_dataset = self._with_reference(self.eval_dataset) if self.eval_dataset is not None else None
            finally:
                self.fast.undo()
        self.precompute_ref_logps = True  # TRL finds them in each batch, whoever put them there

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        """As it is: what encode_dataset made is final."""
        return dataset

    def train(self, *args: Any, **keywords: Any) -> Any:
        """As for every trainer; a frozen reference has the shortcuts too."""
        if self.frozen is not None:
            self.frozen_fast = self.put_on(self.frozen)
            for line in self.frozen_fast.off:
                logger.info("not fast: the reference: %s", line)
        try:
            return super().train(*args, **keywords)
        finally:
            self.frozen_fast.undo()

    # --- the reference -----------------------------------------------------------------------------------------------

    def _off(self) -> Any:
        return self.run.hooks.hook.adapter_off(model=self.policy, run=self.run) if self.run.hooks else None

    @contextmanager
    def _reference(self) -> Iterator[Any]:
        """The starting model, without gradients and without dropout.

        Nor does the policy say meanwhile that it recomputes: TRL would switch that off, and on again with what only transformers
        knows to read in the settings (`every_n_layers`, `offload`).
        """
        off = self._off() if self.frozen is None else None
        model = self.frozen if self.frozen is not None else self.policy
        modes = [(module, module.training) for module in model.modules()]
        recomputed = [module for module in self.policy.modules() if vars(module).get("gradient_checkpointing")]
        model.eval()
        for module in recomputed:
            module.gradient_checkpointing = False
        try:
            with torch.no_grad():
                if off is None:
                    yield model  # a frozen copy, or (before the first step) the model itself
                else:
                    with off:
                        yield model
        finally:
            for module in recomputed:
                module.gradient_checkpointing = True
            for module, training in modes:
                module.training = training

    def _reference_logps(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        with self._reference() as model:
            chosen, rejected = self.compute_ref_log_probs(self._scorer(model, keep_for_kl=True), inputs)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def _with_reference(self, dataset: Dataset) -> Dataset:
        """The dataset with the reference's log-probabilities of each pair; called before the first step."""
        values: dict[str, list[float]] = {f"ref_{side}_logps": [] for side in SIDES}
        size = self.args.per_device_eval_batch_size
        for start in range(0, len(dataset), size):
            batch = self.data_collator([dataset[i] for i in range(start, min(start + size, len(dataset)))])
            found = self._reference_logps(self._prepare_inputs(batch))
            for name, column in values.items():
                column += found[name].float().tolist()
        for name, column in values.items():
            dataset = dataset.add_column(name, column)
        return dataset

    # --- the loss ----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device) -> tuple[list[dict[str, Any]], int]:
        """The micro-batches of one optimizer step, and the denominator: their pairs, over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(len(batch["rows"]) for batch in batches)
        if self.accelerator.num_processes > 1:
            count = int(self.accelerator.reduce(torch.tensor(count, device=device)))
        return batches, count

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: int | None = None) -> Any:
        """TRL's loss, a mean over pairs: one batch of 16 gives what 16 batches of one do."""
        self._log_kl = self._will_log()
        if self.model.training:
            self._watch(inputs)
        if "ref_chosen_logps" not in inputs:
            inputs = {**inputs, **self._reference_logps(inputs)}
        loss = self._compute_loss(self._scorer(model), inputs, False)
        self._reference_found = None
        if num_items_in_batch is not None:
            loss = loss * len(inputs["rows"]) / num_items_in_batch * self.accelerator.num_processes
        return (loss, {}) if return_outputs else loss

    def _scorer(self, model: Any, keep_for_kl: bool = False) -> Any:
        """What TRL's loss calls for its model: log-probabilities [2 x pairs, length - 1] in fp32, 0 where nothing is supervised."""

        def score(
            input_ids: Tensor, attention_mask: Tensor, labels: Tensor, tree: Tree | None = None, output_router_logits: bool = False, **_: Any
        ) -> SimpleNamespace:
            keep = next_is_supervised(labels)[:, :-1]
            given: dict[str, Any] = {"input_ids": input_ids, "use_cache": False} if takes(self.policy, "use_cache") else {"input_ids": input_ids}
            if output_router_logits:  # routers do not balance padding; elsewhere right padding needs no mask
                given |= {"output_router_logits": True, "attention_mask": attention_mask}
            fast = self.frozen_fast if model is self.frozen else self.fast
            ends, tree = (None, None) if output_router_logits else (lengths_of(attention_mask), tree)
            found = self.supervised(model, given, labels, ends, tree=tree, fast=fast)
            padded = torch.zeros(keep.shape, device=labels.device).masked_scatter(keep, found.logps())
            if keep_for_kl:
                self._reference_found = found if self._log_kl else None
            else:
                self._count(padded, keep, found)
            zero = torch.zeros_like(padded, dtype=torch.float32).detach()
            squares = zero
            if self.args.use_weighting:
                squares = zero.masked_scatter(keep, (2 * found.logits().float().log_softmax(-1)).logsumexp(-1))
            return SimpleNamespace(
                log_probs=padded,
                entropy=zero,
                mean_logits=zero,
                is_top1=zero.bool(),
                log_sum_sq_probs=squares,
                aux_loss=getattr(found.outputs, "aux_loss", None),
            )

        return score

    _log_kl = False
    _reference_found: Supervised | None = None

    def _will_log(self) -> bool:
        step = self.state.global_step + 1
        return not self.model.training or step == 1 or step >= self.state.max_steps or step % self.args.logging_steps == 0

    @torch.no_grad()
    def _count(self, logps: Tensor, keep: Tensor, found: Supervised) -> None:
        """Log-probability a token and length of both sides (length bias shows there), and the KL to the reference: exact at
        each supervised position, over the whole vocabulary, averaged; in the steps that are logged."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for side, values, mask in zip(SIDES, logps.chunk(2), keep.chunk(2), strict=True):
            metrics[f"logps_per_token/{side}"].append(float(values.sum() / mask.sum().clamp(min=1)))
            metrics[f"length/{side}"].append(float(mask.sum() / len(mask)))
        if self._reference_found is not None:
            metrics["kl"].append(float(found.divergence(self._reference_found).mean()))

    def _watch(self, inputs: dict[str, Any]) -> None:
        """Count, and compare the first batches with what was audited."""
        for name in self.counts:
            self.counts[name] += inputs[name]
        if self.seen < CHECKED:
            check_pairs(inputs, self.encoded)
        self.seen += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's metrics without those that are not computed here."""
        for metrics in self._metrics.values():
            for name in NOT_LOGGED:
                metrics.pop(name, None)
        super().log(logs, start_time)


def _numbered(encoded: Dataset) -> Dataset:
    """The token columns, and each pair's number in `row`."""
    columns = [f"{side}_{what}" for side in SIDES for what in ("input_ids", "labels")]
    return encoded.select_columns(columns).add_column("row", np.arange(len(encoded)))


def check_pairs(batch: dict[str, Any], encoded: Dataset) -> None:
    """RunError unless the batch holds exactly the tokens and the supervised places of its pairs, as they were audited."""
    pairs = [encoded[number] for number in batch["rows"]]
    wanted = [(pair[f"{side}_input_ids"], pair[f"{side}_labels"]) for side in SIDES for pair in pairs]
    for (ids, labels), there, mask in zip(wanted, batch["input_ids"].tolist(), batch["completion_mask"].tolist(), strict=True):
        counted = [int(label != IGNORE) for label in labels]
        if there[: len(ids)] != ids or mask != counted + [0] * (len(mask) - len(counted)):
            raise RunError(
                f"the batch does not hold the audited tokens of the pairs {batch['rows']}.",
                "A plugin changes the data on its way to the model: leave it out.",
            )
