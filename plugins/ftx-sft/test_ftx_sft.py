"""The trainer `sft`: the loss against plain transformers, one denominator, labels on the wire, resume to the bit."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ftx.data import to_dataset
from ftx.errors import DataError, RunError
from ftx.ledger import Ledger
from ftx.options import Text, build
from ftx.recipe import Choice, Recipe
from ftx.run import Run, RunDir
from ftx.testing.tiny import tiny_model, tiny_model_dir, tiny_tokenizer
from ftx_fast import PARTS, install
from ftx_fast_prefixes import tree_of
from ftx_sft import SFT
from ftx_sft_loss import kept_logits

FAST: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no"}


def answers(count: int = 16) -> list[dict[str, Any]]:
    """Prompt-completion rows of clearly unequal lengths."""
    return [{"prompt": f"q{i}? " * (1 + i % 5), "completion": f"a{i}" * (1 + 3 * (i % 4)), "_file": "data.jsonl", "_line": i + 1} for i in range(count)]


def make_run(path: Path, **changes: Any) -> Run:
    recipe = Recipe(trainer=Choice("sft"), **{key: changes.pop(key) for key in ("eval_data",) if key in changes})
    return Run(**{"recipe": recipe, "ledger": Ledger(), "seed": 7, "dtype": torch.float32, "directory": RunDir(path)} | changes)


def encoded(options: SFT, run: Run, rows: list[dict[str, Any]] | None = None) -> Any:
    return options.encode_dataset(to_dataset(rows or answers()), tiny_tokenizer(), run)


def make_trainer(path: Path, model: Any = None, rows: Any = None, evaluation: Any = None, run: dict[str, Any] | None = None, **options: Any) -> Any:
    saving = {"save_strategy": "epoch"} if "save_steps" in options or "load_best_model_at_end" in options else {}
    plugin, here = SFT(**(FAST | saving | options)), make_run(path, **(run or {}))
    data = encoded(plugin, here, rows)
    judge = encoded(plugin, here, evaluation) if evaluation else None
    return plugin.make_trainer(tiny_model() if model is None else model, tiny_tokenizer(), data, judge, [], here)


def lora(model: Any = None, **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"} | settings)
    return get_peft_model(tiny_model() if model is None else model, config)


class Wrapper(nn.Module):
    """A stranger's adapter: a plain module around the model that keeps its forward, with a bias on the logits."""

    def __init__(self, model: Any, **_: Any) -> None:
        super().__init__()
        self.inside = model.requires_grad_(False)
        self.bias = nn.Parameter(torch.zeros(model.config.vocab_size))

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None, **rest: Any) -> Any:
        output = self.inside(input_ids=input_ids, attention_mask=attention_mask, **rest)
        output.logits = output.logits + self.bias
        return output


class FullLogits(Wrapper):
    """One whose forward knows no logits_to_keep."""

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None) -> Any:
        return super().forward(input_ids, attention_mask, labels)


def virtual_tokens() -> Any:
    from peft import PromptTuningConfig, get_peft_model

    torch.manual_seed(3)
    return get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def soft_capped() -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    return Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=2.0, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def scaled_logits() -> Any:
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return GraniteForCausalLM(GraniteConfig(**sizes, logits_scaling=4.0, initializer_range=0.3, pad_token_id=0, bos_token_id=1, eos_token_id=2))


MODELS = {
    "plain": tiny_model,
    "tied": lambda: tiny_model(tie_word_embeddings=True),
    "lora": lora,
    "lora-on-head": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "head-saved": lambda: lora(modules_to_save=["lm_head"]),
    "wrapper": lambda: Wrapper(tiny_model()),
    "full-logits": lambda: FullLogits(tiny_model()),
    "soft-capped": soft_capped,
    "scaled-logits": scaled_logits,
    "virtual-tokens": virtual_tokens,
}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.requires_grad and one.grad is not None}


def assert_close(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], limit: float = 1e-5) -> None:
    assert mine.keys() == theirs.keys() and mine
    for name, grad in theirs.items():
        assert (mine[name] - grad).norm() <= limit * grad.norm() + 1e-12, name


#: Parts of ftx-fast: all that apply, and none.
with_and_without = pytest.mark.parametrize("fast", ["auto", "off"])


@contextmanager
def installed(trainer: Any) -> Iterator[Any]:
    """The parts of ftx-fast on the model, as train() puts them on; where they are asked for, those that fit every model here are on."""
    every = ["as one function"] + ["attention"] * (trainer.inner.config._attn_implementation == "sdpa")
    trainer.fast = install(trainer.model, trainer.parts)
    try:
        on = " ".join(trainer.fast.on)
        assert all(part in on for part in every) if trainer.parts else not on, trainer.fast.off
        yield trainer.fast
    finally:
        trainer.fast.undo()


def step_gradients(trainer: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of the first optimizer step, as the trainer makes them."""
    loader = iter(trainer.get_train_dataloader())
    steps = trainer.args.gradient_accumulation_steps
    batches, count = trainer.get_batch_samples(loader, steps, trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(batches)
    trainer.model.zero_grad()
    with installed(trainer):
        model = trainer.accelerator.prepare_model(trainer.model) if trainer.args.bf16 else trainer.model  # puts its forward under autocast
        loss = sum(trainer.training_step(model, batch, count).item() for batch in batches)
    return loss, gradients(trainer.model)


# ----------------------------------------------------------------------------------------------------------- the loss


@with_and_without
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_plain_transformers(name: str, fast: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, MODELS[name](), per_device_train_batch_size=4, gradient_accumulation_steps=1, fast=fast)
    loss, mine = step_gradients(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.zero_grad()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if isinstance(trainer.model, Wrapper):  # its forward gives no loss
        shifted = nn.functional.cross_entropy(trainer.model(**inputs).logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten())
    else:
        shifted = trainer.model(**inputs, labels=batch["labels"]).loss
    shifted.backward()
    assert abs(loss - shifted.item()) < 1e-6
    assert_close(mine, gradients(trainer.model))


@pytest.mark.parametrize("name", ["plain", "lora"])
def test_a_step_in_bf16_is_no_further_from_fp32_with_the_parts(name: str, tmp_path: Path) -> None:
    """A bf16 base with fp32 adapters, and fp32 weights under autocast: all 16 rows, in four micro-batches."""

    def model() -> Any:
        return lora(tiny_model().to(torch.bfloat16)) if name == "lora" else tiny_model()

    def found(one: Any, dtype: torch.dtype, fast: str) -> dict[str, torch.Tensor]:
        trainer = make_trainer(tmp_path, one, per_device_train_batch_size=4, gradient_accumulation_steps=4, run={"dtype": dtype}, fast=fast)
        assert trainer.args.bf16 is (name == "plain" and dtype is torch.bfloat16)
        return step_gradients(trainer)[1]

    truth = found(model().float(), torch.float32, "off")
    plain, ours = (found(model(), torch.bfloat16, fast) for fast in ("off", "auto"))
    away = [sum(float((one[key].float() - truth[key]).norm() / truth[key].norm()) for key in truth) for one in (ours, plain)]
    assert 0 < away[0] <= 1.05 * away[1]


@pytest.mark.parametrize("parts", ["auto", [part for part in PARTS if part != "head"]], ids=["head", "logits"])
def test_what_all_rows_begin_with_is_scored_once(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token supervised behind one template: the same loss and gradients, and no label of its tokens computed for each row."""
    rows = [{"text": "a template that all rows begin with, and then " + row["completion"]} for row in answers(16)]
    seen: list[int] = []
    kept = kept_logits
    monkeypatch.setattr("ftx_sft_loan.kept_logits", lambda logits, keep, **more: (seen.append(keep.numel()), kept(logits, keep, **more))[1])
    whole = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    plain, theirs = step_gradients(make_trainer(tmp_path, rows=rows, fast="off", **whole))
    trainer = make_trainer(tmp_path, rows=rows, fast=parts, **whole)
    loss, mine = step_gradients(trainer)
    assert abs(loss - plain) < 1e-6
    assert_close(mine, theirs)
    labels = sum(len(ids) - 1 for ids in trainer.encoded["input_ids"])
    assert seen[-1] <= labels - 15 * 40
    batch = next(iter(trainer.get_train_dataloader()))
    with installed(trainer), torch.no_grad():
        trainer.model.eval()
        assert abs(float(trainer.compute_loss(trainer.model, batch)) - plain) < 1e-5, "divided by all of them"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_the_heads_too(dtype: torch.dtype, tmp_path: Path) -> None:
    """accelerate hands on fp32; a reference, asked under autocast, would else have other numbers than what is trained from it."""
    trainer = make_trainer(tmp_path)
    trainer.args.bf16, trainer.args.fp16 = dtype is torch.bfloat16, dtype is torch.float16  # with fp16 only a GPU trains
    ids = torch.arange(3, 13).unsqueeze(0)
    with installed(trainer), torch.no_grad():
        found = trainer.supervised(trainer.model, {"input_ids": ids}, ids, None)
        with torch.autocast("cpu", dtype):
            wanted = found.head.logps(found.values.float(), found.targets)
        assert torch.equal(found.logps(), wanted) and found.values.dtype is dtype


@with_and_without
@pytest.mark.parametrize("name", ["plain", "lora", "wrapper"])
@pytest.mark.parametrize("rows", [16, 13])
def test_one_batch_of_16_equals_16_batches_of_1(name: str, rows: int, fast: str, tmp_path: Path) -> None:
    """Lengths are unequal, so a mean of means would differ; 13 rows leave an accumulation that is not full."""
    one, many = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}, {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16}
    loss, mine = step_gradients(make_trainer(tmp_path, MODELS[name](), answers(rows), fast=fast, **one))
    again, theirs = step_gradients(make_trainer(tmp_path, MODELS[name](), answers(rows), fast=fast, **many))
    assert abs(loss - again) < 1e-6
    assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["plain", "wrapper"])
def test_the_denominator_is_the_count_of_supervised_next_tokens(name: str, tmp_path: Path) -> None:
    """Rows of text supervise their first token too, which nobody predicts: it does not count."""
    rows = [{"text": "x" * n} for n in (1, 5, 9, 14)]
    trainer = make_trainer(tmp_path, MODELS[name](), rows, gradient_accumulation_steps=2)
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, trainer.args.device)
    assert count == sum(len(row["text"]) for row in rows)  # with the end token, less the first of each
    assert sum((batch["labels"] != -100).sum() for batch in batches) == count + 4
    assert trainer.loss_is_scaled_for_ga and not trainer.model_accepts_loss_kwargs


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    """The count is over all processes, and DDP averages their gradients."""
    code = f"""
import json, os, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_ftx_sft import lora, make_trainer
trainer = make_trainer(Path({str(tmp_path)!r}), lora(), max_steps=2, per_device_train_batch_size=1)
trainer.train()
if os.environ["RANK"] == "0":
    print(json.dumps([trainer.state.log_history[:2], [one.double().sum().item() for one in trainer.model.parameters()]]))
"""
    (tmp_path / "two.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "two.py")]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    lines, sums = json.loads(result.stdout)
    one = make_trainer(tmp_path / "one", lora(), max_steps=2, per_device_train_batch_size=2)
    one.train()
    for mine, theirs in zip(lines, one.state.log_history, strict=False):
        assert (mine["tokens"], mine["supervised_tokens"]) == (theirs["tokens"], theirs["supervised_tokens"])
        assert (mine["loss"], mine["grad_norm"]) == pytest.approx((theirs["loss"], theirs["grad_norm"]), rel=1e-5)
    assert sums == pytest.approx([parameter.double().sum().item() for parameter in one.model.parameters()], abs=1e-4)


def test_a_batch_with_nothing_supervised_gives_zero(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    labels = torch.full((2, 5), -100)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, {"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": labels}, num_items_in_batch=0)
    loss.backward()
    assert loss.item() == 0 and all(grad.abs().sum() == 0 for grad in gradients(trainer.model).values())


def test_the_head_runs_on_supervised_positions_only(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []
    for name in ("plain", "lora"):
        trainer = make_trainer(tmp_path, MODELS[name](), fast="off")
        trainer.inner.lm_head.register_forward_hook(lambda module, given, result: seen.append(tuple(result.shape)))
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.training_step(trainer.model, batch, batch["supervised_tokens"])
        assert seen.pop() == (batch["supervised_tokens"], 259)


def test_mixture_of_experts_keeps_its_balancing_loss(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, router_aux_loss_coef=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    trainer = make_trainer(tmp_path, model, per_device_train_batch_size=4, gradient_accumulation_steps=1)
    loss, _ = step_gradients(trainer)
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    assert abs(loss - model(**inputs, output_router_logits=True).loss.item()) < 1e-5
    trainer.train()
    assert model.config.output_router_logits is False


# ------------------------------------------------------------------------------------------------- against TRL itself


def test_three_steps_equal_trls_own_trainer(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    options = {"max_steps": 3, "lr_scheduler_type": "constant", "warmup_steps": 0.0}
    mine = make_trainer(tmp_path / "mine", **options)
    mine.train()
    settings = {key: value for key, value in FAST.items()} | options
    config = SFTConfig(
        str(tmp_path / "theirs"), **settings, seed=7, data_seed=7, use_cpu=True, bf16=False, activation_checkpointing=False, report_to="none", disable_tqdm=True
    )
    data = mine.encoded.select_columns(["input_ids", "labels"])
    theirs = SFTTrainer(tiny_model(), config, train_dataset=data, processing_class=tiny_tokenizer())
    theirs.train()
    losses = [[line["loss"] for line in one.state.log_history if "loss" in line] for one in (mine, theirs)]
    assert len(losses[0]) == 3 and losses[0] == pytest.approx(losses[1], abs=1e-4)
    for (name, one), (_, other) in zip(mine.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4), name


# -------------------------------------------------------------------------------------------------- labels on the wire


@pytest.mark.parametrize("packing", [False, True])
def test_what_was_audited_is_on_the_wire(packing: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, packing=packing, max_length=64, max_steps=2)
    rows = trainer.encoded
    batches = list(trainer.get_train_dataloader())
    numbers = [number for batch in batches for row in batch["rows"] for number in row]
    assert sorted(numbers) == list(range(len(rows)))
    wanted = sorted(label for row in rows for label in row["labels"][1:] if label != -100)
    assert sorted(label for batch in batches for label in batch["labels"].flatten().tolist() if label != -100) == wanted
    assert sum(batch["tokens"] for batch in batches) == sum(len(row["input_ids"]) for row in rows)
    assert sum(batch["supervised_tokens"] for batch in batches) == len(wanted)
    trainer.train()
    assert trainer.seen == 4


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("what", ["labels", "input_ids"])
def test_other_labels_or_tokens_stop_the_run(what: str, packing: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, packing=packing, max_length=64)
    honest = trainer.data_collator

    def tampering(examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = honest(examples)
        batch[what][0, 1] = 5
        return batch

    trainer.data_collator = tampering
    with pytest.raises(RunError, match="the batch does not hold the audited tokens and labels of the rows"):
        trainer.train()


def test_nothing_is_cut_or_filtered_a_second_time(tmp_path: Path) -> None:
    """At six tokens most rows have lost all their labels: TRL would filter them out."""
    trainer = make_trainer(tmp_path, max_length=6, num_train_epochs=1.0)
    assert len(trainer.train_dataset) == 16 and all(len(ids) <= 6 for ids in trainer.encoded["input_ids"])
    assert sum(all(label == -100 for label in labels) for labels in trainer.encoded["labels"]) > 8
    trainer.train()
    assert trainer.state.global_step == 4
    long = make_trainer(tmp_path, rows=[{"prompt": "p" * 1500, "completion": "c" * 200}] * 4, max_length=None, num_train_epochs=1.0)
    assert next(iter(long.get_train_dataloader()))["input_ids"].shape == (2, 1701)


def test_places_in_one_sequence_are_taken_whether_or_not_the_model_left_out_the_others() -> None:
    logits, places = torch.randn(1, 4, 5), torch.tensor([3, 0, 0, 2])
    for one, only in ((logits, False), (logits[:, places], True)):
        assert torch.equal(kept_logits(one, places, only=only), logits[0, places])
    assert torch.equal(kept_logits(logits, places[:3], only=True), logits[0, places[:3]]), "one that does not as it is told"


@pytest.mark.parametrize(("more", "shares"), [({}, True), ({"args": {"neftune_noise_alpha": 5}}, False), ({"fast": ["attention", "rows"]}, False)])
def test_a_tree_is_made_only_for_rows_that_share(tmp_path: Path, more: dict[str, Any], shares: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise on the embeddings is each row's own; and no tree is made for nothing."""
    trees: list[Any] = []
    monkeypatch.setattr("ftx_sft_trainer.tree_of", lambda *given: trees.append(given) or tree_of(*given))
    trainer = make_trainer(tmp_path, max_steps=2, gradient_accumulation_steps=1, **more)
    trainer.train()
    assert trainer.state.global_step == 2 and bool(trees) == shares
    trainer.fast = trainer.put_on(trainer.model)
    try:
        assert trainer.fast.shares == shares
    finally:
        trainer.fast.undo()


@pytest.mark.parametrize("recomputed", [True, False])
def test_nothing_is_compiled_where_activations_are_recomputed(tmp_path: Path, recomputed: bool) -> None:
    trainer = make_trainer(tmp_path, fast=["auto", "compile"], gradient_checkpointing=recomputed)
    fast = trainer.put_on(trainer.model)
    on, off = fast.on, fast.off
    fast.undo()
    assert ("compile: activations are recomputed" in off) == recomputed
    assert any("RMSNorm" in line for line in on) or not recomputed, "layers in its place"


# -------------------------------------------------------------------------------------------------------------- encoding


def test_encoding_counts_what_it_cuts_and_keeps_the_source(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    data = SFT(max_length=5).encode_dataset(to_dataset([{"prompt": "abc", "completion": "defg", "_file": "f", "_line": 9}]), tiny_tokenizer(), run)
    row = data[0]
    assert len(row["input_ids"]) == len(row["labels"]) == 5 and row["labels"][:3] == [-100] * 3
    assert (row["cut"], row["_file"], row["_line"]) == (3, "f", 9)
    assert str(data.features["input_ids"]) == "List(Value('int32'))"


def test_a_row_that_cannot_be_rendered_is_an_error_or_a_ledger_entry(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0]['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}" + tokenizer.chat_template
    good = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = to_dataset(
        [{"messages": messages, "_file": "chat.jsonl", "_line": n} for n, messages in ((1, good), (2, [{"role": "tool", "content": "x"}, *good]))]
    )
    with pytest.raises(DataError, match=r"chat.jsonl:2: the chat template refuses the row \(no tools here\)"):
        SFT().encode_dataset(rows, tokenizer, make_run(tmp_path))
    run = make_run(tmp_path, ledger=Ledger(skip_bad_rows=True))
    assert len(SFT().encode_dataset(rows, tokenizer, run)) == 1
    assert run.ledger.dropped() == {("chat.jsonl", 2)}


# --------------------------------------------------------------------------------------------------------------- packing


@with_and_without
@pytest.mark.parametrize("name", ["plain", "lora", "wrapper"])
def test_a_packed_loss_is_that_of_the_separate_rows(name: str, fast: str, tmp_path: Path) -> None:
    """The separate rows without any part: both sides on one fast path could be wrong alike."""
    options = {"max_length": 128, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
    packed = make_trainer(tmp_path, MODELS[name](), packing=True, fast=fast, **options)
    apart = make_trainer(tmp_path, MODELS[name](), fast="off", **options)
    assert len(packed.train_dataset) < 16 == len(apart.train_dataset)
    assert all(sum(lengths) <= 128 for lengths in packed.train_dataset["seq_lengths"])
    loss, mine = step_gradients(packed)
    other, theirs = step_gradients(apart)
    assert abs(loss - other) < 1e-6
    assert_close(mine, theirs)


@with_and_without
def test_a_row_of_a_pack_does_not_see_the_others(fast: str, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, packing=True, max_length=128, fast=fast)
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) > 2 and "attention_mask" not in batch
    assert (batch["labels"][0, starts] == -100).all()
    keep = torch.ones_like(batch["labels"], dtype=torch.bool)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, starts[1] : starts[2]] = 77
    with installed(trainer):
        before, after = (trainer.model(**trainer._arguments(given), logits_to_keep=keep).logits for given in (batch, changed))
    inside = torch.zeros(before.shape[0], dtype=torch.bool)
    inside[starts[1] : starts[2]] = True
    assert torch.equal(before[~inside], after[~inside]) and not torch.equal(before[inside], after[inside])


def test_evaluation_rows_are_not_packed_but_give_the_same_loss(tmp_path: Path) -> None:
    options = {"max_length": 128, "eval_strategy": "epoch", "run": {"eval_data": "x"}, "per_device_eval_batch_size": 16}
    losses = [make_trainer(tmp_path, evaluation=answers(9), packing=packing, **options).evaluate()["eval_loss"] for packing in (True, False)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


# -------------------------------------------------------------------------------------------------- resume, seeds, saving


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def assert_same(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, one in mine.items():
        assert torch.equal(one, theirs[name]), name


RESUMED = {
    "plain": tiny_model,
    "tied": MODELS["tied"],
    "lora": lambda: lora(lora_dropout=0.2),
    "wrapper": MODELS["wrapper"],
    "tied-wrapper": lambda: Wrapper(tiny_model(tie_word_embeddings=True)),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_equals_never_having_stopped(name: str, tmp_path: Path) -> None:
    """Six steps over one and a half epochs, the stop in the middle of the first; dropout draws random numbers."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop |= state.global_step == 3

    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", RESUMED[name](), **options)
    start = weights(whole.model)
    whole.train()
    stopped = make_trainer(tmp_path / "parts", RESUMED[name](), **options)
    stopped.add_callback(Stop())
    stopped.train()
    assert stopped.state.global_step == 3
    resumed = make_trainer(tmp_path / "parts", RESUMED[name](), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoints" / "checkpoint-3"))
    assert_same(weights(whole.model), weights(resumed.model))
    assert any(not torch.equal(start[key], one) for key, one in weights(whole.model).items())
    losses = [{line["step"]: line["loss"] for line in one.state.log_history if "loss" in line} for one in (whole, resumed)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


@pytest.mark.parametrize("seed", [7, 8])
def test_the_seed_alone_decides_the_weights_and_the_order(seed: int, tmp_path: Path) -> None:
    trainers = []
    for noise in (0, 1):
        trainer = make_trainer(tmp_path, lora(lora_dropout=0.2), max_steps=3, run={"seed": seed})
        torch.rand(noise * 100)  # what happened before must not matter
        orders = [row for batch in trainer.get_train_dataloader() for row in batch["rows"]]
        torch.manual_seed(0)
        trainer.train()
        trainers.append((weights(trainer.model), orders))
    assert_same(trainers[0][0], trainers[1][0])
    assert trainers[0][1] == trainers[1][1] != sorted(trainers[0][1])


def test_another_seed_gives_another_order(tmp_path: Path) -> None:
    orders = [[row for batch in make_trainer(tmp_path, run={"seed": seed}).get_train_dataloader() for row in batch["rows"]] for seed in (1, 2)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_checkpoints_are_standard_and_none_is_pruned_here(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lora(), max_steps=4, save_steps=1, save_strategy="epoch")
    trainer.train()
    found = sorted((tmp_path / "checkpoints").iterdir())
    assert [one.name for one in found] == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {file.name for file in found[0].iterdir()}
    trainer.save_model(str(tmp_path / "out"))
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


# --------------------------------------------------------------------------------------------- evaluation and stopping


def test_early_stopping_and_the_best_model(tmp_path: Path) -> None:
    """A learning rate this high makes the evaluation loss rise from the first evaluation on."""
    options = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_steps": 0.0, "max_steps": 12, "save_steps": 1, "early_stopping_patience": 2}
    trainer = make_trainer(tmp_path, evaluation=answers(4), load_best_model_at_end=True, run={"eval_data": "x"}, **options)
    trainer.train()
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    best = losses.index(min(losses))
    assert trainer.state.global_step == len(losses) == best + 3 < 12
    assert Path(trainer.state.best_model_checkpoint).name == f"checkpoint-{best + 1}"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)


def test_early_stopping_goes_on_counting_after_a_resume(tmp_path: Path) -> None:
    options = {"learning_rate": 0.3, "lr_scheduler_type": "constant", "warmup_steps": 0.0, "max_steps": 12, "save_steps": 1, "early_stopping_patience": 2}
    whole = make_trainer(tmp_path, evaluation=answers(4), run={"eval_data": "x"}, **options)
    whole.train()
    before = whole.state.global_step - 1
    again = make_trainer(tmp_path, evaluation=answers(4), run={"eval_data": "x"}, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / f"checkpoint-{before}"))
    assert again.state.global_step == whole.state.global_step


@pytest.mark.parametrize(
    ("options", "when"),
    [
        ({}, "no"),
        ({"early_stopping_patience": 1}, "epoch"),
        ({"load_best_model_at_end": True, "save_steps": 4}, "steps"),
        ({"eval_steps": 3}, "steps"),
        ({"eval_strategy": "epoch"}, "epoch"),
        ({"early_stopping_patience": 1, "save_strategy": "no"}, "epoch"),
    ],
)
def test_when_the_evaluation_loss_is_taken(options: dict[str, Any], when: str, tmp_path: Path) -> None:
    plugin = SFT(**options)
    assert plugin.evaluates == when
    reasons = plugin.preflight(make_run(tmp_path))
    assert len(reasons) == (when != "no") and not plugin.preflight(make_run(tmp_path, eval_data="e.jsonl"))
    if reasons:
        assert reasons[0].endswith("needs evaluation data: add --eval-data FILE")


# ----------------------------------------------------------------------------------------------- counts, logs, left-overs


@pytest.mark.parametrize("packing", [False, True])
def test_logs_count_tokens_without_padding(packing: bool, tmp_path: Path) -> None:
    options = {"num_train_epochs": 2.0, "packing": packing, "max_length": 128, "eval_strategy": "epoch", "run": {"eval_data": "x"}}
    trainer = make_trainer(tmp_path, evaluation=answers(3), **options)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    rows = trainer.encoded
    assert lines[-1]["tokens"] == 2 * sum(len(row["input_ids"]) for row in rows)
    assert lines[-1]["supervised_tokens"] == 2 * sum(label != -100 for row in rows for label in row["labels"][1:])
    assert 0 < lines[0]["tokens"] < lines[-1]["tokens"] and lines[0]["step"] == 1
    assert not any("tokens" in line for line in trainer.state.log_history if "eval_loss" in line)
    assert all(line["grad_norm"] > 0 for line in lines) and "entropy" not in lines[0]


def test_nothing_is_written_to_standard_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, max_steps=2, save_steps=1, evaluation=answers(3), eval_steps=1, run={"eval_data": "x"}).train()
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "lora", "lora-on-head", "wrapper"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_model_comes_back_without_patches(name: str, checkpointing: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """A deep copy of a model with a patched forward would run the original's weights."""
    model = MODELS[name]()
    before = {id(module): set(vars(module)) for module in model.modules()}
    configs = [json.dumps(one.to_dict(), default=str) for one in (tiny_model().config, tiny_model().generation_config)]
    trainer = make_trainer(tmp_path, model, max_steps=2, gradient_checkpointing=checkpointing, run={"dtype": dtype})
    assert trainer.args.activation_checkpointing is checkpointing
    assert not any("forward" in vars(module) for module in model.modules())
    trainer.train()
    harmless = {"_require_grads_hooks", "_gradient_checkpointing_func", "gradient_checkpointing"}  # switched off, and no hook in them
    assert all(set(vars(module)) - before[id(module)] <= harmless for module in model.modules())
    inner = trainer.inner
    assert [json.dumps(one.to_dict(), default=str) for one in (inner.config, inner.generation_config)] == configs
    assert inner.config.use_cache and not inner.is_activation_checkpointing and not inner.get_input_embeddings()._forward_hooks
    twin, ids = copy.deepcopy(model).eval(), torch.arange(3, 9)[None]
    with torch.no_grad():
        for one in twin.parameters():
            one.zero_()
        assert twin(ids).logits.abs().sum() == 0 < model.eval()(ids).logits.abs().sum()


@pytest.mark.parametrize("name", ["plain", "lora", "wrapper"])
def test_checkpointing_changes_memory_and_not_the_result(name: str, tmp_path: Path) -> None:
    trained = []
    for checkpointing in (False, True):
        trainer = make_trainer(tmp_path, MODELS[name](), max_steps=2, gradient_checkpointing=checkpointing)
        trainer.train()
        trained.append(weights(trainer.model))
    assert_same(*trained)


def test_an_error_in_training_hands_the_model_back_too(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, run={"dtype": torch.bfloat16}, gradient_checkpointing=True)
    trainer.data_collator = lambda examples: {"nothing": torch.zeros(1)}
    with pytest.raises(KeyError):
        trainer.train()
    assert "forward" not in vars(trainer.model) and trainer.model.config.use_cache and not trainer.model.is_activation_checkpointing


def test_nothing_is_sent_or_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.trainer.base_trainer

    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", lambda **_: pytest.fail("telemetry"))
    make_trainer(tmp_path, max_steps=1, save_steps=1).train()
    assert not list(tmp_path.rglob("README.md"))


# ------------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("dtype", "make", "autocast"),
    [
        (torch.float32, tiny_model, False),
        (torch.bfloat16, tiny_model, True),
        (torch.bfloat16, lambda: lora(tiny_model().to(torch.bfloat16)), False),
        (torch.bfloat16, lora, True),
    ],
)
def test_autocast_only_over_master_weights(dtype: torch.dtype, make: Any, autocast: bool, tmp_path: Path) -> None:
    model = make()
    dtypes = {name: one.dtype for name, one in model.named_parameters()}
    trainer = make_trainer(tmp_path, model, max_steps=2, run={"dtype": dtype})
    assert (trainer.args.bf16, trainer.args.fp16) == (autocast, False)
    trainer.train()
    assert {name: one.dtype for name, one in model.named_parameters()} == dtypes
    assert all(torch.isfinite(one).all() for one in model.parameters())


def test_checkpointing_by_itself_only_when_memory_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from ftx_sft_loan import needs_checkpointing

    model, tokens = tiny_model(), 1000
    need = (80 * 2 * 32 + 14 * 259) * tokens + 12 * sum(one.numel() for one in model.parameters())
    for free, expected in ((need / 0.8 - 1000, True), (need / 0.8 + 1000, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, free))
        assert needs_checkpointing(model, tokens) is expected


class Scaled(nn.Module):
    """An adapter without peft, inside the model."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.ones(layer.out_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * self.scale.to(x.dtype)


def scaled(model: Any) -> Any:
    for block in model.requires_grad_(False).model.layers:
        block.mlp.down_proj = Scaled(block.mlp.down_proj)
    return model


@pytest.mark.parametrize("adapt", [lora, scaled, Wrapper])
def test_adapters_on_a_4_bit_model_train_in_fp32(adapt: Any, tmp_path: Path) -> None:
    """TRL would make peft's bf16, where small updates vanish, and transformers refuses those that are not peft's."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    path = tiny_model_dir(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(path, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"})
    model = adapt(base)
    before = weights(model)
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    trainer = make_trainer(tmp_path, model, max_steps=2, run={"dtype": torch.bfloat16})
    assert {one.dtype for one in model.parameters() if one.requires_grad} == {torch.float32}
    assert not trainer.args.bf16 and base.is_quantized
    trainer.train()
    after = weights(model)
    assert {name for name, one in after.items() if not torch.equal(one, before[name])} == trained


@pytest.mark.gpu
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype, packing: bool, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, lora(tiny_model().to(dtype)).cuda(), max_steps=3, packing=packing, run={"dtype": dtype, "device": "cuda"})
    trainer.train()
    assert trainer.args.fp16 is (dtype is torch.float16) and trainer.args.dataloader_pin_memory
    assert all(torch.isfinite(one).all() for one in trainer.model.parameters())


@pytest.mark.gpu
def test_offloaded_activations_on_a_gpu_change_nothing(tmp_path: Path) -> None:
    after = []
    for offload in (False, True):
        model = lora(tiny_model()).cuda()
        trainer = make_trainer(tmp_path, model, max_steps=2, args={"activation_offloading": offload}, run={"dtype": torch.float32, "device": "cuda"})
        trainer.train()
        after.append(weights(model))
    for name, one in after[0].items():
        torch.testing.assert_close(after[1][name], one, msg=name)


def test_batches_go_to_a_gpu_without_waiting_for_it(tmp_path: Path) -> None:
    """And not from pinned memory where graphs are recorded beside worker processes."""
    from ftx_sft_args import arguments

    run = make_run(tmp_path, device="cuda")

    def given(**options: Any) -> tuple[Any, Any]:
        found = arguments(SFT(**options), run, autocast=False, checkpointing=False)
        return found["accelerator_config"], found["dataloader_pin_memory"]

    assert given() == given(dataloader_num_workers=2) == given(fast=["auto", "graphs"]) == ({"non_blocking": True}, True)
    assert given(fast=["auto", "graphs"], dataloader_num_workers=2) == ({"non_blocking": False}, False)
    assert make_trainer(tmp_path).args.accelerator_config.non_blocking is False


# --------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1, got 0"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps must be at least 1, got -1"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"save_steps": 0}, "save_steps must be at least 1, got 0"),
        ({"early_stopping_patience": 0}, "early_stopping_patience must be at least 1, got 0"),
        ({"save_total_limit": 0}, "save_total_limit must be at least 1, got 0"),
        ({"learning_rate": -1.0}, "learning_rate must not be negative or infinite, got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must not be negative or infinite, got nan"),
        ({"num_train_epochs": 0.0}, "num_train_epochs must be greater than 0, got 0.0"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1 for num_train_epochs, got 0"),
        ({"warmup_steps": 1.5}, "warmup_steps must be a share below 1 or a whole number of steps, got 1.5"),
        ({"packing": True, "max_length": None}, "packing needs max_length: it is the length of a pack"),
        ({"save_strategy": "no", "save_steps": 5}, "save_strategy 'no' and save_steps contradict each other: drop one"),
        ({"eval_strategy": "epoch", "eval_steps": 5}, "eval_strategy 'epoch' and eval_steps contradict each other: drop one"),
        ({"eval_strategy": "no", "early_stopping_patience": 1}, "early_stopping_patience needs the evaluation loss: drop eval_strategy 'no'"),
        ({"lr_scheduler_type": "greedy"}, "lr_scheduler_type 'greedy' needs the evaluation loss: set eval_strategy to 'epoch' or 'steps'"),
        ({"load_best_model_at_end": True, "save_strategy": "no"}, "load_best_model_at_end needs checkpoints: drop save_strategy 'no'"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps"},
            "load_best_model_at_end needs an evaluation at each checkpoint: eval_strategy is 'steps', save_strategy is 'epoch'",
        ),
        (
            {"load_best_model_at_end": True, "save_steps": 5, "eval_steps": 2},
            "load_best_model_at_end needs save_steps to be a multiple of eval_steps, got 5 and 2",
        ),
    ],
)
def test_nonsense_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        SFT(**options)
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("adam_beta3", Text("0.9"), "trainer.args.adam_beta3: trl.SFTConfig has no field 'adam_beta3'. Did you mean 'adam_beta2'?"),
        ("adam_beta2", Text("fast"), "trainer.args.adam_beta2 wants float, got 'fast'."),
        ("learning_rate", 1e-3, "trainer.args.learning_rate: 'learning_rate' is an option of its own: use trainer.learning_rate"),
        ("output_dir", Text("x"), "trainer.args.output_dir cannot be set: use --output"),
        ("loss_type", Text("dft"), "trainer.args.loss_type cannot be set: the trainer computes its own loss"),
        ("push_to_hub", True, "trainer.args.push_to_hub cannot be set: ftx uploads nothing"),
        ("logging_strategy", Text("often"), "trainer.args.logging_strategy cannot be 'often'. Choices: no, steps, epoch."),
    ],
)
def test_args_are_checked_before_anything_is_loaded(name: str, value: Any, text: str, tmp_path: Path) -> None:
    assert SFT(args={name: value}).preflight(make_run(tmp_path)) == [text]


def test_args_arrive_typed_from_text_and_from_yaml(tmp_path: Path) -> None:
    given = {"args.adam_beta2": Text("0.95"), "args.neftune_noise_alpha": Text("none"), "args.adam_epsilon": Text("1e-7")}
    plugin = build(SFT, {**given, "args": {"torch_empty_cache_steps": 50, "ddp_timeout": "900"}}, stage="trainer", name="sft")
    run = make_run(tmp_path)
    assert plugin.preflight(run) == []
    trainer = plugin.make_trainer(tiny_model(), tiny_tokenizer(), encoded(plugin, run), None, [], run)
    values = trainer.args
    assert (values.adam_beta2, values.adam_epsilon, values.neftune_noise_alpha, values.torch_empty_cache_steps, values.ddp_timeout) == (
        0.95,
        1e-7,
        None,
        50,
        900,
    )


def test_what_the_core_owns_exists_in_sftconfig() -> None:
    """A field that TRL renames must not slip through."""
    import dataclasses

    from trl import SFTConfig

    from ftx_sft_args import OWNED

    fields = {field.name for field in dataclasses.fields(SFTConfig)}
    assert OWNED.keys() <= fields
    assert not OWNED.keys() & {field.name for field in dataclasses.fields(SFT)}
    ours = {"args", "early_stopping_patience", "fast"}
    assert {field.name for field in dataclasses.fields(SFT)} - ours <= fields


def test_schedulers_and_optimizer_are_transformers_own(tmp_path: Path) -> None:
    from typing import get_args

    from transformers import TrainingArguments
    from transformers.trainer_utils import SchedulerType

    from ftx_sft_options import OPTIM, Scheduler

    assert set(get_args(Scheduler)) == {one.value for one in SchedulerType}
    assert TrainingArguments(output_dir=str(tmp_path), use_cpu=True).optim == OPTIM
    assert SFT(optim="sgd").preflight(make_run(tmp_path)) == []
    (reason,) = SFT(optim="adamw_fast").preflight(make_run(tmp_path))
    assert reason.startswith("trainer.optim cannot be 'adamw_fast'. Did you mean 'adamw_")


def test_importing_the_plugin_and_its_preflight_load_no_library() -> None:
    code = (
        "import sys; from types import SimpleNamespace as N; from ftx_sft import SFT; SFT().preflight(N(recipe=N(eval_data=None)));"
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets', 'peft') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
