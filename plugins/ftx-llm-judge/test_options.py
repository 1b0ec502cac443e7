"""The options of every judge: what is refused at once, what before the run, and what is only warned of."""

from __future__ import annotations

import sys

import pytest

from ftx.ledger import Ledger
from ftx.options import Text, build
from ftx.recipe import Recipe
from ftx.run import Run
from ftx.testing.tiny import tiny_model_dir
from ftx_llm_judge_options import Judging, families, is_loopback, split

KEY = "sk-test-0123456789abcdef"


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run():
    said = []
    return Run(recipe=Recipe(), ledger=Ledger(), model="smollm2", say=said.append, notes={"said": said})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"concurrency": 0}, "concurrency must be at least 1, not 0"),
        ({"retries": -1}, "retries must be at least 0, not -1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"max_calls": 0}, "max_calls must be at least 1, not 0"),
        ({"timeout": 0.0}, "timeout must be above 0, not 0.0"),
        ({"max_cost": float("nan")}, "max_cost must be above 0, not nan"),
        ({"temperature": -0.1}, "temperature must lie in 0..2, not -0.1"),
        ({"base_url": "localhost:8000"}, "base_url must start with http:// or https://, not 'localhost:8000'"),
        ({"prices": {"gpt-4o": [1.0]}}, "prices.gpt-4o must be [USD per million input tokens, USD per million output tokens], not [1.0]"),
        ({"prices": {"gpt-4o": "free"}}, "prices.gpt-4o must be [USD per million input tokens, USD per million output tokens], not 'free'"),
        ({"prices": {"gpt-4o": [-1, 2]}}, "prices.gpt-4o must be [USD per million input tokens, USD per million output tokens], not [-1, 2]"),
    ],
)
def test_a_value_that_cannot_be_is_refused(given, text):
    with pytest.raises(ValueError) as raised:
        Judging(**given)
    assert str(raised.value) == text


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"key_env": KEY}, "key_env must be the name of an environment variable, not the key itself"),
        ({"base_url": f"https://user:{KEY}@example.org/v1"}, "base_url must not hold a user or a password; keys come from the environment (key_env)"),
    ],
)
def test_a_key_in_an_option_is_refused_and_not_repeated(given, text):
    with pytest.raises(ValueError) as raised:
        Judging(**given)
    assert str(raised.value) == text


def test_a_judge_is_named_once_or_several_are():
    assert Judging(model="gpt-4o").models == ("gpt-4o",)
    assert Judging(model=["gpt-4o", "local:smollm2"]).models == ("gpt-4o", "local:smollm2")
    for model in ("", " ", [], ["gpt-4o", ""]):
        with pytest.raises(ValueError, match=r"no judge is named: -o llm-judge\.model=MODEL"):
            _ = Judging(model=model).models
    with pytest.raises(ValueError, match="a judge is named twice: gpt-4o, gpt-4o"):
        _ = Judging(model=["gpt-4o", "gpt-4o"]).models


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("gpt-4o", ("openai", "gpt-4o")),
        ("openai:gpt-4o", ("openai", "gpt-4o")),
        ("qwen2.5:7b", ("openai", "qwen2.5:7b")),
        ("anthropic:claude-x", ("anthropic", "claude-x")),
        ("local:./model", ("local", "./model")),
    ],
)
def test_a_prefix_chooses_the_back_end(model, parts):
    assert split(model) == parts


def test_prices_come_from_the_command_line_too():
    judging = build(Judging, {"prices.gpt-4.1": Text("[2.5, 10]"), "prices.claude-x": Text("[3, 15]")}, stage="evaluator", name="llm-judge")
    assert judging.price("gpt-4.1") == (2.5, 10.0) and judging.price("anthropic:claude-x") == (3.0, 15.0) and judging.price("gpt-4o") is None


def test_address_and_key_are_those_of_the_openai_compatible_judges(monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    mixed = Judging(model=["gpt-4o", "anthropic:claude-x"], base_url="http://127.0.0.1:8000/v1/", key_env="MINE")
    assert mixed.address("gpt-4o") == "http://127.0.0.1:8000/v1" and mixed.key_name("gpt-4o") == "MINE" and mixed.key("gpt-4o") == ""
    assert mixed.address("anthropic:claude-x") is None and mixed.key("anthropic:claude-x") == KEY
    alone = Judging(model="anthropic:claude-x", base_url="http://127.0.0.1:8000", key_env="MINE")
    assert alone.address("anthropic:claude-x") == "http://127.0.0.1:8000" and alone.key_name("anthropic:claude-x") == "MINE"
    assert Judging(model="local:smollm2", key_env="MINE").key("local:smollm2") == ""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:9/v1")
    assert Judging(model="gpt-4o").address("gpt-4o") == "http://localhost:9/v1"


@pytest.mark.parametrize("address", ["http://localhost:1/v1", "http://127.0.0.1/v1", "http://127.1.2.3:80", "http://[::1]:8000/v1"])
def test_loopback_needs_no_key(address, run):
    assert is_loopback(address) and Judging(model="judge", base_url=address).preflight_reasons(run) == []


@pytest.mark.parametrize("address", [None, "https://api.openai.com/v1", "http://localhost.example.org", "http://10.0.0.1"])
def test_other_servers_need_one(address):
    assert not is_loopback(address)


def test_what_is_missing_is_said_before_the_run(run, monkeypatch):
    said = Judging().preflight_reasons(run)
    assert said == [
        "no judge is named: -o llm-judge.model=MODEL (gpt-4o, anthropic:MODEL, local:MODEL, or what your server at llm-judge.base_url calls its model)"
    ]
    key = "the judge gpt-4o needs a key: put it into the environment variable OPENAI_API_KEY, or name the variable that holds it with -o llm-judge.key_env=NAME"
    price = "llm-judge.max_cost needs the judge's price: -o 'llm-judge.prices.gpt-4o=[USD per million input tokens, output tokens]'"
    assert Judging(model="gpt-4o", max_cost=1.0).preflight_reasons(run) == [price, key]
    assert Judging(model="gpt-4o", dry_run=True).preflight_reasons(run) == [], "a dry run needs no key"
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert Judging(model="gpt-4o").preflight_reasons(run) == []
    assert not any(KEY in line for line in run.notes["said"])


@pytest.mark.parametrize(("model", "client"), [("gpt-4o", "openai"), ("anthropic:claude-x", "anthropic")])
def test_a_missing_client_is_named_with_its_command(model, client, run, monkeypatch):
    monkeypatch.setenv("MINE", KEY)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == client else object())
    assert Judging(model=model, key_env="MINE").preflight_reasons(run) == [
        f"the judge {model} needs the {client} client: pip install 'ftx-llm-judge[{client}]'"
    ]


def test_no_model_judges_itself_unless_told(run, tmp_path):
    run.model_path = tiny_model_dir(tmp_path / "model")
    run.model = str(run.model_path)
    refused = "is the judged model itself: name another judge, or allow it with -o llm-judge.allow_self=true"
    for model in (f"local:{run.model}", f"local:{run.model}/../model", run.model):
        found = Judging(model=model, base_url="http://127.0.0.1:1/v1").preflight_reasons(run)
        assert [reason for reason in found if reason.endswith(refused)] == found != []
        assert Judging(model=model, base_url="http://127.0.0.1:1/v1", allow_self=True).preflight_reasons(run) == []
    other = Judging(model="other", base_url="http://127.0.0.1:1/v1")
    assert other.preflight_reasons(run) == [] and other.preflight_reasons(run, judged=["Other"]) == [f"the judge other {refused}"]
    assert other.preflight_reasons(run, judged=[]) == []


def test_a_judge_of_the_same_family_is_warned_of(run):
    run.model = "Qwen/Qwen2.5-0.5B-Instruct"
    judging = Judging(model=["qwen2.5:72b", "mistral-large"], base_url="http://127.0.0.1:1/v1")
    assert judging.preflight_reasons(run) == []
    assert run.notes["said"] == [
        "warning: the judge qwen2.5:72b and the judged Qwen/Qwen2.5-0.5B-Instruct are of one family (qwen); judges favour their own kind."
    ]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("gpt-4o", {"gpt"}),
        ("anthropic:claude-x", {"claude"}),
        ("mixtral-8x7b", {"mistral"}),
        ("ministral-8b", {"mistral"}),
        ("meta-llama/Llama-3.1-8B", {"llama"}),
        ("ollama/gemma2", {"gemma"}),
        ("HuggingFaceTB/SmolLM2-135M", {"smollm"}),
        ("/data/llama-project/runs/model", set()),
        ("phi-4", {"phi"}),
        ("dolphin-2", set()),
        ("deepseek-r1-distill-qwen-7b", {"deepseek", "qwen"}),
    ],
)
def test_families_are_told_by_names(name, found):
    assert families(name) == found


def test_importing_the_options_imports_nothing_heavy():
    import subprocess

    code = "import sys, ftx_llm_judge_options; print([m for m in ('torch', 'transformers', 'openai', 'anthropic', 'tenacity', 'sklearn') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
