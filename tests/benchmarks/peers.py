"""Other programs, in environments of their own, on the same rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

#: Steps of the short run; the time of a step is that of the long run less that of the short one.
SHORT = 3


def llama_factory(environment: Path, adapter: str, data: Path, steps: int, batch: int, rate: float, work: Path) -> dict:
    """LLaMA-Factory's train command, twice: by the difference of two lengths its start-up does not count."""
    from ftx import models

    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    (work / "rows.json").write_text(json.dumps([{"input": "", **row} for row in rows]))
    (work / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    taken, logs = [], []
    for number, count in enumerate((SHORT, SHORT + steps)):
        output = work / f"out{number}"
        settings = {
            "model_name_or_path": str(models.resolve("smollm2")),
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "lora_rank": 16,
            "lora_alpha": 32,
            "lora_dropout": 0.0,
            "lora_target": "q_proj,k_proj,v_proj,o_proj" if adapter == "attention" else "all",
            "use_dora": adapter == "dora",
            "dataset_dir": str(work),
            "dataset": "rows",
            "template": "default",
            "cutoff_len": 1024,
            "output_dir": str(output),
            "max_steps": count,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": 1,
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": True,
            "use_cpu": True,
        }
        (work / f"settings{number}.json").write_text(json.dumps(settings))
        begun = time.perf_counter()
        command = [environment / "bin" / "llamafactory-cli", "train", work / f"settings{number}.json"]
        with (work / f"said{number}.txt").open("w") as said:
            process = subprocess.Popen([str(word) for word in command], stdout=said, stderr=said, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            _, status, _ = os.wait4(process.pid, 0)
        if status:
            sys.exit((work / f"said{number}.txt").read_text()[-3000:])
        taken.append(time.perf_counter() - begun)
        logs = [line for line in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in line]
    step = (taken[1] - taken[0]) / steps
    return {"losses": [line["loss"] for line in logs], "grad_norms": [line.get("grad_norm", float("nan")) for line in logs], "seconds": [step] * 3}
