"""Axolotl's configuration (its config reference of 2026) -> a recipe."""

from __future__ import annotations

from typing import Any

from ftx_import_translation import ALWAYS, ITSELF, Translation, found, names_of, number, optimizer, refuse, scheduler, steps, whole

#: What its schema takes where the configuration says nothing, and ours differs.
DEFAULTS = {
    "trainer.num_train_epochs": 1.0,
    "trainer.per_device_train_batch_size": 1,
    "trainer.gradient_accumulation_steps": 1,
    "trainer.max_length": 512,
    "trainer.warmup_steps": 0.03,
}
#: Our losses for its kinds of preference training.
RL = {"dpo": "sigmoid", "ipo": "ipo"}
#: Prompt styles that are Alpaca's `### Instruction:` text, and those that are columns of another name.
ALPACA = ("alpaca", "alpaca:chat", "gpteacher", "explainchoice", "concisechoice", "jeopardy", "summarizetldr")
#: Keys that steer machinery which ftx does not have, and why that loses nothing.
NEEDLESS = {
    "output_dir": "the run's directory is --output, which never stands in a recipe",
    "dataset_prepared_path": ITSELF,
    "dataset_processes": ITSELF,
    "dataset_keep_in_memory": ITSELF,
    "shuffle_merged_datasets": ALWAYS,
    "pad_to_sequence_len": "rows are joined or padded to the longest of their batch",
    "group_by_length": "rows of a batch are joined, not padded",
    "strict": ALWAYS,
    "model_type": ITSELF,
    "tokenizer_type": ITSELF,
    "is_llama_derived_model": ITSELF,
    "is_mistral_derived_model": ITSELF,
    "is_qwen_derived_model": ITSELF,
    "is_falcon_derived_model": ITSELF,
    "flash_attention": "attention is chosen by what is installed and exact",
    "sdp_attention": "attention is chosen by what is installed and exact",
    "xformers_attention": "attention is chosen by what is installed and exact",
    "eager_attention": "attention is chosen by what is installed and exact",
    "attn_implementation": "attention is chosen by what is installed and exact",
    "lora_mlp_kernel": "fast=auto does what is exact",
    "lora_qkv_kernel": "fast=auto does what is exact",
    "lora_o_kernel": "fast=auto does what is exact",
    "cut_cross_entropy": "fast=auto computes the head only where there is a label",
    "chunked_cross_entropy": "fast=auto computes the head only where there is a label",
    "save_safetensors": ALWAYS,
    "save_only_model": "a checkpoint is whole, so that a run can go on from it",
    "auto_resume_from_checkpoints": "ftx resume RUN",
    "resume_from_checkpoint": "ftx resume RUN",
    "local_rank": ITSELF,
    "debug": "--traceback",
    "load_best_model_at_end": "not set",
    "include_tokens_per_second": ALWAYS,
    "tokenizer_use_fast": ALWAYS,
}
#: Keys that are known and have no counterpart; those that change what is learned say how.
KNOWN = {
    "train_on_inputs": "ftx trains on answers only",
    "roles_to_train": "ftx trains on assistant turns only",
    "train_on_eos": "ftx trains on each answer's end token",
    "val_set_size": "no split is made in a run: `ftx data split` writes the two files, --eval-data takes the second",
    "trust_remote_code": "code of a model is not run unless it is granted by name",
    "deepspeed": "",
    "fsdp": "",
    "fsdp_config": "",
    "special_tokens": "",
    "tokens": "",
    "tf32": "",
    "neftune_noise_alpha": "",
    "loraplus_lr_ratio": "",
    "relora": "",
    "lora_on_cpu": "",
    "unfrozen_parameters": "",
    "chat_template": "the model's own template is used",
    "chat_template_jinja": "the model's own template is used",
    "default_system_message": "",
    "plugins": "ftx's plugins are other ones: `ftx plugins`",
    "hub_model_id": "`ftx export RUN --to hub`",
    "lr_groups": "",
    "cosine_min_lr_ratio": "",
    "cosine_constant_lr_ratio": "",
    "evals_per_epoch": "",
    "saves_per_epoch": "",
    "pretraining_dataset": "",
    "skip_prepare_dataset": "",
    "sample_packing_eff_est": "",
    "total_num_tokens": "",
    "overrides_of_model_config": "",
    "overrides_of_model_kwargs": "",
    "bnb_config_kwargs": "",
    "gptq": "",
    "torch_compile": "",
    "peft_init_lora_weights": "",
    "lora_fan_in_fan_out": "",
    "peft_layers_to_transform": "",
    "gpu_memory_limit": "`ftx plan --device-memory`",
    "use_tensorboard": "the observer tensorboard of contrib",
    "dataset_exact_deduplication": "`ftx data dedupe` writes the file without them",
}
#: Its names of columns -> ours, for preferences and for instructions.
PAIRS = {"field_chosen": "chosen_column", "field_rejected": "rejected_column", "field_prompt": "prompt_column", "field_system": "system_column"}
INSTRUCTIONS = {"field_instruction": "instruction_column", "field_input": "input_column", "field_output": "output_column", "field_system": "system_column"}
TRACKERS = {"wandb": "wandb_project", "mlflow": "mlflow_tracking_uri", "comet": "comet_project_name"}


def translate(given: dict[str, Any]) -> Translation:
    """A configuration -> its recipe, and what became of each key. DataError for a kind of training that ftx does not have."""
    t = Translation("Axolotl", given)
    for key in ("reward_model", "process_reward_model"):
        if t.get(key):
            raise refuse(t.system, f"{key} trains a reward model, for which ftx has no trainer")
    _trainer(t)
    _model(t)
    _adapter(t)
    _data(t)
    for path, value in DEFAULTS.items():
        t.assume(path, value)
    for key, why in NEEDLESS.items():
        t.skip(key, why)
    t.lose_set(KNOWN)
    for tracker, key in TRACKERS.items():
        for one in [one for one in given if one.startswith(f"{tracker}_") or one == f"use_{tracker}"]:
            if given[one] in (None, False, ""):
                t.skip(one, "not set")
            else:
                t.lose(one, f"the observers of contrib: --observer {tracker}" if one == key else f"no counterpart ({tracker})")
    t.finish()
    return t


def _trainer(t: Translation) -> None:
    rl = t.get("rl")
    if rl is not None and rl not in RL:
        raise refuse(t.system, f"rl: {rl} is a kind of training for which ftx has no trainer")
    t.recipe["trainer"] = {"name": "dpo" if rl else "sft"}
    if rl:
        t.set("trainer.name", "dpo", "rl")
        if RL[rl] != "sigmoid":
            t.set("trainer.loss_type", RL[rl], "rl")
        t.take({"rl_beta": ("trainer.beta", number), "dpo_beta": ("trainer.beta", number), "dpo_label_smoothing": ("trainer.label_smoothing", number)})
        if t.get("rpo_alpha") is not None:
            t.set("trainer.loss_type", [RL[rl], "sft"], "rpo_alpha")
            t.set("trainer.loss_weights", [1.0, number(t.get("rpo_alpha"))], "rpo_alpha")
    t.take(
        {
            "num_epochs": ("trainer.num_train_epochs", number),
            "max_steps": ("trainer.max_steps", whole),
            "micro_batch_size": ("trainer.per_device_train_batch_size", whole),
            "eval_batch_size": ("trainer.per_device_eval_batch_size", whole),
            "gradient_accumulation_steps": ("trainer.gradient_accumulation_steps", whole),
            "learning_rate": ("trainer.learning_rate", number),
            "lr_scheduler": ("trainer.lr_scheduler_type", scheduler),
            "optimizer": ("trainer.optim", optimizer),
            "weight_decay": ("trainer.weight_decay", number),
            "max_grad_norm": ("trainer.max_grad_norm", number),
            "sequence_len": ("trainer.max_length", whole),
            "logging_steps": ("trainer.logging_steps", whole),
            "save_steps": ("trainer.save_steps", steps),
            "eval_steps": ("trainer.eval_steps", steps),
            "save_strategy": ("trainer.save_strategy", _strategy),
            "eval_strategy": ("trainer.eval_strategy", _strategy),
            "save_total_limit": ("trainer.save_total_limit", whole),
            "early_stopping_patience": ("trainer.early_stopping_patience", whole),
            "dataloader_num_workers": ("trainer.dataloader_num_workers", whole),
            "adam_beta1": ("trainer.args.adam_beta1", number),
            "adam_beta2": ("trainer.args.adam_beta2", number),
            "adam_epsilon": ("trainer.args.adam_epsilon", number),
            "seed": ("seed", whole),
        }
    )
    if t.get("warmup_ratio") is not None:
        t.set("trainer.warmup_steps", number(t.get("warmup_ratio")), "warmup_ratio")
    if t.get("warmup_steps") is not None:
        t.set("trainer.warmup_steps", whole(t.get("warmup_steps")), "warmup_steps")
    if t.get("saves_per_epoch") == 1 and t.get("save_steps") is None:
        t.set("trainer.save_strategy", "epoch", "saves_per_epoch")
    if t.get("evals_per_epoch") == 1 and t.get("eval_steps") is None and t.get("test_datasets"):
        t.set("trainer.eval_strategy", "epoch", "evals_per_epoch")
    if not rl and t.get("sample_packing"):
        t.set("trainer.packing", True, "sample_packing")
    if t.get("eval_sample_packing") is not None:
        t.skip("eval_sample_packing", "the evaluation is not packed")
    checkpointing = t.get("gradient_checkpointing")
    if isinstance(checkpointing, bool):
        t.set("trainer.gradient_checkpointing", checkpointing, "gradient_checkpointing")
    elif checkpointing is not None:
        t.set("trainer.gradient_checkpointing", True, "gradient_checkpointing")
    t.skip("gradient_checkpointing_kwargs", ITSELF)


def _model(t: Translation) -> None:
    revision = t.get("revision_of_model")
    if t.get("base_model") is not None:
        reference = found(str(t.get("base_model")))
        t.set("model", f"{reference}@{revision}" if revision else reference, "base_model")
        if revision:
            t.set("model", f"{reference}@{revision}", "revision_of_model")
    for key, own in (("base_model_config", "base_model"), ("tokenizer_config", "base_model")):
        if t.get(key) is not None and t.get(key) == t.get(own):
            t.skip(key, "the model's own")
    for key in ("bf16", "bfloat16", "fp16", "float16"):
        value = t.get(key)
        if value in (True, "full", "true"):
            t.set("dtype", "bfloat16" if key.startswith("b") else "float16", key)
        elif value == "auto":
            t.set("dtype", "auto", key)


def _adapter(t: Translation) -> None:
    kind = t.get("adapter")
    if kind not in (None, "lora", "qlora"):
        t.lose("adapter", f"ftx has no adapter '{kind}' (contrib's `peft` has many methods: --adapter peft)")
    dora = bool(t.get("peft_use_dora"))
    name = "full" if kind is None else "dora" if dora and kind == "lora" else kind
    t.recipe["adapter"] = {"name": name if name in ("full", "lora", "dora", "qlora") else "lora"}
    if kind in ("lora", "qlora"):
        t.set("adapter.name", name, "adapter")
        if dora:
            if kind == "lora":
                t.set("adapter.name", "dora", "peft_use_dora")
            else:
                t.lose("peft_use_dora", "QLoRA's adapter is LoRA; DoRA on 4 bits is --quantizer nf4 --adapter dora")
        t.take(
            {
                "lora_r": ("adapter.r", whole),
                "lora_alpha": ("adapter.alpha", whole),
                "lora_dropout": ("adapter.dropout", number),
                "lora_modules_to_save": ("adapter.modules_to_save", names_of),
                "peft_use_rslora": "adapter.rslora",
            }
        )
        if t.get("lora_target_linear"):
            t.set("adapter.target_modules", "all-linear", "lora_target_linear")
        elif t.get("lora_target_modules") is not None:
            modules = t.get("lora_target_modules")
            t.set("adapter.target_modules", modules if isinstance(modules, str) else names_of(modules), "lora_target_modules")
    if t.get("load_in_8bit"):
        t.set("quantizer", "int8", "load_in_8bit")
    if t.get("load_in_4bit"):
        if kind == "qlora":
            t.needless["load_in_4bit"] = "qlora brings its own 4-bit base"
        else:
            t.set("quantizer", "nf4", "load_in_4bit")
    if t.get("lora_model_dir"):
        t.lose("lora_model_dir", "a run goes on from a run of ftx: --from RUN")


def _data(t: Translation) -> None:
    for key, target in (("datasets", "data"), ("test_datasets", "eval_data")):
        sets = t.get(key)
        if not isinstance(sets, list) or not sets or not isinstance(sets[0], dict):
            continue
        first = dict(sets[0])
        files = first.pop("data_files", None)
        path = files[0] if isinstance(files, list) and files else files or first.pop("path", None)
        first.pop("path", None)
        if path is not None:
            t.set(target, found(str(path)), key)
        if len(sets) > 1:
            t.lose(f"{key}[1:]", f"{len(sets) - 1} more datasets: ftx takes one file or a directory of files")
        if key == "datasets":
            _formatter(t, first)


def _formatter(t: Translation, entry: dict[str, Any]) -> None:
    """How rows are read, from one dataset's entry; what the entry says besides is a loss of its own."""
    kind = entry.pop("type", None)
    for name in ("ds_type", "split", "preprocess_shards"):
        if entry.pop(name, None) not in (None, "train", "json", "csv", "parquet", "arrow", "text"):
            t.lose(f"datasets[0].{name}", "files are told apart by their endings, and a file is one split")
    name, options = "auto", {}
    preference = t.recipe["trainer"]["name"] == "dpo"
    if preference:
        name = "preference"
        options = {ours: entry.pop(theirs) for theirs, ours in PAIRS.items() if theirs in entry}
        if isinstance(kind, dict):
            options |= {ours: kind[theirs] for theirs, ours in PAIRS.items() if theirs in kind}
            for word in ("prompt_format", "chosen_format", "rejected_format"):
                if word in kind:
                    t.lose(f"datasets[0].type.{word}", "texts are taken as they stand, or as turns of the model's template")
    elif isinstance(kind, dict):
        name = "alpaca"
        options = {ours: kind[theirs] for theirs, ours in INSTRUCTIONS.items() if kind.get(theirs)}
        for word in ("format", "no_input_format", "system_format", "system_prompt"):
            if kind.get(word):
                t.lose(f"datasets[0].type.{word}", "the model's chat template is used; for texts of your own write a formatter (README)")
    elif kind in ALPACA:
        name, options = "alpaca", {"style": "instruction"}
    elif kind == "alpaca_chat.load_qa":
        name, options = "completion", {"prompt_column": "question", "completion_column": "answer", "style": "chat"}
    elif kind == "completion":
        name, options = "text", {"text_column": entry.pop("field")} if entry.get("field") else {}
    elif kind in ("chat_template", "sharegpt") or str(kind).startswith("sharegpt"):
        mapping = entry.pop("message_property_mappings", None) or {}
        role, content = mapping.get("role", entry.pop("message_field_role", None)), mapping.get("content", entry.pop("message_field_content", None))
        messages = entry.pop("field_messages", None)
        if kind != "chat_template" or content == "value":
            name = "sharegpt"
            options = {"messages_column": messages, "role_tag": role, "content_tag": content} if kind == "chat_template" else {}
        else:
            name, options = "messages", {"messages_column": messages}
        options = {key: value for key, value in options.items() if value}
        entry.pop("conversation", None)
    elif kind is not None:
        t.lose("datasets[0].type", f"no formatter for the prompt style '{kind}': auto looks at the columns")
    t.recipe["formatter"] = {"name": name, **options}
    if kind is not None and "datasets[0].type" not in t.lost:
        t.carried["datasets[0].type"] = f"formatter={name}"
    for key, value in entry.items():
        if value not in (None, False, [], "", {}):
            t.lose(f"datasets[0].{key}", KNOWN.get(key) or "no counterpart")


def _strategy(value: Any) -> str:
    if value is False or value == "no":
        return "no"
    if value not in ("steps", "epoch"):
        raise ValueError(f"'{value}' has no counterpart")
    return str(value)
