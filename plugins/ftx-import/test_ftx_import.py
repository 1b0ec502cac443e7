"""Twenty configurations of each system, written from its documented keys: what the recipe says, and that no key is lost in silence."""

from __future__ import annotations

import json
import re

import pytest
import yaml
from click.testing import CliRunner

from ftx.cli import main
from ftx.errors import DataError, RecipeError
from ftx_import import check
from ftx_import_axolotl import translate as axolotl
from ftx_import_llamafactory import translate as llamafactory
from ftx_import_translation import read_config

#: name -> (configuration, what the recipe must hold (dotted paths), keys that must be named as lost)
AXOLOTL = {
    "lora on alpaca": (
        """
base_model: meta/base
adapter: lora
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
datasets: [{path: some/alpaca, type: alpaca}]
sequence_len: 4096
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 4
learning_rate: 2e-4
optimizer: adamw_torch_fused
lr_scheduler: cosine
""",
        {
            "model": "meta/base",
            "adapter.name": "lora",
            "adapter.r": 32,
            "adapter.alpha": 16,
            "adapter.dropout": 0.05,
            "adapter.target_modules": "all-linear",
            "formatter.style": "instruction",
            "trainer.max_length": 4096,
            "trainer.per_device_train_batch_size": 2,
            "trainer.gradient_accumulation_steps": 4,
            "trainer.num_train_epochs": 4.0,
            "trainer.learning_rate": 2e-4,
        },
        [],
    ),
    "qlora": (
        "base_model: meta/base\nload_in_4bit: true\nadapter: qlora\nlora_r: 8\n"
        "lora_alpha: 16\noptimizer: paged_adamw_8bit\ndatasets: [{path: d, type: alpaca}]\n",
        {"adapter.name": "qlora", "adapter.r": 8, "trainer.optim": "paged_adamw_8bit", "quantizer": None},
        [],
    ),
    "dora": ("base_model: b\nadapter: lora\npeft_use_dora: true\nlora_r: 4\nlora_alpha: 8\n", {"adapter.name": "dora", "adapter.r": 4}, []),
    "full": ("base_model: b\nlearning_rate: 0.000005\nbf16: true\n", {"adapter.name": "full", "trainer.learning_rate": 5e-6, "dtype": "bfloat16"}, []),
    "its defaults": (
        "base_model: b\nadapter: lora\n",
        {"trainer.num_train_epochs": 1.0, "trainer.per_device_train_batch_size": 1, "trainer.gradient_accumulation_steps": 1, "trainer.max_length": 512},
        [],
    ),
    "8 bits": (
        "base_model: b\nadapter: lora\nload_in_8bit: true\nlora_target_modules: [q_proj, v_proj]\n",
        {"quantizer": "int8", "adapter.target_modules": ["q_proj", "v_proj"]},
        [],
    ),
    "chat template": (
        "base_model: b\nadapter: lora\ndatasets: [{path: d, type: chat_template, field_messages: turns}]\n",
        {"formatter.name": "messages", "formatter.messages_column": "turns"},
        [],
    ),
    "from and value": (
        """
base_model: b
adapter: lora
chat_template: chatml
datasets:
  - path: d
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
    roles_to_train: [assistant]
    train_on_eos: turn
""",
        {"formatter.name": "sharegpt", "formatter.messages_column": "conversations", "formatter.role_tag": "from", "formatter.content_tag": "value"},
        ["chat_template", "datasets[0].roles_to_train", "datasets[0].train_on_eos"],
    ),
    "sharegpt": (
        "base_model: b\nadapter: lora\ndatasets: [{path: d, type: sharegpt, conversation: chatml}]\n",
        {"formatter.name": "sharegpt"},
        ["datasets[0].conversation"],
    ),
    "turns under other keys": (
        """
base_model: b
datasets:
  - path: d
    type: chat_template
    message_property_mappings: {role: speaker, content: said, weight: w}
    roles: {user: [human], assistant: [gpt]}
""",
        {"formatter.name": "sharegpt", "formatter.role_tag": "speaker", "formatter.content_tag": "said"},
        ["datasets[0].message_property_mappings.weight", "datasets[0].roles"],
    ),
    "styles with columns of their own": (
        "base_model: b\ndatasets: [{path: d, type: summarizetldr}]\n",
        {"formatter.name": "auto", "formatter.style": None},
        ["datasets[0].type"],
    ),
    "one part of a repository": (
        "base_model: b\ndatasets: [{path: me/repo, data_files: [a.json, b.json], type: alpaca, split: test}]\n",
        {"data": "a.json"},
        ["datasets[0].path", "datasets[0].data_files[1:]", "datasets[0].split"],
    ),
    "files of a kind": ("base_model: b\ndatasets: [{path: json, data_files: a.jsonl, ds_type: json, type: alpaca}]\n", {"data": "a.jsonl"}, []),
    "held-out rows that are read in another way": (
        """
base_model: b
datasets: [{path: d, type: {field_instruction: q, field_output: a}}]
test_datasets: [{path: e, type: {field_instruction: question, field_output: a}, split: validation, field: x}]
""",
        {"data": "d", "eval_data": "e", "formatter.instruction_column": "q"},
        ["test_datasets[0].type", "test_datasets[0].split", "test_datasets[0].field"],
    ),
    "held-out rows without a style": (
        "base_model: b\ndatasets: [{path: d, type: completion, field: t}]\ntest_datasets: [{path: e, type: completion}]\n",
        {"eval_data": "e"},
        ["test_datasets[0].field"],
    ),
    "no half precision": ("base_model: b\nbf16: false\nfp16: false\n", {"dtype": "float32"}, []),
    "bf16 where there is any": ("base_model: b\nbf16: auto\nfp16: false\n", {"dtype": "auto"}, []),
    "offload": (
        "base_model: b\ngradient_checkpointing: offload\ngradient_checkpointing_kwargs: {use_reentrant: false}\nshuffle_merged_datasets: false\n",
        {"trainer.gradient_checkpointing": True},
        ["gradient_checkpointing", "shuffle_merged_datasets"],
    ),
    "the best checkpoint": (
        "base_model: b\ndatasets: [{path: d, type: alpaca}]\ntest_datasets: [{path: e, type: alpaca}]\n"
        "load_best_model_at_end: true\nsave_steps: 100\neval_steps: 50\nspecial_tokens: {pad_token: <pad>}\n",
        {"trainer.load_best_model_at_end": True, "eval_data": "e"},
        ["special_tokens"],
    ),
    "dpo of another template": (
        "base_model: b\nrl: dpo\ndatasets: [{path: d, type: llama3.argilla}]\n",
        {"formatter.prompt_column": "instruction", "formatter.chosen_column": "chosen_response", "formatter.rejected_column": "rejected_response"},
        ["datasets[0].type: llama3"],
    ),
    "dpo of whole conversations": (
        "base_model: b\nrl: dpo\ndatasets: [{path: d, type: chatml.ultra}]\n",
        {"formatter.style": "chat"},
        ["datasets[0].type: chatml"],
    ),
    "dpo of ranked answers": ("base_model: b\nrl: dpo\ndatasets: [{path: d, type: zephyr.nectar}]\n", {"formatter.prompt_column": None}, ["datasets[0].type"]),
    "dpo of one's own": (
        "base_model: b\nrl: dpo\ndatasets:\n- path: d\n  type: {field_prompt: q, field_chosen: good, field_rejected: bad, prompt_format: '{p}', field_x: y}\n",
        {"formatter.prompt_column": "q", "formatter.chosen_column": "good", "formatter.rejected_column": "bad"},
        ["datasets[0].type.prompt_format", "datasets[0].type.field_x"],
    ),
    "completion": (
        "base_model: b\ndatasets: [{path: d, type: completion, field: content}]\n",
        {"formatter.name": "text", "formatter.text_column": "content"},
        [],
    ),
    "columns of one's own": (
        "base_model: b\nadapter: lora\ndatasets:\n  - path: d\n    type: {field_instruction: q, field_output: a, format: '[INST] {instruction} [/INST]'}\n",
        {"formatter.name": "alpaca", "formatter.instruction_column": "q", "formatter.output_column": "a"},
        ["datasets[0].type.format"],
    ),
    "questions and answers": (
        "base_model: b\nadapter: lora\ndatasets: [{path: d, type: alpaca_chat.load_qa}]\n",
        {"formatter.name": "completion", "formatter.prompt_column": "question", "formatter.style": "chat"},
        [],
    ),
    "dpo": (
        "base_model: b\nadapter: lora\nrl: dpo\nrl_beta: 0.2\nlearning_rate: 5e-6\ndatasets: [{path: d, split: train, type: chatml.intel}]\n",
        {"trainer.name": "dpo", "trainer.beta": 0.2, "formatter.name": "preference", "formatter.prompt_column": "question", "formatter.style": "chat"},
        ["datasets[0].type: chatml"],
    ),
    "ipo and rpo": (
        "base_model: b\nadapter: lora\nrl: ipo\nrpo_alpha: 0.5\ndatasets: [{path: d, type: chat_template.default, field_chosen: good, field_rejected: bad}]\n",
        {"trainer.loss_type": ["ipo", "sft"], "trainer.loss_weights": [1.0, 0.5], "formatter.chosen_column": "good", "formatter.rejected_column": "bad"},
        [],
    ),
    "saving and evaluating": (
        """
base_model: b
adapter: lora
datasets: [{path: d, type: alpaca}]
test_datasets: [{path: held-out, type: alpaca, ds_type: json, split: train}]
save_steps: 100
eval_steps: 50
save_total_limit: 3
early_stopping_patience: 2
logging_steps: 1
""",
        {"eval_data": "held-out", "trainer.save_steps": 100, "trainer.eval_steps": 50, "trainer.save_total_limit": 3, "trainer.early_stopping_patience": 2},
        [],
    ),
    "per epoch": ("base_model: b\nadapter: lora\nsaves_per_epoch: 1\nevals_per_epoch: 4\n", {"trainer.save_strategy": "epoch"}, ["evals_per_epoch"]),
    "packing and kernels": (
        "base_model: b\nadapter: lora\nsample_packing: true\npad_to_sequence_len: true\n"
        "flash_attention: true\nlora_mlp_kernel: true\nwarmup_steps: 10\nweight_decay: 0.01\n",
        {"trainer.packing": True, "trainer.warmup_steps": 10, "trainer.weight_decay": 0.01},
        [],
    ),
    "several machines": (
        "base_model: b\nadapter: lora\ndeepspeed: zero3.json\nfsdp: [full_shard]\n"
        "wandb_project: mine\nwandb_name: a\nhub_model_id: me/model\nval_set_size: 0.1\n",
        {},
        ["deepspeed", "fsdp", "wandb_project", "wandb_name", "hub_model_id", "val_set_size"],
    ),
    "training on everything": ("base_model: b\nadapter: lora\ntrain_on_inputs: true\nneftune_noise_alpha: 5\n", {}, ["train_on_inputs", "neftune_noise_alpha"]),
    "what it does not know": (
        "base_model: b\nadapter: loha\nlr_scheduler: rex\noptimizer: optimi_adamw\nlora_rank: 8\ndatasets: [{path: d, type: steps}, {path: e, type: alpaca}]\n",
        {"adapter.name": "lora", "formatter.name": "auto"},
        ["adapter", "lr_scheduler", "optimizer", "lora_rank", "datasets[0].type", "datasets[1:]"],
    ),
}
LLAMAFACTORY = {
    "lora": (
        """
model_name_or_path: meta/base
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: all
dataset: mine
template: llama3
cutoff_len: 1024
output_dir: saves/x
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
""",
        {
            "model": "meta/base",
            "adapter.r": 16,
            "adapter.alpha": 32,
            "adapter.target_modules": "all-linear",
            "trainer.max_length": 1024,
            "trainer.per_device_train_batch_size": 1,
            "trainer.gradient_accumulation_steps": 8,
            "trainer.learning_rate": 1e-4,
            "trainer.warmup_steps": 0.1,
            "dtype": "bfloat16",
        },
        ["dataset", "template"],
    ),
    "its defaults": (
        "model_name_or_path: b\n",
        {
            "adapter.name": "lora",
            "adapter.r": 8,
            "adapter.alpha": 16,
            "trainer.learning_rate": 5e-5,
            "trainer.lr_scheduler_type": "linear",
            "trainer.per_device_train_batch_size": 8,
            "trainer.gradient_accumulation_steps": 1,
            "trainer.warmup_steps": 0,
            "trainer.max_length": 2048,
            "trainer.save_steps": 500,
        },
        [],
    ),
    "alpha follows the rank": ("model_name_or_path: b\nlora_rank: 64\n", {"adapter.alpha": 128}, []),
    "full": (
        "model_name_or_path: b\nfinetuning_type: full\nlearning_rate: 1.0e-5\npure_bf16: true\ndeepspeed: z3.json\n",
        {"adapter.name": "full", "dtype": "bfloat16"},
        ["deepspeed"],
    ),
    "qlora": (
        "model_name_or_path: b\nquantization_bit: 4\nquantization_method: bnb\ndouble_quantization: true\n",
        {"adapter.name": "qlora", "quantizer": None},
        [],
    ),
    "fp4": ("model_name_or_path: b\nquantization_bit: 4\nquantization_type: fp4\n", {"adapter.name": "lora", "quantizer": "fp4"}, []),
    "8 bits": ("model_name_or_path: b\nquantization_bit: 8\n", {"adapter.name": "lora", "quantizer": "int8"}, []),
    "3 bits": ("model_name_or_path: b\nquantization_bit: 3\nquantization_method: hqq\n", {"adapter.name": "lora"}, ["quantization_bit", "quantization_method"]),
    "dora": (
        "model_name_or_path: b\nuse_dora: true\nlora_target: q_proj,v_proj\n",
        {"adapter.name": "dora", "adapter.target_modules": ["q_proj", "v_proj"]},
        [],
    ),
    "dora on 4 bits": ("model_name_or_path: b\nuse_dora: true\nquantization_bit: 4\n", {"adapter.name": "dora", "quantizer": "nf4"}, []),
    "pissa and rslora": (
        "model_name_or_path: b\npissa_init: true\npissa_iter: 4\nuse_rslora: true\n",
        {"adapter.init": "pissa_niter_4", "adapter.rslora": True},
        [],
    ),
    "pissa with its own number of rounds": ("model_name_or_path: b\npissa_init: true\n", {"adapter.init": "pissa_niter_16"}, []),
    "pissa in full": ("model_name_or_path: b\npissa_init: true\npissa_iter: -1\n", {"adapter.init": "pissa"}, []),
    "dpo": (
        "model_name_or_path: b\nstage: dpo\npref_beta: 0.2\npref_loss: hinge\nlearning_rate: 5.0e-6\n",
        {"trainer.name": "dpo", "trainer.beta": 0.2, "trainer.loss_type": "hinge"},
        [],
    ),
    "dpo with a part of sft": (
        "model_name_or_path: b\nstage: dpo\npref_ftx: 0.3\n",
        {"trainer.loss_type": ["sigmoid", "sft"], "trainer.loss_weights": [1.0, 0.3]},
        [],
    ),
    "pre-training": ("model_name_or_path: b\nstage: pt\npacking: true\n", {"trainer.name": "sft", "trainer.packing": True}, []),
    "saving": (
        "model_name_or_path: b\nsave_strategy: epoch\nsave_steps: 500\nsave_total_limit: 1\n"
        "save_only_model: true\nplot_loss: true\noverwrite_output_dir: true\nreport_to: none\n",
        {"trainer.save_strategy": "epoch", "trainer.save_steps": None, "trainer.save_total_limit": 1},
        [],
    ),
    "trackers": ("model_name_or_path: b\nreport_to: wandb\nrun_name: x\n", {}, ["report_to"]),
    "other masks": (
        "model_name_or_path: b\ntrain_on_prompt: true\nmask_history: true\nmax_samples: 1000\nval_size: 0.1\n",
        {},
        ["train_on_prompt", "mask_history", "max_samples", "val_size"],
    ),
    "speed": (
        "model_name_or_path: b\nflash_attn: fa2\nenable_liger_kernel: true\nuse_unsloth: true\nneat_packing: true\ndisable_gradient_checkpointing: true\n",
        {"trainer.packing": True, "trainer.gradient_checkpointing": False},
        [],
    ),
    "exotic optimizers": (
        "model_name_or_path: b\nuse_galore: true\nuse_badam: true\nloraplus_lr_ratio: 16.0\nneftune_noise_alpha: 5\n",
        {},
        ["use_galore", "use_badam", "loraplus_lr_ratio", "neftune_noise_alpha"],
    ),
    "a typing error": (
        "model_name_or_path: b\nlora_rnk: 8\ntrust_remote_code: true\nmodel_revision: v1\n",
        {"model": "b@v1"},
        ["lora_rnk", "trust_remote_code"],
    ),
}
CASES = [
    pytest.param(function, *case, id=f"{name}: {label}")
    for name, function, cases in (("axolotl", axolotl, AXOLOTL), ("llamafactory", llamafactory, LLAMAFACTORY))
    for label, case in cases.items()
]


def at(recipe: dict, path: str):
    value = recipe
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def test_there_are_twenty_of_each():
    assert len(AXOLOTL) >= 20 and len(LLAMAFACTORY) >= 20


def leaves(value, path: str = ""):
    """The path of everything in a configuration that holds no more of its own; a list of scalars is one thing."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        for number, inner in enumerate(value):
            yield from leaves(inner, f"{path}[{number}]")
    else:
        yield path


def is_told(path: str, done) -> bool:
    """Whether something is carried itself, or it or what holds it is needless or lost."""
    holders = [path[:at] for at in range(1, len(path)) if path[at] in ".["]
    beyond = re.fullmatch(r"(\w+)\[[1-9]\d*\].*", path)
    return path in done.carried or any(one in done.needless or one in done.lost for one in [path, *holders, *([f"{beyond[1]}[1:]"] if beyond else [])])


@pytest.mark.parametrize(("translate", "text", "wanted", "lost"), CASES)
def test_a_configuration(translate, text, wanted, lost):
    given = yaml.safe_load(text)
    done = translate(given)
    assert {path: at(done.recipe, path) for path in wanted} == wanted
    assert set(lost) == set(done.lost), done.lost
    for key in given:
        homes = [home for home in ("carried", "needless", "lost") if key in getattr(done, home)]
        assert homes, f"{key} is dropped in silence"
        assert len(homes) == 1, f"{key} is in {homes}"
    assert [path for path in leaves(yaml.safe_load(text)) if not is_told(path, done)] == [], "dropped in silence"
    assert given == yaml.safe_load(text)
    check(done.recipe)  # the recipe resolves: every plugin is there and takes its options


@pytest.mark.parametrize(
    ("translate", "text", "words"),
    [
        (axolotl, "base_model: b\nrl: orpo\n", "rl: orpo"),
        (axolotl, "base_model: b\nreward_model: true\n", "reward_model"),
        (llamafactory, "model_name_or_path: b\nstage: ppo\n", "stage: ppo"),
        (llamafactory, "model_name_or_path: b\nstage: dpo\npref_loss: simpo\n", "pref_loss: simpo"),
        (llamafactory, "model_name_or_path: b\nfinetuning_type: freeze\n", "finetuning_type: freeze"),
    ],
)
def test_training_that_ftx_does_not_have_is_refused(translate, text, words):
    with pytest.raises(DataError, match=words):
        translate(yaml.safe_load(text))


def test_datasets_are_looked_up(tmp_path):
    info = {
        "chats": {"file_name": "chats.json", "formatting": "sharegpt"},
        "more": {"file_name": "more.json"},
        "pictures": {"file_name": "p.json", "columns": {"images": "i"}},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    done = llamafactory({"model_name_or_path": "b", "dataset": "chats, more", "dataset_dir": str(tmp_path)})
    assert done.recipe["data"] == f"{tmp_path / 'dataset_info.json'}:chats,more" and not done.lost
    for name, words in (("pictures", "images"), ("chat", "no data set 'chat'")):
        done = llamafactory({"model_name_or_path": "b", "dataset": name, "dataset_dir": str(tmp_path)})
        assert "data" not in done.recipe and words in done.lost["dataset"]


def test_the_command(tmp_path):
    config, recipe = tmp_path / "c.yaml", tmp_path / "recipe.yaml"
    config.write_text("base_model: b\nadapter: lora\nlearning_rate: 2e-4\nrelora: true\n")
    result = CliRunner().invoke(main, ["import", "axolotl", str(config)])
    assert result.exit_code == 0 and yaml.safe_load(result.stdout)["trainer"]["learning_rate"] == 2e-4
    assert "WITHOUT A COUNTERPART:\n  relora  no counterpart" in result.stderr
    assert CliRunner().invoke(main, ["import", "axolotl", str(config), "--output", str(recipe), "--quiet"]).output == ""
    assert yaml.safe_load(recipe.read_text())["model"] == "b"
    again = CliRunner().invoke(main, ["import", "axolotl", str(config), "--output", str(recipe)])
    assert again.exit_code == 2 and "exists." in again.stderr
    told = json.loads(CliRunner().invoke(main, ["import", "axolotl", str(config), "--json"]).stdout)
    assert told["status"] == "done" and told["lost"] == {"relora": "no counterpart"} and told["recipe"]["model"] == "b"


def test_what_is_no_configuration(tmp_path):
    file = tmp_path / "c.yaml"
    with pytest.raises(RecipeError, match="no such configuration"):
        read_config(file)
    for text, words in (("- a\n", "mapping"), ("a: [\n", "c.yaml:2: not valid YAML")):
        file.write_text(text)
        with pytest.raises(RecipeError, match=words):
            read_config(file)
