"""Run directories written by hand, as runs leave them: for tests of the page that need no training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import yaml

from ftx.run import RunDir, write_lines

HOSTILE = '<script>window.ran = true</script></script><img src=x onerror="window.ran = true"> \'"& \u2028 \x00 <!-- ]]> {{ 7 * 7 }}'


def score(evaluator: str, metric: str, phase: str, value: float | None, low: float | None = None, high: float | None = None, n: int = 100) -> dict[str, Any]:
    return {"evaluator": evaluator, "metric": metric, "phase": phase, "value": value, "ci_low": low, "ci_high": high, "n": n, "unscored": 0}


def write_run(path: Path, *, steps: int = 40, **files: Any) -> RunDir:
    """A finished run of LoRA and SFT without evaluators. `files` are further ones by their stems: scores, plan, audit, ledger, and recipe and
    manifest, which are filled over what is there."""
    run = RunDir(path)
    recipe = {"model": "smollm2", "data": "train.jsonl", "eval_data": "test.jsonl", "seed": 42, "dtype": "auto", "formatter": {"name": "alpaca"}}
    recipe |= {"adapter": {"name": "lora", "r": 16}, "trainer": {"name": "sft", "max_steps": steps}, "evaluators": [], **files.get("recipe", {})}
    path.mkdir(parents=True, exist_ok=True)
    run.recipe.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), "utf-8")
    manifest = {"ftx": "0.1.0", "plugins": {"adapter:lora": {"distribution": "ftx-lora", "version": "0.1.0", "class": "ftx_lora:LoRA"}}}
    manifest |= {"libraries": {"torch": "2.13.0"}, "python": "3.11.2", "seed": 42, "dtype": "bfloat16", "device": "cpu", "finished": True}
    manifest |= {"parameters": {"trainable": 4_884_480, "stored": 139_399_488, "trainable_bytes": 19_537_920}, **files.get("manifest", {})}
    run.write_json("manifest.json", manifest)
    audit = {"rows": 500, "tokens": 42_607, "supervised_share": 0.26, "length": {"p5": 70, "p50": 85, "p95": 97, "max": 99}, "cut_answers": 0, "findings": []}
    run.write_json("audit.json", files.get("audit", {"train": audit, "eval": audit | {"rows": 100}, "overlap": {"eval_rows_in_train": 0}}))
    write_lines(run / "ledger.jsonl", files.get("ledger", []))
    write_lines(run.metrics, files.get("metrics", metrics(steps)))
    run.write_json("scores.json", files.get("scores", []))
    if "plan" in files:
        run.write_json("plan.json", files["plan"])
    return run


def metrics(steps: int) -> list[dict[str, Any]]:
    lines = []
    for step in range(1, steps + 1):
        line = {"step": step, "epoch": step / 30, "loss": 1.2 * math.exp(-step / 9) + 0.02 + 0.02 * math.sin(step), "grad_norm": 2 / step + 0.1}
        line |= {"learning_rate": 2e-4 * (1 - step / steps), "tokens": 1300 * step, "supervised_tokens": 340 * step}
        lines.append(line | {"tokens_per_second": 300 + 9 * math.sin(step), "peak_memory": 1_900_000_000})
        if step % 10 == 0:
            lines.append({"step": step, "epoch": step / 30, "eval_loss": 1.1 * math.exp(-step / 9) + 0.05, "eval_runtime": 1.0})
    return lines


def items(count: int, right: Any, *, answer: Any = None) -> list[dict[str, Any]]:
    """Items of exact-match; `right(i)` says which answers are, `answer(i)` gives another text than the default one."""
    found = []
    for i in range(count):
        reference = f'{{"name": "offer {i}", "price": {i}.99}}'
        said = answer(i) if answer else reference if right(i) else f"The offer {i} costs {i} euros and 99 cents."
        prompt = [{"role": "system", "content": "Answer in JSON."}, {"role": "user", "content": f"Offer {i}: name and price of the thing number {i}"}]
        found.append({"prompt": prompt, "answer": said, "reference": reference, "verdict": "correct" if right(i) else "wrong", "f1": 1.0 if right(i) else 0.25})
    return found


def exact_match_run(path: Path, count: int = 100, **more: Any) -> RunDir:
    """Base right in every tenth, tuned in all but every twentieth: 9 of 100 unchanged and right, 86 fixed, 1 broken, 4 still wrong."""
    base, tuned = items(count, lambda i: i % 10 == 5), items(count, lambda i: i % 20 != 0 and i != 5)
    shares = [sum(item["verdict"] == "correct" for item in phase) / count for phase in (base, tuned)]
    scores = [
        score("exact-match", "exact_match", phase, share, share - 0.02, min(1, share + 0.02), count)
        for phase, share in zip(("base", "tuned"), shares, strict=True)
    ]
    scores += [
        score("exact-match", "field_f1", phase, share, share - 0.03, min(1, share + 0.03), count)
        for phase, share in zip(("base", "tuned"), shares, strict=True)
    ]
    moved = [(a["verdict"], b["verdict"]) for a, b in zip(base, tuned, strict=True)]
    fixed, broken = moved.count(("wrong", "correct")), moved.count(("correct", "wrong"))
    scores += [score("exact-match", name, "change", value, n=count) for name, value in (("fixed", fixed), ("broken", broken), ("p_value", 1e-20))]
    run = write_run(path, **{"scores": scores, "recipe": {"evaluators": [{"name": "exact-match"}]}, **more})
    run.write_items("exact-match", "base", base)
    run.write_items("exact-match", "tuned", tuned)
    return run


def preference_run(path: Path) -> RunDir:
    """DPO with reward-accuracy."""
    lines = []
    for step in range(1, 31):
        line = {"step": step, "epoch": step / 15, "loss": math.log(2) - step / 60, "grad_norm": 1.0, "learning_rate": 2e-4, "tokens_per_second": 90.0}
        line |= {"rewards/chosen": step / 20, "rewards/rejected": -step / 25, "rewards/margins": step / 11, "rewards/accuracies": min(1.0, 0.5 + step / 60)}
        lines.append(line | {"kl": step / 300, "logps_per_token/chosen": -1.5, "logps_per_token/rejected": -1.7})
    scores = [score("reward-accuracy", "preference_accuracy", phase, value, value - 0.1, value + 0.1, 40) for phase, value in (("base", 0.5), ("tuned", 0.7))]
    scores += [score("reward-accuracy", "reward_margin", "change", 0.8, 0.5, 1.1, 40)]
    run = write_run(path, metrics=lines, scores=scores, recipe={"trainer": {"name": "dpo", "beta": 0.1}, "evaluators": [{"name": "reward-accuracy"}]})
    for phase, right in (("base", 2), ("tuned", 3)):
        rows = [
            {"prompt": f"question {i}", "answer": "the chosen one" if i % 4 < right else "the rejected one", "reference": "the chosen one"} for i in range(40)
        ]
        rows = [
            row | {"rejected": "the rejected one", "verdict": "correct" if i % 4 < right else "wrong", "logps": {"chosen": -9.5}} for i, row in enumerate(rows)
        ]
        run.write_items("reward-accuracy", phase, rows)
    return run


def judged_run(path: Path) -> RunDir:
    """MT-Bench by category, and a judge who rates and compares."""
    scores, rows = [], {}
    for phase, lift in (("base", 0), ("tuned", 2)):
        scores += [score("mt-bench", "average", phase, 3 + lift, 2.5 + lift, 3.5 + lift, 8)]
        scores += [
            score("mt-bench", f"category:{name}", phase, 2 + place + lift, 1.5 + place + lift, 2.5 + place + lift, 2) for place, name in enumerate(CATEGORIES)
        ]
        rows[phase] = [
            {
                "question_id": 81 + i // 2,
                "category": CATEGORIES[i // 2],
                "turn": 1 + i % 2,
                "prompt": f"question {i}",
                "answer": f"{phase} answers {i}",
                "reference": "",
            }
            | {
                "verdict": 3.0 + lift,
                "judgments": [{"judge": ["gpt-4", "single-v1"], "judgment": f"The answer is {phase}. Rating: [[{3 + lift}]]", "score": 3 + lift}],
            }
            for i in range(8)
        ]
    scores.append(score("mt-bench", "average_change", "change", 2.0, 1.5, 2.5, 8))
    run = write_run(path, scores=scores, recipe={"evaluators": [{"name": "mt-bench"}, {"name": "llm-judge"}]})
    for phase, items_of_it in rows.items():
        run.write_items("mt-bench", phase, items_of_it)
    judged = {"prompt": "a question", "answer": "an answer", "reference": "", "verdict": {"helpfulness": 2, "accuracy": 4}, "rating": 3.0}
    for phase, lift in (("base", 0), ("tuned", 1)):
        said = [{"judge": "qwen3", "verdict": judged["verdict"], "reasoning": f"Because it is {phase}."}]
        run.write_items("llm-judge", phase, [judged | {"rating": 3.0 + lift, "judges": said}])
    pair = {"judge": "qwen3", "verdict": "win", "preference": 1.0, "consistent": True, "reasoning": ["A is better.", "B is better."]}
    run.write_items("llm-judge", "change", [{"prompt": "a question", "verdict": "win", "judges": [pair]}])
    return run


CATEGORIES = ("writing", "math", "coding", "stem")
PLAN = {
    "predicted": {
        "peak_memory": 2_400_000_000,
        "by_kind": {"weights": 300_000_000, "activations": 1_200_000_000},
        "seconds": 130.0,
        "tokens": 52_000,
        "disk": 40_000_000,
    },
    "measured": {"peak_memory": 1_900_000_000, "seconds": 143.5, "tokens": 52_000, "disk": 39_000_000},
}
