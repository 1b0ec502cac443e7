"""LLaMA-Factory's configuration (its hparams of 2026) -> a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftx.errors import DataError
from ftx.readers import absolute, sources
from ftx_import_translation import ALWAYS, ITSELF, Translation, found, names_of, number, optimizer, refuse, scheduler, steps, whole

#: What it takes where the configuration says nothing, and ours differs (transformers' TrainingArguments and its own hparams).
DEFAULTS = {
    "trainer.num_train_epochs": 3.0,
    "trainer.per_device_train_batch_size": 8,
    "trainer.gradient_accumulation_steps": 1,
    "trainer.learning_rate": 5e-5,
    "trainer.lr_scheduler_type": "linear",
    "trainer.warmup_steps": 0,
    "trainer.max_length": 2048,
    "trainer.save_steps": 500,
}
#: Kinds of training -> our trainer.
STAGES = {"sft": "sft", "pt": "sft", "dpo": "dpo"}
#: Its preference losses -> TRL's.
LOSSES = {"sigmoid": "sigmoid", "hinge": "hinge", "ipo": "ipo"}
NEEDLESS = {
    "do_train": ALWAYS,
    "do_eval": "--eval-data says it",
    "output_dir": "the run's directory is --output, which never stands in a recipe",
    "overwrite_output_dir": "a run never writes over another",
    "overwrite_cache": ITSELF,
    "preprocessing_num_workers": ITSELF,
    "preprocessing_batch_size": ITSELF,
    "plot_loss": "the page of the run has the curves",
    "ddp_timeout": ITSELF,
    "flash_attn": "attention is chosen by what is installed and exact",
    "enable_liger_kernel": "fast=auto does what is exact",
    "use_unsloth": "fast=auto does what is exact",
    "use_unsloth_gc": "activation checkpointing is decided by the memory at hand",
    "use_reentrant_gc": ITSELF,
    "low_cpu_mem_usage": ITSELF,
    "use_fast_tokenizer": ALWAYS,
    "save_only_model": "a checkpoint is whole, so that a run can go on from it",
    "save_safetensors": ALWAYS,
    "resume_from_checkpoint": "ftx resume RUN",
    "upcast_layernorm": ITSELF,
    "use_kv_cache": ALWAYS,
    "dataset_dir": "the dataset's file is named",
    "print_param_status": "a run prints what trains",
    "include_num_input_tokens_seen": ALWAYS,
    "include_tokens_per_second": ALWAYS,
    "remove_unused_columns": ITSELF,
    "predict_with_generate": "evaluators generate",
    "ignore_pad_token_for_loss": ALWAYS,
    "eval_on_start": "the base is always evaluated",
    "log_level": ITSELF,
}
KNOWN = {
    "template": "the model's own chat template is used: where it is another one, another text is learned",
    "train_on_prompt": "ftx trains on answers only",
    "mask_history": "ftx trains on all assistant turns",
    "val_size": "no split is made in a run: `ftx data split` writes the two files, --eval-data takes the second",
    "max_samples": "`ftx data sample` writes a file of that many rows",
    "trust_remote_code": "code of a model is not run unless it is granted by name",
    "deepspeed": "",
    "fsdp": "",
    "fsdp_config": "",
    "rope_scaling": "",
    "neftune_noise_alpha": "",
    "loraplus_lr_ratio": "",
    "use_galore": "",
    "use_apollo": "",
    "use_badam": "",
    "use_llama_pro": "",
    "use_adam_mini": "",
    "use_muon": "",
    "shift_attn": "",
    "mixture_of_depths": "",
    "resize_vocab": "",
    "add_tokens": "",
    "add_special_tokens": "",
    "split_special_tokens": "",
    "streaming": "",
    "tokenized_path": "",
    "mix_strategy": "",
    "interleave_probs": "",
    "tool_format": "the model's own chat template writes tools",
    "enable_thinking": "the model's own chat template decides",
    "push_to_hub": "`ftx export RUN --to hub`",
    "hub_model_id": "`ftx export RUN --to hub`",
    "export_dir": "`ftx export RUN --to merged --output DIR`",
    "ref_model": "the reference is the model that the run starts from",
    "ref_model_adapters": "the reference is the model that the run starts from",
    "pref_bco_weight": "",
    "simpo_gamma": "",
    "ld_alpha": "",
    "compute_accuracy": "",
    "pissa_convert": "",
    "create_new_adapter": "",
    "image_max_pixels": "",
    "video_max_pixels": "",
    "freeze_vision_tower": "",
    "freeze_multi_modal_projector": "",
    "ray_run_name": "",
    "train_from_scratch": "",
}


def translate(given: dict[str, Any]) -> Translation:
    """A configuration -> its recipe, and what became of each key. DataError for a kind of training that ftx does not have."""
    t = Translation("LLaMA-Factory", given)
    stage = t.get("stage", "sft")
    if stage not in STAGES:
        raise refuse(t.system, f"stage: {stage} is a kind of training for which ftx has no trainer")
    if t.get("finetuning_type", "lora") not in ("lora", "full"):
        raise refuse(t.system, f"finetuning_type: {t.get('finetuning_type')} is a method for which ftx has no adapter (contrib's `peft` has many)")
    t.recipe["trainer"] = {"name": STAGES[stage]}
    if "stage" in given:
        t.set("trainer.name", STAGES[stage], "stage")
    _trainer(t, stage)
    _model(t)
    _adapter(t)
    _data(t)
    for path, value in DEFAULTS.items():
        if not (path == "trainer.save_steps" and "save_strategy" in t.recipe["trainer"]):
            t.assume(path, value)
    for key, why in NEEDLESS.items():
        t.skip(key, why)
    t.lose_set(KNOWN)
    report = t.get("report_to")
    for tracker in [report] if isinstance(report, str) else report or []:
        if tracker == "none":
            t.skip("report_to", "not set")
        else:
            t.lose("report_to", f"the observers of contrib: --observer {tracker}")
    t.skip("run_name", "the run's directory is its name")
    t.finish()
    return t


def _trainer(t: Translation, stage: str) -> None:
    if stage == "dpo":
        loss = t.get("pref_loss", "sigmoid")
        if loss not in LOSSES:
            raise refuse(t.system, f"pref_loss: {loss} is none of the losses of ftx's trainer dpo")
        if "pref_loss" in t.given:
            t.set("trainer.loss_type", LOSSES[loss], "pref_loss")
        t.take({"pref_beta": ("trainer.beta", number), "dpo_label_smoothing": ("trainer.label_smoothing", number)})
        if number(t.get("pref_ftx", 0)):
            t.set("trainer.loss_type", [LOSSES[loss], "sft"], "pref_ftx")
            t.set("trainer.loss_weights", [1.0, number(t.get("pref_ftx"))], "pref_ftx")
    t.take(
        {
            "num_train_epochs": ("trainer.num_train_epochs", number),
            "max_steps": ("trainer.max_steps", whole),
            "per_device_train_batch_size": ("trainer.per_device_train_batch_size", whole),
            "per_device_eval_batch_size": ("trainer.per_device_eval_batch_size", whole),
            "gradient_accumulation_steps": ("trainer.gradient_accumulation_steps", whole),
            "learning_rate": ("trainer.learning_rate", number),
            "lr_scheduler_type": ("trainer.lr_scheduler_type", scheduler),
            "optim": ("trainer.optim", optimizer),
            "weight_decay": ("trainer.weight_decay", number),
            "max_grad_norm": ("trainer.max_grad_norm", number),
            "cutoff_len": ("trainer.max_length", whole),
            "logging_steps": ("trainer.logging_steps", whole),
            "save_steps": ("trainer.save_steps", steps),
            "eval_steps": ("trainer.eval_steps", steps),
            "save_strategy": "trainer.save_strategy",
            "eval_strategy": "trainer.eval_strategy",
            "evaluation_strategy": "trainer.eval_strategy",
            "save_total_limit": ("trainer.save_total_limit", whole),
            "load_best_model_at_end": "trainer.load_best_model_at_end",
            "early_stopping_steps": ("trainer.early_stopping_patience", whole),
            "dataloader_num_workers": ("trainer.dataloader_num_workers", whole),
            "adam_beta1": ("trainer.args.adam_beta1", number),
            "adam_beta2": ("trainer.args.adam_beta2", number),
            "adam_epsilon": ("trainer.args.adam_epsilon", number),
            "seed": ("seed", whole),
        }
    )
    if "save_steps" in t.carried and t.get("save_strategy") in ("steps", "epoch"):
        del t.recipe["trainer"]["save_steps" if t.get("save_strategy") == "epoch" else "save_strategy"]
    for key in ("warmup_ratio", "warmup_steps"):
        if t.get(key) is not None:
            t.set("trainer.warmup_steps", number(t.get(key)) if number(t.get(key)) < 1 else whole(t.get(key)), key)
    for key in ("packing", "neat_packing"):
        if t.get(key) and stage != "dpo":
            t.set("trainer.packing", True, key)
    if "disable_gradient_checkpointing" in t.given:
        t.set("trainer.gradient_checkpointing", not t.get("disable_gradient_checkpointing"), "disable_gradient_checkpointing")
    if "gradient_checkpointing" in t.given:
        t.set("trainer.gradient_checkpointing", bool(t.get("gradient_checkpointing")), "gradient_checkpointing")


def _model(t: Translation) -> None:
    revision = t.get("model_revision", "main")
    if t.get("model_name_or_path") is not None:
        reference = found(str(t.get("model_name_or_path")))
        t.set("model", reference if revision == "main" else f"{reference}@{revision}", "model_name_or_path")
        if "model_revision" in t.given:
            t.carried["model_revision"] = "model" if revision != "main" else "the default"
    for key, dtype in (("bf16", "bfloat16"), ("pure_bf16", "bfloat16"), ("fp16", "float16")):
        if t.get(key):
            t.set("dtype", dtype, key)
    if t.get("adapter_name_or_path"):
        t.lose("adapter_name_or_path", "a run goes on from a run of ftx: --from RUN")


def _adapter(t: Translation) -> None:
    bits = t.get("quantization_bit")
    full = t.get("finetuning_type") == "full"
    dora = bool(t.get("use_dora"))
    # nf4 with double quantisation is what qlora is; anything else on few bits is a quantizer and an adapter
    qlora = bits == 4 and not full and not dora and t.get("quantization_type", "nf4") == "nf4" and t.get("double_quantization", True)
    name = "full" if full else "qlora" if qlora else "dora" if dora else "lora"
    t.recipe["adapter"] = {"name": name}
    if "finetuning_type" in t.given:
        t.set("adapter.name", name, "finetuning_type")
    if dora and not full:
        t.set("adapter.name", "dora", "use_dora")
    if bits is not None:
        if qlora:
            t.carried["quantization_bit"] = "adapter=qlora"
        elif whole(bits) in (4, 8):
            t.set("quantizer", "int8" if whole(bits) == 8 else t.get("quantization_type", "nf4"), "quantization_bit")
        else:
            t.lose("quantization_bit", f"no quantizer has {bits} bits")
        if t.get("quantization_method") in ("bnb", "bitsandbytes"):
            t.skip("quantization_method", "nf4 and int8 are bitsandbytes'")
        for key in ("quantization_type", "double_quantization"):
            t.skip(key, "as the quantizer or qlora does it" if t.get("double_quantization", True) else "the quantizer's own option decides")
    if full:
        for key in [key for key in t.given if key.startswith("lora_")]:
            t.skip(key, "all weights train")
        return
    t.take(
        {
            "lora_rank": ("adapter.r", whole),
            "lora_alpha": ("adapter.alpha", whole),
            "lora_dropout": ("adapter.dropout", number),
            "use_rslora": "adapter.rslora",
            "additional_target": ("adapter.modules_to_save", names_of),
        }
    )
    target = t.get("lora_target", "all")
    if "lora_target" in t.given:
        t.set("adapter.target_modules", "all-linear" if target == "all" else names_of(target), "lora_target")
    if t.get("pissa_init"):
        t.set("adapter.init", _pissa(t.get("pissa_iter", 16)), "pissa_init")
        t.take({"pissa_iter": ("adapter.init", _pissa)})
    t.assume("adapter.r", 8)
    t.assume("adapter.alpha", 2 * t.recipe["adapter"]["r"])


def _pissa(rounds: Any) -> str:
    return "pissa" if whole(rounds) == -1 else f"pissa_niter_{whole(rounds)}"


def _data(t: Translation) -> None:
    """Names of data sets -> dataset_info.json:NAME,NAME, which ftx reads as it is (with ftx-formats)."""
    info = Path(str(t.get("dataset_dir", "data"))).expanduser() / "dataset_info.json"
    for key, target in (("dataset", "data"), ("eval_dataset", "eval_data")):
        if t.get(key) is None:
            continue
        names = ",".join(names_of(t.get(key)))
        reference = absolute(f"{info}:{names}")
        try:
            if reference is None:
                raise DataError(f"{names}: a name in {info}, which is not there")
            sources(reference)
        except DataError as error:
            t.lose(key, f"{error.problem.rstrip('.')}: give --data FILE")
        else:
            t.set(target, reference, key)
