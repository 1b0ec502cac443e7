"""What ftx's trainers add to TRL's, whichever it is: counts, quiet, and a model that is handed back as it came."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PreTrainedModel, PrinterCallback, ProgressCallback

from ftx.errors import PluginError
from ftx_fast import Fast, install
from ftx_sft_loss import kept_logits, next_is_supervised

if TYPE_CHECKING:
    from ftx_fast_head import Head
    from ftx_fast_prefixes import Tree

logger = logging.getLogger(f"ftx.{__name__}")


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


class OnLoan:
    """Mixed into a TRL trainer that has `loan` (Loan), and `counts` of `tokens` and `supervised_tokens`."""

    loan: Loan
    counts: dict[str, int]
    #: Whether the model takes a mask of the positions that its head runs on.
    masked_head: bool
    #: Makes the tree of a batch's rows where they share what they begin with (`shares`).
    data_collator: Any
    #: Names of ftx-fast's parts, and what of them is on while it trains.
    parts: Sequence[str] = ()
    fast: Fast
    #: compute_loss divides; transformers must not divide again by the accumulation steps.
    loss_is_scaled_for_ga = True

    def settle(self) -> None:
        """At the end of the constructor: nothing but ftx counts or prints."""
        self.fast = Fast()
        self.model_accepts_loss_kwargs = False  # get_batch_samples counts, and nobody else
        for printer in (PrinterCallback, ProgressCallback):  # both write to standard output
            self.remove_callback(printer)

    def train(self, resume_from_checkpoint: str | Path | None = None, **keywords: Any) -> Any:
        """Train, or go on from a checkpoint directory; the model object is afterwards as free of patches as before."""
        if resume_from_checkpoint is not None:
            self._resume_patience(Path(resume_from_checkpoint))
        self.fast = self.put_on(self.model)
        self.data_collator.shares = self.fast.shares  # else a tree of each batch would be made for nothing
        for line in self.fast.on:
            logger.info("fast: %s", line)
        for line in self.fast.off:
            logger.info("not fast: %s", line)
        try:
            return super().train(resume_from_checkpoint=str(resume_from_checkpoint) if resume_from_checkpoint is not None else None, **keywords)
        finally:
            self.fast.undo()
            self.loan.give_back()

    def put_on(self, model: nn.Module) -> Fast:
        """The parts that are asked for, on the model that trains or on its reference."""
        return install(model, self.parts, noise=bool(self.args.neftune_noise_alpha), recomputed=bool(self.args.activation_checkpointing))

    def supervised(
        self, model: Any, given: dict[str, Any], labels: Tensor, lengths: Sequence[int] | None, *, tree: Tree | None = None, fast: Fast | None = None
    ) -> Supervised:
        """Run the model over a batch, padded right (`lengths` of its rows, `tree` of their tokens) or packed (None), with the head where a
        token is supervised.

        `fast`: what is on `model`, if it is not the one that trains.
        """
        fast = fast or self.fast
        end = getattr(self.model.config, "eos_token_id", None)
        fill = end if isinstance(end, int) else 0
        shared = fast.shared(given, tree, fill)
        if shared is None and lengths is not None:
            given, labels = fast.joined(given, labels, lengths, fill)
        if shared is not None and tree is not None:
            given = shared
            keep, targets, again = (one.to(labels.device, non_blocking=True) for one in (tree.kept[tree.first], tree.wanted[tree.first], tree.again))
        else:
            keep = next_is_supervised(labels)
            targets, again = labels[:, 1:][keep[:, :-1]], None
        if self.masked_head:
            given = {**given, "logits_to_keep": keep}
        if fast.head is None:
            outputs = model(**given)
            return Supervised(kept_logits(outputs.logits, keep, only=self.masked_head), targets, None, outputs, again)
        with fast.head.left_out():
            outputs = model(**given)
        hidden = kept_logits(outputs.logits, keep, only=self.masked_head)  # accelerate makes fp32 of what was computed under autocast
        half = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else hidden.dtype
        return Supervised(hidden.to(half), targets, fast.head, outputs, again)

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

    def _run_epoch(self, *arguments: Any, **keywords: Any) -> None:
        """One pass over the data, unless the training that is resumed was over: transformers looks only behind a step whether
        it was the last one, and would train one more."""
        stopped = [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        if self.state.global_step >= self.state.max_steps or any(0 < one.early_stopping_patience <= one.early_stopping_patience_counter for one in stopped):
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **keywords)

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


@dataclass(frozen=True)
class Supervised:
    """What a model makes of the n positions of a batch whose next token is supervised, in the order of rows and tokens; of the m of them
    that are not the same token behind the same beginning as another one."""

    values: Tensor
    """Logits [m, vocabulary], or with `head` the hidden states [m, h] that it would have been given."""
    targets: Tensor
    """[m]: the next tokens."""
    head: Head | None
    outputs: Any
    again: Tensor | None = None
    """[n]: which of the m each one is; None if they are the n. Their gradients come together in fp32, and the head computes them once."""

    def logps(self) -> Tensor:
        """fp32 [n]: log-probabilities of the targets, in nats."""
        if self.head is not None:
            return self._all(self.head.logps(self.values, self.targets))
        return self._all(-nn.functional.cross_entropy(self.values.float(), self.targets, reduction="none"))

    def _all(self, found: Tensor) -> Tensor:
        """[m, ...] -> [n, ...]."""
        return found if self.again is None else found[self.again]

    @torch.no_grad()
    def divergence(self, other: Supervised) -> Tensor:
        """fp32 [n]: KL to the distribution of `other`, over the whole vocabulary."""
        if self.head is not None and other.head is not None:
            return self.head.divergence(self._all(self.values), other.head, other._all(other.values))
        ours, theirs = (one.logits().float().log_softmax(-1) for one in (self, other))
        return (ours.exp() * (ours - theirs)).sum(-1)

    @torch.no_grad()
    def logits(self) -> Tensor:
        """[n, vocabulary]."""
        return self._all(self.values if self.head is None else self.head.layer(self.values.to(self.head.layer.weight.dtype)))


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
