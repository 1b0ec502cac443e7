"""Generation for evaluation: ftx's generator beside transformers' `generate` in batches of 8 as they come; writes docs/benchmarks.md.

`generation.py [--prompts N] [--dtype bfloat16] [--run RUN] [--one-by-one]`: on snips' validation questions (or those of the example data,
where snips is absent), smollm2 with a fresh LoRA adapter as a run's tuned model has one, or the tuned model of RUN. Seconds, ratios, and how many
answers have the same text. With options other than --one-by-one it only prints.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from run import REPO, command, processor, replace

from ftx import models
from ftx.encode import prompt_text
from ftx.generate import Generate
from ftx_fast import generating

DATA = REPO / "examples" / "data" / "products-test.jsonl"
SNIPS = REPO.parent / "shared" / "data" / "snips"


MARKS = "<!-- generation: begin -->", "<!-- generation: end -->"
#: What it is to come to beside batches of 8.
BAR = 3.0


def questions(count: int) -> list[str | list[dict[str, str]]]:
    """`count` prompts of different lengths, in no order."""
    import json

    if SNIPS.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, REPO / "examples" / "snips.py", SNIPS, folder], check=True, stdout=subprocess.DEVNULL)
            rows = [json.loads(line) for line in (Path(folder) / "snips-validation.jsonl").read_text("utf-8").splitlines()]
        return [[{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}] for row in rows[:count]]
    rows = [json.loads(line) for line in DATA.read_text("utf-8").splitlines()]
    texts = [f"{row['instruction']}\n{row['input']}" for row in rows]
    texts = [text + " Think of every detail." * (number % 7) for number, text in enumerate(texts * (1 + count // len(texts)))]
    return [[{"role": "user", "content": text}] for text in texts[:count]]


def plain(model, tokenizer, prompts, size: int, new: int) -> list[str]:
    """transformers' generate over batches of `size` in the order that they come."""
    answers = []
    tokenizer.padding_side = "left"
    for start in range(0, len(prompts), size):
        texts = [prompt_text(prompt, tokenizer) for prompt in prompts[start : start + size]]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            out = model.generate(**batch, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers += tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--run", type=Path, help="a finished run, whose adapter is taken")
    parser.add_argument("--one-by-one", action="store_true", help="compare with one prompt at a time too")
    given = parser.parse_args()
    path = models.resolve("smollm2", print)
    torch.manual_seed(0)
    tokenizer = models.load_tokenizer(path)
    model = models.load_model(path, dtype=getattr(torch, given.dtype), device="cpu")
    if given.run:
        model = PeftModel.from_pretrained(model, given.run / "model").eval()
    else:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data *= 0.02  # changes what is said, and leaves sense in it
    prompts = questions(given.prompts)
    generate = Generate(model, tokenizer, around=lambda: generating(model))
    bare = Generate(model, tokenizer)
    ways = {
        "ftx": lambda: generate(prompts, max_new_tokens=given.max_new_tokens),
        "ftx without ftx-fast": lambda: bare(prompts, max_new_tokens=given.max_new_tokens),
        "transformers, batches of 8": lambda: plain(model, tokenizer, prompts, 8, given.max_new_tokens),
    }
    if given.one_by_one:
        ways["ftx, one by one"] = lambda: [generate([prompt], max_new_tokens=given.max_new_tokens)[0] for prompt in prompts]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    answers = {}
    for _ in range(given.rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            answers[name] = way()
            seconds[name].append(time.perf_counter() - start)
    ratios = {name: min(times) / min(seconds["ftx"]) for name, times in seconds.items()}
    same = {name: sum(a == b for a, b in zip(answers["ftx"], said, strict=True)) for name, said in answers.items()}
    others = [name for name in ways if name != "ftx"]
    reached = "reached" if ratios["transformers, batches of 8"] >= BAR else "not reached"
    lines = [
        f"`{command()}`, {datetime.date.today()}, {processor()}, {os.cpu_count()} cores: {len(prompts)} snips prompts, smollm2 with",
        f"{'the adapter of a run' if given.run else 'a fresh LoRA adapter'}, at most {given.max_new_tokens} new tokens, {given.dtype}; the quickest of",
        f"{given.rounds} rounds.",
        "",
        "| | seconds | ftx is faster | same answers |",
        "|---|---|---|---|",
        f"| ftx | {min(seconds['ftx']):.1f} | | |",
        *(f"| {name} | {min(seconds[name]):.1f} | {ratios[name]:.2f} times | {same[name]} of {len(prompts)} |" for name in others),
        "",
        f"At least {BAR:g} times was asked for beside batches of 8: {reached}.",
    ]
    if not set(sys.argv[1:]) - {"--one-by-one"} and SNIPS.is_dir():
        replace(MARKS, lines)
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
