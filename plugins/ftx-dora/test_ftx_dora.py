"""DoRA on a tiny model: its formula, its magnitudes, and the life of an adapter."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from ftx import Run
from ftx.ledger import Ledger
from ftx.testing.tiny import tiny_model
from ftx_dora import DoRA
from ftx_lora import LoRA, wrap

TOKENS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(1))


def a_run(dtype=torch.float32, quantizer=None, device="cpu"):
    recipe = SimpleNamespace(trainer=SimpleNamespace(name="sft", options={}), quantizer=quantizer)
    return Run(recipe=recipe, ledger=Ledger(), dtype=dtype, model="acme/tiny", say=lambda line: None, device=device)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def train(model, steps=2):
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


@pytest.mark.parametrize("options", [{}, {"r": 4, "target_modules": ["q_proj"], "dropout": 0.1}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_life_of_an_adapter(options, tmp_path):
    run, plugin, base = a_run(), DoRA(**options), tiny_model()
    untouched, start = copy.deepcopy(base), logits(base)
    model = adapted(plugin, base, run)
    assert torch.equal(logits(model), start)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    tuned = logits(model)
    plugin.save_adapted(model, tmp_path, run)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_dora"] and config["base_model_name_or_path"] == "acme/tiny"
    assert torch.equal(logits(plugin.load_adapted(untouched, tmp_path, run)), tuned)
    with plugin.adapter_off(model, run):
        assert torch.equal(logits(model), start)
    merged = plugin.merge_adapted(model, run)
    assert type(merged) is LlamaForCausalLM
    assert torch.allclose(logits(merged), tuned, atol=1e-5)


def test_what_trains_and_gets_gradients():
    model = adapted(DoRA(r=4), tiny_model(), a_run())
    first, second = train(model)
    kinds = {"lora_A", "lora_B", "lora_magnitude_vector"}
    assert {kind for name in first for kind in kinds if kind in name} == kinds and len(first) == 3 * 7 * 2
    for name in first:
        assert (first[name].norm() > 0) == ("lora_A" not in name), name
        assert second[name].norm() > 0 and second[name].isfinite().all(), name


def test_gradients_are_those_of_plain_peft():
    from peft import LoraConfig, get_peft_model

    ours = adapted(DoRA(r=8, alpha=24), tiny_model(), a_run())
    torch.manual_seed(0)
    plain = get_peft_model(tiny_model(), LoraConfig(r=8, lora_alpha=24, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM"))
    for step, (found, wanted) in enumerate(zip(train(ours, 3), train(plain, 3), strict=True)):
        assert found.keys() == wanted.keys()
        for name in found:
            assert (found[name] - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), (step, name)


def test_the_merged_weight_is_the_papers():
    """m * (W + s B A) / |W + s B A| with the norm over a row of the weight, without peft."""
    base = tiny_model()
    weight = base.model.layers[1].mlp.up_proj.weight.detach().clone()
    model = adapted(DoRA(r=4, alpha=6, target_modules=["up_proj"]), base, a_run())
    train(model)
    layer = model.base_model.model.model.layers[1].mlp.up_proj
    direction = weight + 6 / 4 * layer.lora_B["default"].weight.detach() @ layer.lora_A["default"].weight.detach()
    magnitude = layer.lora_magnitude_vector["default"].weight.detach()
    merged = DoRA().merge_adapted(model, a_run()).model.layers[1].mlp.up_proj.weight
    assert torch.allclose(merged, magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True), atol=1e-6)


def test_magnitudes_stay_float32_on_a_bfloat16_base(tmp_path):
    """And start exact: peft's own start in bfloat16 changes the untrained model's output."""
    tiny_model().save_pretrained(tmp_path / "base")
    load = lambda: LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)  # noqa: E731
    run, start = a_run(torch.bfloat16), logits(load())
    model = adapted(DoRA(), load(), run)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert torch.equal(logits(model), start)
    assert not torch.equal(logits(wrap(load(), DoRA().lora_config())), start)
    train(model)
    tuned = logits(model)
    DoRA().save_adapted(model, tmp_path / "model", run)
    assert torch.equal(logits(DoRA().load_adapted(load(), tmp_path / "model", run)), tuned)
    merged = DoRA().merge_adapted(model, run)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert (logits(merged) - tuned).abs().max() < 0.05 * tuned.abs().max()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_starts_from_the_base(init, tmp_path):
    run, plugin, base = a_run(), DoRA(r=4, init=init), tiny_model()
    untouched, start = copy.deepcopy(base), logits(base)
    model = adapted(plugin, base, run)
    assert torch.allclose(logits(model), start, atol=1e-4)
    train(model)
    tuned = logits(model)
    plugin.save_adapted(model, tmp_path, run)
    assert torch.allclose(logits(plugin.load_adapted(untouched, tmp_path, run)), tuned, atol=1e-4)


def test_same_seed_same_weights():
    first, second = (adapted(DoRA(), tiny_model(), a_run(), 7).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_it_is_lora():
    assert issubclass(DoRA, LoRA) and DoRA.suggests == LoRA.suggests
    with pytest.raises(ValueError, match="r must be at least 1, got -3"):
        DoRA(r=-3)


def test_int8_on_a_cpu_is_refused():
    int8 = SimpleNamespace(name="int8")
    assert DoRA().preflight(a_run(quantizer=int8)) == ["dora cannot read int8 weights on a CPU: use --quantizer nf4, or --adapter lora."]
    assert DoRA().preflight(a_run(quantizer=int8, device="cuda")) == []
    assert DoRA().preflight(a_run()) == []
