"""LoRA on a tiny model: what trains, what is saved, what comes back, what is refused."""

import copy
import json
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from ftx import Run
from ftx.errors import OptionError, RunError
from ftx.ledger import Ledger
from ftx.options import Text, build
from ftx.testing.tiny import tiny_model
from ftx_lora import LoRA, load, probe

TOKENS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(1))
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def a_run(dtype=torch.float32, quantizer=None, **trainer_options):
    said = []
    recipe = SimpleNamespace(trainer=SimpleNamespace(name="sft", options=trainer_options), quantizer=quantizer)
    run = Run(recipe=recipe, ledger=Ledger(), dtype=dtype, model="acme/tiny", say=said.append)
    run.notes["said"] = said
    return run


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def train(model, steps=2):
    """Steps of AdamW by hand; the gradients of each, by name."""
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, gradients = torch.optim.AdamW(trained.values(), lr=1e-2), []
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in trained.items()})
        optimizer.step()
        optimizer.zero_grad()
    return gradients


def adapted(plugin, base, run, seed=0):
    torch.manual_seed(seed)
    return plugin.adapt_model(base, run)


def in_bfloat16(directory, **overrides):
    """The tiny model as from_pretrained gives it in bfloat16: .to(bfloat16) would round the rotary frequencies as well."""
    tiny_model(**overrides).save_pretrained(directory)
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)


CASES = {
    "default": {},
    "small": {"r": 4, "target_modules": ["q_proj"]},
    "regex": {"target_modules": r".*\.1\.mlp\..*_proj"},
    "rslora": {"rslora": True, "alpha": 8},
    "head": {"modules_to_save": ["lm_head"]},
    "gaussian": {"init": "gaussian"},
    "orthogonal": {"init": "orthogonal"},
    "mica": {"init": "mica"},
    "biases": {"bias": "all"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_life_of_an_adapter(options, tmp_path):
    """Starts as the base, trains, comes back from disk the same, merges to the same, and can be switched off."""
    run, plugin, base = a_run(), LoRA(**options), tiny_model(attention_bias="bias" in options)
    untouched, start = copy.deepcopy(base), logits(base)
    model = adapted(plugin, base, run)
    # orthogonal: B A is zero but for rounding
    assert torch.allclose(logits(model), start, rtol=0, atol=1e-5 if plugin.init == "orthogonal" else 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    tuned = logits(model)
    assert not torch.allclose(tuned, start, atol=1e-2)

    plugin.save_adapted(model, tmp_path / "model", run)
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = plugin.load_adapted(untouched, tmp_path / "model", run)
    assert torch.equal(logits(again), tuned)
    assert not again.training and not any(p.requires_grad for p in again.parameters())

    off = plugin.adapter_off(model, run)
    if "bias" in options:
        assert off is None
    else:
        with off:
            assert torch.equal(logits(model), start)
    assert torch.equal(logits(model), tuned)

    merged = plugin.merge_adapted(model, run)
    assert type(merged) is LlamaForCausalLM and not any("lora" in name for name, _ in merged.named_modules())
    assert torch.allclose(logits(merged), tuned, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.allclose(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)), tuned, atol=1e-5)


def test_what_trains():
    model = adapted(LoRA(r=4), tiny_model(), a_run())
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_A" in name or "lora_B" in name for name in names)
    assert {name.split(".")[-4] for name in names} == set(LINEAR)
    assert len(names) == 2 * len(LINEAR) * 2


def test_every_matrix_gets_a_gradient():
    """B at the first step; A, whose gradient goes through B = 0, at the second."""
    model = adapted(LoRA(), tiny_model(), a_run())
    first, second = train(model)
    for name in first:
        assert (first[name].norm() > 0) == ("lora_B" in name), name
        assert second[name].norm() > 0 and second[name].isfinite().all(), name


@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_are_those_of_plain_peft(rslora):
    from peft import LoraConfig, get_peft_model

    run = a_run()
    ours = adapted(LoRA(r=8, alpha=24, rslora=rslora), tiny_model(), run)
    torch.manual_seed(0)
    plain = get_peft_model(tiny_model(), LoraConfig(r=8, lora_alpha=24, target_modules="all-linear", use_rslora=rslora, task_type="CAUSAL_LM"))
    for step, (found, wanted) in enumerate(zip(train(ours, 3), train(plain, 3), strict=True)):
        assert found.keys() == wanted.keys()
        for name in found:
            assert (found[name] - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), (step, name)


def test_the_update_is_alpha_over_r_times_b_a():
    """Against the formula of the paper, without peft."""
    base = tiny_model()
    weight = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    model = adapted(LoRA(r=4, alpha=6, target_modules=["q_proj"]), base, a_run())
    train(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
    merged = LoRA().merge_adapted(model, a_run())
    assert torch.allclose(merged.model.layers[0].self_attn.q_proj.weight, weight + 6 / 4 * b @ a, atol=1e-6)


def test_same_seed_same_weights():
    first, second, other = (adapted(LoRA(), tiny_model(), a_run(), seed).state_dict() for seed in (7, 7, 8))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_the_saved_configuration_is_portable_and_repeatable(tmp_path):
    base = tiny_model()
    base.name_or_path = base.config._name_or_path = "/home/someone/.cache/models/tiny"
    for name in ("one", "two"):
        LoRA().save_adapted(adapted(LoRA(), copy.deepcopy(base), a_run()), tmp_path / name, a_run())
    text = (tmp_path / "one" / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == "acme/tiny"
    assert "/home/" not in text
    assert json.loads(text)["target_modules"] == sorted(json.loads(text)["target_modules"])
    assert text == (tmp_path / "two" / "adapter_config.json").read_text()


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}], ids=["plain", "head", "embeddings"])
def test_bfloat16_base_float32_adapters(options, tmp_path):
    run, plugin = a_run(torch.bfloat16), LoRA(**options)
    base = in_bfloat16(tmp_path / "base")
    start = logits(base)
    model = adapted(plugin, base, run)
    assert torch.equal(logits(model), start)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    train(model)
    tuned = logits(model)
    plugin.save_adapted(model, tmp_path / "model", run)
    again = plugin.load_adapted(LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16), tmp_path / "model", run)
    assert torch.equal(logits(again), tuned)
    assert {p.dtype for name, p in again.named_parameters() if "lora" in name} == {torch.float32}
    with plugin.adapter_off(model, run):
        assert torch.equal(logits(model), start)
    merged = plugin.merge_adapted(model, run)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in merged.modules())
    assert (logits(merged) - tuned).abs().max() < 0.05 * tuned.abs().max()


def test_merging_rounds_only_once(tmp_path):
    """The merged bfloat16 weight is the float32 sum rounded; peft alone rounds the update first and loses a part of it."""
    model = adapted(LoRA(target_modules=["q_proj"]), in_bfloat16(tmp_path), a_run(torch.bfloat16))
    train(model)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    exact = layer.get_base_layer().weight.detach().float() + layer.get_delta_weight("default").detach()
    peft_merged = copy.deepcopy(model).merge_and_unload(safe_merge=True).model.layers[0].self_attn.q_proj.weight
    merged = LoRA().merge_adapted(model, a_run(torch.bfloat16)).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(merged, exact.bfloat16())
    assert not torch.equal(peft_merged, exact.bfloat16())


@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["lm_head", "q_proj"]}, {"target_modules": ["embed_tokens", "q_proj"]}], ids=str
)
def test_tied_embeddings_come_apart(options, tmp_path):
    """An adapted head or embedding must not drag the other along, neither in the merged model nor in its file."""
    run, plugin = a_run(), LoRA(**options)
    model = adapted(plugin, tiny_model(tie_word_embeddings=True), run)
    train(model)
    tuned = logits(model)
    merged = plugin.merge_adapted(model, run)
    assert torch.allclose(logits(merged), tuned, atol=1e-5)
    merged.save_pretrained(tmp_path)
    assert torch.allclose(logits(LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), tuned, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_starts_from_the_base_are_saved_for_the_untouched_base(init, rslora, tmp_path):
    """To rounding: the start is taken out of the weights and put back."""
    run, plugin, base = a_run(), LoRA(r=4, init=init, rslora=rslora), tiny_model()
    untouched, start = copy.deepcopy(base), logits(base)
    model = adapted(plugin, base, run)
    assert torch.allclose(logits(model), start, atol=1e-4)
    train(model)
    tuned = logits(model)
    assert plugin.adapter_off(model, run) is None
    plugin.save_adapted(model, tmp_path, run)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (8, True)
    again = plugin.load_adapted(untouched, tmp_path, run)
    assert torch.allclose(logits(again), tuned, atol=1e-4)
    with plugin.adapter_off(again, run):
        assert torch.equal(logits(again), start)
    assert torch.allclose(logits(plugin.merge_adapted(model, run)), tuned, atol=1e-4)


def damaged(tmp_path, change):
    from safetensors.torch import load_file, save_file

    LoRA().save_adapted(adapted(LoRA(), tiny_model(), a_run()), tmp_path, a_run())
    state = load_file(tmp_path / "adapter_model.safetensors")
    change(state)
    save_file(state, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RunError) as caught:
        load(tiny_model(), tmp_path)
    return caught.value.problem


def test_a_damaged_adapter_is_refused(tmp_path):
    key = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
    assert damaged(tmp_path / "a", lambda state: state.pop(key)) == f"{tmp_path / 'a'}: 1 missing weights, such as {key}."
    assert (
        damaged(tmp_path / "b", lambda state: state.update({"stray.weight": torch.ones(1)})) == f"{tmp_path / 'b'}: 1 unexpected weights, such as stray.weight."
    )
    assert damaged(tmp_path / "c", lambda state: state.update({key: torch.ones(1, 2)})) == f"{tmp_path / 'c'}: 1 misshapen weights, such as {key}."


def test_an_adapter_of_another_model_or_none_is_refused(tmp_path):
    LoRA().save_adapted(adapted(LoRA(), tiny_model(), a_run()), tmp_path, a_run())
    with pytest.raises(RunError, match="7 missing|14 missing|misshapen"):
        load(tiny_model(num_hidden_layers=3, hidden_size=64), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"holds no adapter \(adapter_config.json is missing\)"):
        load(tiny_model(), tmp_path / "empty")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"r": -3}, "adapter 'lora': r must be at least 1, got -3."),
        ({"alpha": 0}, "adapter 'lora': alpha must be at least 1, got 0."),
        ({"dropout": 1.5}, "adapter 'lora': dropout must be at least 0 and below 1, got 1.5."),
        ({"target_modules": []}, "adapter 'lora': target_modules must name at least one module."),
        (
            {"target_modules": "q(proj"},
            "adapter 'lora': target_modules is not a regular expression (missing ), unterminated subpattern at position 1): q(proj.",
        ),
        ({"init": "orthogonal", "r": 3}, "adapter 'lora': init=orthogonal needs an even r, got 3."),
        ({"init": "eva"}, "adapter 'lora': init must be true, false, gaussian, orthogonal, olora, pissa, pissa_niter_N or mica, got eva."),
        ({"init": "pissa_niter_0"}, "adapter 'lora': init must be true, false, gaussian, orthogonal, olora, pissa, pissa_niter_N or mica, got pissa_niter_0."),
        ({"init": 1}, "adapter.init wants bool or str, got 1."),
        ({"bias": "some"}, "adapter.bias wants 'none' or 'all' or 'lora_only', got 'some'."),
    ],
)
def test_refused_options(options, text):
    with pytest.raises(OptionError) as caught:
        build(LoRA, options, stage="adapter", name="lora")
    assert caught.value.problem == text


def test_options_from_text():
    typed = {"target_modules": "[q_proj, v_proj]", "init": "pissa", "modules_to_save": "lm_head", "dropout": "0.1"}
    plugin = build(LoRA, {key: Text(value) for key, value in typed.items()}, stage="adapter", name="lora")
    assert plugin.target_modules == ["q_proj", "v_proj"] and plugin.init == "pissa" and plugin.modules_to_save == ["lm_head"] and plugin.dropout == 0.1
    assert [build(LoRA, {"init": Text(init)}, stage="adapter", name="lora").init for init in ("false", "pissa_niter_16")] == [False, "pissa_niter_16"]
    assert build(LoRA, {"target_modules": Text("all-linear")}, stage="adapter", name="lora").target_modules == "all-linear"


@pytest.mark.parametrize(
    ("typed", "taken"),
    [
        ("q_proj", ["q_proj"]),
        ("q_proj, v_proj", ["q_proj", "v_proj"]),
        ("layers.0.self_attn.q_proj,v_proj", ["layers.0.self_attn.q_proj", "v_proj"]),
        (r".*\.[qv]_proj", r".*\.[qv]_proj"),
        (r".*\.\d{1,2}\.mlp\.up_proj", r".*\.\d{1,2}\.mlp\.up_proj"),
    ],
)
def test_names_in_a_text_are_names(typed, taken):
    """As LLaMA-Factory's `lora_target` is written. peft takes each text for a regular expression of whole paths, which q_proj never matches."""
    adapter = build(LoRA, {"target_modules": Text(typed)}, stage="adapter", name="lora")
    assert adapter.target_modules == taken
    assert any("lora_A" in name for name, _ in adapted(adapter, tiny_model(), a_run()).named_parameters())


def test_unknown_targets_are_refused():
    with pytest.raises(RunError) as caught:
        adapted(LoRA(target_modules=["v_proj", "q_prj"]), tiny_model(), a_run())
    assert caught.value.problem == "target_modules: the model has no module 'q_prj'. Did you mean 'q_proj'?"
    with pytest.raises(RunError, match="modules_to_save: the model has no module 'head'"):
        adapted(LoRA(modules_to_save=["head"]), tiny_model(), a_run())
    with pytest.raises(RunError, match="peft refuses: .*not found in the base model"):
        adapted(LoRA(target_modules="nothing.*"), tiny_model(), a_run())


def test_notes(tmp_path):
    for rate, said in ((2e-3, ["note: learning rate 0.002 is outside 1e-4 to 3e-4, the usual range for LoRA"]), (2e-4, []), (3e-4, [])):
        run = a_run(learning_rate=rate)
        adapted(LoRA(), tiny_model(), run)
        assert run.notes["said"] == said
    run = a_run(torch.bfloat16)
    adapted(LoRA(bias="all", target_modules=["q_proj"]), in_bfloat16(tmp_path, attention_bias=True), run)
    assert run.notes["said"][0].startswith("note: 8 weights train in bfloat16, where small updates are lost (")


def test_preflight_refuses_pissa_on_a_quantised_base():
    run = a_run(quantizer=SimpleNamespace(name="nf4"))
    assert LoRA(init="pissa").preflight(run) == ["init=pissa changes the base's weights, which cannot be done to quantised ones: use init=true."]
    assert LoRA().preflight(run) == []


def test_a_merge_that_changes_the_model_is_refused(monkeypatch):
    """The probe notices a wrong merge; here peft's scale is broken on purpose."""
    model = adapted(LoRA(init=False), tiny_model(), a_run())
    layer = type(model.base_model.model.model.layers[0].self_attn.q_proj)
    right = layer.get_delta_weight
    monkeypatch.setattr(layer, "get_delta_weight", lambda self, name: 3 * right(self, name))
    with pytest.raises(RunError, match="merging lora changed what the model says: a logit moved by"):
        LoRA().merge_adapted(model, a_run())


def test_the_probe_leaves_the_mode_alone():
    model = tiny_model().train()
    assert probe(model).shape == (1, 32, 259)
    assert model.training


def test_peft_is_imported_in_silence():
    code = "from ftx_lora import LoRA; LoRA().lora_config()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert logging.getLogger("bitsandbytes.backends.cpu.ops").level == logging.ERROR
