"""Other programs, in environments of their own, on the same rows.

Comparable with ftx and TRL because the same clock (tests/toys/clock.py, a callback of transformers') is given to LLaMA-Factory's own
training function: a step is timed from its beginning to the next one's on every side, its batch and log line with it, and positions
and memory are counted alike. The rows go through the model's own chat template there, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TOYS = Path(__file__).resolve().parent.parent / "toys"
#: What its environment runs: clock.py needs transformers and no ftx.
TRAIN = """
import sys
from clock import Watch
from llamafactory.train.tuner import run_exp
noted = sys.argv.pop()
run_exp(callbacks=[Watch(noted)])  # it reads its settings' file from the command line
"""
#: What SmolLM2's own template says where a row has no system message; LLaMA-Factory's ends it with a full stop.
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def llama_factory(environment: Path, adapter: str, data: Path, steps: int, batch: int, rate: float, work: Path) -> dict:
    """LLaMA-Factory's training, in a process of its own -> what tests/toys/clock.py notes."""
    from ftx import models

    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    (work / "rows.json").write_text(json.dumps([{"input": "", **row} for row in rows]))
    (work / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    (work / "settings.yaml").write_text(json.dumps(settings(str(models.resolve("smollm2")), adapter, steps, batch, rate, work)))
    command = [environment / "bin" / "python", "-c", TRAIN, work / "settings.yaml", work / "noted.json"]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(TOYS)}
    with (work / "said.txt").open("w") as said:
        done = subprocess.run([str(word) for word in command], stdout=said, stderr=said, env=variables, check=False)
    if done.returncode:
        sys.exit((work / "said.txt").read_text()[-3000:])
    return json.loads((work / "noted.json").read_text())


def version_of(environment: Path) -> str:
    """LLaMA-Factory's version there; "" if it is not told."""
    command = [str(environment / "bin" / "python"), "-c", "import importlib.metadata as m; print(m.version('llamafactory'))"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


def lora(adapter: str) -> dict:
    target = "q_proj,k_proj,v_proj,o_proj" if adapter == "attention" else "all"
    return {"finetuning_type": "lora", "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target": target, "use_dora": adapter == "dora"}


def settings(model: str, adapter: str, steps: int, batch: int, rate: float, work: Path) -> dict:
    """The workload in LLaMA-Factory's names."""
    return {
        "model_name_or_path": model,
        "stage": "sft",
        "do_train": True,
        **({"finetuning_type": "full"} if adapter == "full" else lora(adapter)),
        "dataset_dir": str(work),
        "dataset": "rows",
        "template": "smollm2",
        "default_system": SYSTEM,
        "cutoff_len": 1024,
        "output_dir": str(work / "out"),
        "max_steps": steps,
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
