"""Full fine-tuning on a tiny model."""

import copy
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from ftx import Run
from ftx.catalogue import Catalogue
from ftx.errors import RunError
from ftx.ledger import Ledger
from ftx.pipeline import load_base
from ftx.recipe import merge, resolve
from ftx.testing.tiny import tiny_model
from ftx_full import Full

TOKENS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(1))


def a_run(dtype=torch.float32, quantizer=None, **trainer_options):
    said = []
    recipe = SimpleNamespace(trainer=SimpleNamespace(name="sft", options=trainer_options), quantizer=quantizer)
    run = Run(recipe=recipe, ledger=Ledger(), dtype=dtype, model="acme/tiny", say=said.append)
    run.notes["said"] = said
    return run


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def train(model, steps=2, rate=1e-3):
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(steps):
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_run_in_bfloat16_trains_from_the_files_own_numbers(tmp_path):
    """From rounded ones the first steps change nothing that is computed with: each is less than half of bfloat16's spacing."""
    whole = tiny_model()
    whole.save_pretrained(tmp_path)
    recipe, hooks = resolve(merge({}, {"adapter": "full"}), Catalogue())
    run = replace(a_run(torch.bfloat16), recipe=recipe, model_path=tmp_path, device="cpu")
    model = hooks.call("adapt_model", model=load_base(hooks, Catalogue(), run), run=run)
    assert all(torch.equal(a, b) and a.requires_grad for a, b in zip(model.parameters(), whole.parameters(), strict=True))
    assert not all(torch.equal(p, p.bfloat16().float()) for p in whole.parameters()), "nothing would be rounded"


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_life_of_a_model(tied, tmp_path):
    run, base = a_run(), tiny_model(tie_word_embeddings=tied)
    base_again, start = copy.deepcopy(base), logits(base)
    model = Full().adapt_model(base, run)
    assert torch.equal(logits(model), start)
    assert all(p.requires_grad for p in model.parameters())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert unmoved == []
    tuned = logits(model)
    Full().save_adapted(model, tmp_path / "model", run)
    again = Full().load_adapted(base_again, tmp_path / "model", run)
    assert torch.equal(logits(again), tuned) and not again.training
    assert all(p.is_meta for p in base_again.parameters()), "the base's weights would stand beside the model's"
    assert Full().adapter_off(model, run) is None
    merged = Full().merge_adapted(model, run)
    assert type(merged) is LlamaForCausalLM and torch.equal(logits(merged), tuned)


def test_master_weights_are_float32(tmp_path):
    """At 5e-6 nearly every weight moves in float32; in bfloat16 nearly none would."""
    tiny_model().save_pretrained(tmp_path / "base")
    load = lambda: LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)  # noqa: E731
    run = a_run(torch.bfloat16)
    model, naive = Full().adapt_model(load(), run), load()
    shares = []
    for one in (model, naive):
        start = {name: p.detach().clone() for name, p in one.named_parameters()}
        train(one, steps=3, rate=5e-6)
        moved = sum((p.float() != start[name].float()).sum().item() for name, p in one.named_parameters())
        shares.append(moved / sum(p.numel() for p in one.parameters()))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # the rows of tokens that do not occur have no gradient in the embedding
    assert shares[0] > 0.75 and shares[1] < 0.25
    tuned = logits(model)
    Full().save_adapted(model, tmp_path / "model", run)
    assert torch.equal(logits(Full().load_adapted(load(), tmp_path / "model", run)), tuned)
    merged = Full().merge_adapted(model, run)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16} and merged.config.dtype == torch.bfloat16
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)), logits(merged))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state.pop("model.norm.weight"), "1 missing weights, such as model.norm.weight."),
        (lambda state: state.update({"stray.weight": torch.ones(1)}), "1 unexpected weights, such as stray.weight."),
        (lambda state: state.update({"model.norm.weight": torch.ones(3)}), "1 misshapen weights, such as model.norm.weight."),
    ],
    ids=["missing", "unexpected", "misshapen"],
)
def test_a_damaged_model_is_refused(change, text, tmp_path):
    Full().save_adapted(tiny_model(), tmp_path, a_run())
    state = load_file(tmp_path / "model.safetensors")
    change(state)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunError) as caught:
        Full().load_adapted(tiny_model(), tmp_path, a_run())
    assert caught.value.problem == f"{tmp_path}: {text}"


def test_no_model_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"holds no model \(no config.json\)"):
        Full().load_adapted(tiny_model(), tmp_path, a_run())


def test_quantised_weights_are_refused():
    run = a_run(quantizer=SimpleNamespace(name="nf4"))
    assert Full().preflight(run) == ["quantizer 'nf4' gives weights that cannot be trained in full: drop --quantizer, or use --adapter lora."]
    assert Full().preflight(a_run()) == []
    model = tiny_model()
    model.is_quantized = True
    with pytest.raises(RunError, match="the weights of acme/tiny are quantised and cannot be trained in full"):
        Full().adapt_model(model, run)


def test_learning_rate_note():
    for rate, said in ((2e-4, ["note: learning rate 0.0002 is outside 1e-6 to 5e-6, the usual range for full fine-tuning"]), (5e-6, []), (1e-6, [])):
        run = a_run(learning_rate=rate)
        Full().adapt_model(tiny_model(), run)
        assert run.notes["said"] == said


def test_importing_loads_no_ml_library():
    code = "import sys, ftx_full; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stdout == "[]\n"
