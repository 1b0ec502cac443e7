"""QLoRA on a tiny model: its 4-bit base, the life of its adapter, and what it refuses."""

import json
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import ftx_qlora
from ftx import Run
from ftx.errors import OptionError, PluginError
from ftx.hooks import Hooks
from ftx.ledger import Ledger
from ftx.options import build
from ftx.testing.tiny import tiny_model
from ftx_bnb import Int8
from ftx_lora import LoRA
from ftx_qlora import QLoRA

TOKENS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Multiples of 64: below that bitsandbytes does not repack on a CPU."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def a_run(dtype=torch.bfloat16, device="cpu", **trainer_options):
    said = []
    recipe = SimpleNamespace(trainer=SimpleNamespace(name="sft", options=trainer_options), quantizer=None)
    run = Run(recipe=recipe, ledger=Ledger(), dtype=dtype, model="acme/tiny", say=said.append, device=device)
    run.notes["said"] = said
    return run


def loaded(directory, plugin, run):
    config = plugin.quantization_config(run)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=run.dtype, device_map={"": run.device}, quantization_config=config)
    plugin.model_loaded(model, run)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def training_loss(model):
    return model.train()(input_ids=TOKENS, labels=TOKENS).loss.item()


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


@pytest.mark.parametrize("options", [{}, {"r": 4, "target_modules": ["q_proj"]}, {"modules_to_save": ["lm_head"]}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_life_of_an_adapter(options, dtype, directory, tmp_path):
    run, plugin = a_run(dtype), QLoRA(**options)
    base = loaded(directory, plugin, run)
    start = logits(base)
    torch.manual_seed(0)
    model = plugin.adapt_model(base, run)
    assert torch.equal(logits(model), start)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name
    tuned = logits(model)
    plugin.save_adapted(model, tmp_path / "model", run)
    assert json.loads((tmp_path / "model" / "adapter_config.json").read_text())["base_model_name_or_path"] == "acme/tiny"
    assert torch.equal(logits(plugin.load_adapted(loaded(directory, plugin, run), tmp_path / "model", run)), tuned)
    with plugin.adapter_off(model, run):
        assert torch.equal(logits(model), start)
    merged = plugin.merge_adapted(model, run)
    assert {p.dtype for p in merged.parameters()} == {dtype}
    assert (logits(merged) - tuned).abs().max() < (1e-5 if dtype == torch.float32 else 0.1) * tuned.abs().max()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)), logits(merged))


def test_the_base_is_nf4_with_double_quantisation(directory):
    model = loaded(directory, QLoRA(), a_run())
    state = model.model.layers[0].mlp.up_proj.weight.quant_state
    assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert model.model.norm.weight.dtype == torch.bfloat16  # what is not packed is as under plain LoRA


def test_every_matrix_gets_a_gradient(directory):
    run, plugin = a_run(), QLoRA()
    first, second = train(plugin.adapt_model(loaded(directory, plugin, run), run))
    for name in first:
        assert (first[name].norm() > 0) == ("lora_B" in name), name
        assert second[name].norm() > 0 and second[name].isfinite().all(), name


def test_activation_checkpointing_is_not_forced(directory):
    run, plugin = a_run(), QLoRA()
    model = plugin.adapt_model(loaded(directory, plugin, run), run)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_it_computes_in_bfloat16_or_says_so(directory):
    for dtype, said in ((torch.bfloat16, []), (torch.float32, ["note: qlora computes in float32, the run's dtype, instead of bfloat16"])):
        run, plugin = a_run(dtype), QLoRA()
        model = plugin.adapt_model(loaded(directory, plugin, run), run)
        assert run.notes["said"] == said
        assert model.base_model.model.model.layers[0].mlp.up_proj.get_base_layer().compute_dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_evaluation_between_two_steps_changes_nothing(dtype, directory):
    """Two trainings, one of them interrupted by a generation: equal losses, to the bit."""
    losses = []
    for evaluates in (False, True):
        run, plugin = a_run(dtype), QLoRA()
        torch.manual_seed(0)
        model = plugin.adapt_model(loaded(directory, plugin, run), run)
        train(model)
        if evaluates:
            model.eval().generate(input_ids=TOKENS, max_new_tokens=3, do_sample=False)
        losses.append(training_loss(model))
    assert losses[0] == losses[1]


@pytest.mark.skipif(not has_avx512bf16(), reason="only a CPU with AVX512-BF16 repacks 4-bit weights")
def test_without_keep_weights_it_would(directory, monkeypatch):
    monkeypatch.setattr(ftx_qlora, "keep_weights", lambda model: None)
    run, plugin = a_run(), QLoRA()
    model = plugin.adapt_model(loaded(directory, plugin, run), run)
    before = training_loss(model)
    model.eval().generate(input_ids=TOKENS, max_new_tokens=3, do_sample=False)
    assert training_loss(model) != before


def test_another_owner_of_the_quantisation_is_refused():
    hooks = Hooks()
    hooks.add(Int8(), "quantizer", "int8")
    hooks.add(QLoRA(), "adapter", "qlora")
    with pytest.raises(PluginError) as caught:
        hooks.check()
    assert str(caught.value) == (
        "quantizer 'int8' and adapter 'qlora' both set quantization_config.\nqlora brings its own 4-bit base: drop --quantizer, or use --adapter lora."
    )


def test_suggestions(monkeypatch):
    paged = {**LoRA.suggests, "trainer.optim": "paged_adamw_8bit"}
    monkeypatch.setattr("ftx.machine.gpus", lambda: [])
    assert QLoRA.suggests("auto") == QLoRA.suggests("cpu") == LoRA.suggests
    assert QLoRA.suggests("cuda") == paged  # planned for a machine that is not this one
    monkeypatch.setattr("ftx.machine.gpus", lambda: [("a GPU", 24 << 30)])
    assert QLoRA.suggests("auto") == paged
    assert QLoRA.suggests("cpu") == LoRA.suggests


def test_a_paged_optimizer_on_a_cpu_is_refused():
    assert QLoRA().preflight(a_run(optim="paged_adamw_8bit")) == ["the optimizer paged_adamw_8bit needs a GPU: -o trainer.optim=adamw_torch"]
    assert QLoRA().preflight(a_run(optim="adamw_torch")) == []
    assert QLoRA().preflight(a_run()) == []


def test_starts_that_change_the_base_are_refused():
    for init in ("pissa", "pissa_niter_4", "olora"):
        with pytest.raises(OptionError) as caught:
            build(QLoRA, {"init": init}, stage="adapter", name="qlora")
        assert caught.value.problem == f"adapter 'qlora': init={init} changes the base's weights, which cannot be done to quantised ones: use init=true."


@pytest.mark.gpu
def test_the_suggested_optimizer_trains_on_a_gpu(directory):
    import bitsandbytes as bnb

    run, plugin = a_run(device="cuda"), QLoRA()
    model = plugin.adapt_model(loaded(directory, plugin, run), run)
    optimizer = bnb.optim.PagedAdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens, losses = TOKENS.cuda(), []
    for _ in range(5):
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
