"""ftx plan: closed forms against measured numbers, what the plan decides and advises, and that it needs neither weights nor torch."""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from datasets import Dataset
from shelf import install

from ftx import activations
from ftx.catalogue import Catalogue
from ftx.cli import main
from ftx.errors import ModelError, OptionError
from ftx.foresight import CONFIGS, config_of, what_fits
from ftx.ledger import Ledger
from ftx.machine import Machine, compute_bytes, parse_size
from ftx.pipeline import base_dtype
from ftx.plan import Prediction, predict, steps_of
from ftx.planning import Planner, settle
from ftx.recipe import Recipe, merge, resolve
from ftx.recommended import recommended
from ftx.rows import Rows, computed, largest_batches, largest_packs, packed, prefix_of, rows_of
from ftx.run import Run
from ftx.shape import Shape, read_shape, shape_of
from ftx.testing.tiny import tiny_model_dir

GB = 1 << 30
#: Parameters as published, to the last one.
PUBLISHED = {
    "gemma-2-2b": 2_614_341_888,
    "llama-3.2-3b": 3_212_749_824,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-nemo-12b": 12_247_782_400,
    "qwen2.5-14b": 14_770_033_664,
    "llama-3.1-70b": 70_553_706_496,
}
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def planner(model: str, memory: float, *, device: str = "cuda", rows: Rows | None = None) -> Planner:
    machine = Machine(device, int(memory * GB), False)
    return Planner(Catalogue(), Run(recipe=merge({}, {}), ledger=Ledger(), device=device), machine, config_of(model, None), rows)  # type: ignore[arg-type]


def asked(model: str, adapter: str = "qlora", *options: str, **given: object):
    return merge({}, {"model": model, "adapter": adapter, "device": "cuda", **given}, tuple(f"trainer.{one}" for one in options))


def prediction(adapter: str, trainer: str, shape: Shape, *options: str):
    recipe, hooks = resolve(merge({}, {"adapter": adapter, "trainer": trainer}, options), Catalogue())
    return predict(Run(recipe=recipe, ledger=Ledger(), hooks=hooks), hooks, shape)


# ---- the model's numbers


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_the_published_ones_and_transformers(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    assert read_shape(CONFIGS / name).parameters == PUBLISHED[name]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(CONFIGS / name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]


def test_a_config_without_sizes_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    with pytest.raises(ModelError, match="num_hidden_layers is missing"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        read_shape(tmp_path)


@pytest.mark.parametrize(
    ("measured", "adapter", "size", "lengths", "options"),
    [
        (40428, "lora", 4, (1,), ()),
        (31788, "lora", 4, (1,), ("adapter.target_modules=[q_proj,k_proj,v_proj,o_proj]",)),
        (31788 + 16128, "lora", 4, (1,), ("adapter.target_modules=[q_proj,k_proj,v_proj,o_proj]", "adapter.dropout=0.05")),
        (31788 + 4608, "lora", 4, (192, 192), ("adapter.target_modules=[q_proj,k_proj,v_proj,o_proj]", "trainer.packing=true")),
        (37356, "lora", 2, (1,), ()),
        (37356, "qlora", 2, (1,), ()),
    ],
    ids=["all-linear", "attention", "dropout", "under-a-mask", "bfloat16", "qlora"],
)
def test_saved_activations_are_those_of_the_reference_to_the_byte(measured, adapter, size, lengths, options):
    """Bytes a token and layer that saved_tensors_hooks measured on SmolLM2's sizes: transformers' own layers and peft's, with
    the base in float32 or bfloat16 and adapters in float32. Other combinations there are not ftx's: it has no bfloat16
    adapters, and autocast only where the base trains."""
    shape = replace(shape_of(SMOLLM2).with_batch(lengths), layers=1, loaded=size, compute=size)
    found = prediction(adapter, "sft", shape, "trainer.fast=off", *options)
    assert found.parts["activations"] == measured * sum(lengths)


def measured_kept(model, lengths: tuple[int, ...], *, autocast: bool) -> int:
    """Bytes of the storages that the forward pass of packed rows keeps for the backward one, parameters aside."""
    import torch

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    ids, places = torch.zeros(1, sum(lengths), dtype=torch.long), torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model.model(input_ids=ids, position_ids=places, use_cache=False)
    del out
    return sum(kept.values())


@pytest.mark.parametrize("adapter", ["full", "lora", "lora with dropout", "dora", "dora with dropout", "qlora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fast", ["off", "auto"])
@pytest.mark.parametrize("lengths", [(96,), (560,), (20, 30, 46), (600, 560)], ids=["short", "long", "packed", "packed-long"])
def test_saved_activations_of_a_layer_to_the_byte(adapter, dtype, fast, lengths, tmp_path):
    """Three layers less two: one layer, measured by saved_tensors_hooks on a small Llama, against the closed form."""
    import torch

    from ftx import models
    from ftx_fast import install, parts_of
    from ftx_sft_loan import autocasts

    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_key_value_heads": 2}
    if adapter.startswith("dora") and fast == "off":
        pytest.skip("peft's own DoRA is an estimate: it makes matrices as large as the weights on the way")
    found = []
    adapter, _, drops = adapter.partition(" with ")
    options = (f"trainer.fast={fast}", "trainer.packing=true", *(["adapter.r=4"] if adapter != "full" else []), *(["adapter.dropout=0.1"] if drops else []))
    recipe, hooks = resolve(merge({}, {"adapter": adapter}, options), Catalogue())
    run = Run(recipe=recipe, ledger=Ledger(), dtype=getattr(torch, dtype), hooks=hooks, say=lambda line: None)
    for layers in (2, 3):
        directory = tiny_model_dir(tmp_path / str(layers), num_hidden_layers=layers, **sizes)
        base = models.load_model(directory, dtype=base_dtype(hooks, run), device="cpu", quantization_config=hooks.hook.quantization_config(run=run))
        hooks.hook.model_loaded(model=base, run=run)
        model = hooks.call("adapt_model", model=base, run=run)
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        on = install(model, parts_of(fast))
        try:
            inner.train()
            found.append(measured_kept(inner, lengths, autocast=autocasts(model, run.dtype)))
        finally:
            on.undo()
    shape = replace(shape_of(inner.config.to_dict()), loaded=run.dtype.itemsize, compute=run.dtype.itemsize).with_batch(lengths)
    plan = predict(run, hooks, shape)
    norms = 4 * sum(outputs for _, outputs in shape.linears.values()) if adapter == "dora" else 0  # kept from step to step: counted as the adapter's
    assert plan.parts["activations"] / shape.layers == found[1] - found[0] - norms


# ---- the moments


def test_the_kinds_at_the_peak_sum_to_it():
    for adapter in ("full", "lora", "dora"):
        for checkpointing in ("true", "false"):
            found = prediction(adapter, "sft", shape_of(SMOLLM2), f"trainer.gradient_checkpointing={checkpointing}")
            assert sum(found.by_kind.values()) == found.peak_memory
            assert all(size > 0 for size in found.by_kind.values())


def test_more_of_anything_never_needs_less():
    shape = shape_of(SMOLLM2)
    for adapter in ("full", "lora", "dora", "qlora"):
        for trainer in ("sft", "dpo"):
            needs = [prediction(adapter, trainer, shape.with_batch((length,) * 4)).peak_memory for length in (64, 128, 512)]
            assert needs == sorted(needs)  # beyond 512 a CPU keeps no probabilities any more
            kept, again = (
                prediction(adapter, trainer, shape.with_batch((512,) * 4), f"trainer.gradient_checkpointing={value}").peak_memory for value in ("false", "true")
            )
            assert again < kept


def test_steps_are_those_of_transformers():
    assert steps_of(100, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_train_epochs": 3}) == 21
    assert steps_of(100, {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 1, "dataloader_drop_last": True}) == 12
    assert steps_of(100, {"per_device_train_batch_size": 8, "max_steps": 7}) == 7


def test_a_strangers_adapter_contributes(tmp_path, monkeypatch):
    (tmp_path / "strange_adapter.py").write_text(
        "from dataclasses import replace\n"
        "from ftx import hookimpl, plugin\n\n\n"
        "@plugin\nclass Strange:\n"
        '    """An adapter that nobody here knows."""\n\n'
        "    @hookimpl\n    def adapt_model(self, model, run): ...\n\n"
        "    @hookimpl\n    def save_adapted(self, model, path, run): ...\n\n"
        "    @hookimpl\n    def load_adapted(self, base, path, run): ...\n\n"
        "    @hookimpl\n    def plan_shape(self, shape):\n        return replace(shape, trained=1000)\n\n"
        "    @hookimpl\n    def memory_use(self, shape):\n        return {'adapter': 4000, 'gradients': 4000, 'activations': 7 * shape.tokens * shape.layers}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = prediction("strange_adapter:Strange", "sft", shape_of(SMOLLM2))
    assert (found.parts["adapter"], found.parts["optimizer"], found.shape.trained) == (4000, 8000, 1000)
    plain = prediction("strange_adapter:Strange", "sft", shape_of(SMOLLM2), "trainer.fast=off")
    assert plain.parts["activations"] == activations.layers(plain.shape) + 7 * plain.shape.tokens * 30


# ---- decisions and advice


def test_nothing_is_computed_twice_unless_memory_asks_for_it():
    roomy, tight = planner("llama-3.1-8b", 200), planner("llama-3.1-8b", 24)
    case, made, advice = settle(roomy, asked("llama-3.1-8b", "qlora"))
    assert case.recipe.trainer.options["gradient_checkpointing"] is False
    assert (made, advice) == ([], [])
    case, made, advice = settle(tight, asked("llama-3.1-8b", "qlora"))
    options = case.recipe.trainer.options
    assert options["per_device_train_batch_size"] * options["gradient_accumulation_steps"] == 16
    assert tight.fits(case) and made and not advice
    assert [change.what.split()[1] for change in made] == ["rows", "activations"][: len(made)]


def test_what_the_recipe_says_is_not_changed_without_fit():
    tight = planner("llama-3.1-8b", 24)
    wanted = asked("llama-3.1-8b", "qlora", "per_device_train_batch_size=8", "gradient_checkpointing=false")
    case, made, advice = settle(tight, wanted)
    assert not tight.fits(case) and not made
    assert case.recipe.trainer.options["per_device_train_batch_size"] == 8
    assert tight.fits(advice[-1].case)
    case, made, _ = settle(tight, wanted, fit=True)
    options = case.recipe.trainer.options
    assert tight.fits(case) and options["per_device_train_batch_size"] * options["gradient_accumulation_steps"] == 32


def test_advice_is_cheapest_first_and_each_step_needs_less():
    small = planner("llama-3.1-8b", 13)
    case, _, advice = settle(small, asked("llama-3.1-8b", "lora"))
    said = [change.option.split()[0] for change in advice]
    assert said[0].startswith("-o") and "per_device_train_batch_size=1" in advice[0].option
    assert "gradient_checkpointing=true" in advice[1].option
    assert advice[2].option == "--quantizer nf4"
    needs = [case.prediction.needed, *(change.case.prediction.needed for change in advice)]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == len(needs)
    assert small.fits(advice[-1].case)


def test_an_8_bit_optimizer_comes_last():
    _, _, advice = settle(planner("qwen2.5-3b", 40), asked("qwen2.5-3b", "full"))
    assert "optim=adamw_8bit" in advice[-1].option
    assert not any("quantizer" in change.option for change in advice), "full fine-tuning refuses packed weights"


BROKEN = """
from ftx import hookimpl, plugin


@plugin
class Broken:
    \"\"\"A plugin that cannot be asked about memory.\"\"\"

    @hookimpl
    def memory_use(self, shape, run):
        raise ZeroDivisionError("no such thing")
"""


def test_a_broken_plugin_that_nobody_named_is_left_out_and_logged(tmp_path, monkeypatch, caplog):
    hooks = {"quantizer": ["quantization_config(self, run)"], "adapter": ["adapt_model(self, model, run)", "save_adapted(self)", "load_adapted(self)"]}
    code = {f"bad_{stage}": BROKEN + "".join(f"\n    @hookimpl\n    def {name}: ...\n" for name in names) for stage, names in hooks.items()}
    install(tmp_path, "bad", {f"{stage}:aaa": f"bad_{stage}:Broken" for stage in hooks}, **code)
    monkeypatch.syspath_prepend(tmp_path)
    small = planner("llama-3.1-8b", 13)
    assert "aaa" in small.catalogue.names("quantizer")
    _, _, advice = settle(small, asked("llama-3.1-8b", "lora"))
    assert "--quantizer nf4" in [change.option for change in advice]
    assert "quantizer aaa is not advised: ZeroDivisionError: no such thing" in caplog.text
    content = json.loads(run("models", "--device-memory", "12GB", "--json").stdout)
    assert all("qlora" in one["adapters"] and "aaa" not in one["adapters"] for one in content["models"].values())
    assert caplog.text.count("adapter aaa is left out: ZeroDivisionError: no such thing") == 1


def test_shorter_rows_say_how_many_they_cut():
    rows = Rows([(3000,)] * 3 + [(100,)] * 97, [50] * 100)
    tight = planner("llama-3.1-8b", 7.4, rows=rows)
    _, _, advice = settle(tight, asked("llama-3.1-8b", "qlora", "max_length=none"))
    assert "per_device_train_batch_size" in advice[0].option
    assert "max_length" in advice[-1].option and advice[-1].what.endswith("(cuts 3 rows)")
    assert tight.fits(advice[-1].case)


# ---- published needs


@pytest.mark.parametrize("name", recommended())
def test_published_needs_of_qlora_pay_for_something(name):
    """The memory that is published for QLoRA of this size pays for rows of at least 256 tokens, one at a time."""
    found = what_fits(planner(name, recommended()[name]["qlora"]), asked(name))
    assert found and found[0][0] == 1 and found[0][2] >= 256


def test_70b_fits_in_48_gb_with_what_the_plan_decides():
    found = settle(planner("llama-3.1-70b", 48), asked("llama-3.1-70b"))
    assert found[1] and not found[2]
    assert found[0].prediction.needed < 48e9 / 1.03, "also where a GB is 10**9 bytes"
    assert 38e9 < found[0].prediction.by_kind["weights"] < 40.5e9  # 39.5 GB of weights, as computed for NF4 with double quantisation


# ---- the command


def run(*arguments: str):
    return CliRunner().invoke(main, list(arguments))


def test_70b_in_under_3_seconds_without_torch(tmp_path):
    script = (
        "import sys\nfrom ftx.cli import main\n"
        "try:\n    main(sys.argv[1:], standalone_mode=False)\n"
        "finally:\n    print('LOADED', sorted({'torch', 'transformers', 'datasets', 'peft', 'trl', 'bitsandbytes', 'numpy'} & sys.modules.keys()))\n"
    )
    (tmp_path / "config.json").write_text((CONFIGS / "llama-3.1-70b" / "config.json").read_text())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", script, "plan", "--model", str(tmp_path), "--adapter", "qlora", "--device-memory", "48GB"], capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "LOADED []" in done.stdout, done.stdout + done.stderr
    assert "fits" in done.stdout and "70,553,706,496 parameters" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3, "CPU seconds: the wall's depend on who else computes"


def test_what_does_not_fit_is_refused_with_advice(tmp_path):
    refused = run("plan", "--model", "llama-3.1-8b", "--device-memory", "13GB")
    assert refused.exit_code == 2
    assert "the run needs" in refused.output and "-o trainer.gradient_checkpointing=true" in refused.output and "--quantizer" in refused.output
    assert run("plan", "--model", "llama-3.1-8b", "--device-memory", "13GB", "--force").exit_code == 0
    fitted = run("plan", "--model", "llama-3.1-8b", "--device-memory", "13GB", "--fit", "--json")
    assert fitted.exit_code == 0
    content = json.loads(fitted.stdout)
    assert content["fits"] and content["settings"]["gradient_checkpointing"] is True
    assert content["settings"]["per_device_train_batch_size"] * content["settings"]["gradient_accumulation_steps"] == 16
    assert sum(content["predicted"]["by_kind"].values()) == content["predicted"]["peak_memory"]
    assert [change["option"].split("=")[0] for change in content["changes"]][:1] == ["-o trainer.per_device_train_batch_size"]


@pytest.fixture
def data(tmp_path) -> Path:
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"number {i} " * (1 + i % 5), "completion": f"it is {i}"}) + "\n" for i in range(40)))
    return file


def test_with_data_it_counts_tokens_steps_and_disk(tmp_path, data):
    model = tiny_model_dir(tmp_path / "model")
    content = json.loads(run("plan", "--model", str(model), "--data", str(data), "-o", "trainer.num_train_epochs=2", "--json", "--device", "cpu").stdout)
    found = content["predicted"]
    train = content["audit"]["train"]
    assert found["tokens"] == 2 * train["tokens"] and found["steps"] == 2 * 3
    assert 0 < found["supervised_tokens"] < found["tokens"]
    tokenizer = sum((model / name).stat().st_size for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"))
    adapter = found["by_kind"]["adapter"]
    assert found["disk"] == adapter + tokenizer + 2 * (3 * adapter + tokenizer), "the adapter, and two checkpoints of it with Adam's states"
    assert "seconds" not in found, "no speed of this machine was measured"


def test_an_adapter_that_trains_nothing_is_said(tmp_path):
    model = str(tiny_model_dir(tmp_path / "model"))
    for targets, said in (("q_proj", False), ("nothing.*", True)):
        answer = run("plan", "--model", model, "--device", "cpu", "--adapter", "lora", "-o", f"adapter.target_modules={targets}")
        assert answer.exit_code == 0 and ("note: nothing trains, as far as the plugins say" in answer.output) is said


def test_without_weights_the_data_are_left_out(data):
    done = run("plan", "--model", "llama-3.1-8b", "--adapter", "qlora", "--data", str(data), "--device-memory", "80GB")
    assert done.exit_code == 0 and "planned without the data" in done.output and "training:" not in done.output


def test_a_run_records_what_was_planned_and_decided(tmp_path, data):
    model = tiny_model_dir(tmp_path / "model")
    done = run("run", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "run"), "-o", "trainer.max_steps=3", "--device", "cpu")
    assert done.exit_code == 0, done.output
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["trainer"]["gradient_checkpointing"] is False, "decided, so that a repeat does not depend on the memory that is free"
    found = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert found["predicted"]["steps"] == 3 and found["predicted"]["peak_memory"] > 0


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_finished_run_took_what_was_predicted(process, tmp_path, data, packing):
    """Tokens, supervised tokens and steps exactly; the disk less what the run writes about itself. In a process of its own: what
    other tests hold would be measured too."""
    model, place = tiny_model_dir(tmp_path / "model", **SMALL), tmp_path / "run"
    options = ("num_train_epochs=2", "per_device_train_batch_size=4", "gradient_accumulation_steps=1", "max_length=200", "save_steps=4", "save_total_limit=2")
    chosen = [part for one in (*options, f"packing={packing}") for part in ("-o", f"trainer.{one}")]
    files = ("--model", model, "--data", data, "--adapter", "full", "--output", place)
    done = process("run", *files, *chosen, "--device", "cpu", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "plan.json").read_text())
    predicted, measured = found["predicted"], found["measured"]
    last = json.loads((place / "metrics.jsonl").read_text().splitlines()[-1])
    assert predicted["tokens"] == measured["tokens"] == last["tokens"]
    assert predicted["supervised_tokens"] == last["supervised_tokens"]
    assert predicted["steps"] == last["step"]
    assert predicted["peak_memory"] == pytest.approx(measured["peak_memory"], rel=0.05)
    assert 0.95 * measured["disk"] < predicted["disk"] < measured["disk"]


def test_a_run_that_would_not_fit_is_refused_and_leaves_nothing(tmp_path, data, monkeypatch):
    monkeypatch.setattr("ftx.foresight.this_machine", lambda device: Machine("cpu", 300 << 10, True))
    model = tiny_model_dir(tmp_path / "model")
    arguments = ["run", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "run"), "-o", "trainer.max_steps=1", "--device", "cpu"]
    refused = run(*arguments)
    assert refused.exit_code == 2 and "cpu has 0.3 MB here" in refused.output and "--force" in refused.output
    assert not (tmp_path / "run").exists()
    forced = run(*arguments, "--force")
    assert forced.exit_code == 0 and "tried all the same" in forced.output


def test_an_open_micro_batch_is_made_smaller_and_the_effective_batch_kept(tmp_path, data, monkeypatch):
    monkeypatch.setattr("ftx.foresight.this_machine", lambda device: Machine("cpu", 1 << 20, True))
    model = tiny_model_dir(tmp_path / "model")
    done = run("run", "--model", str(model), "--data", str(data), "--output", str(tmp_path / "run"), "-o", "trainer.max_steps=1", "--device", "cpu")
    assert done.exit_code == 0, done.output
    assert "rows at a time" in done.output
    trainer = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["trainer"]
    assert trainer["per_device_train_batch_size"] < 4
    assert trainer["per_device_train_batch_size"] * trainer["gradient_accumulation_steps"] == 16


def test_models_lists_every_recommended_one_and_marks_what_fits():
    content = json.loads(run("models", "--device-memory", "12GB", "--json").stdout)
    assert list(content["models"]) == list(recommended())
    big, small = content["models"]["qwen2.5-14b"]["adapters"], content["models"]["llama-3.2-3b"]["adapters"]
    assert small["qlora"]["fits"] and not big["lora"]["fits"] and not small["full"]["fits"]
    printed = run("models", "--device-memory", "12GB").output
    assert "published for QLoRA: 20 GB" in printed and "(" in printed


@pytest.mark.parametrize(("text", "size"), [("48GB", 48 * GB), ("48 GiB", 48 * GB), ("500m", 500 << 20), ("1.5g", 3 * GB // 2), ("51539607552", 48 * GB)])
def test_sizes(text, size):
    assert parse_size(text) == size


def test_a_size_without_a_unit():
    with pytest.raises(OptionError, match="'48' is 48 bytes, in which no model fits.") as error:
        parse_size("48")
    assert error.value.remedy == "With a unit: 48GB"


@pytest.mark.parametrize("text", ["", "lots", "-3GB", "0GB", "3 XB"])
def test_what_is_no_size(text):
    with pytest.raises(OptionError, match="is no size of memory"):
        parse_size(text)


def test_the_dtype_without_torch_is_that_with_it():
    from ftx.device import best_dtype

    assert compute_bytes("auto", "cpu") == best_dtype("cpu").itemsize


def test_the_docs_table_of_published_needs_is_what_the_plan_says():
    text = (Path(__file__).parent.parent / "docs" / "plan.md").read_text("utf-8")
    listed = [
        line.split("|")[1:-1] for line in text.partition("<!-- published: begin -->")[2].partition("<!-- published: end -->")[0].splitlines() if "`" in line
    ]
    assert [cells[0].strip(" `") for cells in listed] == [*recommended(), "llama-3.1-70b"]
    for name, memory, *longest in ([cell.strip(" `") for cell in cells] for cells in listed):
        found = {micro: again for micro, _, again in what_fits(planner(name, parse_size(memory) / GB), asked(name))}
        assert [f"{found[micro]} tokens" for micro in (1, 4)] == longest, name


def trained_and_measured(directory: Path, wanted: Recipe, columns: dict[str, list], place: Path):
    """Two steps of the real trainer on encoded rows: (the run, the model, bytes that the second step adds as ftx.measure sees it)."""
    import torch
    from transformers import TrainerCallback

    from ftx import models
    from ftx.measure import measure
    from ftx.run import RunDir

    recipe, hooks = resolve(wanted, Catalogue())
    live = Run(recipe=recipe, ledger=Ledger(), dtype=torch.float32, model_path=directory, directory=RunDir(place), hooks=hooks, say=lambda line: None)
    live.directory.checkpoints.mkdir(parents=True)
    model = models.load_model(directory, dtype=torch.float32, device="cpu", quantization_config=hooks.hook.quantization_config(run=live))
    hooks.hook.model_loaded(model=model, run=live)
    model = hooks.call("adapt_model", model=model, run=live)

    class Second(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 1:
                self.block = measure()
                self.found = self.block.__enter__()

        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                self.block.__exit__(None, None, None)

    second, encoded = Second(), Dataset.from_dict(columns)
    tokenizer = models.load_tokenizer(directory)
    hooks.call("make_trainer", model=model, tokenizer=tokenizer, train_dataset=encoded, eval_dataset=None, callbacks=[second], run=live).train()
    return live, model, second.found.added


SMALL = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 1000}


def of_two_steps(directory: Path, adapter: str, trainer: str, *options: str) -> Recipe:
    given = {"model": str(directory), "adapter": adapter, "trainer": trainer, "device": "cpu", "dtype": "float32"}
    more = ("trainer.gradient_accumulation_steps=1", "trainer.max_steps=2", "trainer.save_strategy=no")
    return merge({}, given, (*more, *options))


def row_of(length: int, answer: int, number: int = 0, alike: int = 0) -> tuple[list[int], list[int]]:
    """Tokens and labels of a row; those of another number differ from the place `alike` on."""
    return [(place + number * (place >= alike)) % 900 for place in range(length)], [-100] * (length - answer) + [5] * answer


def standing(plan: Prediction) -> int:
    return sum(plan.parts[kind] for kind in ("weights", "adapter", "optimizer", "reference"))


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize(("adapter", "trainer"), [("full", "sft"), ("lora", "sft"), ("dora", "sft"), ("qlora", "sft"), ("lora", "dpo"), ("full", "dpo")])
def test_the_peak_of_a_step_is_the_measured_one(adapter, trainer, checkpointing, tmp_path):
    check_a_step(adapter, trainer, checkpointing, 0, tmp_path)


@pytest.mark.parametrize(
    ("adapter", "trainer", "checkpointing"), [("lora", "sft", "false"), ("lora", "dpo", "false"), ("full", "sft", "true"), ("dora", "sft", "false")]
)
def test_the_peak_of_a_step_over_rows_that_begin_alike_is_the_measured_one(adapter, trainer, checkpointing, tmp_path):
    plan = check_a_step(adapter, trainer, checkpointing, 40, tmp_path)
    assert plan.shape.shared == 3 * 40 and plan.shape.tokens == -(-(4 * 95 - 3 * 40) // 32) * 32


def check_a_step(adapter: str, trainer: str, checkpointing: str, alike: int, tmp_path: Path) -> Prediction:
    """The second step's peak on a small Llama, within 2 % of the plan's."""
    directory = tiny_model_dir(tmp_path / "model", **SMALL)
    rows, length, answer = 4 if trainer == "sft" else 2, 96, 48
    wanted = of_two_steps(directory, adapter, trainer, f"trainer.per_device_train_batch_size={rows}", f"trainer.gradient_checkpointing={checkpointing}")
    names = ["chosen_", "rejected_"] if trainer == "dpo" else [""]
    made = {name: [row_of(length, answer, 1 + len(names) * row + side, alike) for row in range(8)] for side, name in enumerate(names)}
    columns = {f"{name}{what}": [row[place] for row in made[name]] for name in names for place, what in enumerate(("input_ids", "labels"))}
    live, model, added = trained_and_measured(directory, wanted, columns, tmp_path / "run")
    found = rows_of(Dataset.from_dict(columns))
    assert found.prefix == alike and found.alike.tolist() == ([alike] * 8 if trainer == "dpo" else [])
    plan = Planner(Catalogue(), live, Machine("cpu", None, True), directory, found).case(wanted).prediction
    assert plan.peak_memory == pytest.approx(standing(plan) + added, rel=0.02)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.shape.trained == trained
    return plan


@pytest.mark.parametrize("at_once", [10_000, 1])
def test_what_rows_begin_with_alike(at_once, monkeypatch):
    monkeypatch.setattr("ftx.rows.AT_ONCE", at_once)
    ids = [[1, 2, 3, 4], [1, 2, 3], [1, 2, 9, 9, 9], [1, 2, 3, 4]]
    assert prefix_of(Dataset.from_dict({"input_ids": ids})) == 2
    assert prefix_of(Dataset.from_dict({"input_ids": [[7, 8]] * 3})) == 2
    assert prefix_of(Dataset.from_dict({"input_ids": [[7, 8], [1]]})) == 0
    pairs = Dataset.from_dict({"chosen_input_ids": ids, "rejected_input_ids": [[1, 2, 3, 5], [1, 2], [2], [1, 2, 3, 4]], "x": [0] * 4})
    assert prefix_of(pairs) == 0
    rows = rows_of(pairs.remove_columns("x").add_column("chosen_labels", ids).add_column("rejected_labels", ids))
    assert rows.alike.tolist() == [3, 2, 0, 4] and rows.lengths.tolist() == [[4, 4], [3, 2], [5, 1], [4, 4]]


def test_what_one_pass_over_the_rows_computes():
    one = Rows([(9,), (5,), (7,), (7,)], [1] * 4, prefix=3)
    assert computed(one, 2, joined=True, shared=False) == 28
    assert computed(one, 2, joined=True, shared=True) == 28 - 4 - 2 * 3  # no last token; one row of each batch finds the beginning there
    assert computed(one, 4, joined=False, shared=False) == 36
    assert computed(one, 1, joined=False, shared=False) == 28
    assert 30 <= computed(one, 2, joined=False, shared=False) <= 32  # by who comes together
    pairs = Rows([(9, 6), (8, 8)], [1, 1], alike=[4, 5], prefix=2)
    assert computed(pairs, 2, joined=True, shared=True) == 31 - 4 - 9 - 2
    assert computed(pairs, 1, joined=False, shared=False) == 18 + 16
    assert computed(Rows([], []), 2, joined=False, shared=False) == 0


def test_the_largest_batch_by_length_and_by_what_differs():
    rows = Rows([(90, 90), (80, 70), (60, 60)], [9, 8, 7], alike=[85, 20, 0], prefix=0)
    assert list(largest_batches(rows, 1)) == [((90, 90), 9, 85), ((80, 70), 8, 20)]
    assert list(largest_batches(rows, 1, 50)) == [((50, 50), 9, 50), ((50, 50), 7, 0)]
    one = Rows([(9,), (30,), (20,)], [1, 2, 3], prefix=5)
    assert list(largest_batches(one, 2)) == [((30, 20), 5, 5)]
    assert list(largest_batches(Rows([], []), 2)) == [((), 0, 0)]


# ---- packed rows


@pytest.mark.parametrize("fast", ["off", "auto"])
def test_the_peak_of_a_packed_step_is_the_measured_one(fast, tmp_path):
    """Packs of rows of several lengths: what one pass holds is what the plan says it holds, and so is the peak."""
    directory = tiny_model_dir(tmp_path / "model", **SMALL)
    lengths = [90, 60, 45, 45, 30] * 4  # four packs of 90, four of 60 and 30, four of 45 and 45
    options = ("trainer.packing=true", "trainer.max_length=90", "trainer.per_device_train_batch_size=3", f"trainer.fast={fast}")
    wanted = of_two_steps(directory, "lora", "sft", *options)
    made = [row_of(length, length // 3) for length in lengths]
    live, _, added = trained_and_measured(
        directory, wanted, {"input_ids": [ids for ids, _ in made], "labels": [labels for _, labels in made]}, tmp_path / "run"
    )
    rows = Rows([(length,) for length in lengths], [length // 3 for length in lengths])
    plan = Planner(Catalogue(), live, Machine("cpu", None, True), directory, rows).case(wanted).prediction
    assert plan.shape.tokens == 270 and plan.shape.joined
    assert plan.peak_memory == pytest.approx(standing(plan) + added, rel=0.05)


def test_packs_are_those_of_the_trainer():
    from trl import pack_dataset

    chosen = random.Random(3)
    lengths = [chosen.choice((5, 17, 60, 128, 250, 300)) for _ in range(2300)]
    theirs = pack_dataset(Dataset.from_dict({"input_ids": [[1] * length for length in lengths]}), 300)
    ours = packed(lengths, 300)
    assert sorted(map(len, theirs["input_ids"])) == sorted(sum(lengths[number] for number in pack) for pack in ours)
    assert sorted(number for pack in ours for number in pack) == list(range(2300))
    fullest, _ = largest_packs(lengths, lengths, 2, 300)
    assert sum(fullest) == 600
    assert largest_packs([700, 20], [30, 10], 4, 300) == ((300, 20), 40), "a longer row than a pack is cut, and there are no more rows than there are"


def test_a_plan_with_packing_holds_whole_packs():
    """1,000 rows of 60 tokens in packs of 2,048: a pass holds packs, and not four rows."""
    rows = Rows([(60,)] * 1000, [20] * 1000)
    wanted = asked("llama-3.1-8b", "qlora", "packing=true", "max_length=2048", "per_device_train_batch_size=4", "gradient_checkpointing=false")
    case = planner("llama-3.1-8b", 80, rows=rows).case(wanted)
    assert case.prediction.shape.tokens == 4 * 34 * 60
    assert case.prediction.steps == 3 * 2  # 30 packs, 16 a step
    without = planner("llama-3.1-8b", 80).case(wanted)
    assert case.prediction.peak_memory == pytest.approx(without.prediction.peak_memory, rel=0.01)
    few = planner("llama-3.1-8b", 80, rows=Rows([(60,)] * 10, [20] * 10)).case(wanted)
    assert few.prediction.shape.tokens == 600, "no more than there is"
    tight = planner("llama-3.1-8b", 7.2, rows=rows)
    _, _, advice = settle(tight, asked("llama-3.1-8b", "qlora", "packing=true", "max_length=2048"))
    assert advice[-1].what.startswith("packs of at most ") and tight.fits(advice[-1].case)


def test_a_run_from_another_runs_adapter_is_planned_on_its_base(tmp_path, data):
    model = tiny_model_dir(tmp_path / "model")
    common = ("--data", str(data), "-o", "trainer.max_steps=1", "--device", "cpu", "--quiet")
    assert run("run", "--model", str(model), "--output", str(tmp_path / "first"), *common).exit_code == 0
    second = run("run", "--from", str(tmp_path / "first"), "--output", str(tmp_path / "second"), *common)
    assert second.exit_code == 0, second.output
    first, then = (json.loads((tmp_path / name / "plan.json").read_text())["predicted"] for name in ("first", "second"))
    assert first == then
    assert json.loads(run("plan", "--from", str(tmp_path / "first"), "--data", str(data), "--device", "cpu", "--json").stdout)["parameters"] == 35168


def test_a_model_of_another_kind_is_counted_from_its_files_and_never_refused(tmp_path, data, monkeypatch):
    model = tiny_model_dir(tmp_path / "model")
    assert read_shape(model).counted == read_shape(model).parameters == 35168
    config = json.loads((model / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(config | {"model_type": "something_new", "intermediate_size": 4096}))
    (other / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    assert read_shape(other).parameters == 35168
    (other / "model.safetensors").write_bytes(b"no header")
    assert read_shape(other).counted == 0
    done = run("plan", "--model", str(other), "--device-memory", "1GB")
    assert "they are an estimate" in done.output
