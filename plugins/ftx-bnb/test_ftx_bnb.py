"""The quantizers on a tiny model: they load, LoRA trains through them, evaluation leaves them alone, merging is faithful."""

import copy
import logging
import subprocess
import sys
from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.integrations.bitsandbytes import dequantize_bnb_weight

import ftx_bnb
from ftx import Run
from ftx.errors import OptionError
from ftx.hooks import Hooks
from ftx.ledger import Ledger
from ftx.options import build
from ftx.testing.tiny import tiny_model
from ftx_bnb import FP4, NF4, Int8
from ftx_lora import LoRA

TOKENS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(1))
LAYERS = {NF4: "Linear4bit", FP4: "Linear4bit", Int8: "Linear8bitLt"}
#: Of normally distributed weights, relative and in the norm.
ERROR = {NF4: 0.1, FP4: 0.15, Int8: 0.01}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Multiples of 64: below that bitsandbytes does not repack on a CPU."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_model(hidden_size=64, intermediate_size=128).save_pretrained(path)
    return path


def a_run(dtype=torch.float32, device="cpu"):
    recipe = SimpleNamespace(trainer=None, quantizer=SimpleNamespace(name="any"))
    return Run(recipe=recipe, ledger=Ledger(), dtype=dtype, model="acme/tiny", say=lambda line: None, device=device)


def loaded(directory, quantizer, run, *more):
    """The model as the core loads it, through the hooks of the quantizer and of `more`."""
    hooks = Hooks()
    for number, plugin in enumerate([quantizer, *more]):
        hooks.add(plugin, "plugin", str(number))
    config = hooks.hook.quantization_config(run=run)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=run.dtype, device_map={"": run.device}, quantization_config=config)
    hooks.hook.model_loaded(model=model, run=run)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def training_loss(model):
    return model.train()(input_ids=TOKENS, labels=TOKENS).loss.item()


def train(model, steps=2):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "quantizer", [NF4(), NF4(double_quant=False), FP4(), Int8(), Int8(threshold=0.0)], ids=["nf4", "nf4-plain", "fp4", "int8", "int8-plain"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_lora_on_a_quantised_base(quantizer, dtype, directory, tmp_path):
    run, plugin = a_run(dtype), LoRA()
    base = loaded(directory, quantizer, run, plugin)
    layer = base.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == LAYERS[type(quantizer)] and type(base.lm_head) is torch.nn.Linear
    exact = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).model.layers[0].mlp.up_proj.weight
    error = (dequantize_bnb_weight(layer.weight, getattr(layer, "state", None)) - exact).norm() / exact.norm()
    assert 0 < error < ERROR[type(quantizer)]
    start = logits(base)
    torch.manual_seed(0)
    model = plugin.adapt_model(base, run)
    assert torch.equal(logits(model), start)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert not model.is_gradient_checkpointing
    quantised = layer.weight.detach().clone()
    train(model)
    assert torch.equal(layer.weight, quantised)
    tuned = logits(model)
    assert not torch.allclose(tuned, start, atol=0.1)

    plugin.save_adapted(model, tmp_path / "model", run)
    again = plugin.load_adapted(loaded(directory, quantizer, run, plugin), tmp_path / "model", run)
    assert torch.equal(logits(again), tuned)
    with plugin.adapter_off(model, run):
        assert torch.equal(logits(model), start)

    merged = plugin.merge_adapted(model, run)
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert {p.dtype for p in merged.parameters()} == {dtype}
    # int8 rounds activations as well, in evaluation, which the merged model does not
    loose = 0.1 if type(quantizer) is Int8 or dtype == torch.bfloat16 else 1e-5
    assert (logits(merged) - tuned).abs().max() < loose * tuned.abs().max()
    merged.save_pretrained(tmp_path / "merged")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=dtype)
    assert not hasattr(plain.config, "quantization_config")
    assert torch.equal(logits(plain), logits(merged))


@pytest.mark.parametrize("quantizer", [NF4(), NF4(double_quant=False), FP4(), Int8()], ids=["nf4", "nf4-plain", "fp4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_evaluation_leaves_the_weights_alone(quantizer, dtype, directory):
    run = a_run(dtype)
    model = loaded(directory, quantizer, run)
    before = training_loss(model)
    model.eval().generate(input_ids=TOKENS, max_new_tokens=3, do_sample=False)
    assert training_loss(model) == before


@pytest.mark.skipif(not has_avx512bf16(), reason="only a CPU with AVX512-BF16 repacks 4-bit weights")
@pytest.mark.parametrize("quantizer", [NF4(), FP4()], ids=["nf4", "fp4"])
def test_without_keep_weights_evaluation_changes_them(quantizer, directory, monkeypatch):
    """The test above can fail: this is what bitsandbytes does by itself."""
    monkeypatch.setattr(ftx_bnb, "keep_weights", lambda model: None)
    model = loaded(directory, quantizer, a_run())
    before = training_loss(model)
    model.eval().generate(input_ids=TOKENS, max_new_tokens=3, do_sample=False)
    assert training_loss(model) != before


def test_double_quantisation_is_what_is_asked_for(directory):
    for double in (True, False):
        model = loaded(directory, NF4(double_quant=double), a_run())
        assert model.model.layers[0].mlp.up_proj.weight.quant_state.nested is double
    assert loaded(directory, FP4(), a_run()).model.layers[0].mlp.up_proj.weight.quant_state.quant_type == "fp4"


def test_the_base_computes_in_the_runs_dtype(directory):
    for dtype in (torch.float32, torch.bfloat16):
        assert NF4().quantization_config(a_run(dtype)).bnb_4bit_compute_dtype == dtype


def test_options():
    with pytest.raises(OptionError) as caught:
        build(Int8, {"threshold": -1.0}, stage="quantizer", name="int8")
    assert caught.value.problem == "quantizer 'int8': threshold must be at least 0, got -1."
    with pytest.raises(OptionError, match="quantizer 'nf4' has no option 'double_quants'. Did you mean 'double_quant'?"):
        build(NF4, {"double_quants": True}, stage="quantizer", name="nf4")


@pytest.mark.parametrize("quantizer", [NF4(), FP4(), Int8()], ids=["nf4", "fp4", "int8"])
def test_preflight(quantizer, monkeypatch):
    assert quantizer.preflight(a_run()) == []
    monkeypatch.setattr(ftx_bnb, "native_libraries", lambda kind: [])
    assert quantizer.preflight(a_run()) == ["the installed bitsandbytes has no library for cpu on this platform: drop the quantizer, or use --adapter lora."]
    assert quantizer.check_environment() == [f"failure: bitsandbytes {bnb.__version__} has no compiled library for this platform"]


def test_int8_on_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    assert Int8().preflight(a_run(device="cuda")) == [
        "bitsandbytes needs a GPU of compute capability 7.5 for this, here is 7.0: drop the quantizer, or try nf4."
    ]
    assert NF4().preflight(a_run(device="cuda")) == []


def test_doctor():
    assert NF4().check_environment()[0].startswith(f"ok: bitsandbytes {bnb.__version__} with libraries for cpu")


def test_importing_and_preflight_load_no_ml_library():
    code = (
        "import sys, types, ftx_bnb; ftx_bnb.NF4().preflight(types.SimpleNamespace(device='cpu'));"
        "print([m for m in ('torch', 'transformers', 'bitsandbytes') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "[]\n"


def test_a_copy_is_as_good(directory):
    """DPO and evaluation may copy a model: the copy must not repack either."""
    model = copy.deepcopy(loaded(directory, NF4(), a_run()))
    before = training_loss(model)
    logits(model)
    assert training_loss(model) == before


def test_bitsandbytes_is_silent(directory, caplog):
    with caplog.at_level(logging.DEBUG, logger="root"):
        training_loss(loaded(directory, Int8(), a_run()))
        logits(loaded(directory, Int8(), a_run()))
    assert not [record for record in caplog.records if record.name.startswith("bitsandbytes")]


@pytest.mark.gpu
@pytest.mark.parametrize("quantizer", [NF4(), FP4(), Int8()], ids=["nf4", "fp4", "int8"])
def test_on_a_gpu(quantizer, directory, tmp_path):
    run, plugin = a_run(torch.bfloat16, "cuda"), LoRA()
    model = plugin.adapt_model(loaded(directory, quantizer, run, plugin), run)
    tokens = TOKENS.cuda()
    losses = []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    plugin.merge_adapted(model, run)
