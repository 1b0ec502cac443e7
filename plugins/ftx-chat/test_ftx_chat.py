"""`ftx chat` and `ftx generate`: a conversation with a finished run, behind a pipe and on a real pseudo-terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ftx.catalogue import Catalogue
from ftx.console import Console
from ftx.encode import prompt_text
from ftx.errors import DataError, ModelError, RecipeError, RowError
from ftx.generate import Generate
from ftx.testing import ftx, tiny_model_dir
from ftx_chat_conversation import Chat, Conversation, clean, save_row
from ftx_chat_voices import Voices, newest_run, stream

TOOL = {"type": "function", "function": {"name": "clock", "description": "The time.", "parameters": {"type": "object", "properties": {}}}}
QUESTIONS = ["what is 3?", "what is 17?", "who are you?"]


def write_rows(file: Path, rows: list[dict]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A tiny model directory."""
    return tiny_model_dir(tmp_path_factory.mktemp("tiny"))


def trained(folder: Path, tiny: Path, adapter: str, *more: str) -> Path:
    rows = [{"question": f"what is {i}?", "answer": f"it is {i}"} for i in range(24)]
    data = write_rows(folder / f"{adapter}.jsonl", rows)
    answer = ftx(
        *("run", "--model", tiny, "--data", data, "--adapter", adapter, "--dtype", "float32", "--output", folder / adapter, "--quiet", "--observer", "none"),
        *("-o", "trainer.max_steps=12", "-o", "trainer.per_device_train_batch_size=8", "-o", "trainer.gradient_accumulation_steps=1"),
        *("-o", "trainer.learning_rate=0.02", *more),
    )
    assert answer.exit_code == 0, answer.output
    return folder / adapter


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny) -> Path:
    """A finished run of LoRA on question/answer rows."""
    return trained(tmp_path_factory.mktemp("chat"), tiny, "lora")


@pytest.fixture(scope="module")
def full_run(tmp_path_factory, tiny) -> Path:
    """A finished run whose adapter has overwritten the base."""
    return trained(tmp_path_factory.mktemp("chat"), tiny, "full")


@pytest.fixture(scope="module")
def voices(run) -> Voices:
    return Voices(str(run), Catalogue(), Console(quiet=True))


def asked(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def said(voices: Voices, phase: str, question: str, **how) -> str:
    return "".join(voices.answer(phase, asked(question), **{"max_new_tokens": 24, **how}))


# ---- the model in hand -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["base", "tuned"])
def test_a_streamed_answer_is_that_of_generate(voices, phase):
    model, context = voices.model(phase)
    with context:
        wanted = Generate(model, voices.tokenizer)([asked(question) for question in QUESTIONS], max_new_tokens=24)
    assert [said(voices, phase, question) for question in QUESTIONS] == wanted
    assert any(wanted)


def test_base_and_tuned_are_the_models_of_the_evaluation(voices, run, tiny):
    """Base is the model as it came, and having been base once does not change the tuned one."""
    from ftx.models import load_model

    before = said(voices, "tuned", QUESTIONS[0])
    base = said(voices, "base", QUESTIONS[0])
    assert said(voices, "tuned", QUESTIONS[0]) == before != base
    plain = load_model(tiny, dtype=voices.run.dtype, device="cpu")
    assert "".join(stream(plain, voices.tokenizer, asked(QUESTIONS[0]), max_new_tokens=24)) == base


def test_an_answer_that_is_stopped_leaves_the_tuned_model(voices):
    wanted = said(voices, "tuned", QUESTIONS[0])
    with contextlib.closing(voices.answer("base", asked(QUESTIONS[0]), max_new_tokens=24)) as pieces:
        next(pieces)
    assert said(voices, "tuned", QUESTIONS[0]) == wanted


def test_sampling_goes_by_its_seed_and_touches_no_other(voices):
    import torch

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    answers = [said(voices, "base", QUESTIONS[0], temperature=1.5, seed=seed) for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_characters_of_several_tokens_come_whole(voices):
    """The tiny tokenizer has one token a byte."""

    class Says:
        """A model that says a text, whatever it is asked."""

        config = None

        def __init__(self, text: str) -> None:
            self.ids = [*voices.tokenizer(text, add_special_tokens=False)["input_ids"], voices.tokenizer.eos_token_id]
            self.at = 0

        def parameters(self):
            import torch

            return iter([torch.zeros(1)])

        def __call__(self, **_):
            from types import SimpleNamespace

            import torch

            logits = torch.zeros(1, 1, 300)
            logits[0, 0, self.ids[self.at]] = 1
            self.at += 1
            return SimpleNamespace(logits=logits, past_key_values=None)

    text = "Zürich 東京 🙂."
    pieces = list(stream(Says(text), voices.tokenizer, "x", max_new_tokens=99))
    assert pieces == list(text)


@pytest.mark.parametrize(("room", "cut"), [(1000, "max_new_tokens"), (3, "max_new_tokens"), (2, "context")])
def test_the_end_says_what_cut_the_answer(voices, monkeypatch, room, cut):
    asks = len(voices.tokenizer(prompt_text(asked(QUESTIONS[0]), voices.tokenizer), add_special_tokens=False)["input_ids"])
    monkeypatch.setattr("ftx_chat_voices.context_length", lambda model: asks + room)
    pieces = voices.answer("base", asked(QUESTIONS[0]), max_new_tokens=3)
    with pytest.raises(StopIteration) as end:
        while True:
            next(pieces)
    assert end.value.value == cut


def test_a_conversation_too_long_for_the_model_is_refused(voices):
    with pytest.raises(RowError, match=r"the conversation has \d+ tokens, and the model takes 2048"):
        said(voices, "tuned", "x" * 3000)


def test_an_adapter_that_keeps_no_base_says_so(full_run):
    voices = Voices(str(full_run), Catalogue(), Console(quiet=True))
    with pytest.raises(ModelError, match="adapter 'full' keeps no base beside the tuned model."):
        voices.model("base")
    both = Voices(str(full_run), Catalogue(), Console(quiet=True), second=True)
    assert said(both, "base", QUESTIONS[0]) != said(both, "tuned", QUESTIONS[0]) == said(voices, "tuned", QUESTIONS[0])
    alone = Voices(str(full_run), Catalogue(), Console(quiet=True), only="base")
    assert said(alone, "base", QUESTIONS[0]) == said(both, "base", QUESTIONS[0])
    with pytest.raises(ModelError, match="only the base is loaded."):
        alone.model("tuned")


# ---- the conversation ------------------------------------------------------------------------------------------------


def test_each_goes_on_from_its_own_answers():
    talk = Conversation("Be brief.")
    talk.ask("a?")
    talk.add("base", "base a")
    talk.add("tuned", "tuned a")
    talk.ask("b?")
    talk.add("tuned", "tuned b")
    talk.ask("c?")
    assert [one["content"] for one in talk.messages("base")] == ["Be brief.", "a?", "base a", "b?", "tuned b", "c?"]
    assert [one["content"] for one in talk.messages("tuned")] == ["Be brief.", "a?", "tuned a", "b?", "tuned b", "c?"]
    talk.settle()
    assert talk.row("tuned")["completion"] == [{"role": "assistant", "content": "tuned b"}]
    with pytest.raises(RowError, match="no answer of the base model"):
        talk.row("base")


def piped(run: Path, lines: str, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ftx", "chat", str(run), "--max-new-tokens", "8", *more]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, input=lines, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_a_conversation_through_a_pipe(run, voices, tmp_path):
    file = tmp_path / "saved.jsonl"
    file.write_text('{"question": "old", "answer": "row"}')  # no newline behind it
    lines = ["what is 3?", "/save", "/both", "what is \\", "17?", "/system Be brief.", "/save", "/temp warm", "/temp 0.7", "/temp", "/sytem x"]
    done = piped(run, "\n".join([*lines, "/reset", "/save", "//help", "/base", "/quit", "never"]), "--save", str(file))
    assert done.returncode == 0, done.stderr
    out = done.stdout.splitlines()
    assert out[0] == f"tuned: {said(voices, 'tuned', 'what is 3?', max_new_tokens=8)}".splitlines()[0] or "cut at 8 tokens" in done.stdout
    for line in (
        f"(saved to {file} as a row of auto)",
        "(base and tuned)",
        "(system: Be brief.)",
        "Error: 'warm' is not a temperature from 0 to 10.",
        "(temperature 0.7)",
        "Error: no command is called '/sytem'. Did you mean '/system'?",
        "(a new conversation)",
        "Error: there is no answer of the tuned model to save.",
        "(base)",
    ):
        assert line in out, line
    assert sum(line.startswith("base: ") for line in out) == 2 and "never" not in done.stdout
    rows = read_rows(file)
    assert rows[0] == {"question": "old", "answer": "row"}
    assert rows[1].keys() == {"question", "answer"} and rows[1]["question"] == "what is 3?", "the columns that the run was trained on"
    assert rows[2]["question"][0] == {"role": "system", "content": "Be brief."} and rows[2]["question"][-1]["content"] == "what is \n17?"
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[1:]))
    again = ftx("generate", run, "--data", tmp_path / "train.jsonl", "--output", tmp_path / "out.jsonl", "--max-new-tokens", "2", "--json")
    assert again.exit_code == 0, again.output
    assert read_rows(tmp_path / "out.jsonl")[0]["reference"] == rows[1]["answer"]


def test_who_names_no_run_means_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="no run with a trained model lies in runs/."):
        newest_run()
    for number, name in enumerate(("old", "new", "unfinished")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        if name != "unfinished":
            (tmp_path / "runs" / name / "model").mkdir()
            os.utime(tmp_path / "runs" / name / "model", (number, number))
    assert newest_run() == "runs/new"


def test_what_a_model_says_cannot_move_the_cursor():
    assert clean("a\x1b[2Jb\r\x07\tc\n") == "a\ufffd[2Jb\ufffd\ufffd\tc\n"


@pytest.mark.parametrize(("room", "words"), [(1000, " (cut at 3 tokens: /max N)\n"), (2, " (cut: the model's context is full: /reset)\n")])
def test_a_cut_answer_says_what_to_do(voices, tmp_path, monkeypatch, room, words):
    asks = len(voices.tokenizer(prompt_text(asked(QUESTIONS[0]), voices.tokenizer), add_special_tokens=False)["input_ids"])
    monkeypatch.setattr("ftx_chat_voices.context_length", lambda model: asks + room)
    out = io.StringIO()
    talk = Chat(voices, save=tmp_path / "saved.jsonl", max_new_tokens=3, output=out, speaking=("base",))
    assert talk.take(QUESTIONS[0]) and out.getvalue().startswith("base: ") and out.getvalue().endswith(words)
    assert talk.take("/reset") and "(a new conversation)" in out.getvalue()


def test_what_cannot_be_talked_to_or_saved_is_refused(tmp_path, voices):
    answer = ftx("chat", tmp_path)
    assert answer.exit_code == 2 and "not a run (it has no recipe.yaml)." in answer.output
    row = {"prompt": asked("a?"), "completion": [{"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match="a turn is saved as one line of JSON."):
        save_row(row, tmp_path / "turns.txt", voices.hooks, voices.run)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match="cannot be written"):
        save_row(row, tmp_path / "folder.jsonl", voices.hooks, voices.run)


# ---- a terminal ------------------------------------------------------------------------------------------------------


class Terminal:
    """`ftx chat` on a pseudo-terminal of its own, which turns Ctrl-C into the signal as a real one does."""

    def __init__(self, *words: str, columns: int = 100) -> None:
        self.pid, self.file = pty.fork()
        if not self.pid:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it, and so would all that it starts
            os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TERM="xterm", COLUMNS=str(columns), LINES="40")
            os.execv(sys.executable, [sys.executable, "-m", "ftx", "chat", *words])
        self.seen = ""

    def wait(self, pattern: str, seconds: float = 300) -> str:
        """Read until the pattern stands behind what was read before; what came."""
        end, came = time.monotonic() + seconds, ""
        while time.monotonic() < end:
            if select.select([self.file], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    came = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", came + os.read(self.file, 65536).decode("utf-8", "replace"))
            if re.search(pattern, came, re.DOTALL):
                self.seen += came
                return came
        raise AssertionError(f"{pattern!r} did not come: {self.seen[-500:]!r} then {came[-2000:]!r}")

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def press_until(self, key: str, pattern: str) -> str:
        """Press a key until the pattern comes: CPython's readline loses Ctrl-C between a letter's echo and its wait for the next one."""
        for _ in range(20):
            self.type(key)
            with contextlib.suppress(AssertionError):
                return self.wait(pattern, seconds=5)
        raise AssertionError(f"{pattern!r} does not come after {key!r}")

    def status(self) -> int:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            with contextlib.suppress(OSError):  # where nobody reads, it cannot end
                if select.select([self.file], [], [], 0.1)[0]:
                    os.read(self.file, 65536)
            time.sleep(0.05)
        raise AssertionError("it does not end")

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.file)


@pytest.fixture
def terminal():
    opened: list[Terminal] = []

    def start(*words: str, **how) -> Terminal:
        opened.append(Terminal(*words, **how))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(run, terminal, tmp_path, monkeypatch):
    monkeypatch.setenv("FTX_CACHE", str(tmp_path / "cache"))
    screen = terminal(str(run), "--max-new-tokens", "2000")
    screen.wait("tuned> ")
    screen.type("/base\n")
    screen.wait(r"\(base\).*base> ")
    screen.type("tell me all\n")
    screen.wait(r"base: .{10}")  # the random model goes on for two thousand tokens
    screen.type("\x03")
    screen.wait(r"\(stopped\).*base> ")
    screen.type("half a li")
    screen.wait("half a li")  # Ctrl-C throws away what has not been read yet, and readline would wait for it
    screen.press_until("\x03", r"Ctrl-D or /quit leaves.*base> ")
    screen.type("/save\n")  # what it had said is a turn of the conversation
    screen.wait(r"saved to .*base> ")
    screen.type("\x04")
    assert screen.status() == 0
    row = read_rows(run / "chat.jsonl")[-1]
    assert row["question"] == "tell me all" and row["answer"]
    assert "tell me all" in (tmp_path / "cache" / "chat_history").read_text()


def test_both_stand_side_by_side_on_a_wide_terminal(run, terminal, voices):
    screen = terminal(str(run), "--max-new-tokens", "4")
    screen.wait("tuned> ")
    screen.type("/both\nwhat is 3?\n")
    screen.wait(r"base {20,}tuned.*" + re.escape(said(voices, "tuned", "what is 3?", max_new_tokens=4)) + r" \(cut at 4.*base\+tuned> ")
    screen.type("/quit\n")
    assert screen.status() == 0


# ---- ftx generate ----------------------------------------------------------------------------------------------------


def test_answers_in_batch_beside_the_prompts(run, voices, tmp_path):
    data = write_rows(tmp_path / "data.jsonl", [{"question": question, "answer": "yes"} for question in QUESTIONS])
    outputs = {}
    for phase, more in (("tuned", []), ("base", ["--base"])):
        file = tmp_path / f"{phase}.jsonl"
        answer = ftx("generate", run, "--data", data, "--output", file, "--max-new-tokens", 24, "--json", *more)
        assert answer.exit_code == 0, answer.output
        assert json.loads(answer.stdout) == {"status": "done", "output": str(file), "answers": 3, "phase": phase}
        outputs[phase] = read_rows(file)
        assert [row["answer"] for row in outputs[phase]] == [said(voices, phase, question) for question in QUESTIONS]
        assert outputs[phase][1] | {"answer": ""} == {
            "prompt": asked(QUESTIONS[1]),
            "answer": "",
            "reference": "yes",
            "file": str(data),
            "line": 2,
            "phase": phase,
        }
    assert outputs["base"] != outputs["tuned"]


@pytest.mark.parametrize(
    ("rows", "more", "prompt", "reference"),
    [
        ([{"prompt": "hello"}], [], asked("hello"), None),
        ([{"prompt": "hello"}], ["--raw"], "hello", None),
        ([{"messages": asked("hello")}], [], asked("hello"), None),
        ([{"prompt": "hello", "tools": json.dumps([TOOL])}], [], [{**asked("hello")[0], "tools": [TOOL]}], None),
        ([{"messages": asked("hello"), "tools": [TOOL]}], [], [{**asked("hello")[0], "tools": [TOOL]}], None),
        ([{"messages": [*asked("hello"), {"role": "assistant", "content": "Hi."}]}], [], asked("hello"), "Hi."),
        ([{"instruction": "hello", "output": "Hi."}], ["--formatter", "alpaca"], asked("hello"), "Hi."),
        ([{"q": "hello", "answer": "Hi."}], ["-o", "formatter.prompt_column=q", "--formatter", "completion"], "hello", "Hi."),
    ],
)
def test_prompts_alone_and_other_formats(run, tmp_path, rows, more, prompt, reference):
    if "--formatter" in more and "completion" in more:
        more = [*more, "-o", "formatter.completion_column=answer"]
    file = tmp_path / "out.jsonl"
    answer = ftx("generate", run, "--data", write_rows(tmp_path / "in.jsonl", rows), "--output", file, "--max-new-tokens", 2, *more)
    assert answer.exit_code == 0, answer.output
    (row,) = read_rows(file)
    assert row["prompt"] == prompt and row.get("reference") == reference
    assert ("no row has an answer that the formatter reads" in answer.output) is (reference is None)


@pytest.mark.parametrize(
    ("rows", "more", "problem"),
    [
        (
            [{"prompt": "hello", "completion": "Hi."}, {"prompt": "you", "completion": ""}],
            ["--formatter", "completion"],
            "in.jsonl:2: field 'completion' is empty.",
        ),
        ([{"prompt": "hello", "reply": "Hi."}, {"prompt": "you"}], ["--formatter", "completion", "-o", "formatter.completion_column=reply"], "in.jsonl:2: "),
        ([{"messages": [*asked("hello"), {"role": "assistant", "content": "Hi."}]}, {"messages": asked("you")}], ["--formatter", "messages"], "in.jsonl:2: "),
    ],
)
def test_one_bad_row_does_not_make_a_file_one_of_prompts_alone(run, tmp_path, rows, more, problem):
    answer = ftx("generate", run, "--data", write_rows(tmp_path / "in.jsonl", rows), "--output", tmp_path / "out.jsonl", *more)
    assert answer.exit_code == 2 and problem in answer.output
    assert "Prompts are taken alone only where no row has an answer" in answer.output and not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(("tools", "problem"), [("[{", "field 'tools' is no JSON"), ("[3]", "field 'tools' must be a list of objects")])
def test_tools_that_are_none(run, tmp_path, tools, problem):
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "hello", "tools": tools}])
    answer = ftx("generate", run, "--data", rows, "--output", tmp_path / "out.jsonl")
    assert answer.exit_code == 2 and f"in.jsonl:1: {problem}" in answer.output


def test_what_generate_refuses_leaves_nothing(run, tmp_path):
    rows = write_rows(tmp_path / "in.jsonl", [{"prompt": "hello"}, {"prompt": 3}])
    answer = ftx("generate", run, "--data", rows, "--output", tmp_path / "out.jsonl")
    assert answer.exit_code == 2 and "in.jsonl:2: field 'prompt' holds neither a text nor messages." in answer.output
    answer = ftx("generate", run, "--data", rows, "--output", tmp_path)
    assert answer.exit_code == 2 and "cannot be written." in answer.output
    answer = ftx("generate", run, "--data", rows, "--output", rows)
    assert answer.exit_code == 2 and "in.jsonl holds the prompts, and would be written over." in answer.output and len(read_rows(rows)) == 2
    other = write_rows(tmp_path / "other.jsonl", [{"city": "Bern"}])
    answer = ftx("generate", run, "--data", other, "--output", tmp_path / "out.jsonl")
    assert answer.exit_code == 2 and "Prompts without answers stand in a column called prompt, or messages." in answer.output
    assert not (tmp_path / "out.jsonl").exists()
