"""Judges on servers that others wrote: a run judged from its beginning to its scores by the real model.

smollm2 is too small to judge well; what is tested is that nothing of what a real server says is lost, doubled or made up.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from faulty_proxy import PASSING, faulty
from real_servers import Server, missing, serving
from support import REPO, read_rows, write_rows

import ftx_smollm2
from ftx import models

KEY = "sk-test-0123456789abcdef-never-written"
DATA = REPO / "examples" / "data"
TURNS = {
    "writing": ["Write one sentence about the sea.", "Write it again in five words."],
    "math": ["What is 12 times 3?", "And half of that?"],
    "coding": ["Write a Python expression that adds a and b.", "Now one that multiplies them."],
    "humanities": ["Who wrote Hamlet?", "In which century did he live?"],
}
#: The first holds answers to a JSON schema; the second passes over `response_format`, and smollm2 writes little JSON of itself.
SERVERS = ("llama.cpp", "transformers serve")


@dataclass(frozen=True)
class Judged:
    """A run, how many questions it was judged on, and how the command ended."""

    run: Path
    questions: int
    status: int
    printed: str


@pytest.fixture(scope="module", params=SERVERS)
def server(request, tmp_path_factory):
    """A running server. `--full` wants both; otherwise the first that is installed is asked, and pytest says so of the other."""
    name, lacks = request.param, missing(request.param)
    if request.config.getoption("--full"):
        assert not lacks, f"{name} is not installed: {lacks}"
    elif lacks:
        pytest.skip(f"{name} is not installed: {lacks}")
    elif name != (first := next(one for one in SERVERS if not missing(one))):
        pytest.skip(f"{first} is asked; give --full, or `make full`, for {name} too")
    directory = models.resolve("smollm2", print)
    with serving(name, ftx_smollm2.path(), directory, tmp_path_factory.mktemp("server") / "log.txt") as running:
        yield running


@pytest.fixture(scope="module")
def judging(request, tmp_path_factory):
    """`judging(server, evaluator)` -> the arguments that name the judge."""
    cache = tmp_path_factory.mktemp("cache")
    free = 64 if request.config.getoption("--full") else 24  # what a server without schemas may say: to no end, mostly

    def arguments(server: Server, evaluator: str, **more: object) -> list[str]:
        given = {"model": server.model, "base_url": server.address, "max_tokens": 160 if server.schemas else free, "concurrency": 2, "allow_self": "true"}
        given |= {"cache": cache / f"{evaluator}.sqlite", "timeout": 240} | more
        return ["--evaluator", evaluator, *(word for name, value in given.items() for word in ("-o", f"{evaluator}.{name}={value}"))]

    return arguments


@pytest.fixture(scope="module")
def judged(request, server, judging, tiny, process_of_module, tmp_path_factory):
    """`ftx run`, with base and tuned judged by rubric and in pairs. In the full suite smollm2 is also what is judged."""
    full, folder = request.config.getoption("--full"), tmp_path_factory.mktemp("judged")
    count = 3 if full else 1
    questions = folder / "questions.jsonl"
    questions.write_text("".join((DATA / "products-test.jsonl").read_text("utf-8").splitlines(keepends=True)[:count]), encoding="utf-8")
    done = process_of_module(
        *("run", "--model", "smollm2" if full else str(tiny), "--data", str(DATA / "products-train.jsonl"), "--eval-data", str(questions)),
        *("--formatter", "alpaca", "--adapter", "lora", "--dtype", "float32", "--evaluator", "exact-match", "-o", "exact-match.max_new_tokens=8"),
        *("-o", "trainer.max_steps=2", "-o", "trainer.per_device_train_batch_size=4", "-o", "trainer.gradient_accumulation_steps=1"),
        *("-o", "trainer.learning_rate=5e-3", "-o", "trainer.warmup_steps=0"),  # or base and tuned say the same, and no pair is asked about
        *(*judging(server, "llm-judge", max_new_tokens=40 if full else 12), "--output", str(folder / "run")),
        OPENAI_API_KEY=KEY,
        timeout=850,
    )
    (folder / "printed.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    return Judged(folder / "run", count, done.returncode, done.stdout + done.stderr)


def _usage(run: Path, evaluator: str) -> dict[str, int]:
    (counts,) = json.loads((run / "manifest.json").read_text())["usage"][evaluator].values()
    return counts


def _scores(run: Path, evaluator: str) -> dict[tuple[str, str], dict]:
    return {(score["metric"], score["phase"]): score for score in json.loads((run / "scores.json").read_text()) if score["evaluator"] == evaluator}


def test_every_answer_has_a_verdict_or_a_reason_and_the_counts_add_up(judged, server):
    """Where no answer at all could be scored, that is said with the reason, and the other evaluator keeps its scores."""
    scores, folder, n, failed = _scores(judged.run, "llm-judge"), judged.run / "eval" / "llm-judge", judged.questions, 0
    for phase in ("base", "tuned"):
        assert ("exact_match", phase) in _scores(judged.run, "exact-match")
        if ("rating", phase) not in scores:
            assert f"'llm-judge' failed on the {phase} model: llm-judge: none of the {n} answers could be rated (" in judged.printed
            assert not (folder / f"{phase}.jsonl").exists()
            failed += 1
            continue
        items, rating = read_rows(folder / f"{phase}.jsonl"), scores["rating", phase]
        rated = [item for item in items if item["verdict"] != "unscored"]
        assert len(items) == n and rated and all(item["reason"] for item in items if item["verdict"] == "unscored")
        for item in rated:
            assert all(value in (1, 2, 3, 4, 5) for value in item["verdict"].values()), item["verdict"]
        assert rating["n"] == len(rated) and rating["unscored"] == n - len(rated) and 1 <= rating["value"] <= 5
        assert len(rated) < 2 or rating["ci_low"] <= rating["value"] <= rating["ci_high"]
    if not failed and ("win_rate", "change") in scores:
        pairs, rate = read_rows(folder / "change.jsonl"), scores["win_rate", "change"]
        compared = [pair for pair in pairs if pair["verdict"] in ("win", "tie", "loss")]
        assert len(pairs) == n and all(pair["reason"] for pair in pairs if pair not in compared)
        assert rate["n"] == len(compared) and rate["unscored"] == n - len(compared) and 0 <= rate["value"] <= 1
    elif not failed:
        assert f"llm-judge: none of the {n} pairs could be scored (" in judged.printed
        failed += 1
    assert judged.status == (1 if failed else 0), judged.printed
    assert not failed or not server.schemas, "a server that holds to the schema gives verdicts"
    asked = n * (2 if failed else 2 + 2 * any(pair["judges"] for pair in pairs))  # a rating each, and each pair in both orders
    assert asked <= _usage(judged.run, "llm-judge")["calls"] <= 2 * n * 4, "each is asked once, and once more to repair its answer"


def test_the_key_stands_nowhere(judged):
    for file in judged.run.parent.rglob("*"):
        if file.is_file():
            assert KEY.encode() not in file.read_bytes(), f"{file.name} holds the key"


@pytest.mark.full
def test_a_finished_run_is_judged_again_through_a_faulty_proxy_and_gets_the_same_verdicts(judged, server, judging, process):
    """What stands between client and server changes nothing: the server is greedy, so its verdicts are the same ones."""
    if judged.status:
        pytest.skip("this server gave no verdicts that could be compared")
    run = judged.run
    before = {phase: read_rows(run / "eval" / "llm-judge" / f"{phase}.jsonl") for phase in ("base", "tuned", "change")}
    with faulty(server.address, [fault for fault in PASSING if fault not in ("silence", "another language")], every=2) as proxy:
        done = process("eval", str(run), *judging(replace(server, address=proxy.address), "llm-judge", max_new_tokens=40, cache="none"), timeout=850)
    assert done.returncode == 0, done.stderr
    assert sum(proxy.done.values()) >= 3, "the proxy has spoiled nothing"
    after = {phase: read_rows(run / "eval" / "llm-judge" / f"{phase}.jsonl") for phase in before}
    for phase, items in before.items():
        assert [item["verdict"] for item in after[phase]] == [item["verdict"] for item in items], phase


def _four_questions(folder: Path) -> dict[str, object]:
    """`mt-bench.data`: four questions of two turns, with references where the category wants them."""
    questions = [{"question_id": 81 + number, "category": category, "turns": turns} for number, (category, turns) in enumerate(TURNS.items())]
    write_rows(folder / "question.jsonl", questions)
    (folder / "reference_answer").mkdir()
    answers = [
        {"question_id": 82, "choices": [{"index": 0, "turns": ["36", "18"]}]},
        {"question_id": 83, "choices": [{"index": 0, "turns": ["a + b", "a * b"]}]},
    ]
    write_rows(folder / "reference_answer" / "gpt-4.jsonl", answers)
    return {"data": folder, "max_new_tokens": 24}


@pytest.mark.parametrize("count", [1, pytest.param(4, marks=pytest.mark.full)])
def test_questions_of_mt_bench(judged, server, judging, process, tmp_path, count):
    run = shutil.copytree(judged.run, tmp_path / "run")
    (tmp_path / "bench").mkdir()
    done = process("eval", str(run), *judging(server, "mt-bench", max_questions=count, **_four_questions(tmp_path / "bench")), timeout=850)
    scores, folder, n, failed = _scores(run, "mt-bench"), run / "eval" / "mt-bench", 2 * count, 0
    for phase in ("base", "tuned"):
        if ("average", phase) not in scores:
            assert f"'mt-bench' failed on the {phase} model: mt-bench: none of the {n} answers could be judged (" in done.stderr + done.stdout
            assert not (folder / f"{phase}.jsonl").exists()
            failed += 1
            continue
        items = read_rows(folder / f"{phase}.jsonl")
        unscored = [item for item in items if item["verdict"] == "unscored"]
        assert len(items) == n and all(item["reason"] for item in unscored)
        average = scores["average", phase]
        assert average["unscored"] == len(unscored) and average["n"] + len(unscored) == n and 1 <= average["value"] <= 10
    assert done.returncode == (1 if failed else 0), done.stderr
    assert 2 * n <= sum(_usage(run, "mt-bench")[key] for key in ("calls", "cached")) <= 4 * n, "each turn of both is asked, and once more to repair its answer"
    assert _scores(run, "llm-judge") == _scores(judged.run, "llm-judge"), "the other's scores stay"
