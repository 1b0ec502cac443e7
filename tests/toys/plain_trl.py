"""The reference: a plain TRL script, by default LoRA r16 on all linear layers, the loss on answers only, or DPO on pairs.

Called as a script by the snips test and the benchmark: plain_trl.py SETTINGS.json writes a JSON with the loss, the gradient norm and the
seconds of each step, and saves the adapter.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(settings: dict) -> None:
    import torch
    from clock import Watch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from ftx import models

    path = models.resolve(settings["model"])
    tokenizer = AutoTokenizer.from_pretrained(path)
    kind, more = settings.get("adapter", "lora"), {}
    if kind == "qlora":
        from transformers import BitsAndBytesConfig

        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)
        more = {"quantization_config": four}
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, settings["dtype"]), **more)
    rows = [json.loads(line) for line in Path(settings["data"]).read_text("utf-8").splitlines()]
    pairs = settings.get("trainer") == "dpo"
    say = lambda role, text: [{"role": role, "content": text}]  # noqa: E731
    if pairs:
        sides = [{side: say("assistant", row[side]) for side in ("chosen", "rejected")} for row in rows]
        dataset = Dataset.from_list([{"prompt": say("user", row["prompt"]), **side} for row, side in zip(rows, sides, strict=True)])
    else:
        asked = [f"{row['instruction']}\n{row['input']}" if row.get("input") else row["instruction"] for row in rows]
        dataset = Dataset.from_list(
            [{"prompt": say("user", text), "completion": say("assistant", row["output"])} for text, row in zip(asked, rows, strict=True)]
        )
    set_seed(42)
    if kind != "full":
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if kind == "attention" else "all-linear"
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=targets, use_dora=kind == "dora"))
    trainer_class, config_class = (DPOTrainer, DPOConfig) if pairs else (SFTTrainer, SFTConfig)
    config = config_class(
        output_dir=settings["output"],
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=settings["accumulation"],
        learning_rate=settings.get("learning_rate", 2e-4),
        lr_scheduler_type="cosine",
        warmup_steps=0.03,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=42,
        bf16=settings["bf16"],
        gradient_checkpointing=settings["checkpointing"],
    )
    trainer = trainer_class(model=model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[Watch(settings["result"])])
    trainer.train()
    trainer.model.save_pretrained(settings["output"])


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
