"""gguf: the numbers and the tokens in the file, what is refused, and what reads it back."""

from __future__ import annotations

import json
import re
import sys

import numpy
import pytest
import torch
from gguf import GGUFReader, dequantize
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ftx import parity
from ftx.errors import RunError
from ftx.recipe import Choice
from ftx.testing import finished_run, ftx, tiny_model, tiny_tokenizer
from ftx_gguf import LLAMA3, pre_tokenizer, write_gguf
from ftx_gguf_reader import read_gguf, read_with_transformers

ROWS = [{"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]} for i in range(8)]
PROMPTS = [row["messages"][:1] for row in ROWS[:4]]
SHAPE = {"vocab_size": len(tiny_tokenizer(merges=True)), "hidden_size": 64, "intermediate_size": 128}


def tensors(file):
    """Name -> numbers in float32, as the gguf library reads them."""
    return {one.name: torch.from_numpy(dequantize(one.data, one.tensor_type).astype(numpy.float32)) for one in GGUFReader(file).tensors}


def metadata(file):
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


# ---- weights -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "error"), [("f32", 0), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 0.5 / 127 + 2**-11)])
def test_numbers_are_rounded_once(kind, error, tmp_path):
    """To the nearest of their kind: float16 has 11 bits, bfloat16 8, q8_0 127 steps up to the largest of 32 in a row, whose size is a float16."""
    model = tiny_model(**SHAPE)
    found = tensors(write_gguf(model, tiny_tokenizer(merges=True), tmp_path / "model.gguf", kind))
    for name, key in (("blk.1.ffn_down.weight", "model.layers.1.mlp.down_proj.weight"), ("output.weight", "lm_head.weight")):
        exact = model.state_dict()[key]
        scale = exact.reshape(len(exact), -1, 32).abs().amax(-1, keepdim=True).expand(-1, -1, 32).reshape(exact.shape) if kind == "q8_0" else exact.abs()
        assert bool(((found[name] - exact).abs() <= error * scale + 1e-7).all()), name
    assert torch.equal(found["blk.0.attn_norm.weight"], model.state_dict()["model.layers.0.input_layernorm.weight"])
    assert len(found) == len(model.state_dict())


def test_queries_and_keys_lie_in_pairs(tmp_path):
    """llama.cpp turns rows 2i and 2i + 1 of a head together, transformers i and i + half."""
    model = tiny_model(**SHAPE)
    found = tensors(write_gguf(model, tiny_tokenizer(merges=True), tmp_path / "model.gguf", "f32"))
    for name, key, heads in (("blk.0.attn_q.weight", "q_proj", 4), ("blk.0.attn_k.weight", "k_proj", 2)):
        exact = model.state_dict()[f"model.layers.0.self_attn.{key}.weight"]
        size = len(exact) // heads
        for head in range(heads):
            for i in range(size // 2):
                assert torch.equal(found[name][head * size + 2 * i], exact[head * size + i])
                assert torch.equal(found[name][head * size + 2 * i + 1], exact[head * size + size // 2 + i])


def test_tied_embeddings_stand_there_once(tmp_path):
    model = tiny_model(**SHAPE, tie_word_embeddings=True)
    assert "output.weight" not in tensors(write_gguf(model, tiny_tokenizer(merges=True), tmp_path / "model.gguf", "f32"))


def test_a_number_too_large_for_float16(tmp_path):
    model = tiny_model(**SHAPE)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    with pytest.raises(RunError, match="blk.0.ffn_up.weight is too large for float16"):
        write_gguf(model, tiny_tokenizer(merges=True), tmp_path / "model.gguf", "f16")
    write_gguf(model, tiny_tokenizer(merges=True), tmp_path / "again.gguf", "bf16")


PLAIN = {**SHAPE, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2, "eos_token_id": 2, "bos_token_id": 1}
LONG = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SHAPES = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**PLAIN, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**PLAIN)),
    "wide heads": lambda: LlamaForCausalLM(LlamaConfig(**PLAIN, head_dim=32)),
    "linear": lambda: LlamaForCausalLM(LlamaConfig(**PLAIN, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0})),
    "llama3": lambda: LlamaForCausalLM(LlamaConfig(**PLAIN, rope_parameters=LONG)),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_models_of_llamas_shape(shape, tmp_path):
    """What reads the file back says what the model says. transformers reads no scaled rotary embedding out of a GGUF, so
    those are left to llama.cpp."""
    from importlib.util import find_spec

    if shape in ("linear", "llama3") and not find_spec("llama_cpp"):
        pytest.skip("scaled rotary embeddings are read back by llama.cpp only: pip install llama-cpp-python")
    torch.manual_seed(0)
    model, tokenizer = SHAPES[shape]().eval(), tiny_tokenizer(merges=True)
    torch.nn.init.normal_(model.model.layers[0].self_attn.q_proj.bias) if shape == "qwen2" else None
    probe = parity.ask(model, tokenizer, PROMPTS)
    reader = read_gguf(write_gguf(model, tokenizer, tmp_path / "model.gguf", "f32"))
    found = parity.agreement(reader, probe)
    assert found.share > 0.97 and found.largest_difference < 0.1 * found.largest_logit and not reader.problems, str(found)


def test_the_rotary_factors_of_llama3(tmp_path):
    """By the formula of Llama 3.1: slow turns are divided by `factor`, fast ones stay, those between are blended."""
    model = SHAPES["llama3"]()
    factors = tensors(write_gguf(model, tiny_tokenizer(merges=True), tmp_path / "model.gguf", "f16"))["rope_freqs.weight"]
    waves = 2 * torch.pi * 10000.0 ** (torch.arange(0, 16, 2) / 16)
    assert torch.allclose(factors[waves < 64 / 4], torch.tensor(1.0)) and torch.allclose(factors[waves > 64], torch.tensor(8.0))
    between = factors[(waves > 64 / 4) & (waves < 64)]
    assert len(between) and bool(((between > 1) & (between < 8)).all())


def test_what_cannot_be_written(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(RunError, match="a model of type 'gpt2' cannot be written as GGUF here"):
        write_gguf(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=300)), tiny_tokenizer(merges=True), tmp_path / "model.gguf", "f16")
    with pytest.raises(RunError, match="llama.cpp computes SiLU"):
        write_gguf(tiny_model(**SHAPE, hidden_act="gelu"), tiny_tokenizer(merges=True), tmp_path / "model.gguf", "f16")
    with pytest.raises(RunError, match="the tokenizer has 271 tokens and the model 259"):
        write_gguf(tiny_model(), tiny_tokenizer(merges=True), tmp_path / "model.gguf", "f16")


# ---- tokenizer -----------------------------------------------------------------------------------------------------


def described(*steps, **model):
    return {"model": {"type": "BPE", **model}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(steps)}}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(rule):
    return {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ([DIGITS, BYTES], "smollm"),
        ([BYTES], "gpt-2"),
        ([split(LLAMA3), {**BYTES, "use_regex": False}], "llama-bpe"),
        ([split(LLAMA3.replace("{1,3}", "")), {**BYTES, "use_regex": False}], "qwen2"),
    ],
)
def test_rules_have_llama_cpps_name(steps, name):
    assert pre_tokenizer(described(*steps)) == name
    if len(steps) == 1:
        assert pre_tokenizer({"model": {"type": "BPE"}, "pre_tokenizer": steps[0]}) == name


def test_rules_are_those_of_transformers_own_table():
    """The expressions that transformers splits by when a GGUF names these rules."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS as known

    assert known["llama-bpe"] == LLAMA3 and known["qwen2"] == LLAMA3.replace("{1,3}", "")


@pytest.mark.parametrize("steps", [[{**DIGITS, "individual_digits": False}, BYTES], [{**BYTES, "add_prefix_space": True}], [split("x"), BYTES], []])
def test_unknown_rules_are_refused(steps):
    with pytest.raises(RunError, match="has no name in llama.cpp that ftx knows"):
        pre_tokenizer(described(*steps))


@pytest.mark.parametrize("model", [{"type": "Unigram"}, {"byte_fallback": True}])
def test_sentencepiece_is_refused(model):
    with pytest.raises(RunError, match="is no byte-level BPE"):
        pre_tokenizer(described(BYTES, **model))


def test_what_the_file_says_of_tokens(tmp_path):
    tokenizer = tiny_tokenizer(merges=True)
    about = metadata(write_gguf(tiny_model(**{**SHAPE, "vocab_size": 280}), tokenizer, tmp_path / "model.gguf", "f16"))
    assert about["general.architecture"] == "llama" and about["tokenizer.ggml.model"] == "gpt2" and about["tokenizer.ggml.pre"] == "smollm"
    assert about["tokenizer.chat_template"] == tokenizer.chat_template
    assert about["tokenizer.ggml.tokens"][:3] == ["<|pad|>", "<|im_start|>", "<|im_end|>"] and about["tokenizer.ggml.tokens"][-1] == "[PAD279]"
    assert about["tokenizer.ggml.token_type"] == [3, 3, 3] + [1] * 268 + [5] * 9
    assert about["tokenizer.ggml.merges"][:3] == ["t h", "th e", "i n"]
    assert [about[f"tokenizer.ggml.{kind}_token_id"] for kind in ("bos", "eos", "padding")] == [1, 2, 0]
    assert about["tokenizer.ggml.add_bos_token"] is False and about["tokenizer.ggml.add_eos_token"] is False


def test_a_second_end_token_is_named(tmp_path):
    """Where a turn ends with another token than a text, llama.cpp must stop at both."""
    tokenizer = tiny_tokenizer(merges=True)
    tokenizer.eos_token = "<|pad|>"
    about = metadata(write_gguf(tiny_model(**SHAPE, eos_token_id=0), tokenizer, tmp_path / "model.gguf", "f16"))
    assert about["tokenizer.ggml.eos_token_id"] == 0 and about["tokenizer.ggml.eot_token_id"] == 2


def test_wrong_rules_are_found_out(tmp_path):
    """With another name for the rules "12" becomes one token: the check sees it, and the export is not put in its place."""
    run = finished_run(tmp_path / "run", ROWS, adapter="lora")
    result = ftx("export", run.directory, "--to", "gguf", "-o", "exporter.pre=gpt-2", "--prompts", "2", "--output", tmp_path / "out")
    assert result.exit_code == 1 and "the tokenizer reads '" in result.output and "as other tokens than the run's" in result.output
    assert not (tmp_path / "out").exists()
    report = json.loads((tmp_path / "out.disagrees" / "export.json").read_text())
    assert report["agrees"] is False and report["parity"]["token_agreement"] == 1


# ---- a run ---------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_smollm2_as_f16(tmp_path):
    """The default model, moved at random: one file, read back by llama.cpp where it is installed, else by transformers."""
    run = finished_run(tmp_path / "smollm2 run", ROWS, adapter=Choice("lora", {"r": 4}), amount=0.02, model="smollm2")
    result = ftx("export", run.directory, "--to", "gguf", "--prompts", "2")
    assert result.exit_code == 0, result.output
    out = run.directory / "export" / "gguf"
    report = json.loads((out / "export.json").read_text())
    assert report["parity"]["token_agreement"] >= 0.98 and report["base_token_agreement"] < 1
    about = metadata(out / "smollm2-run-f16.gguf")
    assert about["tokenizer.ggml.pre"] == "smollm" and about["llama.attention.head_count_kv"] == 3 and about["llama.rope.freq_base"] == 100000.0


def test_transformers_reads_it_where_llama_cpp_does_not(tmp_path):
    """The second reader is kept alive by a test, whatever is installed."""
    model, tokenizer = tiny_model(**SHAPE).eval(), tiny_tokenizer(merges=True)
    probe = parity.ask(model, tokenizer, PROMPTS)
    reader = read_with_transformers(write_gguf(model, tokenizer, tmp_path / "model.gguf", "f16"))
    assert parity.agreement(reader, probe).share > 0.97 and parity.check_text(reader, probe, tokenizer)[2] == []


def test_an_installed_llama_cpp_that_does_not_load(tmp_path, monkeypatch):
    (tmp_path / "llama_cpp.py").write_text("raise OSError('libllama.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llama_cpp", raising=False)
    reader = read_gguf(write_gguf(tiny_model(**SHAPE), tiny_tokenizer(merges=True), tmp_path / "model.gguf", "f16"))
    assert re.fullmatch(r"transformers \S+ \(the installed llama-cpp-python cannot be loaded: libllama.so: cannot open\)", reader.name)


@pytest.mark.full
def test_llama_cpp_reads_it(tmp_path):
    """llama.cpp itself: its tokens, its template, its logits, its end of an answer."""
    pytest.importorskip("llama_cpp", reason="needs llama.cpp: pip install llama-cpp-python")
    from ftx_gguf_reader import LlamaReader

    model, tokenizer = tiny_model(**SHAPE).eval(), tiny_tokenizer(merges=True)
    probe = parity.ask(model, tokenizer, PROMPTS)
    reader = LlamaReader(write_gguf(model, tokenizer, tmp_path / "model.gguf", "f32"))
    assert parity.check_text(reader, probe, tokenizer)[2] == []
    assert parity.agreement(reader, probe).share > 0.97
    equal, wrong = parity.check_ends(reader, probe, tokenizer)
    assert equal and not wrong
