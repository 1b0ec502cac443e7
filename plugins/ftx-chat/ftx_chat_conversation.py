"""The conversation behind `ftx chat`: what is typed, what is answered, and the commands that begin with a slash."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ftx.encode import Messages
from ftx.errors import DataError, FtxError, RowError, did_you_mean
from ftx.hooks import Hooks
from ftx.models import cache_directory
from ftx.run import Run
from ftx_chat_voices import Voices

#: Narrower terminals get base and tuned one below the other.
SIDE_BY_SIDE = 60
HISTORY = 1000


class Conversation:
    """The turns so far. Base and tuned each go on from their own answers where they have given one."""

    def __init__(self, system: str = "") -> None:
        self.system = system
        self.turns: list[tuple[str, dict[str, str]]] = []

    def ask(self, question: str) -> None:
        self.turns.append((question, {}))

    def add(self, phase: str, answer: str) -> None:
        self.turns[-1][1][phase] = answer

    def settle(self) -> None:
        """Forget a question that nobody answered: the next one would follow it without an answer between them."""
        if self.turns and not self.turns[-1][1]:
            self.turns.pop()

    def messages(self, phase: str) -> Messages:
        """What the model of a phase reads, up to the last question."""
        made: Messages = [{"role": "system", "content": self.system}] if self.system else []
        for question, answers in self.turns[:-1]:
            said = answers.get(phase) or next(iter(answers.values()))
            made += [{"role": "user", "content": question}, {"role": "assistant", "content": said}]
        return made + ([{"role": "user", "content": self.turns[-1][0]}] if self.turns else [])

    def row(self, phase: str) -> dict[str, Any]:
        """The last turn as a row of type prompt-completion: what went before it is context. RowError if there is none."""
        answer = self.turns[-1][1].get(phase, "") if self.turns else ""
        if not answer.strip():
            raise RowError(f"there is no answer of the {phase} model to save")
        return {"prompt": self.messages(phase), "completion": [{"role": "assistant", "content": answer}]}


def save_row(row: dict[str, Any], file: Path, hooks: Hooks, run: Run) -> str:
    """Append a formatted row to a .jsonl file in the form that the run's formatter reads; the name of that form.

    Where the formatter has no `unformat_row`, or cannot hold the row, it becomes a row of messages. Raises DataError.
    """
    if file.suffix.lower() != ".jsonl":
        raise DataError(f"{file}: a turn is saved as one line of JSON.", "Give a file that ends in .jsonl")
    form, written = "messages", {"messages": [*row["prompt"], *row["completion"]]}
    for owner in hooks.owners("unformat_row"):
        try:
            written, form = hooks.call("unformat_row", row=row, run=run), owner.partition(":")[2]
        except RowError as error:
            run.say(f"formatter {owner.partition(':')[2]} cannot hold this turn ({error}): saved as messages")
    line = json.dumps(written, ensure_ascii=False).encode() + b"\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a+b") as target:
            if target.tell():
                target.seek(-1, os.SEEK_END)
                line = line if target.read(1) == b"\n" else b"\n" + line
            target.write(line)
            target.flush()
            os.fsync(target.fileno())
    except OSError as error:
        raise DataError(f"{file} cannot be written ({error.strerror}).", "Give another file: /save FILE") from error
    return form


class Chat:
    """One sitting at a terminal or behind a pipe: `run()` until the input ends."""

    def __init__(
        self,
        voices: Voices,
        *,
        system: str = "",
        temperature: float = 0.0,
        max_new_tokens: int = 512,
        seed: int = 42,
        save: Path,
        raw: bool = False,
        speaking: tuple[str, ...] = ("tuned",),
        output: TextIO | None = None,
    ) -> None:
        from rich.console import Console as Rich

        self.voices, self.talk = voices, Conversation(system)
        self.temperature, self.max_new_tokens, self.seed, self.save = temperature, max_new_tokens, seed, save
        self.speaking, self.raw = speaking, raw or not voices.tokenizer.chat_template
        self.output = output or sys.stdout
        self.rich = Rich(file=self.output, highlight=False, markup=False, soft_wrap=True)

    # ---- reading -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Read, answer, and again. Ctrl-C stops an answer or clears the line; the end of the input (Ctrl-D) leaves."""
        terminal = sys.stdin.isatty()
        with _history(terminal):
            while True:
                try:
                    line = self._read(terminal)
                    if line is None:
                        break
                    if line.strip() and not self.take(line):
                        break
                except KeyboardInterrupt:
                    self.say("\n(Ctrl-D or /quit leaves)")
        if terminal:
            self.say("")

    def _read(self, terminal: bool) -> str | None:
        """One line, with those that a backslash at its end joins to it; None at the end of the input."""
        lines: list[str] = []
        while True:
            if terminal:
                try:
                    line = input("... " if lines else f"{'+'.join(self.speaking)}> ")
                except EOFError:
                    return "\n".join(lines) or None
            else:
                line = sys.stdin.readline()
                if not line:
                    return "\n".join(lines) or None
                line = line.rstrip("\n")
            lines.append(line.removesuffix("\\"))
            if not line.endswith("\\"):
                return "\n".join(lines)

    def take(self, line: str) -> bool:
        """Do what one line says; False to leave. Errors are printed, and the conversation goes on."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                return self.command(*line[1:].strip().partition(" ")[::2])
            self.ask(line.removeprefix("/") if line.startswith("//") else line)
        except RowError as error:
            self.say(f"Error: {error}.")
        except FtxError as error:
            self.say(f"Error: {error.problem}\n       {error.remedy}")
        return True

    # ---- answering ---------------------------------------------------------------------------------------------------

    def ask(self, question: str) -> None:
        """The answers of those who are speaking, into the conversation; a stopped answer counts as far as it came."""
        for phase in self.speaking:
            self.voices.model(phase)  # before anything is said: it may not be there
        self.talk.ask(question)
        try:
            if len(self.speaking) > 1 and self.rich.is_terminal and self.rich.width >= SIDE_BY_SIDE:
                self._side_by_side()
            else:
                for phase in self.speaking:
                    self._below(phase)
        except KeyboardInterrupt:
            self.say("\n(stopped)")
        finally:
            self.talk.settle()

    def _answer(self, phase: str, show: Callable[[str], None]) -> None:
        prompt = self.talk.turns[-1][0] if self.raw else self.talk.messages(phase)
        pieces = self.voices.answer(phase, prompt, max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=self.seed + len(self.talk.turns) - 1)
        said: list[str] = []
        with contextlib.closing(pieces):  # at Ctrl-C too: with it the adapter is back
            try:
                while True:
                    said.append(next(pieces))
                    show(said[-1])
            except StopIteration as end:
                if end.value:
                    show(f" (cut at {self.max_new_tokens} tokens: /max N)" if end.value == "max_new_tokens" else " (cut: the model's context is full: /reset)")
                elif not "".join(said).strip():
                    show("(an empty answer)")
            finally:
                if "".join(said).strip():
                    self.talk.add(phase, "".join(said))

    def _below(self, phase: str) -> None:
        self.write(f"{phase}: ")
        self._answer(phase, self.write)
        self.write("\n")

    def _side_by_side(self) -> None:
        from rich.live import Live
        from rich.table import Table
        from rich.text import Text

        shown = {phase: "" for phase in self.speaking}

        def table() -> Table:
            grid = Table(expand=True, box=None, padding=(0, 1), width=self.rich.width)
            for phase in self.speaking:
                grid.add_column(phase, ratio=1, overflow="fold")
            grid.add_row(*(Text(shown[phase]) for phase in self.speaking))
            return grid

        with Live(table(), console=self.rich, auto_refresh=False, vertical_overflow="ellipsis") as live:
            for phase in self.speaking:

                def show(piece: str, phase: str = phase) -> None:
                    shown[phase] += clean(piece)
                    live.update(table(), refresh=True)

                self._answer(phase, show)

    # ---- commands ----------------------------------------------------------------------------------------------------

    def command(self, name: str, rest: str) -> bool:
        rest = rest.strip()
        if name in ("quit", "exit"):
            return False
        if name in SLASH:
            SLASH[name](self, rest)
        else:
            hint = did_you_mean(name, [*SLASH, "quit"]).replace("'", "'/", 1)
            self.say(f"Error: no command is called '/{name}'.{hint}\n       /help lists them.")
        return True

    def voice(self, *phases: str) -> None:
        for phase in phases:
            self.voices.model(phase)
        self.speaking = phases
        self.say(f"({' and '.join(phases)})")

    def set_system(self, text: str) -> None:
        """The system text; `-` takes it away, nothing shows it."""
        if text:
            self.talk.system = "" if text == "-" else text
        self.say(f"(system: {self.talk.system or 'none'})")

    def set_temperature(self, text: str) -> None:
        self.temperature = _number(text, float, self.temperature, 0, 10, "a temperature")
        self.say(f"(temperature {self.temperature:g}{'' if self.temperature else ': greedy'})")

    def set_max(self, text: str) -> None:
        self.max_new_tokens = _number(text, int, self.max_new_tokens, 1, 1 << 20, "a number of tokens")
        self.say(f"(at most {self.max_new_tokens} tokens)")

    def reset(self, text: str) -> None:
        self.talk = Conversation(self.talk.system)
        self.say("(a new conversation)")

    def save_turn(self, text: str) -> None:
        """The last turn; of two answers the tuned model's, unless only the base speaks."""
        self.save = Path(text).expanduser() if text else self.save
        phase = "tuned" if "tuned" in self.speaking else "base"
        form = save_row(self.talk.row(phase), self.save, self.voices.hooks, self.voices.run)
        self.say(f"(saved to {self.save} as a row of {form})")

    def help(self, text: str) -> None:
        self.say(HELP)

    # ---- writing -----------------------------------------------------------------------------------------------------

    def write(self, text: str) -> None:
        self.output.write(clean(text))
        self.output.flush()

    def say(self, text: str) -> None:
        self.write(f"{text}\n")


HELP = """/base /tuned /both   who answers; /both asks the two, side by side on a terminal that is wide enough
/system TEXT         the system text from here on; /system - takes it away
/temp NUMBER         0 is greedy, above it answers are sampled
/max NUMBER          longest answer, in tokens
/save [FILE]         append the last turn to a data file in the form that the run was trained on
/reset               a new conversation
/help                this
/quit                leave (also Ctrl-D); Ctrl-C stops an answer
A line that ends with \\ goes on in the next; one that begins with // is sent with one /."""

#: The commands; each takes the chat and what stands behind its name.
SLASH: dict[str, Callable[[Chat, str], None]] = {
    "base": lambda chat, _: chat.voice("base"),
    "tuned": lambda chat, _: chat.voice("tuned"),
    "both": lambda chat, _: chat.voice("base", "tuned"),
    "system": Chat.set_system,
    "temp": Chat.set_temperature,
    "max": Chat.set_max,
    "save": Chat.save_turn,
    "reset": Chat.reset,
    "help": Chat.help,
}


def clean(text: str) -> str:
    """What a model says cannot move the cursor or recolour the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _number(text: str, kind: type[Any], now: Any, low: float, high: float, what: str) -> Any:
    if not text:
        return now
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        raise RowError(f"'{text}' is not {what} from {low:g} to {high:g}")
    return value


@contextlib.contextmanager
def _history(terminal: bool) -> Iterator[None]:
    """Lines of earlier sittings behind the arrow keys, where Python has readline."""
    readline: Any = None
    if terminal:
        with contextlib.suppress(ImportError):
            import readline
    file = cache_directory() / "chat_history"
    if readline:
        with contextlib.suppress(OSError):
            readline.read_history_file(file)
        readline.set_history_length(HISTORY)
    try:
        yield
    finally:
        if readline:
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                readline.write_history_file(file)
