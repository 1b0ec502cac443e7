"""The trainer `dpo` on the tiny model: the reference, the losses beside TRL's own, and what a run logs."""

from __future__ import annotations

import math
import re

import pytest
import torch

from ftx.errors import FtxError, OptionError
from ftx.recipe import Choice
from ftx.run import read_lines
from ftx.testing import catalogue
from ftx.testing.runs import OWN, train
from ftx_dpo import DIVERGENCES, DPO, LOSSES, OF_DIFFERENCES, SMOOTHED, SORTING
from ftx_fast import Fast

PAIRS = [
    {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {i} + {i}?"}],
        "chosen": [{"role": "assistant", "content": f"{2 * i}."}],
        "rejected": [{"role": "assistant", "content": f"I think that it is {2 * i + 1}, or so."}],
    }
    for i in range(6)
]
QUICK = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "learning_rate": 1e-2, "warmup_steps": 0, "logging_steps": 1}

#: Whatever trains: low-rank ones, all weights, a quantised base, one without peft, and another method of peft's.
ADAPTERS = ["lora", "dora", "qlora", "full", OWN, Choice("peft", {"method": "vera", "r": 8, "target_modules": ["q_proj", "o_proj"]})]
ADAPTERS += [Choice("lora", {"dropout": 0.5}), Choice("lora", {"init": "pissa"})]


def run(path, adapter="lora", rows=PAIRS, recipe=None, **options):
    """A run of dpo on the tiny model in fp32; its metrics by step."""
    trainer = Choice("dpo", {**QUICK, "max_steps": 2, **options})
    train(path, rows, catalogue(), adapter=adapter, trainer=trainer, **(recipe or {}))
    return [line for line in read_lines(path / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=str)
def test_it_starts_at_the_reference(adapter, precompute, tmp_path):
    """Before the first update rewards are 0 and the loss is ln 2, whatever the adapter, with dropout off in both passes."""
    first = run(tmp_path / "run", adapter, max_steps=1, precompute_ref_log_probs=precompute)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert abs(first[name]) < 1e-6, (name, first[name])


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_from_an_earlier_run_the_reference_is_that_runs_model(adapter, tmp_path):
    """SFT then DPO: the second run starts at ln 2 again, and not from the first one's base."""
    sft = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    train(tmp_path / "sft", sft, catalogue(), adapter=adapter, trainer=Choice("sft", {**QUICK, "max_steps": 8}))
    plain = run(tmp_path / "plain", adapter, max_steps=1)[0]
    second = run(tmp_path / "dpo", adapter, max_steps=1, recipe={"start": str(tmp_path / "sft")})[0]
    assert second["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(second["rewards/chosen"]) < 1e-6 and abs(second["rewards/rejected"]) < 1e-6
    assert second["logps_per_token/chosen"] > plain["logps_per_token/chosen"] + 0.1, "the earlier run's training is not in the model"


def test_it_learns_and_says_how(tmp_path):
    metrics = run(tmp_path / "run", max_steps=20)
    last = metrics[-1]
    assert last["loss"] < 0.2 and last["rewards/accuracies"] == 1 and last["rewards/margins"] > 1
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6) and last["kl"] > 0.01
    assert last["length/rejected"] > last["length/chosen"] > 0 > last["logps_per_token/chosen"]
    assert metrics[-1]["tokens"] > metrics[0]["tokens"] > metrics[0]["supervised_tokens"] > 0
    assert not {"entropy", "num_tokens", "logits/chosen", "mean_token_accuracy"} & set(last), "placeholders are logged"


@pytest.mark.parametrize("args", [{}, {"use_weighting": True}], ids=str)
def test_answers_that_begin_alike_are_scored_once_and_count_twice(args, tmp_path, monkeypatch):
    """Their first tokens are the same label behind the same beginning; loss, rewards, KL and counts are those of a run without the parts."""
    words = [f"Well, let me see: it is {i}" for i in range(6)]
    both = ("chosen", "rejected")
    rows = [{**row, **{side: [{"role": "assistant", "content": f"{words[i]} {row[side][0]['content']}"}] for side in both}} for i, row in enumerate(PAIRS)]
    met, shared = [], Fast.shared

    def spied(self, given, tree, fill):
        found = shared(self, given, tree, fill)
        met.append((len(tree.first), len(tree.again)) if found is not None else None)
        return found

    monkeypatch.setattr(Fast, "shared", spied)
    plain, ours = ([*run(tmp_path / fast, rows=rows, max_steps=3, fast=fast, args=args)] for fast in ("off", "auto"))
    assert [one for one in met if one] and all(distinct < every for distinct, every in filter(None, met))
    for name in ("loss", "kl", "rewards/chosen", "rewards/margins", "logps_per_token/rejected", "length/chosen", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in plain], abs=1e-5, rel=1e-4), name
    assert ours[-1]["kl"] > 1e-3


def test_one_big_batch_is_many_small_ones(tmp_path):
    """The denominator is the count of pairs, also where the last micro-batch is not full."""
    big = run(tmp_path / "big", per_device_train_batch_size=6, max_steps=3)
    small = run(tmp_path / "small", per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=3)
    assert [line["loss"] for line in small] == pytest.approx([line["loss"] for line in big], abs=1e-5)


@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("settings", [{}, {"every_n_layers": 2}], ids=str)
def test_recomputing_changes_no_loss(settings, adapter, tmp_path):
    """Whatever is set of it: the reference is asked in between, and recomputes nothing."""
    args = {"args": {"activation_checkpointing_kwargs": settings}} if settings else {}
    some = run(tmp_path / "some", adapter, gradient_checkpointing=True, **args)
    none = run(tmp_path / "none", adapter, gradient_checkpointing=False)
    assert [line["loss"] for line in some] == pytest.approx([line["loss"] for line in none], abs=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_each_loss_trains_and_mixes(loss, tmp_path):
    extra = {"label_smoothing": 1e-3} if loss == "exo_pair" else {}
    alone = run(tmp_path / "alone", loss_type=loss, **extra)
    mixed = run(tmp_path / "mixed", loss_type=[loss, "sigmoid"], loss_weights=[0.5, 2.0], **extra)
    assert all(math.isfinite(line["loss"]) for line in alone)
    assert mixed[0]["loss"] == pytest.approx(0.5 * alone[0]["loss"] + 2 * math.log(2), abs=1e-5)


# ---- beside plain TRL ----------------------------------------------------------------------------------------------

RANK_4 = Choice("lora", {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]})
#: Each loss alone, with label smoothing where it counts, and a mixture with weights.
CASES = [{"loss_type": [loss]} for loss in LOSSES if loss not in SMOOTHED]
CASES += [{"loss_type": [loss], "label_smoothing": 1e-3 if loss == "exo_pair" else 0.1} for loss in SMOOTHED]
CASES += [{"loss_type": ["robust", "ipo", "sft"], "label_smoothing": 0.2, "loss_weights": [0.8, 0.2, 1.5]}]
#: Fields of DPOConfig that are given as trainer.args.
ARGS = [
    {"use_weighting": True},
    {"ld_alpha": 0.3},
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
]


def plain_trl(path, steps, full=False, **options):
    """What a script of TRL (with peft, unless `full`) logs: the same base, pairs, order, rank and seed in fp32."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import DPOConfig, DPOTrainer

    from ftx.testing.runs import shared_model_dir

    config = DPOConfig(
        output_dir=str(path),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        max_steps=steps,
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
    model, reference = (AutoModelForCausalLM.from_pretrained(shared_model_dir(), dtype=torch.float32) for _ in range(2))
    set_seed(42)
    trainer = DPOTrainer(
        model,
        ref_model=reference if full else None,
        args=config,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(shared_model_dir()),
        peft_config=None if full else LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def agree(ours, theirs):
    for name in ("loss", "rewards/chosen", "rewards/rejected", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], abs=2e-4, rel=2e-3), name


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_losses_are_trls(options, tmp_path):
    agree(run(tmp_path / "ours", RANK_4, max_steps=3, **options), plain_trl(tmp_path / "trl", 3, **options))


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory):
    return [line["loss"] for line in run(tmp_path_factory.mktemp("plain") / "run", RANK_4, max_steps=3)]


@pytest.mark.parametrize("args", ARGS, ids=str)
def test_the_fields_of_trls_config_do_what_they_do_there(args, plain_losses, tmp_path):
    ours = run(tmp_path / "ours", RANK_4, max_steps=3, args=args)
    agree(ours, plain_trl(tmp_path / "trl", 3, **args))
    assert [line["loss"] for line in ours] != pytest.approx(plain_losses, abs=1e-4), "the field changes nothing here"


def test_the_reference_follows_the_model_as_in_trl(tmp_path):
    args = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}
    ours = run(tmp_path / "ours", "full", max_steps=5, learning_rate=1e-2, args=args)
    agree(ours, plain_trl(tmp_path / "trl", 5, full=True, **args))
    still = run(tmp_path / "still", "full", max_steps=5, learning_rate=1e-2)
    assert [line["loss"] for line in ours[:2]] == [line["loss"] for line in still[:2]]
    assert abs(ours[2]["loss"] - still[2]["loss"]) > 1e-3, "the reference has not moved"
    with pytest.raises(FtxError, match="sync_ref_model needs a reference of its own.\nUse it with --adapter full"):
        run(tmp_path / "lora", "lora", args=args)


@pytest.mark.parametrize("adapter", [RANK_4, "full"], ids=str)
def test_a_reference_taken_once_gives_the_same_losses(adapter, tmp_path):
    """Over two epochs, so that each pair comes again behind updates."""
    once, asked = (run(tmp_path / str(precompute), adapter, max_steps=6, precompute_ref_log_probs=precompute) for precompute in (True, False))
    assert asked[-1]["loss"] < 0.6
    for name in ("loss", "rewards/chosen", "rewards/rejected"):
        assert [line[name] for line in once] == pytest.approx([line[name] for line in asked], abs=1e-5), name


def test_what_is_known_of_trls_losses_is_what_stands_in_trl():
    import inspect

    from trl import DPOTrainer

    whole = inspect.getsource(DPOTrainer)
    loss = inspect.getsource(DPOTrainer._compute_loss)
    branches = dict(re.findall(r'if loss_type == "(\w+)":\n(.*?)(?=\n +(?:el)?if loss_type ==|\n +else:\n +raise)', loss, re.DOTALL))
    assert tuple(branches) == LOSSES
    assert {name for name, branch in branches.items() if "label_smoothing" in branch} == set(SMOOTHED)
    assert {name for name, branch in branches.items() if "torch.sort(" in branch} == set(SORTING)
    assert set(re.findall(r'"(\w+)"', re.search(r"f_divergence_loss_types = {(.*?)}", whole)[1])) == set(OF_DIFFERENCES)
    assert tuple(re.findall(r'self\.f_divergence_type == "(\w+)"', loss)) == DIVERGENCES


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
        (
            {"loss_type": ["sigmoid", "ipo"], "label_smoothing": 0.1},
            "label_smoothing counts only in the losses exo_pair, robust, aot, aot_unpaired; sigmoid, ipo would ignore it",
        ),
    ],
)
def test_bad_options(options, words, tmp_path):
    with pytest.raises(OptionError, match="(?s)" + words.replace("?", r"\?")):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precompute_ref_log_probs": True, "args": {"sync_ref_model": True}}, "trainer.args.sync_ref_model moves the reference, and trainer.precompute"),
        ({"args": {"sync_ref_model": True, "ref_model_sync_steps": 0}}, "ref_model_sync_steps must be at least 1, got 0"),
        (
            {"args": {"f_divergence_type": "reverse-kl"}},
            "f_divergence_type cannot be 'reverse-kl'. Did you mean 'reverse_kl'? Choices: reverse_kl, forward_kl,",
        ),
        ({"loss_type": ["sigmoid", "nca_pair"], "args": {"f_divergence_type": "forward_kl"}}, "goes with the losses sigmoid, hinge, ipo, exo_pair, robust"),
        ({"loss_type": "aot", "args": {"use_weighting": True}}, "trainer.args.use_weighting does not go with aot, which sorts the pairs"),
        ({"args": {"ld_alpha": 1.5}}, "trainer.args.ld_alpha must lie in 0..1, got 1.5"),
    ],
    ids=str,
)
def test_args_that_contradict_each_other_are_refused_before_anything_is_loaded(options, words, tmp_path, monkeypatch):
    monkeypatch.setattr("ftx.models.load_model", lambda *_, **__: pytest.fail("the model is loaded"))
    with pytest.raises(FtxError, match=re.escape(words)) as caught:
        run(tmp_path / "run", "full", **options)
    assert caught.value.remedy == "Nothing was loaded or written." and not (tmp_path / "run").exists()
