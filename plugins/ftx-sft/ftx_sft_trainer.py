"""TRL's SFTTrainer as ftx runs it: one loss, one denominator, and a model that is handed back as it came."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, Features, List, Value
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ftx.encode import IGNORE
from ftx.errors import PluginError, RunError
from ftx_sft_args import arguments
from ftx_sft_loss import kept_logits, next_is_supervised, summed_loss, supervised_tokens, takes, takes_mask

if TYPE_CHECKING:
    from ftx import Run
    from ftx_sft import SFT

#: Micro-batches at the start of a process whose labels are compared with the audited rows.
CHECKED = 8
#: Batch entries that are no arguments of the model.
BOOKKEEPING = ("labels", "attention_mask", "rows", "tokens", "supervised_tokens")


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
    return SupervisedTrainer(model, config, tokenizer, train_dataset, eval_dataset if options.evaluates != "no" else None, callbacks, pack_length)


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model in what an adapter returned: itself, or what it wraps."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise PluginError(
        "the adapter returned a model with no transformers model in it.", "The trainer 'sft' needs one; use another trainer, or mend the adapter."
    )


def autocasts(model: nn.Module, dtype: torch.dtype | None) -> bool:
    """Whether to compute in bfloat16 over float32 weights: true for master weights, false for small fp32 adapters on a bf16 model."""
    total = sum(parameter.numel() for parameter in model.parameters())
    single = sum(parameter.numel() for parameter in model.parameters() if parameter.dtype is torch.float32)
    return dtype is torch.bfloat16 and 2 * single > total


def longest(dataset: Dataset, options: SFT) -> int:
    """Tokens of the longest sequence of a batch."""
    return options.max_length if options.packing and options.max_length else max(len(ids) for ids in dataset["input_ids"])


def needs_checkpointing(inner: PreTrainedModel, tokens: int) -> bool:
    """On CUDA: whether a micro-batch of `tokens` would fill more than 80 % of the free memory without checkpointing.

    Generous, in bytes: 80 a token for each layer and hidden unit (LoRA on all linear layers of a Llama measures 72 to
    77), 14 for each logit, 12 for each trained parameter (gradient and two Adam states, fp32).
    """
    config = inner.config.get_text_config()
    per_token = 80 * getattr(config, "num_hidden_layers", 0) * getattr(config, "hidden_size", 0) + 14 * config.vocab_size
    trained = sum(parameter.numel() for parameter in inner.parameters() if parameter.requires_grad)
    free, _ = torch.cuda.mem_get_info()
    return inner.supports_gradient_checkpointing and per_token * tokens + 12 * trained > 0.8 * free


def numbered(encoded: Dataset, pack_length: int | None = None) -> Dataset:
    """`input_ids` and `labels` with the number of the row that each sequence (packed: each token) comes from, in `rows`.

    Packed, best fit decreasing, it has as many rows as there are packs, and `seq_lengths`.
    """
    tokens = encoded.select_columns(["input_ids", "labels"])
    lengths = [1] * len(tokens) if pack_length is None else [len(ids) for ids in tokens["input_ids"]]
    rows = [[number] * length for number, length in enumerate(lengths)]
    column = Dataset.from_dict({"rows": rows}, features=Features({"rows": List(Value("int32"))}))
    tokens = tokens.add_column("rows", column.data.column("rows"), feature=column.features["rows"])
    return tokens if pack_length is None else pack_dataset(tokens, pack_length, strategy="bfd")


class Collator:
    """Rows -> one batch, padded right (packed: joined into one sequence with position ids that start anew for each row).

    Besides the tensors a batch has what was counted on the CPU, so that no GPU need wait for it: `tokens` (without
    padding), `supervised_tokens`, and in `rows` the numbers of the dataset's rows in each row of the batch.
    """

    def __init__(self, pad: int, packed: bool, multiple: int | None) -> None:
        self.packed = packed
        self.join = DataCollatorForLanguageModeling(pad_token_id=pad, padding_free=packed, pad_to_multiple_of=multiple)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = dict(self.join(examples))
        rows = [list(dict.fromkeys(example["rows"])) for example in examples]
        batch["rows"] = [[number for one in rows for number in one]] if self.packed else rows
        batch["tokens"] = sum(len(example["input_ids"]) for example in examples)
        batch["supervised_tokens"] = supervised_tokens(batch["labels"])
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


class SupervisedTrainer(SFTTrainer):
    """SFTTrainer with the loss of supervised tokens only, divided by their count over the whole optimizer step.

    TRL's own loss scores every position on a CPU and adds entropy and accuracy over the vocabulary at each step. Here
    the model's own forward runs its head on the kept positions (`logits_to_keep`), so that whatever belongs to a head
    (soft-capping, scaling, an adapter) holds.
    """

    #: compute_loss divides; transformers must not divide again by the accumulation steps.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        tokenizer: PreTrainedTokenizerBase,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        callbacks: list[TrainerCallback],
        pack_length: int | None,
    ) -> None:
        self.encoded, self.packed = train_dataset, pack_length is not None
        self.inner = inner_model(model)
        self.seen, self.counts = 0, {"tokens": 0, "supervised_tokens": 0}
        self.loan = Loan(model, self.inner)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        with self.loan.for_constructor():
            super().__init__(
                model=model,
                args=args,
                data_collator=Collator(pad, self.packed, args.pad_to_multiple_of),
                train_dataset=numbered(train_dataset, pack_length),
                eval_dataset=numbered(eval_dataset) if eval_dataset is not None else None,
                processing_class=tokenizer,
                callbacks=callbacks,
            )
        self.model_accepts_loss_kwargs = False  # get_batch_samples counts, and nobody else
        self.masked_head = takes_mask(model, self.inner)
        for printer in (PrinterCallback, ProgressCallback):  # both write to standard output
            self.remove_callback(printer)

    def train(self, resume_from_checkpoint: str | Path | None = None, **keywords: Any) -> Any:
        """Train, or go on from a checkpoint directory; the model object is afterwards as free of patches as before."""
        if resume_from_checkpoint is not None:
            self._resume_patience(Path(resume_from_checkpoint))
        try:
            return super().train(resume_from_checkpoint=str(resume_from_checkpoint) if resume_from_checkpoint is not None else None, **keywords)
        finally:
            self.loan.give_back()

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
        keep = next_is_supervised(labels)
        outputs = model(**self._arguments(inputs, keep))
        count = keep.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch)
        loss = summed_loss(kept_logits(outputs.logits, keep), labels, keep) / count.clamp(min=1)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # the count is of all processes, and DDP averages their gradients
        if self.aux_loss_enabled:  # a mixture of experts: a mean of each micro-batch, averaged over the step
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / (self.current_gradient_accumulation_steps if training else 1)
        return (loss, outputs) if return_outputs else loss

    def _arguments(self, inputs: dict[str, Any], keep: torch.Tensor) -> dict[str, Any]:
        """What the model gets. No attention mask: padding is on the right, where no real token looks, and without a mask
        attention takes its fast causal path; in a pack, position ids that start anew keep the rows apart."""
        given = {name: value for name, value in inputs.items() if name not in BOOKKEEPING}
        if self.masked_head:
            given["logits_to_keep"] = keep
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

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add `tokens` (no padding) and `supervised_tokens`: what was trained on since this process began."""
        if not any(name.startswith("eval_") for name in logs):
            logs = {**logs, **self._totals()}
        super().log(logs, start_time)

    def _totals(self) -> dict[str, int]:
        if self.accelerator.num_processes == 1:
            return dict(self.counts)
        mine = torch.tensor(list(self.counts.values()), device=self.args.device)
        return dict(zip(self.counts, self.accelerator.reduce(mine).tolist(), strict=True))

    def _resume_patience(self, checkpoint: Path) -> None:
        """Early stopping goes on counting; transformers would restore it only together with the order to stop."""
        state = json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
        saved = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback")
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and saved:
                callback.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As transformers does; for a wrapper that is no PreTrainedModel, tied weights once: safetensors refuses them twice."""
        if state_dict is None and not hasattr(self.model, "save_pretrained"):
            first: dict[int, str] = {}
            weights = self.model.state_dict(keep_vars=True)
            state_dict = {name: weight.detach() for name, weight in weights.items() if first.setdefault(id(weight), name) == name}
        super()._save(output_dir, state_dict)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """None: a checkpoint is the run's own."""

    def _send_telemetry(self) -> None:
        """None: what is trained here is nobody else's business."""


class Loan:
    """What TRL, transformers and accelerate leave on a model object, and how it is taken away again."""

    #: A patched `forward` on the instance would make a deep copy of the model run the original's weights.
    LEFT = ("forward", "_original_forward", "_is_accelerate_prepared", "model_tags")
    #: What TRL and transformers want of a model and a plain nn.Module around one does not have.
    LENT = ("config", "generation_config", "add_model_tags", "activation_checkpointing_enable", "_keys_to_ignore_on_save")

    def __init__(self, model: nn.Module, inner: PreTrainedModel) -> None:
        self.model, self.inner = model, inner
        self.lent = [name for name in self.LENT if not hasattr(model, name)]
        self.before = [(module, dict(vars(module))) for module in (model, inner)]
        configs = {
            id(one): one
            for module in model.modules()
            for one in (getattr(module, "config", None), getattr(module, "generation_config", None))
            if hasattr(one, "to_dict")
        }
        self.configs = [(config, dict(vars(config))) for config in configs.values()]
        self.was_checkpointing = inner.is_activation_checkpointing

    @contextmanager
    def for_constructor(self) -> Iterator[None]:
        """While TRL's constructor looks at the model: lend it what it lacks, hide what TRL would refuse or change."""
        for name in self.lent:
            setattr(self.model, name, getattr(self.inner, name))
        dtypes = [(one, one.data) for one in self.model.parameters() if one.requires_grad]
        hidden: dict[str, Any] = {}
        if self.model is self.inner and getattr(self.model, "is_quantized", False) and dtypes:
            hidden["is_quantized"] = False  # only peft counts there as an adapter on a quantised model
        if hasattr(self.model, "peft_config") and hasattr(self.model.get_output_embeddings(), "base_layer"):
            hidden["get_output_embeddings"] = lambda: None  # TRL's own loss cannot train an adapter on the head; this one can
        if hasattr(self.model, "enable_input_require_grads"):
            hidden["enable_input_require_grads"] = lambda: None  # transformers calls it again at the start of training, and forgets this first hook
        own = dict(vars(self.model))
        vars(self.model).update(hidden)
        try:
            yield
        finally:
            for name in hidden:
                vars(self.model).update({name: own[name]}) if name in own else vars(self.model).pop(name)
            for parameter, data in dtypes:
                if parameter.dtype is not data.dtype:  # TRL makes adapters of a quantised model bf16: small updates would vanish
                    parameter.data = data.to(parameter.device)
            self._clean(("forward", "_original_forward"))

    def give_back(self) -> None:
        """After training: no patches, no checkpointing, and the configs (use_cache, special tokens) as they were."""
        if self.inner.is_activation_checkpointing and not self.was_checkpointing:
            self.inner.activation_checkpointing_disable()
            self.inner.disable_input_require_grads()
        self._clean((*self.LEFT, *self.lent))
        for config, before in self.configs:
            vars(config).clear()
            vars(config).update(before)

    def _clean(self, names: tuple[str, ...]) -> None:
        for module, before in self.before:
            for name in names:
                if name in before:
                    vars(module)[name] = before[name]
                else:
                    vars(module).pop(name, None)
