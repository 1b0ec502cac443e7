"""On a GPU: ftx beside TRL, SmolLM2-135M and a Llama of 8 billion random weights, LoRA and QLoRA; writes a table into docs/benchmarks.md.

`python tests/benchmarks/gpu.py [--model smollm2|8B] [--steps N] [--length TOKENS]`. Rows are of random tokens of one length, all supervised, so
that no hub and no data is needed. Tokens a second are medians without the first steps, in which ftx looks through the labels; MFU counts 4 N
operations a token for an adapter (the frozen weights have no gradient) against the card's dense bf16 rate. Every side has torch's fused AdamW.
GiB are of tensors, and of what the allocator held, which for CUDA graphs is the one that tells. Each run is a process of its own and has LIMIT
seconds; the table is written after each.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run import at_least, command, replace

from ftx import models

MARKS = "<!-- gpu: begin -->", "<!-- gpu: end -->"
#: Dense bf16 rates of cards, in operations a second.
RATES = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
BIG = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
#: (model, adapter, rows a micro-batch)
WORKLOADS = [("smollm2", "lora", 32), ("smollm2", "qlora", 32), ("8B", "lora", 4), ("8B", "qlora", 4)]
#: Micro-batches in which ftx's trainer holds the labels against the rows (ftx_sft_trainer.CHECKED), and one more.
AUDITED = 9
#: QLoRA suggests a paged one of 8 bits, which would be compared with TRL's.
OPTIMIZER = "adamw_torch_fused"
#: Seconds that one run may take.
LIMIT = 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["smollm2", "8B"], help="one of the two; both without it")
    parser.add_argument("--steps", type=at_least(AUDITED + 2), default=20)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--worker", nargs=4, metavar=("SIDE", "MODEL", "ADAPTER", "ROWS"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing was measured")
    if asked.worker:
        side, model, adapter, rows = asked.worker
        print(json.dumps(measured(side, Path(model), adapter, int(rows), asked.steps, asked.length)))
        return
    title = [
        f"`{command()}`, {datetime.date.today()}, {torch.cuda.get_device_name()}, torch {torch.__version__}:",
        f"rows of {asked.length} tokens, rank 16.",
        "",
        "| workload | | tokens/s | GiB of tensors | GiB held | MFU | ftx is faster | last loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = {"smollm2": models.resolve("smollm2", print)}
        for model, adapter, rows in [one for one in WORKLOADS if asked.model in (None, one[0])]:
            if model not in paths:
                paths[model] = big(Path(folder) / model, paths["smollm2"])
            found: dict[str, dict] = {}
            for side in ("ftx", *(("ftx, graphs", "ftx, compile") if model == "smollm2" else ()), "TRL", "TRL tuned"):
                call = [
                    sys.executable,
                    __file__,
                    "--steps",
                    str(asked.steps),
                    "--length",
                    str(asked.length),
                    "--worker",
                    side,
                    str(paths[model]),
                    adapter,
                    str(rows),
                ]
                lines.append(f"| {model}, {adapter} | {side} | {row(run(call, found, side), found)}")
                print(lines[-1], flush=True)
                replace(MARKS, [*title, *lines], say=False)


def run(call: list[str], found: dict[str, dict], side: str) -> dict | str:
    """What a worker measured, or why it did not; the end of what it said goes to standard error."""
    try:
        done = subprocess.run(call, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired as late:
        print(str(late.stderr)[-3000:], file=sys.stderr, flush=True)
        return f"more than {LIMIT} s"
    if done.returncode:
        print(done.stderr[-3000:], file=sys.stderr, flush=True)
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:80]  # one that is killed says nothing
    found[side] = json.loads(done.stdout.splitlines()[-1])
    return found[side]


def row(one: dict | str, found: dict[str, dict]) -> str:
    """The end of a table's line."""
    if isinstance(one, str):
        return f"failed: {one} | | | | | |"
    faster = "" if one["side"].startswith("ftx") or "ftx" not in found else f"{found['ftx']['rate'] / one['rate']:.2f} times"
    sizes = f"{one['peak'] / 2**30:.1f} | {one['held'] / 2**30:.1f}"
    return f"{one['rate']:,.0f} | {sizes} | {one['mfu']:.0%} | {faster} | {one['loss']:.3f} |"


def big(path: Path, like: Path) -> Path:
    """A Llama of 8 billion random weights in bfloat16, with the tokenizer of another model."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        made = AutoModelForCausalLM.from_config(LlamaConfig(**BIG), dtype=torch.bfloat16)
        torch.set_default_dtype(torch.float32)
    made.save_pretrained(path)
    models.load_tokenizer(like).save_pretrained(path)
    del made
    torch.cuda.empty_cache()
    return path


def measured(side: str, path: Path, adapter: str, rows: int, steps: int, length: int) -> dict:
    """Tokens a second, peak bytes, MFU and the last loss of one run."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self):
            self.seconds, self.losses, self.began = [], [], None

        def on_step_begin(self, args, state, control, **kwargs):
            """From beginning to beginning, as tests/toys/clock.py: with what the batch and the log cost."""
            torch.cuda.synchronize()
            now = time.perf_counter()
            self.seconds += [now - self.began] if self.began is not None else []
            self.began = now

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.losses += [logs["loss"]] if "loss" in logs else []

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = models.load_tokenizer(path)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(100, 40000, (rows * steps, length), generator=generator).tolist()
        dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
        torch.cuda.reset_peak_memory_stats()
        trainer = (ours if side.startswith("ftx") else theirs)(side, path, adapter, rows, steps, dataset, tokenizer, clock, Path(folder))
        trainer.train()
        weights = sum(
            parameter.numel() * (2 if parameter.dtype is torch.uint8 else 1)  # two 4-bit numbers a byte
            for label, parameter in trainer.model.named_parameters()
            if "embed_tokens" not in label and "lora" not in label
        )
        tied = trainer.model.config.tie_word_embeddings
        weights += trainer.model.get_input_embeddings().weight.numel() if tied else 0  # the head's products
    rate = rows * length / statistics.median(clock.seconds[AUDITED:])
    limit = next((limit for card, limit in RATES.items() if card in torch.cuda.get_device_name()), float("nan"))
    sizes = {"peak": torch.cuda.max_memory_allocated(), "held": torch.cuda.max_memory_reserved()}
    return {"side": side, "rate": rate, **sizes, "mfu": 4 * weights * rate / limit, "loss": clock.losses[-1]}


def ours(side, path, adapter, rows, steps, dataset, tokenizer, clock, folder):
    """The plugins of `ftx run` on these tokens."""
    import torch

    from ftx.catalogue import Catalogue
    from ftx.console import Console
    from ftx.pipeline import open_run, seed_everything
    from ftx.recipe import merge, resolve
    from ftx.run import RunDir

    words = {"max_steps": steps, "per_device_train_batch_size": rows, "gradient_accumulation_steps": 1, "logging_steps": 1, "learning_rate": 2e-4}
    words |= {"gradient_checkpointing": False}  # `ftx run` asks its plan, which has room for this on such cards
    words |= {"save_strategy": "no", "optim": OPTIMIZER, "fast": {"ftx": "auto", "ftx, graphs": "[auto,graphs]", "ftx, compile": "[auto,compile]"}[side]}
    assignments = tuple(f"trainer.{key}={value}" for key, value in words.items())
    recipe, hooks = resolve(merge({}, {"model": str(path), "data": "none", "adapter": adapter}, assignments), Catalogue())
    run = open_run(recipe, hooks, Console(quiet=True))
    run.directory = RunDir(folder / "run")
    run.directory.checkpoints.mkdir(parents=True)
    config = hooks.hook.quantization_config(run=run)
    model = models.load_model(path, dtype=torch.bfloat16, device="cuda", quantization_config=config)
    hooks.hook.model_loaded(model=model, run=run)
    seed_everything(run.seed)
    model = hooks.call("adapt_model", model=model, run=run)
    return hooks.call("make_trainer", model=model, tokenizer=tokenizer, train_dataset=dataset, eval_dataset=None, callbacks=[clock], run=run)


def theirs(side, path, adapter, rows, steps, dataset, tokenizer, clock, folder):
    """TRL as it comes (fp32 load where nothing is quantised, bf16 autocast, checkpointing) or tuned (bf16, no checkpointing)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    tuned = side == "TRL tuned"
    more = {"dtype": torch.bfloat16 if tuned or adapter == "qlora" else torch.float32, "device_map": {"": 0}}
    if adapter == "qlora":
        more["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
    model = AutoModelForCausalLM.from_pretrained(path, **more)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    config = SFTConfig(
        output_dir=str(folder / "trl"),
        max_steps=steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=1,
        learning_rate=2e-4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        max_length=None,
        optim=OPTIMIZER,
        bf16=not tuned,
        gradient_checkpointing=not tuned,
    )
    return SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[clock])


if __name__ == "__main__":
    main()
