"""A whole step of DPO, the reference's pass included: the gradient of every trained parameter as without the parts."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ftx.data import to_dataset
from ftx.ledger import Ledger
from ftx.recipe import Choice, Recipe
from ftx.run import Run, RunDir
from ftx.testing.tiny import tiny_model, tiny_tokenizer

ftx_dpo = pytest.importorskip("ftx_dpo")

PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"What is {i} + {i}?" * (1 + i % 3)}],
        "chosen": [{"role": "assistant", "content": f"{2 * i}."}],
        "rejected": [{"role": "assistant", "content": f"I think that it is {2 * i + 1}, or so."}],
        "_file": "pairs.jsonl",
        "_line": i + 1,
    }
    for i in range(4)
]


def adapted():
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(tiny_model(), config)


def gradients(model, fast, path, dtype=torch.float32):
    """Loss and gradients of the first step, of a policy that has moved away from its reference."""
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "save_strategy": "no", "logging_steps": 1}
    plugin, tokenizer = ftx_dpo.DPO(fast=fast, **options), tiny_tokenizer()
    run = Run(recipe=Recipe(trainer=Choice("dpo")), ledger=Ledger(), seed=7, dtype=dtype, directory=RunDir(path))
    rows = plugin.encode_dataset(to_dataset(PAIRS), tokenizer, run)
    trainer = plugin.make_trainer(model, tokenizer, rows, None, [], run)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.02)
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    trainer.current_gradient_accumulation_steps = 1
    trainer.fast, trainer.frozen_fast = trainer.put_on(model), trainer.put_on(trainer.frozen)
    try:
        parts = (trainer.fast.head is not None, trainer.fast.joins, trainer.frozen_fast.head is not None, trainer.fast.shares)
        assert parts == ((True,) * 4 if fast == "auto" else (False,) * 4)
        positions = []
        counting = model.get_input_embeddings().register_forward_pre_hook(lambda _, given: positions.append(given[0].numel()))
        loss = trainer.training_step(model, batches[0], count).item()
        counting.remove()
        whole = sum(len(ids) for side in ("chosen", "rejected") for ids in rows[f"{side}_input_ids"])
        assert (min(positions) < 0.8 * whole) == (fast == "auto"), "what the two of a pair begin with is computed once"
    finally:
        trainer.frozen_fast.undo()
        trainer.fast.undo()
    return loss, {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def test_in_bf16_no_further_from_fp32_than_the_plain_path(tmp_path):
    """The adapters' gradients; a deep model, as where it matters."""

    def model(dtype):
        torch.manual_seed(0)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        return get_peft_model(tiny_model(num_hidden_layers=8).bfloat16().to(dtype), config)

    _, truth = gradients(model(torch.float32), "off", tmp_path / "truth")
    away = {}
    for fast in ("off", "auto"):
        _, found = gradients(model(torch.bfloat16), fast, tmp_path / fast, torch.bfloat16)
        away[fast] = sum(float((found[name].float() - wanted).norm() / wanted.norm()) for name, wanted in truth.items()) / len(truth)
    assert away["auto"] <= 1.05 * away["off"] < 1, away


@pytest.mark.parametrize("make", [adapted, tiny_model])
def test_gradients_of_a_step(make, tmp_path):
    (loss, got), (wanted_loss, wanted) = (gradients(make(), fast, tmp_path / fast) for fast in ("auto", "off"))
    assert loss == pytest.approx(wanted_loss, rel=1e-6) and abs(loss - 0.6931) > 1e-3
    assert got.keys() == wanted.keys() and len(got) > 8
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
