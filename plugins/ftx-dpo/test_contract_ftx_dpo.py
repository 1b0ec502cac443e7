"""The exams of the trainer `dpo` and the evaluator `reward-accuracy`."""

from __future__ import annotations

from ftx.testing import EvaluatorContract, TrainerContract
from ftx_dpo import DPO
from ftx_dpo_accuracy import RewardAccuracy


class TestDPO(TrainerContract):
    plugin = DPO
    options = [{}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "gradient_accumulation_steps": 2}, {"precompute_ref_log_probs": True}]


class TestRewardAccuracy(EvaluatorContract):
    plugin = RewardAccuracy
    headline = "preference_accuracy"
    reads_answers = False
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for question, chosen, rejected in (("What is 2 + 2?", "4", "5, I think"), ("A colour?", "Blue.", "Nine."), ("Spell 'cat'.", "c, a, t", "d, o, g"))
    ]
