"""The trainer `dpo` on the tiny model: the reference, the losses beside TRL's own, and what a run logs."""

from __future__ import annotations

import math

import pytest
import torch

from ftx.errors import OptionError
from ftx.recipe import Choice
from ftx.run import read_lines
from ftx.testing import catalogue
from ftx.testing.runs import train
from ftx_dpo import DPO, LOSSES

PAIRS = [
    {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {i} + {i}?"}],
        "chosen": [{"role": "assistant", "content": f"{2 * i}."}],
        "rejected": [{"role": "assistant", "content": f"I think that it is {2 * i + 1}, or so."}],
    }
    for i in range(6)
]
QUICK = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "warmup_steps": 0, "logging_steps": 1}


def run(path, adapter="lora", rows=PAIRS, recipe=None, **options):
    """A run of dpo on the tiny model in fp32; its metrics by step."""
    trainer = Choice("dpo", {**QUICK, "max_steps": 2, **options})
    train(path, rows, catalogue(), adapter=adapter, trainer=trainer, **(recipe or {}))
    return [line for line in read_lines(path / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("adapter", ["lora", "dora", "full", Choice("lora", {"dropout": 0.5}), Choice("lora", {"init": "pissa"})], ids=str)
def test_it_starts_at_the_reference(adapter, precompute, tmp_path):
    """Before the first update rewards are 0 and the loss is ln 2, whatever the adapter, with dropout off in both passes."""
    first = run(tmp_path / "run", adapter, max_steps=1, precompute_ref_log_probs=precompute)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(first[name]) < 1e-6, (name, first[name])


def test_from_an_earlier_run_the_reference_is_that_runs_model(tmp_path):
    """SFT then DPO: the second run starts at ln 2 again, and not from the first one's base."""
    sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    train(tmp_path / "sft", sft, catalogue(), adapter="lora", trainer=Choice("sft", {**QUICK, "max_steps": 8}))
    plain = run(tmp_path / "plain", max_steps=1)[0]
    second = run(tmp_path / "dpo", max_steps=1, recipe={"start": str(tmp_path / "sft")})[0]
    assert second["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert second["logps_per_token/chosen"] > plain["logps_per_token/chosen"] + 0.1, "the earlier run's training is not in the model"


def test_it_learns_and_says_how(tmp_path):
    metrics = run(tmp_path / "run", max_steps=20)
    last = metrics[-1]
    assert last["loss"] < 0.2 and last["rewards/accuracies"] == 1 and last["rewards/margins"] > 1
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and last["kl"] > 0.01
    assert last["length/rejected"] > last["length/chosen"] > 0 > last["logps_per_token/chosen"]
    assert metrics[-1]["tokens"] > metrics[0]["tokens"] > metrics[0]["supervised_tokens"] > 0
    assert not {"entropy", "num_tokens", "logits/chosen", "mean_token_accuracy"} & set(last), "placeholders are logged"


def test_one_big_batch_is_many_small_ones(tmp_path):
    """The denominator is the count of pairs, also where the last micro-batch is not full."""
    big = run(tmp_path / "big", per_device_train_batch_size=6, max_steps=3)
    small = run(tmp_path / "small", per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3)
    assert [line["loss"] for line in small] == pytest.approx([line["loss"] for line in big], abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_trains_and_mixes(loss, tmp_path):
    extra = {"label_smoothing": 1e-3} if loss == "exo_pair" else {}
    alone = run(tmp_path / "alone", loss_type=loss, **extra)
    mixed = run(tmp_path / "mixed", loss_type=[loss, "sigmoid"], loss_weights=[0.5, 2.0], **extra)
    assert all(math.isfinite(line["loss"]) for line in alone)
    assert mixed[0]["loss"] == pytest.approx(0.5 * alone[0]["loss"] + 2 * math.log(2), abs=1e-5)


@pytest.mark.parametrize("options", [{"loss_type": ["sigmoid"]}, {"loss_type": ["ipo", "sft"]}, {"loss_type": ["robust"], "label_smoothing": 0.1}], ids=str)
def test_the_losses_are_trls(options, tmp_path):
    """Step by step as a plain TRL script with peft: the same base, pairs, order, rank and seed in fp32."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import DPOConfig, DPOTrainer

    from ftx.testing.runs import shared_model_dir

    ours = run(tmp_path / "ours", Choice("lora", {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}), max_steps=3, **options)
    model = AutoModelForCausalLM.from_pretrained(shared_model_dir(), dtype=torch.float32)
    config = DPOConfig(
        output_dir=str(tmp_path / "trl"),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        max_steps=3,
        learning_rate=1e-2,
        warmup_steps=0,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        logging_steps=1,
        seed=42,
        data_seed=42,
        report_to="none",
        save_strategy="no",
        **options,
    )
    set_seed(42)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model, args=config, train_dataset=Dataset.from_list(PAIRS), processing_class=AutoTokenizer.from_pretrained(shared_model_dir()), peft_config=lora
    )
    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    for name in ("loss", "rewards/chosen", "rewards/rejected", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], abs=2e-4, rel=2e-3), name


def test_whole_conversations_without_a_prompt(tmp_path):
    """The prompt is what both sides share."""
    from ftx.testing.runs import make_run
    from ftx.testing.tiny import tiny_tokenizer

    whole = [{"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]} for row in PAIRS]
    from datasets import Dataset

    given = [DPO().encode_dataset(Dataset.from_list(rows), tiny_tokenizer(), make_run()) for rows in (PAIRS, whole)]
    assert given[0].to_list() == given[1].to_list()
    assert all(label == -100 for label in given[0][0]["chosen_labels"][:5])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "beta must be greater than 0"),
        ({"loss_type": "sigmoyd"}, "loss_type: 'sigmoyd' is none of TRL's losses. Did you mean 'sigmoid'?"),
        ({"loss_type": ["ipo", "sft"], "loss_weights": [1.0]}, "one weight for each of the 2 losses"),
        ({"label_smoothing": 0.5}, "below 0.5"),
        ({"loss_type": "exo_pair"}, "needs label_smoothing above 0"),
    ],
)
def test_bad_options(options, words, tmp_path):
    with pytest.raises(OptionError, match="(?s)" + words.replace("?", r"\?")):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()
