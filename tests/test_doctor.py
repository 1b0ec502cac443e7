"""`ftx doctor`: each line says its state and, where it is not well, what to do; the exit status is that of the defaults."""

from __future__ import annotations

import http.server
import json
import threading
from importlib import metadata

import pytest
from shelf import GOOD, install, points_in
from venvs import Environment, built

from ftx import doctor
from ftx.catalogue import Catalogue
from ftx.machine import memory, this_machine


@pytest.fixture(scope="module")
def lines():
    return doctor.examine_environment()


def test_every_line_has_a_state_and_says_what_to_do(lines):
    said = [doctor.split_line(line) for line in lines]
    assert {one["status"] for one in said} <= {"ok", "warning", "failure"}
    assert all(one["what"] for one in said) and all(one["do"] for one in said if one["status"] != "ok"), lines
    text = "\n".join(lines)
    for word in (
        "Python 3",
        "torch ",
        "bfloat16 measured",
        "flash attention",
        "tested",
        "GiB free on the disk",
        "of memory",
        "the hub",
        "smollm2",
        "bitsandbytes",
    ):
        assert word in text, word
    assert {f"{entry.stage} {entry.name}" for entry in Catalogue().entries} <= {": ".join(line.split(": ")[1:2]) for line in lines}


def test_the_command_and_its_json(cli, monkeypatch):
    monkeypatch.setattr(doctor, "examine_environment", lambda: ["ok: all; well", "warning: little room; make some", "warning: \x1b[31mred; wash it"])
    fine = cli("doctor", "--json")
    checks = json.loads(fine.stdout)["checks"]
    assert fine.exit_code == 0 and checks[:2] == [
        {"status": "ok", "what": "all; well", "do": ""},
        {"status": "warning", "what": "little room", "do": "make some"},
    ]
    assert "\x1b" not in cli("doctor").stdout
    monkeypatch.setattr(doctor, "examine_environment", lambda: ["ok: well", "failure: no torch; install it"])
    bad = cli("doctor", "--quiet")
    assert bad.exit_code == 1 and bad.stdout == "failure: no torch; install it\n" and "1 check failed" in bad.stderr
    assert json.loads(cli("doctor", "--json").stdout)["status"] == "failed"


def test_a_check_that_raises_is_a_failure_and_not_the_end(monkeypatch):
    def _torch():
        raise ImportError("libcudart.so: cannot open shared object file\nand more")

    said = doctor.split_line(doctor._guarded(_torch)[0])
    assert said["status"] == "failure" and said["what"] == "torch: ImportError: libcudart.so: cannot open shared object file" and said["do"]


def test_only_what_is_a_default_fails(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    failing = GOOD.format(name="Good").replace("Good is here", "no engine; buy one").replace('"ok: ', '"failure: ')
    assert "failure: no engine" in failing, "GOOD must have a check_environment that says ok"
    install(tmp_path, "one", {"adapter:lora": "doc_one:Good", "quantizer:nf9": "doc_one:Good", "observer:audit": "doc_one:Good"}, doc_one=failing)
    found = doctor._plugins(Catalogue(points_in(tmp_path)))
    assert "failure: adapter lora: no engine; buy one" in found and "warning: quantizer nf9: no engine; buy one" in found
    assert "failure: observer audit: no engine; buy one" in found, "a run without `observers` takes it"


def test_a_misspelt_group_is_found(tmp_path, monkeypatch):
    install(tmp_path, "typo", {"adaptor:lost": "x:X", "reader:fine": "x:X"})
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._strange_groups() == ["warning: the entry point lost is in the group ftx.adaptor, which nothing reads; name the group ftx.adapter"]


def test_versions_are_held_against_requirements_and_the_tested_ones(tmp_path, monkeypatch):
    assert doctor._versions() == [line for line in doctor._versions() if line.startswith("ok: ")], "the environment of the tests is the tested one"
    real = doctor.metadata_version
    monkeypatch.setattr(doctor, "metadata_version", lambda name: {"torch": "2.13.0+cu130", "rich": "14.9", "pluggy": "1.0", "trl": None}.get(name, real(name)))
    found = doctor._versions()
    assert any(line.startswith("failure: ftx-core needs pluggy>=1.7, 1.0 is installed; pip install ") for line in found)
    assert any(line.startswith("warning: ftx-sft needs trl") and "it is not installed" in line for line in found)
    (other,) = [line for line in found if "other versions" in line]
    assert "rich 14.9 (tested: " in other and "torch" not in other


def test_memory_is_that_of_the_container_without_its_cached_files(tmp_path):
    free, total = memory(tmp_path / "none")
    assert free is not None and free < total
    files = {"memory.max": f"{3 << 30}\n", "memory.current": f"{2 << 30}\n", "memory.stat": f"anon 5\ninactive_file {1536 << 20}\nactive_file 7\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert memory(tmp_path) == (min(free, 2560 << 20), 3 << 30)
    (tmp_path / "memory.current").write_text(f"{5 << 30}\n")
    assert memory(tmp_path) == (0, 3 << 30), "a group may stand over its limit for a moment"
    (tmp_path / "memory.max").write_text("max\n")
    assert memory(tmp_path)[1] == total
    (tmp_path / "memory.max").write_text(f"{total * 2}\n")
    assert memory(tmp_path)[1] == total


def test_a_plan_and_the_doctor_ask_the_same_memory(monkeypatch):
    monkeypatch.setattr("ftx.machine.memory", lambda: (3 << 30, 8 << 30))
    monkeypatch.setattr(doctor, "memory", lambda: (3 << 30, 8 << 30))
    assert this_machine("cpu").memory == 3 << 30
    assert doctor._memory() == ["warning: 3.0 GiB of 8.0 GiB of memory free; close other programs, or take a smaller micro-batch: ftx plan"]


class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_):
        pass


def test_whether_the_hub_answers(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    server = http.server.HTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert doctor._hub()[0].startswith("ok: the hub answers in ")
    server.shutdown()
    server.server_close()
    assert doctor._hub()[0].startswith("warning: the hub cannot be reached (") and "; use installed names" in doctor._hub()[0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert doctor._hub() == ["ok: the hub is switched off (HF_HUB_OFFLINE)"]


def test_bfloat16_that_does_not_compute_is_found(monkeypatch):
    import torch

    def broken(self):
        raise RuntimeError("not implemented for 'BFloat16'")

    monkeypatch.setattr(torch.Tensor, "bfloat16", broken)
    (line,) = doctor._bfloat16()
    assert "bfloat16 does not compute on" in line and "; use --dtype" in line


def test_the_tested_versions_travel_in_the_wheel(tmp_path):
    """An installed ftx-core knows them without the repository."""
    environment = Environment(tmp_path / "env")
    environment.pip("install", "--no-deps", *built(tmp_path / "wheels", "core"))
    done = environment._call([environment.python, "-c", "from ftx.doctor import tested_versions as t; import ftx; print(ftx.__file__, t()['torch'], len(t()))"])
    file, torch, count = done.stdout.split()
    assert "site-packages" in file and torch == metadata.version("torch").partition("+")[0] and int(count) == len(doctor.tested_versions())
