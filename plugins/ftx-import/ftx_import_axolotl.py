"""Axolotl's configuration (its config reference of 2026) -> a recipe."""

from __future__ import annotations

from copy import deepcopy
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
#: Its styles of preference data -> the columns that they are documented with; what stands before the point is a template.
TEMPLATES = ("chatml", "llama3")
STYLES = {
    "argilla": {"prompt_column": "instruction", "chosen_column": "chosen_response", "rejected_column": "rejected_response"},
    "argilla_chat": {},
    "icr": {"prompt_column": "input"},
    "intel": {"prompt_column": "question"},
    "prompt_pairs": {"prompt_column": "prompt"},
    "ultra": {"prompt_column": "prompt"},
}
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
#: Keys of an entry that say how its rows are read, what stands for a key that is not set, and words for what is lost of an entry.
READING = ("type", "field", "field_messages", "message_property_mappings", *PAIRS)
UNSET: tuple[Any, ...] = (None, False, [], "", {})
OWN_TEXT = "the model's chat template is used; for texts of your own write a formatter (README)"
AS_IT_STANDS = "texts are taken as they stand, or as turns of the model's template"
WORDS = {
    **dict.fromkeys(("format", "no_input_format", "system_format", "system_prompt"), OWN_TEXT),
    **dict.fromkeys(("prompt_format", "chosen_format", "rejected_format"), AS_IT_STANDS),
    "conversation": "the model's own template is used",
    "roles": "ftx has its own names of roles: -o formatter.user_tag and its like",
}
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
    if given.get("shuffle_merged_datasets") is False:
        t.lose("shuffle_merged_datasets", "rows are always shuffled")
    for key, why in NEEDLESS.items():
        if key not in t.lost:
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
            "load_best_model_at_end": "trainer.load_best_model_at_end",
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
        t.recipe["trainer"]["gradient_checkpointing"] = True
        t.lose("gradient_checkpointing", f"activations are computed again (gradient_checkpointing=true); '{checkpointing}' has no counterpart")
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
    off = [key for key in ("bf16", "bfloat16", "fp16", "float16") if t.given.get(key) is False]
    if "dtype" not in t.recipe and any(key.startswith("b") for key in off):
        for key in off:
            t.set("dtype", "float32", key)


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
    """The first of the data sets, and how its rows are read; what its entry says besides is a loss of its own."""
    given = {key: t.get(key) if isinstance(t.get(key), list) else [] for key in ("datasets", "test_datasets")}
    entries = {key: [deepcopy(one) for one in given[key] if isinstance(one, dict)] for key in given}
    for key, target in (("datasets", "data"), ("test_datasets", "eval_data")):
        if not entries[key]:
            continue
        first = entries[key][0]
        _file(t, first, key, target)
        for name in ("ds_type", "split", "preprocess_shards"):
            value = first.pop(name, None)
            if name == "split" and value not in (None, "train"):
                t.lose(f"{key}[0].split", "a file is one split, and of the hub `train` is read")
            elif value is not None:
                t.needless[f"{key}[0].{name}"] = ITSELF
        if len(given[key]) > 1:
            t.lose(f"{key}[1:]", f"{len(given[key]) - 1} more datasets: ftx takes one file or a directory of files")
    if entries["test_datasets"]:
        _same_format(t, entries["test_datasets"][0], entries["datasets"][0] if entries["datasets"] else {})
    if entries["datasets"]:
        _formatter(t, entries["datasets"][0])


def _file(t: Translation, entry: dict[str, Any], key: str, target: str) -> None:
    """Where an entry's rows are: its path, or the one of its files."""
    path, files = entry.pop("path", None), entry.pop("data_files", None)
    files = [files] if isinstance(files, str) else files or []
    if path is not None and not files:
        t.set(target, found(str(path)), key)
        t.carried[f"{key}[0].path"] = target
    elif files:
        t.set(target, found(str(files[0])), key)
        t.carried[f"{key}[0].data_files"] = target
        if len(files) > 1:
            t.lose(f"{key}[0].data_files[1:]", f"{len(files) - 1} more files: ftx takes one file or a directory of files")
        if path in ("json", "csv", "parquet", "arrow", "text"):
            t.needless[f"{key}[0].path"] = "files are told apart by their endings"
        elif path is not None:
            t.lose(f"{key}[0].path", f"the files of '{path}' are not looked up there: put them here, or give the repository whole")


def _same_format(t: Translation, entry: dict[str, Any], trained: dict[str, Any]) -> None:
    """Held-out rows are read as those that are trained on; an entry that says otherwise is a loss."""
    for name, value in entry.items():
        if name in trained and trained[name] == value:
            t.carried[f"test_datasets[0].{name}"] = "formatter"
        elif value not in UNSET:
            t.lose(f"test_datasets[0].{name}", "held-out rows are read as those of datasets[0] are")
    for name, value in trained.items():
        if name not in entry and value not in UNSET and name in READING:
            t.lose(f"test_datasets[0].{name}", "not given, and held-out rows are read as those of datasets[0] are")


def _formatter(t: Translation, entry: dict[str, Any]) -> None:
    """How rows are read, from one dataset's entry; what the entry says besides is a loss of its own."""
    kind = entry.pop("type", None)
    if t.recipe["trainer"]["name"] == "dpo":
        name, options = _pairs(t, kind, entry)
    elif isinstance(kind, dict):
        name, options = "alpaca", _columns(t, kind, INSTRUCTIONS, "datasets[0].type")
    elif kind == "alpaca":
        name, options = "alpaca", {"style": "instruction"}
    elif kind == "alpaca_chat.load_qa":
        name, options = "completion", {"prompt_column": "question", "completion_column": "answer", "style": "chat"}
    elif kind == "completion":
        name, options = "text", _columns(t, entry, {"field": "text_column"}, "datasets[0]", rest=False)
    elif kind in ("chat_template", "sharegpt", "sharegpt:chat"):
        name, options = _turns(t, str(kind), entry)
    else:
        name, options = "auto", {}
        if kind is not None:
            t.lose("datasets[0].type", f"no formatter for the prompt style '{kind}': auto looks at the columns")
    t.recipe["formatter"] = {"name": name, **options}
    if kind is not None and not isinstance(kind, dict) and "datasets[0].type" not in t.lost:
        t.carried["datasets[0].type"] = f"formatter={name}"
    for key, value in entry.items():
        if value in UNSET:
            t.needless[f"datasets[0].{key}"] = "not set"
        else:
            t.lose(f"datasets[0].{key}", WORDS.get(key) or KNOWN.get(key) or "no counterpart")


def _pairs(t: Translation, kind: Any, entry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The formatter of preferences with the columns of a style, or with those that the entry names."""
    options: dict[str, Any] = {}
    if isinstance(kind, dict):
        options = _columns(t, kind, PAIRS, "datasets[0].type")
    elif kind in ("chat_template", "chat_template.default"):
        options = {"prompt_column": entry.get("field_messages") or "messages"}
        t.carried |= {"datasets[0].field_messages": "formatter.prompt_column"} if entry.pop("field_messages", None) else {}
        if entry.get("message_property_mappings") == {"role": "role", "content": "content"}:
            t.needless["datasets[0].message_property_mappings"] = "its default"
            del entry["message_property_mappings"]
    elif kind is not None:
        template, _, style = str(kind).partition(".")
        if template not in TEMPLATES or style not in STYLES:
            t.lose(
                "datasets[0].type", f"the columns of the style '{kind}' are not known: preference looks for its own, name them with -o formatter.prompt_column"
            )
        else:
            options = {**STYLES[style], "style": "chat"}
            t.lose(f"datasets[0].type: {template}", "the model's own template is used")
    return "preference", options | _columns(t, entry, PAIRS, "datasets[0]", rest=False)


def _turns(t: Translation, kind: str, entry: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The formatter of conversations: messages of role and content, or turns under other keys."""
    options = _columns(t, entry, {"field_messages": "messages_column"}, "datasets[0]", rest=False)
    tags = _columns(t, entry, {"message_field_role": "role_tag", "message_field_content": "content_tag"}, "datasets[0]", rest=False)
    mapping = entry.pop("message_property_mappings", None) or {}
    tags |= _columns(t, mapping, {"role": "role_tag", "content": "content_tag"}, "datasets[0].message_property_mappings")
    if kind == "chat_template" and tags.get("role_tag", "role") == "role" and tags.get("content_tag", "content") == "content":
        return "messages", options
    usual = {"role_tag": "role", "content_tag": "content"} if kind == "chat_template" else {}
    return "sharegpt", options | usual | tags


def _columns(t: Translation, given: dict[str, Any], names: dict[str, str], where: str, *, rest: bool = True) -> dict[str, Any]:
    """Our options out of its keys; with `rest`, every other key that is set is a loss."""
    options = {}
    for key, value in list(given.items()):
        if value in UNSET and (rest or key in names):
            t.needless[f"{where}.{key}"] = "not set"
            given.pop(key)
        elif key in names:
            options[names[key]] = given.pop(key)
            t.carried[f"{where}.{key}"] = f"formatter.{names[key]}"
        elif rest:
            t.lose(f"{where}.{key}", WORDS.get(key, "no counterpart"))
    return options


def _strategy(value: Any) -> str:
    if value is False or value == "no":
        return "no"
    if value not in ("steps", "epoch"):
        raise ValueError(f"'{value}' has no counterpart")
    return str(value)
