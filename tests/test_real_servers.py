"""Judges on servers that others wrote: a run judged from its beginning to its scores, with the real model on both sides.

smollm2 is too small to judge well; what is tested is that nothing of what a real server says is lost, doubled or made up.
"""

from __future__ import annotations

import json
from dataclasses import replace

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


def _running(name, request, tmp_path_factory):
    """A running server. Without `--full` one that is not installed is skipped, and pytest says which."""
    if lacks := missing(name):
        assert not request.config.getoption("--full"), f"{name} is not installed: {lacks}"
        pytest.skip(f"{name} is not installed: {lacks}")
    directory = models.resolve("smollm2", print)
    with serving(name, ftx_smollm2.path(), directory, tmp_path_factory.mktemp("server") / "log.txt") as running:
        yield running


@pytest.fixture(scope="module")
def server(request, tmp_path_factory):
    """llama.cpp's: it holds the answers to a JSON schema."""
    yield from _running("llama.cpp", request, tmp_path_factory)


@pytest.fixture(scope="module")
def server_without_schemas(request, tmp_path_factory):
    """That of transformers: it passes over `response_format`, and smollm2 writes no JSON of itself."""
    yield from _running("transformers serve", request, tmp_path_factory)


@pytest.fixture(scope="module")
def judging(tmp_path_factory):
    """`judging(server, evaluator)` -> the arguments that name the judge."""
    cache = tmp_path_factory.mktemp("cache")

    def arguments(server: Server, evaluator: str, *more: str) -> list[str]:
        given = {"model": server.model, "base_url": server.address, "max_tokens": 160, "concurrency": 2, "allow_self": "true"}
        given |= {"cache": cache / f"{evaluator}.sqlite", "timeout": 240}
        return ["--evaluator", evaluator, *(word for name, value in given.items() for word in ("-o", f"{evaluator}.{name}={value}")), *more]

    return arguments


def _train(process, folder, *evaluator):
    """Two real steps, with base and tuned evaluated on three questions."""
    questions = folder / "questions.jsonl"
    questions.write_text("".join((DATA / "products-test.jsonl").read_text("utf-8").splitlines(keepends=True)[:3]), encoding="utf-8")
    output = folder / "run"
    done = process(
        *("run", "--model", "smollm2", "--data", str(DATA / "products-train.jsonl"), "--eval-data", str(questions), "--formatter", "alpaca"),
        *("--adapter", "lora", "-o", "trainer.max_steps=2", "-o", "trainer.per_device_train_batch_size=4", "-o", "trainer.gradient_accumulation_steps=1"),
        *(*evaluator, "--output", str(output)),
        OPENAI_API_KEY=KEY,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr
    (folder / "printed.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    return output


@pytest.fixture(scope="module")
def run(server, judging, process_of_module, tmp_path_factory):
    """A run judged by rubric and in pairs."""
    return _train(process_of_module, tmp_path_factory.mktemp("judged"), *judging(server, "llm-judge", "-o", "llm-judge.max_new_tokens=40"))


def test_scores_of_base_and_tuned_with_intervals_and_what_is_unscored(run):
    scores = [score for score in json.loads((run / "scores.json").read_text()) if score["evaluator"] == "llm-judge"]
    ratings = {score["phase"]: score for score in scores if score["metric"] == "rating"}
    assert set(ratings) <= {"base", "tuned"}
    for phase in ("base", "tuned"):
        items = read_rows(run / "eval" / "llm-judge" / f"{phase}.jsonl")
        scored = [item for item in items if item["verdict"] != "unscored"]
        assert len(items) == 3 and all(item["reason"] for item in items if item["verdict"] == "unscored")
        for item in scored:
            assert all(value in (1, 2, 3, 4, 5) for value in item["verdict"].values()), item["verdict"]
        if scored:
            assert ratings[phase]["n"] == len(scored) and ratings[phase]["unscored"] == 3 - len(scored) and 1 <= ratings[phase]["value"] <= 5
            assert len(scored) < 2 or ratings[phase]["ci_low"] <= ratings[phase]["value"] <= ratings[phase]["ci_high"]
    change = read_rows(run / "eval" / "llm-judge" / "change.jsonl")
    assert len(change) == 3


def test_the_key_stands_nowhere(run):
    for file in run.parent.rglob("*"):
        if file.is_file():
            assert KEY.encode() not in file.read_bytes(), f"{file.name} holds the key"


def test_a_finished_run_is_judged_again_through_a_faulty_proxy_and_gets_the_same_verdicts(run, server, judging, process):
    """What stands between client and server changes nothing: the server is greedy, so its verdicts are the same ones."""
    before = {phase: read_rows(run / "eval" / "llm-judge" / f"{phase}.jsonl") for phase in ("base", "tuned", "change")}
    with faulty(server.address, [fault for fault in PASSING if fault not in ("silence", "another language")], every=2) as proxy:
        arguments = judging(replace(server, address=proxy.address), "llm-judge", "-o", "llm-judge.max_new_tokens=40", "-o", "llm-judge.cache=none")
        done = process("eval", str(run), *arguments, timeout=850)
    assert done.returncode == 0, done.stderr
    assert sum(proxy.done.values()) >= 3, "the proxy has spoiled nothing"
    after = {phase: read_rows(run / "eval" / "llm-judge" / f"{phase}.jsonl") for phase in before}
    for phase, items in before.items():
        assert [item["verdict"] for item in after[phase]] == [item["verdict"] for item in items], phase


def _four_questions(tmp_path):
    """`mt-bench.data`: four questions of two turns, with references where the category wants them."""
    questions = [{"question_id": 81 + number, "category": category, "turns": turns} for number, (category, turns) in enumerate(TURNS.items())]
    write_rows(tmp_path / "question.jsonl", questions)
    (tmp_path / "reference_answer").mkdir()
    answers = [
        {"question_id": 82, "choices": [{"index": 0, "turns": ["36", "18"]}]},
        {"question_id": 83, "choices": [{"index": 0, "turns": ["a + b", "a * b"]}]},
    ]
    write_rows(tmp_path / "reference_answer" / "gpt-4.jsonl", answers)
    return ("-o", f"mt-bench.data={tmp_path}", "-o", "mt-bench.max_new_tokens=24")


def test_four_questions_of_mt_bench(run, server, judging, process, tmp_path):
    done = process("eval", str(run), *judging(server, "mt-bench", *_four_questions(tmp_path)), timeout=850)
    assert done.returncode == 0, done.stderr
    scores = {(score["metric"], score["phase"]): score for score in json.loads((run / "scores.json").read_text()) if score["evaluator"] == "mt-bench"}
    for phase in ("base", "tuned"):
        items = read_rows(run / "eval" / "mt-bench" / f"{phase}.jsonl")
        assert len(items) == 8, "four questions of two turns"
        unscored = sum(item["verdict"] == "unscored" for item in items)
        if ("average", phase) in scores:
            average = scores["average", phase]
            assert average["unscored"] == unscored and average["n"] + unscored == 8 and 1 <= average["value"] <= 10
        else:
            assert unscored == 8


def test_a_judge_that_gives_no_verdict_is_an_error_that_says_why_and_harms_nothing(server_without_schemas, judging, process, tmp_path):
    """Against a real server: what it says cannot be scored, and no score is made of it."""
    run = _train(process, tmp_path, "--evaluator", "exact-match", "-o", "exact-match.max_new_tokens=24")
    before = (run / "scores.json").read_bytes()
    judge = judging(server_without_schemas, "llm-judge", "-o", "llm-judge.max_new_tokens=24", "-o", "llm-judge.max_tokens=48")
    done = process("eval", str(run), *judge, OPENAI_API_KEY=KEY, timeout=850)
    assert done.returncode == 1 and "none of the 3 answers could be rated" in done.stderr and "holds no JSON object" in done.stderr, done.stderr
    assert (run / "scores.json").read_bytes() == before
    assert not any(KEY.encode() in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())
