"""Asking a judge: no verdict is lost, doubled or misread whatever the server does; nothing is asked twice; no key gets out."""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import hashlib
import json
import logging
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import ftx_llm_judge_asking as asking
from ftx.errors import RunError
from ftx.ledger import Ledger
from ftx.recipe import Recipe
from ftx.run import Run
from ftx.testing.tiny import tiny_model_dir
from ftx_llm_judge_asking import Ask, Judge, Unreadable
from ftx_llm_judge_backends import LONGEST_WAIT, retry_after
from ftx_llm_judge_options import Judging

sys.path.insert(0, str(Path(__file__).parent))
from faulty_proxy import FINAL, PASSING, faulty
from judge_server import served

KEY = "sk-test-0123456789abcdef"
SCHEMA = {"type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"], "additionalProperties": False}
#: The server's count for each answer: see judge_server.
GIVEN, MADE = 100, 10


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(asking, "FIRST_WAIT", 0.01)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def run():
    said = []
    return Run(recipe=Recipe(), ledger=Ledger(), say=said.append, notes={"said": said})


def options(address, tmp_path, **given):
    return Judging(**{"model": "judge", "base_url": address, "cache": str(tmp_path / "cache.sqlite"), "timeout": 30.0, **given})


def score(user):
    """The verdict that belongs to a question, and to no other."""
    return int(hashlib.sha256(user.encode()).hexdigest()[:6], 16)


def by_question(system, user):
    return json.dumps({"score": score(user)})


def parse(text):
    match = re.fullmatch(r'\{"score": (\d+)\}', text)
    if not match:
        raise Unreadable(f"no score in {text[:40]!r}")
    return int(match[1])


def questions(count):
    return [Ask(system="Judge.", user=f"How good is answer {number}?", schema=SCHEMA) for number in range(count)]


def judged(asks, run, address, tmp_path, parse=parse, **given):
    judge = Judge(options(address, tmp_path, **given), "judge", run)
    try:
        return judge.verdicts(asks, parse), judge.usage
    finally:
        judge.close()


def right(asks, verdicts):
    return [verdict.value for verdict in verdicts] == [score(ask.user) for ask in asks]


def kept(file):
    with contextlib.closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return connection.execute("SELECT count(*) FROM answers").fetchone()[0]


# ---- Faults


@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.full)])
def test_a_third_of_the_requests_fail_and_no_verdict_is_lost_doubled_or_misread(count, run, tmp_path):
    asks = questions(count)
    with served(by_question) as upstream, faulty(upstream, silence=4.0) as proxy:
        verdicts, usage = judged(asks, run, proxy.address, tmp_path, timeout=3.0)
    print(f"\n{count} verdicts, {proxy.requests} requests, of which failed:")
    for fault, times in proxy.done.items():
        print(f"{times:5} {fault}")
    assert sum(proxy.done.values()) >= count // 3 and set(proxy.done) == set(PASSING)
    assert right(asks, verdicts) and not any(verdict.reason for verdict in verdicts)
    assert kept(tmp_path / "cache.sqlite") == count
    assert usage.calls == sum(verdict.asked for verdict in verdicts) >= proxy.requests  # a connection may fail before it arrives
    assert usage.output_tokens == sum(verdict.output_tokens for verdict in verdicts) == MADE * (count + proxy.done["another language"])


@pytest.mark.parametrize("fault", PASSING)
def test_each_fault_passes(fault, run, tmp_path):
    asks = questions(2)
    with served(by_question) as upstream, faulty(upstream, [fault], every=1, silence=3.0) as proxy:
        verdicts, _ = judged(asks, run, proxy.address, tmp_path, timeout=2.0 if fault == "silence" else 30.0)
    assert right(asks, verdicts) and proxy.done[fault] >= 2
    assert all(verdict.asked >= 2 for verdict in verdicts)


@pytest.mark.parametrize("fault", ["500", "dropped connection", "half a body", "HTML", "wrong shape"])
def test_a_fault_that_does_not_pass_leaves_an_item_unscored_with_its_reason(fault, run, tmp_path):
    reasons = {
        "500": "HTTP 500: internal error",
        "dropped connection": "the connection failed",
        "half a body": "the connection failed",
        "HTML": "the server's answer is not in the form of an answer: <html>",
        "wrong shape": 'the server\'s answer is not in the form of an answer: {"choices"',
    }
    with served(by_question) as upstream, faulty(upstream, [fault], every=2) as proxy:
        verdicts, _ = judged(questions(4), run, proxy.address, tmp_path, retries=0, concurrency=1)
    assert [verdict.value is None for verdict in verdicts] == [True, False, True, False]
    assert reasons[fault] in verdicts[0].reason and verdicts[1].reason == ""
    assert kept(tmp_path / "cache.sqlite") == 2


def test_a_fault_is_asked_again_as_often_as_the_options_say(run, tmp_path):
    with canned((500, '{"error": {"message": "down"}}')) as (address, requests):
        (verdict,), _ = judged(questions(1), run, address, tmp_path, retries=2)
    assert verdict.reason == "HTTP 500: down (tried 3 times)" and verdict.asked == len(requests) == 3


@pytest.mark.parametrize("fault", FINAL)
def test_a_final_error_is_not_asked_again(fault, run, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    reasons = {
        "insufficient_quota": "the quota is used up (HTTP 429: You exceeded your current quota)",
        "400": "HTTP 400: the prompt is too long",
        "401": "HTTP 401: Incorrect key: Bearer [key]",
        "403": "HTTP 403: not for Bearer [key]",
        "404": "HTTP 404: no such model",
    }
    with served(by_question) as upstream, faulty(upstream, [fault], every=1) as proxy:
        verdicts, _ = judged(questions(12), run, proxy.address, tmp_path, concurrency=2)
    assert {verdict.reason for verdict in verdicts} == {reasons[fault]}
    assert {verdict.value for verdict in verdicts} == {None}
    # what holds for one request only is asked of each, what holds for all of those that were under way
    assert proxy.requests == 12 if fault in ("400", "403") else proxy.requests <= 2


def test_a_rate_limit_is_waited_for_as_long_as_the_server_says(run, tmp_path):
    with served(by_question) as upstream, faulty(upstream, ["429, Retry-After in seconds"], every=1) as proxy:
        judged(questions(1), run, proxy.address, tmp_path)
    ((first, second),) = proxy.arrived.values()
    assert 1.0 <= second - first < 10


def test_retry_after_is_read_as_seconds_or_date_and_capped():
    soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=20)
    assert 15 < retry_after({"retry-after": email.utils.format_datetime(soon, usegmt=True)}) <= 20
    given = {"2": 2.0, "1.5": 1.5, "86400": LONGEST_WAIT, "inf": LONGEST_WAIT, "nan": 0.0, "-1": 0.0, "soon": 0.0, "": 0.0}
    assert {text: retry_after({"retry-after": text}) for text in given} == given
    assert retry_after({}) == 0.0


def test_waits_grow_and_have_jitter(monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr(asking, "FIRST_WAIT", 1.0)

    def waits(attempt, failure):
        state = SimpleNamespace(attempt_number=attempt, outcome=SimpleNamespace(exception=lambda: failure))
        return [asking._wait(state) for _ in range(20)]

    passing = asking.Passing("slow down")
    assert all(1 <= wait <= 2 for wait in waits(1, passing)) and len(set(waits(1, passing))) > 1
    assert all(8 <= wait <= 9 for wait in waits(4, passing))
    assert set(waits(1, asking.Passing("slow down", wait=7.0))) == {7.0}
    assert set(waits(20, passing)) == {LONGEST_WAIT}


# ---- Repair


def test_an_unreadable_answer_is_asked_for_once_more_and_then_unscored(run, tmp_path):
    seen = []
    with served(lambda system, user: "four, I think", seen) as address:
        (verdict,), usage = judged(questions(1), run, address, tmp_path)
    assert (verdict.value, verdict.reason, verdict.text) == (None, "no score in 'four, I think'", "four, I think")
    assert (verdict.asked, usage.calls, verdict.output_tokens) == (2, 2, 2 * MADE)
    assert [message["role"] for message in seen[1]["messages"]] == ["system", "user", "assistant", "user"]
    assert seen[1]["messages"][3]["content"].startswith("Your answer could not be read: no score in 'four, I think'. Answer again")
    assert kept(tmp_path / "cache.sqlite") == 0


def test_an_answer_that_was_cut_says_so(run, tmp_path):
    body = {"choices": [{"message": {"content": '{"sco'}, "finish_reason": "length"}]}
    with canned(json.dumps(body)) as (address, _):
        (verdict,), usage = judged(questions(1), run, address, tmp_path, max_tokens=7)
    assert verdict.reason == "the answer was cut at max_tokens=7: no score in '{\"sco'"
    assert usage.output_tokens == 2 * 2, "where the server counts no tokens they are estimated"


# ---- Cache


def test_what_is_known_is_not_asked_again(run, tmp_path):
    seen, asks = [], questions(6)
    with served(by_question, seen) as address:
        first, _ = judged(asks[:4], run, address, tmp_path)
        second, usage = judged([*asks, *asks], run, address, tmp_path)
    assert right([*asks, *asks], second) and [verdict.cached for verdict in second[:6]] == [True] * 4 + [False] * 2
    assert len(seen) == 6 and usage.cached == 4 and second[0].asked == 0
    assert [verdict.input_tokens for verdict in first] == [verdict.input_tokens for verdict in second[:4]] == [GIVEN] * 4


def test_everything_that_changes_the_answer_is_in_the_key(run, tmp_path):
    seen, ask = [], Ask(system="Judge.", user="Good?", schema=SCHEMA)
    changed = [{"system": "Judge!"}, {"user": "Good!"}, {"schema": None}, {"schema_name": "x"}, {"temperature": 0.5}, {"max_tokens": 9}, {"sample": 1}]
    same = [{"what": "item 3"}, {"temperature": 0}, {"max_tokens": 1024}]
    asks = [ask, *(Ask(**{**vars(ask), **change}) for change in changed), *(Ask(**{**vars(ask), **change}) for change in same)]
    with served(by_question, seen) as address, served(by_question, seen) as other:
        judged(asks, run, address, tmp_path)
        assert len(seen) == 1 + len(changed)
        judged([ask], run, other, tmp_path)
        judged([ask], run, f"{address}/", tmp_path)
        assert len(seen) == 2 + len(changed)
        judge = Judge(options(address, tmp_path, model="judge-2"), "judge-2", run)
        judge.verdicts([ask], parse)
        assert len(seen) == 3 + len(changed)


def test_no_cache_is_kept_where_none_is_wanted(run, tmp_path, monkeypatch):
    monkeypatch.setenv("FTX_CACHE", str(tmp_path / "ftx"))
    with served(by_question, seen := []) as address:
        for _ in range(2):
            judged(questions(1), run, address, tmp_path, cache="none")
        assert len(seen) == 2 and not list(tmp_path.iterdir())
        judged(questions(1), run, address, tmp_path, cache="")
    assert kept(tmp_path / "ftx" / "judge.sqlite") == 1


def test_a_file_that_is_no_cache_is_refused(run, tmp_path):
    (tmp_path / "cache.sqlite").write_text("not a database, but long enough to be looked at by sqlite as one" * 20)
    with pytest.raises(RunError, match=r"the judge's cache .*cache.sqlite cannot be used: file is not a database"):
        Judge(options("http://127.0.0.1:1/v1", tmp_path), "judge", run)


def test_a_cache_that_cannot_be_written_costs_no_verdict(run, tmp_path, monkeypatch):
    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("ftx_llm_judge_cache.Cache.put", full)
    with served(by_question) as address:
        verdicts, _ = judged(questions(1), run, address, tmp_path)
    assert right(questions(1), verdicts)
    assert run.notes["said"] == [f"warning: a verdict could not be written to {tmp_path / 'cache.sqlite'}: database or disk is full"]


def test_an_answer_that_todays_parser_cannot_read_is_asked_again(run, tmp_path):
    with served(by_question, seen := []) as address:
        judged(questions(1), run, address, tmp_path, parse=lambda text: text)

        def strict(text):
            if len(seen) < 2:
                raise Unreadable("not that one")
            return 1

        (verdict,), _ = judged(questions(1), run, address, tmp_path, parse=strict)
    assert verdict.value == 1 and len(seen) == 2 and kept(tmp_path / "cache.sqlite") == 1


ELSEWHERE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so do its children
sys.path.insert(0, {here!r})
from ftx.ledger import Ledger; from ftx.recipe import Recipe; from ftx.run import Run
from ftx_llm_judge_asking import Judge
from test_asking import options, parse, questions, right
from pathlib import Path
judge = Judge(options({address!r}, Path({directory!r}), concurrency=2), "judge", Run(recipe=Recipe(), ledger=Ledger()))
print("ready", flush=True)
asks = questions({count})
sys.exit(0 if right(asks, judge.verdicts(asks, parse)) else 5)
"""


def elsewhere(address, tmp_path, count):
    """Another process that asks the same judge the same questions."""
    code = ELSEWHERE.format(here=str(Path(__file__).parent), address=address, directory=str(tmp_path), count=count)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_interrupted_and_run_again_only_what_is_missing_is_asked(run, tmp_path):
    asks, seen, some, sent = questions(12), [], threading.Event(), threading.Event()

    def slow(system, user):
        if len(seen) >= 5:
            some.set()
            sent.wait(60)  # it is still asking when the signal comes,
            time.sleep(1)  # and has seen it when the answers do
        return by_question(system, user)

    with served(slow, seen) as address:
        process = elsewhere(address, tmp_path, len(asks))
        assert some.wait(120)
        process.send_signal(signal.SIGINT)
        sent.set()
        _, error = process.communicate(timeout=60)
        assert process.returncode != 0 and "KeyboardInterrupt" in error
        before = len(seen)
        assert 5 <= before < 12 and kept(tmp_path / "cache.sqlite") == before, "what was under way is kept too"
        verdicts, _ = judged(asks, run, address, tmp_path)
    assert right(asks, verdicts) and len(seen) == 12
    assert len({json.dumps(request["messages"]) for request in seen}) == 12


def test_two_processes_share_one_cache(run, tmp_path):
    with served(by_question, seen := []) as address:
        processes = [elsewhere(address, tmp_path, 30) for _ in range(2)]
        for process in processes:
            _, error = process.communicate(timeout=180)
            assert process.returncode == 0, error
        assert kept(tmp_path / "cache.sqlite") == 30 and 30 <= len(seen) <= 60
        before = len(seen)
        verdicts, _ = judged(questions(30), run, address, tmp_path)
    assert right(questions(30), verdicts) and len(seen) == before


# ---- Caps, dry run, usage


def test_the_cap_on_calls_stops_cleanly(run, tmp_path):
    with served(by_question, seen := []) as address:
        verdicts, usage = judged(questions(12), run, address, tmp_path, max_calls=5)
        assert len(seen) == usage.calls == 5
        assert sum(verdict.value is not None for verdict in verdicts) == 5
        assert {verdict.reason for verdict in verdicts if verdict.value is None} == {"the cap of 5 calls is reached"}
        # the cap holds for the whole run, and what is known costs none of it
        again, usage = judged(questions(12), run, address, tmp_path, max_calls=5)
        assert len(seen) == 5 and [verdict.value for verdict in again] == [verdict.value for verdict in verdicts] and usage.cached == 5


def test_the_cap_on_money_is_never_exceeded(run, tmp_path):
    # an answer costs 100 * $1 + 10 * $10 a million, $0.0002, and could cost at most 100 tokens * $10 a million more
    with served(by_question, seen := []) as address:
        verdicts, usage = judged(questions(40), run, address, tmp_path, max_cost=0.004, max_tokens=100, prices={"judge": [1.0, 10.0]})
    scored = sum(verdict.value is not None for verdict in verdicts)
    assert 10 <= scored == len(seen) <= 20 and usage.cost == pytest.approx(scored * 0.0002) and usage.cost <= 0.004
    assert {verdict.reason for verdict in verdicts if verdict.value is None} == {"the cap of $0.004 is reached"}


def test_a_dry_run_asks_nothing_and_estimates(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)  # it needs no client
    asks = [Ask(system="s" * 400_000, user="u" * 399_999 + str(number % 2)) for number in range(3)]
    given = {"dry_run": True, "prices": {"judge": [2.5, 10.0]}, "max_tokens": 80_000}
    verdicts, usage = judged(asks, run, "http://127.0.0.1:1/v1", tmp_path, **given)
    assert [(verdict.value, verdict.reason, verdict.asked) for verdict in verdicts] == [(None, "dry run", 0)] * 3
    assert usage.line() == "judge judge would make 2 calls, about 400k input and up to 160k output tokens, $1.00 to $2.60"


def test_usage_is_added_up_over_a_jury_and_noted_for_the_manifest(run, tmp_path):
    with served(by_question) as address:
        given = {"model": ["judge", "other"], "prices": {"judge": [1.0, 2.0], "other": "[10, 20]"}}
        judged(questions(3), run, address, tmp_path, **given)
        other = Judge(options(address, tmp_path, **given), "other", run)
        other.verdicts(questions(2), parse)
        judged(questions(1), run, address, tmp_path, **given)
    counts = {"calls": 3, "cached": 1, "input_tokens": 300, "output_tokens": 30, "cost": pytest.approx(0.00036)}
    assert run.notes["usage"]["llm-judge"]["judge"] == counts
    assert other.usage.line() == "judges judge, other: 5 calls, 1 from the cache, 500 + 50 tokens, $0.0028"
    assert json.dumps(run.notes)


def test_usage_without_prices_has_no_cost(run, tmp_path):
    with served(by_question) as address:
        _, usage = judged(questions(1), run, address, tmp_path)
    assert usage.cost is None and usage.line() == "judge judge: 1 calls, 100 + 10 tokens"


# ---- Keys


def test_no_key_gets_out(run, tmp_path, monkeypatch, capfd, caplog):
    """A server that repeats the key in errors and answers, clients told to log all they can, and every fault there is."""
    monkeypatch.setenv("SECRET", KEY)
    monkeypatch.setenv("OPENAI_LOG", "debug")
    caplog.set_level(logging.DEBUG)
    talkative = {"choices": [{"message": {"content": f"you sent {KEY}"}, "finish_reason": "stop"}]}
    outcomes = []
    with served(by_question) as upstream, canned(json.dumps(talkative)) as (echo, _), faulty(upstream, [*PASSING, *FINAL], every=1, silence=2.0) as proxy:
        for fault in (*PASSING, *FINAL):
            proxy.faults = [fault]
            asks = [Ask(system="Judge.", user=f"{fault} {KEY[:5]}")]
            outcomes += judged(asks, run, proxy.address, tmp_path, key_env="SECRET", timeout=1.5, retries=1)[0]
        outcomes += judged(questions(1), run, echo, tmp_path, key_env="SECRET", parse=lambda text: text)[0]
        judge = Judge(options(echo, tmp_path, key_env="SECRET"), "judge", run)
        with pytest.raises(ZeroDivisionError) as raised:  # a traceback with everything in it
            judge.verdicts([Ask(system="Judge.", user="traceback")], lambda text: 1 / 0)
    assert outcomes[-1].value == "you sent [key]"
    out, error = capfd.readouterr()
    texts = [out, error, caplog.text, repr(outcomes), repr(judge), repr(vars(judge.usage)), str(run.notes), str(raised.getrepr(showlocals=False))]
    assert not [text for text in texts if KEY in text]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert files and not [file for file in files if KEY.encode() in file.read_bytes()]


def test_the_key_is_sent_and_a_placeholder_is_no_secret(run, tmp_path, monkeypatch):
    body = json.dumps({"choices": [{"message": {"content": "none of it"}, "finish_reason": "stop"}]})
    monkeypatch.setenv("SECRET", "none")
    with canned(body) as (address, requests):
        (verdict,), _ = judged(questions(1), run, address, tmp_path, key_env="SECRET", parse=lambda text: text)
    assert requests[0]["authorization"] == "Bearer none" and verdict.value == "none of it"


# ---- Back ends


@contextlib.contextmanager
def canned(*bodies):
    """A server that gives (status, body) or body in turn, the last one from then on; and what it was sent, with its headers."""
    requests, left = [], list(bodies)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({"path": self.path, **{name.lower(): value for name, value in self.headers.items()}, "body": body})
            answer = left.pop(0) if len(left) > 1 else left[0]
            status, text = answer if isinstance(answer, tuple) else (200, answer)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


OPENAI = json.dumps({"choices": [{"message": {"content": '{"score": 3}'}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 5, "completion_tokens": 2}})
CLAUDE = json.dumps({"content": [{"type": "text", "text": '{"score": 3}'}], "stop_reason": "end_turn", "usage": {"input_tokens": 5, "output_tokens": 2}})


def refusal(message, **more):
    return 400, json.dumps({"error": {"message": message, **more}})


def test_what_an_openai_compatible_server_is_sent(run, tmp_path):
    with canned(OPENAI) as (address, requests):
        (verdict,), _ = judged(questions(1), run, address, tmp_path)
    assert (verdict.value, verdict.input_tokens, verdict.output_tokens) == (3, 5, 2)
    sent = requests[0]["body"]
    assert requests[0]["path"] == "/v1/chat/completions" and (sent["model"], sent["temperature"], sent["max_tokens"]) == ("judge", 0.0, 1024)
    assert sent["messages"] == [{"role": "system", "content": "Judge."}, {"role": "user", "content": "How good is answer 0?"}]
    assert sent["response_format"] == {"type": "json_schema", "json_schema": {"name": "verdict", "schema": SCHEMA, "strict": True}}


def test_no_schema_is_sent_when_it_is_off(run, tmp_path):
    with canned(OPENAI) as (address, requests):
        judged(questions(1), run, address, tmp_path, structured="off")
    assert "response_format" not in requests[0]["body"]


@pytest.mark.parametrize(
    ("error", "gone", "new", "warned"),
    [
        (refusal("Unsupported value: 'temperature' does not support 0.0", param="temperature", code="unsupported_value"), "temperature", {}, "temperature"),
        (refusal("Use 'max_completion_tokens' instead.", param="max_tokens"), "max_tokens", {"max_completion_tokens": 1024}, None),
    ],
)
def test_what_a_server_refuses_is_left_out_from_then_on(error, gone, new, warned, run, tmp_path):
    with canned(error, OPENAI) as (address, requests):
        verdicts, usage = judged(questions(3), run, address, tmp_path, concurrency=1)
    assert [verdict.value for verdict in verdicts] == [3, 3, 3] and len(requests) == 4 and usage.calls == 3
    assert all(gone not in request["body"] and new.items() <= request["body"].items() for request in requests[1:])
    told = f"warning: the judge judge does not take {warned}, and is asked without it from now on."
    assert run.notes["said"] == ([told] if warned else [])


def test_a_schema_that_a_server_refuses_is_asked_for_in_llama_cpps_form_and_then_left_out(run, tmp_path):
    error = (500, json.dumps({"error": {"message": "1 validation error: {'loc': ('body', 'response_format', 'type')}"}}))
    with canned(error, refusal("'response_format' is not supported"), OPENAI) as (address, requests):
        verdicts, _ = judged(questions(2), run, address, tmp_path, concurrency=1)
    assert [verdict.value for verdict in verdicts] == [3, 3]
    form = [request["body"].get("response_format", {}) for request in requests]
    assert [one.get("type") for one in form] == ["json_schema", "json_object", None, None] and form[1]["schema"] == SCHEMA
    assert run.notes["said"] == ["warning: the judge judge does not take response_format, and is asked without it from now on."]


def test_a_400_for_another_reason_is_final(run, tmp_path):
    with canned(refusal("'max_tokens' or 'max_completion_tokens' is too large: 1024")) as (address, requests):
        (verdict,), _ = judged(questions(1), run, address, tmp_path)
    assert verdict.reason == "HTTP 400: 'max_tokens' or 'max_completion_tokens' is too large: 1024" and len(requests) == 1


def test_anthropic_is_asked_in_its_own_way(run, tmp_path, monkeypatch):
    monkeypatch.setenv("ANTHROPIC_API_KEY", KEY)
    overloaded = (529, json.dumps({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}))
    with canned(overloaded, CLAUDE) as (address, requests):
        judge = Judge(options(address.removesuffix("/v1"), tmp_path, model="anthropic:claude-x"), "anthropic:claude-x", run)
        (verdict,) = judge.verdicts(questions(1), parse)
    assert not verdict.reason
    assert (verdict.value, verdict.input_tokens, verdict.output_tokens, verdict.asked, verdict.model) == (3, 5, 2, 2, "anthropic:claude-x")
    sent = requests[1]["body"]
    assert requests[1]["path"] == "/v1/messages" and requests[1]["authorization"] == f"Bearer {KEY}"
    assert (sent["model"], sent["system"]) == ("claude-x", "Judge.") and "temperature" not in sent
    assert sent["messages"] == [{"role": "user", "content": "How good is answer 0?"}] and sent["max_tokens"] == 1024
    assert sent["output_config"]["format"]["type"] == "json_schema" and "score" in sent["output_config"]["format"]["schema"]["properties"]


def test_a_local_model_judges_in_this_process(run, tmp_path):
    model = f"local:{tiny_model_dir(tmp_path / 'model')}"
    given = options(None, tmp_path, model=model, max_tokens=8)
    asks, tries = [Ask(system="Judge.", user=f"Answer {number}") for number in range(40)], []

    def second_try(text):
        tries.append(text)
        if len(tries) == 1:
            raise Unreadable("not yet")
        return len(text)

    judge = Judge(given, model, run)
    verdicts = judge.verdicts(asks, second_try)
    judge.close()
    assert [verdict.value for verdict in verdicts] == [len(verdict.text) for verdict in verdicts] and judge.usage.calls == 41
    assert sorted(verdict.asked for verdict in verdicts) == [1] * 39 + [2] and all(verdict.output_tokens > 0 for verdict in verdicts)
    again = Judge(given, model, run).verdicts(asks, len)
    assert [verdict.text for verdict in again] == [verdict.text for verdict in verdicts] and all(verdict.cached for verdict in again)


def test_half_a_surrogate_pair_costs_nothing(run, tmp_path):
    with served(by_question) as address:
        (verdict,), _ = judged([Ask(system="Judge.", user="broken \ud83d here")], run, address, tmp_path)
    assert verdict.value == score("broken ? here")


def test_a_missing_client_is_named_with_its_command(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(RunError, match=r"the judge judge needs the openai client\.\npip install 'ftx-llm-judge\[openai\]'"):
        judged(questions(1), run, "http://127.0.0.1:1/v1", tmp_path)
