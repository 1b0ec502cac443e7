"""The reference: a plain TRL script, LoRA r16 on all linear layers, prompt-completion rows, the loss on answers only.

Called as a script by the snips test and the benchmark: plain_trl.py SETTINGS.json writes a JSON with the loss of each step and
the seconds of each step, and saves the adapter.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(settings: dict) -> None:
    import torch
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer

    from ftx import models

    path = models.resolve(settings["model"])
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, settings["dtype"]))
    rows = [json.loads(line) for line in Path(settings["data"]).read_text("utf-8").splitlines()]
    dataset = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"{row['instruction']}\n{row['input']}"}],
                "completion": [{"role": "assistant", "content": row["output"]}],
            }
            for row in rows
        ]
    )
    set_seed(42)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    losses, seconds = [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.began = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            seconds.append(time.perf_counter() - self.began)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                losses.append(logs["loss"])

    config = SFTConfig(
        output_dir=settings["output"],
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["batch"],
        gradient_accumulation_steps=settings["accumulation"],
        learning_rate=2e-4,
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
    trainer = SFTTrainer(model=model, args=config, train_dataset=dataset, processing_class=tokenizer, callbacks=[Watch()])
    trainer.train()
    trainer.model.save_pretrained(settings["output"])
    Path(settings["result"]).write_text(json.dumps({"losses": losses, "seconds": seconds}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
