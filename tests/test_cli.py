"""The command line: what it imports, what it prints, how it ends, and the texts of the design's errors."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from importlib import metadata

import pytest
from shelf import GOOD, install, points_in

from ftx import __version__, catalogue
from ftx.catalogue import Catalogue
from ftx.cli import COMMANDS
from ftx.commands.common import answering
from ftx.describe import described
from ftx.doctor import _plugins as plugin_lines
from ftx.errors import DataError, Interrupted, RunError

HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "evaluate", "bitsandbytes", "numpy", "stevedore", "pluggy", "yaml", "rich", "json"}
HEAVY |= {"importlib.metadata", "packaging"}

#: Prints as JSON the modules that a call of ftx imported, and nothing of what the call itself prints.
SPY = """
import sys
before = set(sys.modules)
import io, contextlib
with contextlib.redirect_stdout(io.StringIO()):
    try:
        from ftx.cli import main
        main(sys.argv[1:], prog_name="ftx")
    except SystemExit as end:
        assert end.code in (0, None), end.code
now = set(sys.modules) - before
print("\\n".join(sorted(now)))
"""


def imported_by(*arguments: str, **environment: str) -> set[str]:
    env = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", SPY, *arguments], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def foreign(modules: set[str]) -> set[str]:
    """The top-level names that are not Python's own."""
    return {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)


# ---- what is imported ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["--help", "-h", "--version"])
def test_help_and_version_import_click_and_nothing_else(argument):
    modules = imported_by(argument)
    assert foreign(modules) == {"ftx", "click"} and not modules & HEAVY
    assert {name for name in modules if name.startswith("ftx")} == {"ftx", "ftx.cli"}


@pytest.mark.parametrize("command", list(COMMANDS))
def test_a_commands_help_is_light_too(command):
    modules = imported_by(command, "--help")
    assert not modules & (HEAVY - {"json"})
    assert {name for name in modules if name.startswith("ftx.commands.")} == {"ftx.commands.common", f"ftx.commands.{command}"}


def test_listing_imports_no_plugin_and_no_library():
    modules = imported_by("plugins")
    assert {entry.value.partition(":")[0] for entry in Catalogue().entries} & modules == set()
    assert not modules & {"torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "numpy"}


def test_showing_imports_that_plugin_and_no_library():
    modules = imported_by("plugins", "show", "adapter", "lora")
    others = {entry.value.partition(":")[0] for entry in Catalogue().entries} - {"ftx_lora"}
    assert "ftx_lora" in modules and not modules & others
    assert not modules & {"torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "numpy"}


# ---- the texts of the design ---------------------------------------------------------------------------------------


def errors(result) -> list[str]:
    assert result.exit_code == 2 and result.stdout == "" and "Traceback" not in result.stderr, result.output
    return result.stderr.splitlines()


def test_an_unknown_adapter(cli):
    installed = ", ".join(Catalogue().names("adapter"))
    assert errors(cli("run", "--data", "x.jsonl", "--adapter", "qlroa")) == [
        "Error: no adapter is called 'qlroa'. Did you mean 'qlora'?",
        f"       Installed: {installed}.",
    ]


def test_a_missing_library(tmp_path, monkeypatch, cli):
    install(tmp_path, "ftx-lacking", {"adapter:lacking": "lacking_one:L"}, version="0.1.0", lacking_one="import bitsandbytes_of_ours")
    monkeypatch.syspath_prepend(tmp_path)
    assert errors(cli("run", "--data", "x.jsonl", "--adapter", "lacking")) == [
        "Error: adapter 'lacking' (ftx-lacking 0.1.0) could not be loaded: No module named 'bitsandbytes_of_ours'",
        "       pip install bitsandbytes_of_ours, or see it all with --traceback.",
    ]


def test_two_adapters_of_one_name(tmp_path, monkeypatch, cli):
    install(tmp_path, "acme-lora", {"adapter:lora": "acme.lora:LoRA"}, version="2.0")
    monkeypatch.syspath_prepend(tmp_path)
    assert errors(cli("run", "--data", "x.jsonl")) == [
        f"Error: two adapters are called 'lora': ftx-lora {__version__} (ftx_lora:LoRA) and acme-lora 2.0 (acme.lora:LoRA).",
        "       Uninstall one, or name the class: --adapter acme.lora:LoRA",
    ]


def test_an_unknown_option(cli):
    options = [one["name"] for one in described("adapter", "lora")["options"]]
    assert options[:4] == ["r", "alpha", "dropout", "target_modules"]
    assert errors(cli("run", "--data", "x.jsonl", "-o", "adapter.rank=8")) == [
        f"Error: adapter 'lora' has no option 'rank'. Did you mean 'r'? Options: {', '.join(options)}.",
        "       ftx plugins show adapter lora",
    ]


def test_two_that_set_quantization_config(cli):
    assert errors(cli("run", "--data", "x.jsonl", "--quantizer", "int8", "--adapter", "qlora")) == [
        "Error: quantizer 'int8' and adapter 'qlora' both set quantization_config.",
        "       qlora brings its own 4-bit base: drop --quantizer, or use --adapter lora.",
    ]


def test_a_value_of_the_wrong_kind(cli):
    lines = errors(cli("run", "--data", "x.jsonl", "-o", "adapter.r=sixteen"))
    assert lines[0] == "Error: adapter.r wants int, got 'sixteen'." and len(lines) == 2


# ---- commands, stages, endings -------------------------------------------------------------------------------------


def test_an_unknown_command(cli):
    result = cli("plugin")
    assert result.exit_code == 2 and "Error: no command is called 'plugin'. Did you mean 'plugins'?" in result.stderr
    assert f"Commands: {', '.join([*COMMANDS, *Catalogue().names('command')])}." in result.stderr
    assert "no command is called 'zzz'.\n" in cli("zzz").stderr


def test_a_distribution_brings_a_command(process, tmp_path):
    body = "import click\n\n@click.command()\n@click.argument('who')\ndef greet(who):\n    'Greet someone.'\n    click.echo(f'hello {who}')\n"
    points = {"command:greet": "greeting:greet", "command:broken": "no_such_module:x", "command:odd": "greeting:click"}
    install(tmp_path, "acme-greet", points, greeting=body)
    place = {"PYTHONPATH": str(tmp_path)}
    assert process("greet", "you", **place).stdout == "hello you\n"
    assert "Greet someone." in process("greet", "--help", **place).stdout
    assert "command    greet" in process("plugins", **place).stdout
    assert "Did you mean 'greet'?" in process("greeet", **place).stderr
    broken, odd = process("broken", **place), process("odd", **place)
    assert (
        broken.returncode == 2
        and broken.stderr.splitlines()[0] == "Error: command 'broken' (acme-greet 1.0) could not be loaded: No module named 'no_such_module'"
    )
    assert odd.returncode == 2 and odd.stderr.splitlines()[0] == "Error: command 'odd' (acme-greet 1.0): greeting:click is no click command."
    assert process("--help", **place).returncode == 0, "a broken command breaks nobody else"


def test_an_unknown_stage(cli):
    assert errors(cli("plugins", "show", "adaptor", "lora")) == [
        "Error: no stage is called 'adaptor'. Did you mean 'adapter'?",
        "       Stages: formatter, quantizer, adapter, trainer, evaluator, exporter, observer.",
    ]


def test_version(cli, process):
    assert cli("--version").stdout == f"ftx, version {__version__}\n"
    assert process("--version").stdout == f"ftx, version {__version__}\n"


def test_every_command_stands_in_the_help_with_its_own_words(cli):
    text = cli("--help").stdout
    for name, words in COMMANDS.items():
        assert name in text and words.split(":")[0] in text
        assert cli(name, "--help").exit_code == 0


def test_show_has_the_option_table(cli):
    lines = cli("plugins", "show", "adapter", "lora").stdout.splitlines()
    assert lines[0] == f"adapter lora (ftx-lora {__version__})"
    assert any(line.startswith("hooks: ") and "adapt_model" in line for line in lines)
    (r,) = [line.split() for line in lines if line.split()[:1] == ["r"]]
    assert r[1:3] == ["int", "16"]
    assert f"installed in: {metadata.distribution('ftx-lora').locate_file('')}" in lines
    assert any(line.startswith("suggests: trainer.learning_rate=") for line in lines)


def test_what_has_no_summary_is_listed_with_its_place(tmp_path, monkeypatch, cli):
    """An empty directory of metadata that some update left behind has no name either: its place is all that tells it from the others."""
    (install(tmp_path, "left", {"adapter:left": "left_one:L"}) / "METADATA").unlink()
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = [line for line in cli("plugins").stdout.splitlines() if line.split()[:2] == ["adapter", "left"]]
    assert line.split()[2:] == ["unknown", str(tmp_path)]


def test_a_traceback_only_when_asked_for(tmp_path, monkeypatch, cli):
    install(tmp_path, "ftx-loud", {"adapter:loud": "loud_one:L"}, loud_one="raise RuntimeError('\\x1b[31mred\\x07 alert')")
    monkeypatch.syspath_prepend(tmp_path)
    lines = errors(cli("plugins", "show", "adapter", "loud"))
    assert lines[0].endswith("could not be loaded: \N{REPLACEMENT CHARACTER}[31mred\N{REPLACEMENT CHARACTER} alert"), "a plugin cannot recolour the terminal"
    result = cli("plugins", "show", "adapter", "loud", "--traceback")
    assert result.exit_code == 2 and "Traceback (most recent call last)" in result.stderr and "loud_one.py" in result.stderr


# ---- --json --------------------------------------------------------------------------------------------------------


def only_object(result) -> dict:
    """The one JSON object on standard output."""
    assert result.stdout.count("\n") == 1
    content = json.loads(result.stdout)
    assert isinstance(content, dict)
    return content


def test_json_of_a_list(cli):
    result = cli("plugins", "--json")
    content = only_object(result)
    assert content["status"] == "done" and result.exit_code == 0
    lora = next(one for one in content["plugins"] if (one["stage"], one["name"]) == ("adapter", "lora"))
    assert (lora["distribution"], lora["version"], lora["value"]) == ("ftx-lora", __version__, "ftx_lora:LoRA") and lora["summary"]
    assert "ftx-lora" in result.stderr, "the table is for people"


def test_json_of_a_plugin(cli):
    content = only_object(cli("plugins", "show", "adapter", "lora", "--json"))
    assert content["options"][0]["name"] == "r" and "adapt_model" in content["hooks"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["plugins", "show", "adapter", "qlroa"], "no adapter is called 'qlroa'. Did you mean 'qlora'?"),
        (["run", "--data", "x.jsonl", "--adapter", "qlroa"], "no adapter is called 'qlroa'. Did you mean 'qlora'?"),
        (["run", "nothing.yaml"], "nothing.yaml: no such recipe."),
        (["eval", "nothing"], "not a run (it has no recipe.yaml)."),
        (["resume", "nothing"], "not a run (it has no recipe.yaml)."),
    ],
)
def test_json_of_a_refusal(cli, arguments, text):
    result = cli(*arguments, "--json")
    content = only_object(result)
    assert result.exit_code == 2 and content["status"] == "refused" and text in content["error"] and content["remedy"]
    assert text in result.stderr


# ---- many plugins --------------------------------------------------------------------------------------------------


def listing_time(folder, runs: int = 5) -> float:
    """Median seconds of `ftx plugins`."""
    env = {**os.environ, "PYTHONPATH": str(folder)}
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "ftx", "plugins"], env=env, capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - began)
    assert "dummy_9" in done.stdout
    return statistics.median(times)


def test_200_distributions_are_listed_in_less_than_three_times_the_time_of_10(tmp_path):
    for count in (10, 200):
        for i in range(count):
            install(tmp_path / str(count), f"dummy-{i}", {f"adapter:dummy_{i}": f"dummy_{i}:D"}, **{f"dummy_{i}": "raise SystemExit"})
    assert listing_time(tmp_path / "200") < 3 * listing_time(tmp_path / "10")


# ---- doctor's look at plugins --------------------------------------------------------------------------------------


def test_doctor_says_what_is_wrong_with_each_plugin(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    install(tmp_path, "good", {"adapter:good": "doc_good:Good"}, doc_good=GOOD.format(name="Good"))
    install(tmp_path, "ending", {"adapter:ending": "doc_ending:E"}, doc_ending="raise SystemExit(1)")
    install(
        tmp_path, "asking", {"adapter:asking": "doc_asking:Good"}, doc_asking=GOOD.format(name="Good").replace("return", "raise SystemExit(1)\n        return")
    )
    install(tmp_path, "lora-a", {"adapter:lora": "x:X"})
    install(tmp_path, "lora-b", {"adapter:lora": "y:Y"})
    lines = plugin_lines(Catalogue(points_in(tmp_path)))
    assert "ok: adapter good: Good is here" in lines
    assert any(line.startswith("warning: adapter 'ending' (ending 1.0) could not be loaded: it ends the program on import") for line in lines)
    assert any(line.startswith("warning: adapter asking: SystemExit: 1; ") for line in lines)
    assert "failure: two adapters are called 'lora' (lora-a 1.0 and lora-b 1.0); uninstall one" in lines


# ---- how a command ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "content"),
    [
        (ValueError("broken\nin two"), 1, {"status": "failed", "error": "ValueError: broken", "remedy": ""}),
        (RunError("it fell over.", "Pick it up."), 1, {"status": "failed", "error": "it fell over.", "remedy": "Pick it up."}),
        (DataError("a: bad.", "Mend it."), 2, {"status": "refused", "error": "a: bad.", "remedy": "Mend it."}),
        (Interrupted("interrupted.", "Go on."), 130, {"status": "interrupted", "error": "interrupted.", "remedy": "Go on."}),
        (KeyboardInterrupt(), 130, {"status": "interrupted"}),
    ],
)
def test_every_ending_has_its_status_and_its_json(capsys, error, status, content):
    with pytest.raises(SystemExit) as ended, answering(as_json=True) as result:
        print("chatter of a library")
        result.content = {"run": "x"}
        raise error
    out, err = capsys.readouterr()
    assert ended.value.code == status and json.loads(out) == {**content, "run": "x"}
    assert "chatter" in err and "Error: " in err and "Traceback" not in err


def test_a_command_scans_what_is_installed_once(cli, monkeypatch):
    scans = []
    monkeypatch.setattr(catalogue, "_installed", lambda: scans.append(1) or points)
    points = [entry.point for entry in Catalogue([*metadata.entry_points(group="ftx.adapter")]).entries]
    assert cli("plugins", "show", "adapter", "lora").exit_code == 0 and len(scans) == 1
    assert cli("run", "--data", "x.jsonl").exit_code == 2 and len(scans) == 2
