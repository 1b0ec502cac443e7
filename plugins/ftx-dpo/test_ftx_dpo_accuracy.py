"""The evaluator `reward-accuracy`: its log-probabilities beside a forward pass one by one, and a run that it scores."""

from __future__ import annotations

import json

import pytest
import torch
from test_ftx_dpo import PAIRS, QUICK

from ftx.recipe import Choice
from ftx.run import read_lines, write_lines
from ftx.testing import catalogue
from ftx.testing.runs import train
from ftx.testing.tiny import tiny_model, tiny_tokenizer
from ftx_dpo_logps import pair_logps


def test_log_probabilities_are_those_of_one_by_one():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for found, row in zip(pair_logps(PAIRS, model, tokenizer, 256), PAIRS, strict=True):
        for side in ("chosen", "rejected"):
            prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
            answer = row[side][0]["content"] + tokenizer.eos_token + "\n"  # the template's end of a turn is trained with it
            ids = torch.tensor([tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]])
            tokens = len(tokenizer(answer, add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])[-tokens:]
            assert found["tokens"][side] == tokens
            assert found["logps"][side] == pytest.approx(float(logps.sum()), abs=1e-4)


def test_what_cannot_be_scored_says_why():
    same = {**PAIRS[0], "rejected": [{"role": "assistant", "content": "x" * 500}]}
    alone = {"prompt": PAIRS[0]["prompt"], "completion": PAIRS[0]["chosen"]}
    long, other, good = pair_logps([same, alone, PAIRS[0]], tiny_model(), tiny_tokenizer(), 200)
    assert long == "the pair is longer than 200 tokens: raise max_tokens"
    assert other == "the row is not a pair of a chosen and a rejected answer"
    assert set(good["logps"]) == {"chosen", "rejected"}


def test_a_run_of_dpo_is_scored_on_pairs_it_has_not_seen(tmp_path):
    write_lines(tmp_path / "held_out.jsonl", PAIRS[4:])
    trainer = Choice("dpo", {**QUICK, "max_steps": 20, "beta": 0.5})
    more = {"eval_data": str(tmp_path / "held_out.jsonl"), "evaluators": (Choice("reward-accuracy", {}),)}
    train(tmp_path / "run", PAIRS[:4], catalogue(), adapter="lora", trainer=trainer, **more)
    scores = {(score["phase"], score["metric"]): score for score in json.loads((tmp_path / "run" / "scores.json").read_text())}
    assert scores["change", "reward_accuracy"]["value"] == 1 and scores["change", "reward_accuracy"]["n"] == 2
    assert 0 < scores["change", "reward_accuracy"]["ci_low"] < 1 == scores["change", "reward_accuracy"]["ci_high"]
    base, tuned = (read_lines(tmp_path / "run" / "eval" / "reward-accuracy" / f"{phase}.jsonl") for phase in ("base", "tuned"))
    moved = [
        sum(sign * (after["logps"][side] - before["logps"][side]) for side, sign in (("chosen", 0.5), ("rejected", -0.5)))
        for before, after in zip(base, tuned, strict=True)
    ]
    margin = scores["change", "reward_margin"]
    assert margin["value"] == pytest.approx(sum(moved) / 2, abs=1e-6), "the margin is in the trainer's beta"
    assert margin["ci_low"] <= margin["value"] <= margin["ci_high"]
