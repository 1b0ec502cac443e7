"""peft's methods by name: the hooks are wide enough for all of them."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from ftx import Run
from ftx.errors import OptionError, RunError
from ftx.ledger import Ledger
from ftx.options import Text, as_dict, build
from ftx.testing.tiny import tiny_model
from ftx_peft import Peft, methods

TOKENS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(1))


def a_run(dtype=torch.float32):
    said = []
    recipe = SimpleNamespace(trainer=SimpleNamespace(name="sft", options={}), quantizer=None)
    run = Run(recipe=recipe, ledger=Ledger(), dtype=dtype, model="acme/tiny", say=said.append)
    run.notes["said"] = said
    return run


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def train(model, steps=2):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


#: Options as they are typed on a command line.
MERGED = {
    "lora": {"r": "4", "target_modules": "[q_proj, v_proj]"},
    "adalora": {"total_step": "10"},
    "vera": {"r": "8", "target_modules": "[q_proj, o_proj]"},
    "ia3": {},
    "oft": {"oft_block_size": "4"},
    "boft": {"boft_block_size": "4"},
    "loha": {"r": "4", "target_modules": "all-linear"},
    "lokr": {},
    "hra": {},
    "ln_tuning": {},
    "osf": {},
    "vblora": {"vector_length": "8", "num_vectors": "16"},
}
PROMPTS = {
    "prompt_tuning": {"num_virtual_tokens": "4"},
    "p_tuning": {"num_virtual_tokens": "4", "encoder_hidden_size": "16"},
    "prefix_tuning": {"num_virtual_tokens": "4"},
}
METHODS = MERGED | PROMPTS


def typed(method, options):
    return build(Peft, {"method": Text(method)} | {key: Text(value) for key, value in options.items()}, stage="adapter", name="peft")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_life_of_an_adapter(method, dtype, tmp_path):
    run, plugin = a_run(dtype), typed(method, METHODS[method])
    tiny_model().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    untouched, start = copy.deepcopy(base), logits(base)
    torch.manual_seed(0)
    model = plugin.adapt_model(base, run)
    trains = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert bool(run.notes["said"]) == any(p.dtype != torch.float32 for p in trains.values())
    train(model)
    assert any(not torch.equal(p, trains[name]) for name, p in model.named_parameters() if name in trains)
    tuned = logits(model)
    plugin.save_adapted(model, tmp_path / "model", run)
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = plugin.load_adapted(untouched, tmp_path / "model", run)
    assert torch.equal(logits(again), tuned)
    with plugin.adapter_off(model, run):
        assert torch.equal(logits(model), start)
    assert torch.equal(logits(model), tuned)
    if method in PROMPTS:
        with pytest.raises(RunError) as caught:
            plugin.merge_adapted(model, run)
        assert str(caught.value) == f"{method} cannot be merged into the weights.\nUse the model with its adapter, or train with --adapter lora."
    else:
        merged = plugin.merge_adapted(model, run)
        assert type(merged) is LlamaForCausalLM and {p.dtype for p in merged.parameters()} == {dtype}
        assert (logits(merged) - tuned).abs().max() < (1e-5 if dtype == torch.float32 else 0.05) * tuned.abs().max()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_from_the_base_is_not_switched_off_in_place(init, tmp_path):
    """The base under such an adapter is not the base: whoever wants that one loads it again."""
    run, plugin, base = a_run(), typed("lora", {"r": "4", "init_lora_weights": init}), tiny_model()
    untouched, start = copy.deepcopy(base), logits(base)
    model = plugin.adapt_model(base, run)
    assert torch.allclose(logits(model), start, atol=1e-4)
    train(model)
    tuned = logits(model)
    plugin.save_adapted(model, tmp_path, run)
    again = plugin.load_adapted(untouched, tmp_path, run)
    assert torch.allclose(logits(again), tuned, atol=1e-4)
    assert plugin.adapter_off(model, run) is None and plugin.adapter_off(again, run) is None


def test_a_method_whose_layers_cannot_be_merged():
    run, plugin = a_run(), Peft(method="lily")
    with pytest.raises(RunError, match="lily cannot be merged into the weights: "):
        plugin.merge_adapted(plugin.adapt_model(tiny_model(), run), run)


def test_generation_with_a_learned_prompt():
    model = Peft(method="prompt_tuning", args={"num_virtual_tokens": 4}).adapt_model(tiny_model(), a_run())
    assert model.eval().generate(input_ids=TOKENS, max_new_tokens=3, do_sample=False).shape == (2, 15)


def test_it_is_the_same_as_lora():
    from ftx_lora import LoRA

    weights = []
    for plugin in (LoRA(r=4, alpha=8), Peft(method="lora", args={"r": 4, "lora_alpha": 8, "target_modules": "all-linear"})):
        torch.manual_seed(0)
        model = plugin.adapt_model(tiny_model(), a_run())
        train(model)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert Peft.suggests == LoRA.suggests


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "vira"}, "peft has no method 'vira'. Did you mean 'vera'?"),
        ({"method": "vera", "rank": "4"}, "adapter 'peft' with method 'vera' has no option 'rank'."),
        ({"method": "lora", "lora_alfa": "4"}, "adapter 'peft' with method 'lora' has no option 'lora_alfa'. Did you mean 'lora_alpha'?"),
        ({"method": "vera", "task_type": "SEQ_CLS"}, "adapter 'peft' with method 'vera' has no option 'task_type'."),
        ({"method": "lora", "r": "four"}, "adapter.r wants int, got 'four'."),
        (
            {"method": "lora", "init_lora_weights": "eva"},
            "adapter 'peft': init_lora_weights=eva is not to be had: it decomposes what the layers see of the data",
        ),
        ({"method": "lora", "init_lora_weights": "corda"}, "adapter 'peft': init_lora_weights=corda is not to be had: it decomposes"),
        (
            {"method": "lora", "init_lora_weights": "loftq", "loftq_config": "{loftq_bits: 4}"},
            "adapter 'peft': init_lora_weights=loftq is not to be had: it puts",
        ),
        ({"method": "oft", "r": "4", "oft_block_size": "4"}, "adapter 'peft': "),
    ],
)
def test_refused_options(options, text):
    with pytest.raises(OptionError) as caught:
        typed(options.pop("method"), options)
    assert caught.value.problem.startswith(text)


def test_the_remedy_lists_what_there_is():
    with pytest.raises(OptionError) as caught:
        Peft(method="vira")
    assert caught.value.remedy.startswith("Methods: ada") and "prompt_tuning" in caught.value.remedy
    with pytest.raises(OptionError) as caught:
        Peft(method="ia3", args={"r": 3})
    assert "feedforward_modules" in caught.value.remedy and "peft_type" not in caught.value.remedy


def test_a_written_recipe_gives_the_same_configuration():
    """A recipe holds the options as they were typed; YAML types are taken as they are."""
    first = typed("lora", {"r": "4", "lora_dropout": "0.1", "use_rslora": "true", "rank_pattern": "{q_proj: 2}"})
    second = build(Peft, as_dict(first), stage="adapter", name="peft")
    third = build(Peft, {"method": "lora", "r": 4, "lora_dropout": 0.1, "use_rslora": True, "rank_pattern": {"q_proj": 2}}, stage="adapter", name="peft")
    assert first.peft_config().to_dict() == second.peft_config().to_dict() == third.peft_config().to_dict()


def test_what_the_model_refuses_is_said():
    with pytest.raises(RunError, match="peft refuses: .*not found in the base model"):
        Peft(method="lora", args={"target_modules": ["nowhere"]}).adapt_model(tiny_model(), a_run())


def test_every_method_has_a_configuration():
    assert {"lora", "vera", "ia3", "oft", "boft", "prompt_tuning", "prefix_tuning"} <= methods().keys()
