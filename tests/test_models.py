"""A model reference becomes a directory that plain transformers loads, or an error that says what to do."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftx import models
from ftx.device import best_dtype, fastest, pick_device
from ftx.errors import ModelError
from ftx.testing.tiny import tiny_model_dir

RESOLVE = "import sys; from ftx import models; print(models.resolve(sys.argv[1]))"
#: The same, where the header of the GGUF file, which takes seconds to read, is read once at most.
CONVERT = f"""
import gguf
reader, build, read = gguf.GGUFReader, gguf.GGUFReader._build_fields, []
reader._build_fields = lambda self, *given: read.append(self) or build(self, *given)
{RESOLVE}
assert len(read) <= 1 and gguf.GGUFReader is reader, read
"""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> tuple[Path, list[Path]]:
    """The cache directory, and where two processes that convert smollm2 into it at the same time say that it lies."""
    cache = tmp_path_factory.mktemp("cache")
    environment = {**os.environ, "FTX_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CONVERT, "smollm2"]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [error for _, error in said] == ["", ""]
    yield cache, [Path(output.strip()) for output, _ in said]
    shutil.rmtree(cache)


@pytest.fixture
def cache(smollm2, monkeypatch) -> Path:
    monkeypatch.setenv("FTX_CACHE", str(smollm2[0]))
    return smollm2[0]


@pytest.fixture
def model_dir(tmp_path) -> Path:
    return tiny_model_dir(tmp_path / "model")


def refusal(reference: object) -> str:
    with pytest.raises(ModelError) as caught:
        models.resolve(str(reference))
    return str(caught.value)


# ---- smollm2


def test_two_processes_convert_into_one_directory(smollm2):
    cache, found = smollm2
    assert found[0] == found[1]
    assert [path.name for path in (cache / "models").iterdir()] == [found[0].name], "something was left behind"
    names = {file.name for file in found[0].iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not any(name.endswith((".bin", ".pt", ".gguf")) for name in names)


def test_found_again_without_transformers_and_without_network(cache, smollm2):
    code = f"""
import socket, sys
def refuse(*arguments): raise OSError("no network here")
socket.socket.connect = socket.getaddrinfo = refuse
{RESOLVE}
assert "transformers" not in sys.modules and "torch" not in sys.modules
"""
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, "smollm2"], capture_output=True, text=True, check=False)
    assert (done.returncode, Path(done.stdout.strip())) == (0, smollm2[1][0]), done.stderr
    assert time.monotonic() - started < 5


def test_nothing_of_the_gguf_is_left_in_the_config(cache):
    config = json.loads((models.resolve("smollm2") / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"


def test_weights_are_the_dequantised_ones_to_the_bit(cache):
    import gguf

    import ftx_smollm2

    weights = load_file(models.resolve("smollm2") / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(ftx_smollm2.path()).tensors}
    for ours, theirs in [("model.layers.7.mlp.up_proj.weight", "blk.7.ffn_up.weight"), ("model.embed_tokens.weight", "token_embd.weight")]:
        expected = torch.from_numpy(gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type))
        assert weights[ours].dtype == torch.float32
        assert torch.equal(weights[ours], expected)


def test_it_answers(cache):
    path = models.resolve("smollm2")
    tokenizer, model = models.load_tokenizer(path), models.load_model(path, dtype=best_dtype("cpu"), device="cpu")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer, skip_special_tokens=True)
    assert answer[-1] == tokenizer.eos_token_id, "the end of the turn does not end the answer"
    assert not model.training


def test_tokens_are_those_it_was_trained_on(cache):
    tokenizer = models.load_tokenizer(models.resolve("smollm2"))
    assert tokenizer.tokenize("x =  12.5") == ["x", "Ġ=", "ĠĠ", "1", "2", ".", "5"]
    assert tokenizer.model_max_length == 8192
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.chat_template.count("<|im_start|>") >= 2


def test_a_gguf_file_by_its_path_is_the_same_model(cache, tmp_path):
    import ftx_smollm2

    link = tmp_path / ftx_smollm2.path().name
    link.symlink_to(ftx_smollm2.path())
    assert models.resolve(str(link)) == models.resolve("smollm2")


def test_a_directory_does_not_hide_an_installed_name(cache, tmp_path, monkeypatch, model_dir):
    model_dir.rename(tmp_path / "smollm2")
    monkeypatch.chdir(tmp_path)
    assert models.resolve("smollm2").parent == cache / "models"
    assert models.resolve("./smollm2") == tmp_path / "smollm2"


# ---- refused


def test_unknown_name():
    assert refusal("smolm2").splitlines() == [
        "no model is called 'smolm2'. Did you mean 'smollm2'?",
        "Give a hub id (owner/name), a directory, a .gguf file, or an installed name: smollm2.",
    ]


def test_hub_id_offline(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for reference in ("nobody/nothing", "nobody/nothing@v1.0"):
        assert refusal(reference).splitlines() == [
            "model 'nobody/nothing' is neither a directory here nor in the local cache, and HF_HUB_OFFLINE is set.",
            "Connect to the network once, or give a directory, a .gguf file or an installed name.",
        ]


@pytest.mark.parametrize("reference", ["./model", "/no/such/model", "model.gguf", "owner/model.gguf", "a/b/c", "../owner/name"])
def test_a_path_that_is_not_there(reference, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal(reference) == f"'{reference}': no such file or directory.\nCheck the path. A hub id has the form owner/name."


def test_a_file_that_is_no_model(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert refusal(file).startswith(f"'{file}' is a file, not a model.\n")


def test_a_directory_that_is_no_model(tmp_path):
    assert refusal(tmp_path).splitlines() == [
        f"{tmp_path} has no config.json, so it is not a model directory.",
        "Give a directory that transformers' save_pretrained wrote.",
    ]
    (tmp_path / "a.gguf").touch()
    assert refusal(tmp_path).endswith(f"\nGive the file: {tmp_path / 'a.gguf'}")
    (tmp_path / "adapter_config.json").touch()
    assert refusal(tmp_path).startswith(f"{tmp_path} holds an adapter, not a model.\n")
    (tmp_path / "recipe.yaml").touch()
    assert refusal(tmp_path) == f"{tmp_path} is a run, not a model.\nTo start from its model: --from {tmp_path}"


def test_pickles_are_refused(model_dir):
    weights = load_file(model_dir / "model.safetensors")
    (model_dir / "model.safetensors").unlink()
    assert refusal(model_dir) == f"{model_dir} holds no *.safetensors weights.\nWas it downloaded or saved completely?"
    torch.save(weights, model_dir / "pytorch_model.bin")
    assert refusal(model_dir).startswith(f"{model_dir} holds its weights as a pickle (pytorch_model.bin), which can run code when it is read.\n")


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(200), b"no gguf at all" * 100])
def test_a_broken_gguf(content, tmp_path, monkeypatch):
    monkeypatch.setenv("FTX_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    text = refusal(file)
    assert text.startswith(f"{file} could not be read as GGUF: ")
    assert text.endswith("\nIs it complete, and of an architecture that transformers reads from GGUF?")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("FTX_CACHE", str(tmp_path / "cache"))
    text = refusal("smollm2")
    assert "could not be converted into" in text
    assert text.endswith("\nSet FTX_CACHE to a directory with room.")


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        (["json:loads", "json:dumps"], "two models are called 'mine': unknown (json:loads) and unknown (json:dumps).\nUninstall one."),
        (["no_such_module:path"], "model 'mine' (no_such_module:path) could not be found: No module named 'no_such_module'\nSee it all with --traceback."),
        (["os:getlogin_"], "model 'mine' (os:getlogin_) could not be found: module 'os' has no attribute 'getlogin_'\nSee it all with --traceback."),
        (["sys:exit"], "model 'mine' (sys:exit) could not be found: SystemExit\nSee it all with --traceback."),
        (["platform:node"], None),
    ],
)
def test_a_broken_installed_model(points, expected, monkeypatch):
    monkeypatch.setattr(models.metadata, "entry_points", lambda group: [EntryPoint("mine", value, group) for value in points])
    text = refusal("mine")
    assert text == expected or (expected is None and text.startswith("model 'mine' (platform:node) says that it lies in '"))


# ---- tokenizer


def test_a_directory_without_tokenizer(model_dir):
    (model_dir / "tokenizer.json").unlink()
    with pytest.raises(ModelError) as caught:
        models.load_tokenizer(model_dir)
    assert str(caught.value) == f"{model_dir} has no tokenizer.\nSave it beside the model: tokenizer.save_pretrained(DIRECTORY)"


def test_a_broken_tokenizer(model_dir):
    (model_dir / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="could not be loaded"):
        models.load_tokenizer(model_dir)


def test_a_tokenizer_without_template_loads(model_dir):
    (model_dir / "chat_template.jinja").unlink()
    assert not models.load_tokenizer(model_dir).chat_template


def test_a_missing_pad_token_is_replaced(model_dir):
    config = json.loads((model_dir / "tokenizer_config.json").read_text())
    for changes, expected in [({}, "<|pad|>"), ({"pad_token": None}, "<|pad|>"), ({"pad_token": None, "eos_token": None}, "<|pad|>")]:
        (model_dir / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v is not None}))
        assert models.load_tokenizer(model_dir).pad_token == expected
    (model_dir / "tokenizer.json").write_text((model_dir / "tokenizer.json").read_text().replace("<|pad|>", "<|nothing|>"))
    (model_dir / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "pad_token"}))
    assert models.load_tokenizer(model_dir).pad_token == "<|im_end|>"


# ---- model


def load(path: Path):
    return models.load_model(path, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("tied", [False, True])
def test_loads_what_was_saved(tied, tmp_path):
    path = tiny_model_dir(tmp_path / "model", tie_word_embeddings=tied)
    saved, model = load_file(path / "model.safetensors"), load(path)
    assert ("lm_head.weight" in saved) is not tied
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in saved.items())
    assert model.config._attn_implementation == "sdpa"
    assert models.load_model(path, dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16


def test_a_missing_weight_is_refused(model_dir, capfd):
    weights = load_file(model_dir / "model.safetensors")
    del weights["model.layers.0.mlp.down_proj.weight"]
    save_file(weights, model_dir / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        load(model_dir)
    assert str(caught.value).splitlines() == [
        f"the model in {model_dir} lacks model.layers.0.mlp.down_proj.weight.",
        "It would start with random numbers there: get the files again.",
    ]
    assert capfd.readouterr() == ("", "")


def test_a_missing_head_that_is_not_tied_is_refused(model_dir):
    weights = load_file(model_dir / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, model_dir / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lacks lm_head.weight"):
        load(model_dir)


def test_an_unknown_weight_is_reported(model_dir, caplog):
    weights = load_file(model_dir / "model.safetensors")
    save_file({**weights, "vision.weight": torch.ones(2)}, model_dir / "model.safetensors", {"format": "pt"})
    load(model_dir)
    assert [record.getMessage() for record in caplog.records if record.name == "ftx"] == [
        f"{model_dir} holds weights that LlamaForCausalLM does not use: vision.weight"
    ]


def test_a_weight_of_another_shape_is_refused(model_dir):
    weights = load_file(model_dir / "model.safetensors")
    weights["lm_head.weight"] = torch.ones(3, 32)
    save_file(weights, model_dir / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="could not be loaded"):
        load(model_dir)


def test_a_truncated_file_is_refused(model_dir):
    with open(model_dir / "model.safetensors", "r+b") as stream:
        stream.truncate(4000)
    with pytest.raises(ModelError, match="could not be loaded"):
        load(model_dir)


def test_code_from_the_directory_is_not_run(model_dir, tmp_path):
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(
        json.dumps({**config, "model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}})
    )
    (model_dir / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError) as caught:
        load(model_dir)
    assert caught.value.problem == f"the model in {model_dir} needs its author's own code, which ftx does not run unasked."
    assert caught.value.remedy.startswith("Use a model that transformers knows.") and "--trust-remote-code MODEL" in caught.value.remedy
    assert not (tmp_path / "ran").exists()


# ---- fingerprint, device, dtype


def test_fingerprint(model_dir, tmp_path):
    original = models.fingerprint(model_dir)
    copy = Path(shutil.copytree(model_dir, tmp_path / "elsewhere"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_version": "9.9"}))
    assert models.fingerprint(copy) == original
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert models.fingerprint(copy) != original
    other = tiny_model_dir(tmp_path / "other", seed=1)
    assert models.fingerprint(other) != original
    (other / "model.safetensors").write_bytes((model_dir / "model.safetensors").read_bytes())
    assert models.fingerprint(other) == original
    (other / "chat_template.jinja").write_text("another")
    assert models.fingerprint(other) != original


def test_fingerprint_of_a_big_file_samples_both_ends(tmp_path):
    def of(first: bytes, last: bytes) -> str:
        with open(tmp_path / "model.safetensors", "wb") as stream:
            stream.write(first)
            stream.truncate(20_000_000)
            stream.seek(20_000_000 - len(last))
            stream.write(last)
        return models.fingerprint(tmp_path)

    assert len({of(b"a", b"a"), of(b"b", b"a"), of(b"a", b"b")}) == 3


def test_device_and_dtype(monkeypatch):
    assert pick_device("cpu") == "cpu"
    slower, faster, disturbed = ({torch.float32: 1.0, torch.bfloat16: seconds} for seconds in (2.0, 0.5, 1.2))
    for name, measured, expected in [
        ("avx512_bf16", faster, torch.bfloat16),
        ("amx_bf16", faster, torch.bfloat16),
        ("avx512_bf16", disturbed, torch.bfloat16),  # by another program
        ("avx512_bf16", slower, torch.float32),  # a capability that is claimed and emulated
        ("avx512_f", faster, torch.float32),
    ]:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True})
        monkeypatch.setattr("ftx.device._seconds", lambda measured=measured: measured)
        assert best_dtype("cpu") == expected
    for capability, expected in [((9, 0), torch.bfloat16), ((8, 0), torch.bfloat16), ((7, 5), torch.float16)]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert best_dtype("cuda") == expected


def test_both_dtypes_are_timed():
    from ftx.device import _seconds

    measured = _seconds()
    assert measured.keys() == {torch.bfloat16, torch.float32} and all(0 < seconds < 10 for seconds in measured.values())


def test_the_fastest_call_counts_and_the_first_does_not():
    takes = iter([0.0, 0.08, 0.04, 0.06])
    assert 0.04 <= fastest(lambda: time.sleep(next(takes)), "cpu", times=3) < 0.06
    assert next(takes, None) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_gpu():
    assert pick_device("auto") == "cpu"
    with pytest.raises(ModelError) as caught:
        pick_device("cuda")
    assert str(caught.value) == "no CUDA device can be used here.\nUse --device cpu, or a torch built for your GPU: ftx doctor"


@pytest.mark.gpu
def test_on_a_gpu(model_dir):
    assert pick_device("auto") == "cuda"
    model = models.load_model(model_dir, dtype=best_dtype("cuda"), device="cuda")
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
