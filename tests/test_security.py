"""What docs/security.md promises: code runs only where it was named, nothing escapes its directory or the terminal's line."""

from __future__ import annotations

import ast
import gzip
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml
from shelf import GOOD, install
from support import REPO, write_rows

from ftx import yamls
from ftx.card import base_licence
from ftx.errors import ModelError, printable
from ftx.ledger import Ledger
from ftx.recipe import Recipe
from ftx.run import Run, RunDir

# ---- code ----------------------------------------------------------------------------------------------------------

CONFIGURATION = """
from transformers import LlamaConfig

class OddConfig(LlamaConfig):
    model_type = "odd_llama"
"""
MODELING = """
import pathlib
from transformers import LlamaForCausalLM
from .configuration_odd import OddConfig

pathlib.Path({witness!r}).write_text("the model's code ran")

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


@pytest.fixture
def odd(tiny, tmp_path, monkeypatch):
    """A model that only its own code can load, and the file that this code writes."""
    model, witness = tmp_path / "odd", tmp_path / "witness"
    shutil.copytree(tiny, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "odd_llama", "architectures": ["OddForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    (model / "config.json").write_text(json.dumps(config))
    (model / "configuration_odd.py").write_text(CONFIGURATION)
    (model / "modeling_odd.py").write_text(MODELING.format(witness=str(witness)))
    return model, witness


def test_a_models_code_runs_only_if_granted_to_that_model_by_name(cli, toy_run, tiny, odd, tmp_path):
    model, witness = odd
    few = ("-o", "trainer.max_steps=1", "--device", "cpu")
    refused = cli(*toy_run("--model", model, *few))
    assert refused.exit_code in (1, 2) and "needs its author's own code, which ftx does not run unasked" in refused.stderr, refused.output
    assert "--trust-remote-code MODEL" in refused.stderr and not witness.exists()
    other = cli(*toy_run("--model", model, *few, "--trust-remote-code", tiny, output=tmp_path / "other"))
    assert other.exit_code == 2 and f"trust_remote_code is granted to '{tiny}', but the model is '{model}'" in other.stderr and not witness.exists()
    granted = cli(*toy_run("--model", model, *few, "--trust-remote-code", model, output=tmp_path / "granted"))
    assert granted.exit_code == 0 and witness.exists(), granted.output
    recipe = tmp_path / "granted" / "recipe.yaml"
    assert yaml.safe_load(recipe.read_text())["trust_remote_code"] == str(model), "the grant is written down"
    moved = cli("run", recipe, "--model", tiny, "--output", tmp_path / "moved")
    assert moved.exit_code == 2 and "granted to" in moved.stderr, "another model over a recipe does not inherit it"
    print_before = json.loads((tmp_path / "granted" / "manifest.json").read_text())["model"]["fingerprint"]
    (model / "modeling_odd.py").write_text((model / "modeling_odd.py").read_text() + "\n# changed\n")
    from ftx.models import fingerprint

    assert fingerprint(model) != print_before, "a change of the code is a change of the model"


def test_pickles_are_refused_wherever_a_model_is_read(cli, toy_run, tiny, tmp_path):
    for name in ("pytorch_model.bin", "model.pt", "weights.ckpt", "adapter_model.bin", "weights.pkl"):
        folder = tmp_path / name
        shutil.copytree(tiny, folder)
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(b"")
        assert f"({name}), which can run code when it is read" in cli(*toy_run("--model", folder)).stderr
    assert cli(*toy_run("-o", "trainer.max_steps=1")).exit_code == 0
    (tmp_path / "run" / "model" / "adapter_model.bin").write_bytes(b"")
    for command in (["eval", tmp_path / "run", "--evaluator", "toys:Equal"], toy_run("--from", tmp_path / "run", output=tmp_path / "next")):
        result = cli(*command)
        assert result.exit_code == 2 and "holds a pickle (adapter_model.bin)" in result.stderr, result.output


def test_an_index_does_not_lead_out_of_the_model(tiny, tmp_path):
    from ftx.models import resolve

    folder = tmp_path / "model"
    shutil.copytree(tiny, folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    assert resolve(str(folder)) == folder
    for names, says in ((["../../secret.safetensors"], "outside of the model"), (["model-2.safetensors"], "lacks model-2"), (None, "cannot be read")):
        index.write_text(json.dumps({"weight_map": dict.fromkeys("a", names[0])} if names else []))
        with pytest.raises(ModelError, match=says):
            resolve(str(folder))


def test_a_pinned_revision_is_fetched_and_recorded(cli, toy_run, tiny, tmp_path, monkeypatch):
    """From a cache laid out as the hub's client lays it out; no network."""
    from huggingface_hub import constants

    from ftx.models import resolve, revision

    first, second = "1" * 40, "2" * 40
    cache = tmp_path / "hub" / "models--org--name"
    for commit in (first, second):
        shutil.copytree(tiny, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(second)
    (cache / "refs" / "v1").write_text(first)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for reference, commit in (("org/name", second), ("org/name@v1", first), (f"org/name@{first}", first)):
        assert revision(resolve(reference)) == commit, reference
    assert revision(tiny) is None
    with pytest.raises(ModelError):
        resolve("org/name@" + "3" * 40)
    assert cli(*toy_run("-o", "trainer.max_steps=1", "--model", "org/name@v1")).exit_code == 0
    model = json.loads((tmp_path / "run" / "manifest.json").read_text())["model"]
    assert (model["reference"], model["revision"]) == ("org/name@v1", first)


#: Shipped calls that evaluate text, run pickles, or hand a string to a shell.
FORBIDDEN_NAMES = {"eval", "exec", "compile"}
FORBIDDEN = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
FORBIDDEN_CALLS = {
    "torch.load",
    "os.system",
    "os.popen",
    "yaml.safe_load",  # unfolds aliases of aliases: ftx.yamls is for what somebody else wrote
    "yaml.safe_load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "yaml.load_all",
    "numpy.load",
    "pandas.read_pickle",
    "pandas.eval",
}


#: Where yaml.safe_load reads the project's own text, or what the person at the terminal typed.
OWN_YAML = {"core/ftx/options.py", "core/ftx/recommended.py", "core/ftx/testing/common.py"}


def shipped() -> list[Path]:
    found = [*REPO.glob("core/ftx/**/*.py"), *REPO.glob("plugins/*/ftx_*.py"), *REPO.glob("contrib/*/ftx_*.py")]
    return [file for file in found if not file.name.startswith("test_")]


def dotted(node: ast.AST) -> str:
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def faults(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"imports {name}" for name in names if name.partition(".")[0] in FORBIDDEN]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in FORBIDDEN_NAMES or name in FORBIDDEN_CALLS:
            found.append(f"calls {name}")
        if name == "__import__" and not isinstance(node.args[0], ast.Constant):
            found.append("calls __import__ with a variable")
        if name == "yaml.load" and not any("Safe" in dotted(arg) or "Base" in dotted(arg) or dotted(arg) == "_Loader" for arg in node.args[1:]):
            found.append("calls yaml.load without a safe loader")
        for keyword in node.keywords:
            constant = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            if (keyword.arg == "shell" and constant is not False) or (keyword.arg in ("trust_remote_code", "allow_pickle") and constant is True):
                found.append(f"calls {name} with {keyword.arg}")
    return found


def test_the_search_for_evaluated_text_finds_it():
    bad = [
        "eval(x)",
        "exec(x)",
        "import pickle",
        "from dill import load",
        "torch.load(f)",
        "run(c, shell=True)",
        "m(trust_remote_code=True)",
        "yaml.load(x)",
        "yaml.safe_load(x)",
        "__import__(x)",
    ]
    assert [text for text in bad if not faults(text)] == []
    assert faults("model.eval(); re.compile(x); yamls.load(x); __import__('torch'); m(trust_remote_code=False)") == []


def test_nothing_shipped_evaluates_text_or_reads_pickles():
    files = shipped()
    assert len(files) > 60
    found = {file.relative_to(REPO).as_posix(): bad for file in files if (bad := faults(file.read_text("utf-8")))}
    assert found == {name: ["calls yaml.safe_load"] for name in OWN_YAML}


# ---- paths ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../x", "a/b", "/etc/x", "..", "x\ny", "a b", "A"])
def test_a_new_plugin_stays_where_it_is_made(cli, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    result = cli("plugins", "new", "adapter", name)
    assert result.exit_code == 2 and "cannot be a plugin's name" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["../../evil:Class", "a/b:Class", "/etc/passwd", "..", "../x", "x\x1b[31m", "", "a:b:c"])
def test_a_plugins_name_is_no_path(cli, name, tmp_path):
    for stage in ("evaluator", "adapter", "observer"):
        result = cli("run", "--data", "x.jsonl", f"--{stage}", name)
        assert result.exit_code == 2 and f"cannot be a {stage}'s name" in result.stderr and "\x1b" not in result.stderr, result.output
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({"data": "x.jsonl", "evaluators": [{"name": name}]}))
    assert "cannot be a evaluator's name" in cli("run", recipe).stderr


def test_an_installed_name_that_is_a_path_writes_nothing_outside(cli, tmp_path, monkeypatch):
    install(tmp_path / "site", "evil", {"evaluator:../../../evil": "doc_evil:Good"}, doc_evil=GOOD.format(name="Good"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert "cannot be a evaluator's name" in cli("run", "--data", "x.jsonl", "--evaluator", "../../../evil").stderr
    for name in ("../x", "a/b", "..", "/x"):
        with pytest.raises(ValueError):
            RunDir(tmp_path).items(name, "base")


def test_archives_are_no_data(cli, toy_run, tmp_path):
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("../../escaped.jsonl", "{}")
    with zipfile.ZipFile(tmp_path / "hidden.jsonl", "w") as archive:
        archive.writestr("../../escaped.jsonl", "{}")
    (tmp_path / "data.tar.gz").write_bytes(gzip.compress(b"x" * 600))
    before = sorted(tmp_path.rglob("*"))
    for name in ("data.zip", "data.tar.gz", "hidden.jsonl"):
        result = cli(*toy_run("--data", tmp_path / name))
        assert result.exit_code == 2 and name in result.stderr, result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_a_gzip_bomb_is_refused(cli, toy_run, tmp_path, monkeypatch):
    from ftx import files
    from ftx.data import read_dataset

    monkeypatch.setattr(files, "UNPACKED", 1 << 20)
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b'{"q": "' + b"a" * (4 << 20) + b'", "a": "b"}\n'))
    result = cli(*toy_run("--data", tmp_path / "bomb.jsonl.gz"))
    assert result.exit_code == 2 and "unpacks to more than" in result.stderr, result.output
    rows = [{"q": f"question {i} {'words ' * 50}", "a": "answer"} for i in range(5000)]
    fine = write_rows(tmp_path / "fine.jsonl", rows)
    (tmp_path / "fine.jsonl.gz").write_bytes(gzip.compress(fine.read_bytes()))
    assert (tmp_path / "fine.jsonl.gz").stat().st_size * files.RATIO > fine.stat().st_size > 1 << 20
    assert len(read_dataset(str(tmp_path / "fine.jsonl.gz"), Ledger())) == 5000


# ---- YAML ----------------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "more than 20,000 values, once its aliases are unfolded"),
        ("data: &a [*a]\n", "a value refers to itself"),
        ("data: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("data: x\n" + "#" * (1 << 20), "longer than 1,048,576 characters"),
        ("data: !!python/object/apply:os.system ['touch escaped']\n", "could not determine a constructor"),
        ("? [a, b]\n: c\n", "a key must be a plain word"),
        ("data: a\ndata: b\n", "the key 'data' stands there twice"),
        ("seed: " + "9" * 5000, "digits"),
        ("data: 2026-99-99\n", "month"),
    ],
    ids=lambda value: value[:20] if len(value) < 60 else "long",
)
def test_yaml_that_is_made_to_hurt(cli, tmp_path, monkeypatch, text, says):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    result = cli("run", recipe)
    assert result.exit_code == 2 and "not valid YAML" in result.stderr and says in result.stderr, result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("text", ["license: " + "[" * 5000, LAUGHS + "license: mit", "license: &a [*a]"], ids=["deep", "laughs", "itself"])
def test_a_models_card_that_is_made_to_hurt_states_no_licence(tmp_path, text):
    run = Run(recipe=Recipe(), ledger=Ledger(), model="org/name", model_path=tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
    assert base_licence(run) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert base_licence(run) == "mit"


def test_honest_anchors_work():
    assert yamls.load("a: &x {r: 8}\nb: *x\nc: {<<: *x, s: 1}\n") == {"a": {"r": 8}, "b": {"r": 8}, "c": {"r": 8, "s": 1}}
    assert yamls.load("") is None


# ---- the terminal and the log --------------------------------------------------------------------------------------

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202ered\r\x08"


def hostile(text: str) -> list[str]:
    return [character for character in text if not character.isprintable() and character not in "\n\t"]


def test_what_printable_lets_through():
    assert printable("Grüße, 世界\n\tok") == "Grüße, 世界\n\tok" and hostile(printable(ESCAPES)) == []


def test_data_gives_no_escape_sequence_to_terminal_log_or_ledger(cli, toy_run, tmp_path):
    """In a column, a file's name, a bad row, an answer, a recipe, an option: what is printed and what is logged is plain."""
    rows = [{"q": f"{ESCAPES} {i}", "a": ESCAPES} for i in range(12)]
    folder = tmp_path / f"data{ESCAPES}"
    folder.mkdir()
    data = write_rows(folder / "train.jsonl", [*rows, {"q": ESCAPES}, {f"x{ESCAPES}": 1}])
    held_out = write_rows(tmp_path / "test.jsonl", [{"q": f"{ESCAPES} other", "a": ESCAPES}])
    more = ("--data", data, "--eval-data", held_out, "--evaluator", "toys:Equal", "-o", "trainer.max_steps=1")
    careful = ("--skip-bad-rows", "--formatter", "toys:Careful")
    outputs = [cli(*toy_run(*more)), cli(*toy_run(*more, *careful)), cli("run", tmp_path / f"{ESCAPES}.yaml")]
    outputs += [cli(*toy_run("-o", f"adapter.{ESCAPES}=1")), cli(*toy_run(*more, *careful, "--json", output=tmp_path / "json"))]
    assert [done.exit_code for done in outputs[1:]] == [0, 2, 2, 0], [done.stderr for done in outputs]
    # a line end in a column's name, in what is said and in what refuses
    forged = {"prompt": "a", "completion": "b", "x\nError: forged\r\u2028Error: forged": "c"}
    named = write_rows(tmp_path / "named.jsonl", [{**forged, "completion": f"b{i}"} for i in range(8)])
    outputs += [cli(*toy_run("--data", named, "-o", "trainer.max_steps=1", formatter="completion", output=tmp_path / "named"))]
    outputs += [
        cli(*toy_run("--data", named, formatter="alpaca", output=tmp_path / "alpaca")),
        cli("data", "convert", named, "--to", "text", "--keep", "none", "--output", tmp_path / "x.jsonl"),
    ]
    assert [done.exit_code for done in outputs[5:]] == [0, 2, 2], [done.output for done in outputs[5:]]
    assert all("\\nError: forged" in done.output for done in outputs[5:])
    log = (tmp_path / "named" / "log.txt").read_text("utf-8")
    for printed in (log, *(done.output for done in outputs[5:])):
        assert not any(line.strip().startswith("Error: forged") for line in printed.splitlines())
    for done in outputs:
        assert hostile(done.stdout + done.stderr) == [], ascii(done.stdout + done.stderr)
    for name in ("run", "json"):
        assert hostile((tmp_path / name / "log.txt").read_text("utf-8")) == []
        assert "\x1b" not in (tmp_path / name / "ledger.jsonl").read_text("utf-8")


def test_a_librarys_warning_that_quotes_data_is_plain_in_the_log(cli, toy_run, tmp_path):
    assert cli(*toy_run("-o", "trainer.max_steps=1", adapter="toys:Loud")).exit_code == 0
    log = (tmp_path / "run" / "log.txt").read_text("utf-8")
    assert "owned" in log and hostile(log) == []


def test_a_distributions_summary_is_printed_plain(cli, tmp_path, monkeypatch):
    install(
        tmp_path, "loud", {"adapter:loud": "doc_loud:Good"}, summary="\x1b[31mred\x9b", doc_loud=GOOD.format(name="Good").replace("The plugin", "\\x1b[31mThe")
    )
    monkeypatch.syspath_prepend(tmp_path)
    for command in (["plugins"], ["plugins", "show", "adapter", "loud"], ["plugins", "--json"]):
        result = cli(*command)
        assert result.exit_code == 0 and hostile(result.stdout) == [], ascii(result.stdout)
