"""The exporter `ollama`: the model and a Modelfile with its template and its stop tokens."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftx import hookimpl, option, plugin
from ftx.encode import Messages, end_tokens, render
from ftx.errors import RowError, RunError
from ftx.export import Exported
from ftx.parity import CONVERSATIONS, Reader, read_with_transformers
from ftx_export import merged, write_merged

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ftx import Run

ROLES = ("system", "user", "assistant")
#: What stands in for a message's text while a template is taken apart: no template has a reason to change it.
MARKS = {"system": "Qsystemq", "user": "Quserq", "assistant": "Qassistantq"}
#: More conversations that Ollama's template must render as the run's does, beside those of every export.
CHATS: tuple[Messages, ...] = (
    [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}, {"role": "user", "content": "V {{ .W }}"}],
    [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A\nB"}, {"role": "user", "content": "V"}, {"role": "assistant", "content": "W"}],
)
LOAD = """```sh
ollama create {name} -f Modelfile
ollama run {name}
```
"""


@plugin
class Ollama:
    """What `ollama create` takes: the model as GGUF or safetensors, and a Modelfile with template and stop tokens."""

    weights: Literal["gguf", "safetensors"] = option(
        "gguf", "gguf needs ftx-gguf; of safetensors Ollama makes a GGUF itself, and knows the tokenizers of few models."
    )
    type: Literal["f32", "f16", "bf16", "q8_0"] = option("f16", "How weights are stored in a GGUF.")

    @hookimpl
    def preflight(self, run: Run) -> list[str]:
        if self.weights == "gguf" and importlib.util.find_spec("ftx_gguf") is None:
            return ["GGUF is written by ftx-gguf, which is not installed: install it, or give -o exporter.weights=safetensors."]
        return []

    @hookimpl
    def exported_form(self, model: Any, run: Run) -> Any:
        if self.weights == "safetensors":
            return merged(model, run)
        from ftx_gguf import merged_in_float32

        return merged_in_float32(model, run)

    @hookimpl
    def export_model(self, model: Any, tokenizer: PreTrainedTokenizerBase, path: Path, run: Run) -> Exported:
        template = chat_template(tokenizer)  # first: what cannot be said in it need not be written
        name = re.sub(r"[^a-z0-9._-]+", "-", run.directory.path.name.lower()).strip("-._") if run.directory else ""
        if self.weights == "gguf":
            from ftx_gguf import write_gguf

            source = "./" + write_gguf(model, tokenizer, path / f"{name or 'model'}-{self.type}.gguf", self.type).name
        else:
            check_converter(tokenizer)
            write_merged(model, tokenizer, path)
            source = "."
        ends = [str(tokenizer.convert_ids_to_tokens(number)) for number in sorted(end_tokens(tokenizer))]
        (path / "Modelfile").write_text(modelfile(source, template, ends), encoding="utf-8")
        return Exported(f"a model for Ollama ({self.type if self.weights == 'gguf' else 'safetensors'})", LOAD.format(name=name or "model"))

    @hookimpl
    def read_exported(self, path: Path, run: Run) -> Reader:
        if self.weights == "safetensors":
            reader: Any = read_with_transformers(path, run)
        else:
            from ftx_gguf_reader import read_gguf

            reader = read_gguf(next(iter(sorted(path.glob("*.gguf")))), rounded=self.type == "q8_0")
        reader.problems += modelfile_problems((path / "Modelfile").read_text("utf-8"), run)
        return reader


# --------------------------------------------------------------------------------------------------------------------
# The template, in Go's language
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pieces:
    """What a chat template writes around messages: before and behind one of each role, and at the end for an answer.
    `system`: the system message that it adds where a conversation has none."""

    before: dict[str, str]
    behind: dict[str, str]
    asking: str
    system: str | None = None

    def template(self) -> str:
        """The template as Ollama runs it, in the language of Go's text/template."""
        arms = []
        for role in self.before:
            word = "if" if not arms else "else if"
            arms.append(f'{{{{ {word} eq .Role "{role}" }}}}{_literal(self.before[role])}{{{{ .Content }}}}{_literal(self.behind[role])}')
        return f"{{{{ range .Messages }}}}{''.join(arms)}{{{{ end }}}}{{{{ end }}}}{_literal(self.asking)}"


def chat_template(tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """The tokenizer's chat template taken apart; RunError where it is no row of messages, each between two fixed texts."""
    if not tokenizer.chat_template:
        raise RunError("the model's tokenizer has no chat template, so Ollama would have none.", "Export it as --to gguf, for plain text.")
    unlike = RunError("the chat template is more than a fixed text around each message, which is all that a Modelfile is written for.", "Use --to gguf.")
    user, assistant = ({"role": role, "content": MARKS[role]} for role in ("user", "assistant"))
    system = {"role": "system", "content": MARKS["system"]}
    try:
        one, two = (render(messages, tokenizer) for messages in ([user], [user, assistant]))
        asked = render([user], tokenizer, generation_prompt=True)
        start = one.split(MARKS["user"])
        end = two.split(MARKS["assistant"])
        if len(start) != 2 or len(end) != 2 or not asked.startswith(one) or not two.startswith(one):
            raise unlike
        opening, behind_user = start
        before, behind = {"user": opening, "assistant": end[0].removeprefix(one)}, {"user": behind_user, "assistant": end[1]}
        said = None
        try:
            led = render([system, user], tokenizer).split(MARKS["system"])
        except RowError:
            led = []  # a template without system messages
        if len(led) == 2:
            three = render([user, assistant, user], tokenizer)
            if not three.startswith(two):
                raise unlike
            before["user"] = three.removeprefix(two).partition(MARKS["user"])[0]
            before["system"] = led[0]
            tail = before["user"] + MARKS["user"] + behind_user
            if not led[1].endswith(tail):
                raise unlike
            behind["system"] = led[1].removesuffix(tail)
            if opening != before["user"]:  # it adds a system message of its own
                added = opening.removesuffix(before["user"])
                if not (added.startswith(before["system"]) and added.endswith(behind["system"])):
                    raise unlike
                said = added.removeprefix(before["system"]).removesuffix(behind["system"])
    except RowError as error:
        raise unlike from error
    found = Pieces({role: before[role] for role in ROLES if role in before}, behind, asked.removeprefix(one), said)
    return _without_bos(found, tokenizer)


def _without_bos(pieces: Pieces, tokenizer: PreTrainedTokenizerBase) -> Pieces:
    """llama.cpp writes the beginning-of-text token itself where the tokenizer does: it must not stand there twice."""
    bos, ids = tokenizer.bos_token, list(tokenizer("a")["input_ids"])
    if not bos or not ids or ids[0] != tokenizer.bos_token_id:
        return pieces
    return Pieces({role: text.removeprefix(bos) for role, text in pieces.before.items()}, pieces.behind, pieces.asking, pieces.system)


def _literal(text: str) -> str:
    """A text as it stands between Go's actions."""
    return text.replace("{{", '{{ "{{" }}')


def modelfile(source: str, pieces: Pieces, ends: list[str]) -> str:
    """The Modelfile; RunError for a text that its quotes cannot hold."""
    lines = [f"FROM {source}", f'TEMPLATE """{pieces.template()}"""']
    if pieces.system is not None:
        lines.append(f'SYSTEM """{pieces.system}"""')
    lines += [f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends]
    if any(text.count('"""') != 2 for text in lines if '"""' in text):
        raise RunError('the chat template holds """, which a Modelfile cannot.', "Export it as --to gguf.")
    return "\n".join(lines) + "\n"


def check_converter(tokenizer: PreTrainedTokenizerBase) -> None:
    """RunError where Ollama would make a GGUF with other rules of the tokenizer than the model was trained on: of
    safetensors it knows those of Llama 3 and Qwen 2 only."""
    about = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = about.get("pre_tokenizer") or {}
    cuts = [step for step in steps.get("pretokenizers", [steps]) if step.get("type") == "Split"]
    if about["model"].get("type") == "BPE" and not about["model"].get("byte_fallback") and not cuts:
        raise RunError(
            "Ollama does not know how this tokenizer cuts a text when it is given safetensors; some texts would become other tokens.",
            "Give it as GGUF: -o exporter.weights=gguf",
        )


# --------------------------------------------------------------------------------------------------------------------
# Reading it back
# --------------------------------------------------------------------------------------------------------------------


def modelfile_problems(text: str, run: Run) -> list[str]:
    """What a written Modelfile does otherwise than the run's tokenizer: renderings, and tokens that end an answer."""
    from ftx import models

    assert run.directory is not None
    tokenizer = models.load_tokenizer(run.directory.model)
    found = read_modelfile(text)
    ids = list(tokenizer("a")["input_ids"])
    bos = str(tokenizer.bos_token) if tokenizer.bos_token and ids and ids[0] == tokenizer.bos_token_id else ""
    problems = []
    for messages in (*CONVERSATIONS, *CHATS):
        try:
            wanted = render(messages, tokenizer, generation_prompt=True)
        except RowError:
            continue
        said = found["system"]
        led = [{"role": "system", "content": said}, *messages] if said and messages[0]["role"] != "system" else messages
        given = bos + go_render(str(found["template"]), led)
        if given != wanted:
            problems.append(f"the Modelfile's template gives {given[:80]!r} where the run's gives {wanted[:80]!r}")
    ends = {str(tokenizer.convert_ids_to_tokens(number)) for number in end_tokens(tokenizer)}
    if set(found["stop"]) != ends:
        problems.append(f"the Modelfile stops at {found['stop']}, the run at {sorted(ends)}")
    return problems[:3]


def read_modelfile(text: str) -> dict[str, Any]:
    """template, system (None without one), stop and from of a Modelfile."""
    quoted = {key.lower(): body for key, body in re.findall(r'^(TEMPLATE|SYSTEM) """(.*?)"""$', text, re.MULTILINE | re.DOTALL)}
    stops = [json.loads(one) for one in re.findall(r'^PARAMETER stop (".*")$', text, re.MULTILINE)]
    return {"template": quoted.get("template"), "system": quoted.get("system"), "stop": stops, "from": re.findall(r"^FROM (.*)$", text, re.MULTILINE)[0]}


def go_render(template: str, messages: Iterable[dict[str, Any]]) -> str:
    """What Go's text/template makes of the few actions that a Modelfile of ours has: range over .Messages, if / else if on
    .Role, .Role, .Content and quoted texts. Anything else is a ValueError."""
    parts = re.split(r"\{\{(.*?)\}\}", template, flags=re.DOTALL)
    tree, rest = _parse(parts, 0, top=True)
    assert rest == len(parts)
    return "".join(_run(node, None, list(messages)) for node in tree)


def _parse(parts: list[str], at: int, *, top: bool = False) -> tuple[list[Any], int]:
    """Nodes up to the action that ends them: texts (even places) and actions (odd places) of `parts`."""
    nodes: list[Any] = []
    while at < len(parts):
        if at % 2 == 0:
            nodes.append(("text", parts[at]))
            at += 1
            continue
        action = parts[at].strip()
        if action == "end" or action.startswith("else"):
            if top:
                raise ValueError(f"'{action}' without a beginning")
            return nodes, at
        if action == "range .Messages":
            body, at = _parse(parts, at + 1)
            nodes.append(("range", body))
        elif found := re.fullmatch(r'if eq \.Role "(\w+)"', action):
            arms, word = [], found[1]
            while True:
                body, at = _parse(parts, at + 1)
                arms.append((word, body))
                following = re.fullmatch(r'else if eq \.Role "(\w+)"', parts[at].strip())
                if not following:
                    break
                word = following[1]
            nodes.append(("if", arms))
        elif action in (".Role", ".Content"):
            nodes.append(("field", action[1:].lower()))
        elif re.fullmatch(r'"[^"\\]*"', action):
            nodes.append(("text", action[1:-1]))
        else:
            raise ValueError(f"'{action}' is no action that is known here")
        at += 1
    if not top:
        raise ValueError("an action has no end")
    return nodes, at


def _run(node: Any, message: Any, messages: list[Any]) -> str:
    kind, content = node
    if kind == "text":
        return str(content)
    if kind == "field":
        return str(message[content])
    if kind == "range":
        return "".join(_run(inner, one, messages) for one in messages for inner in content)
    body = next((body for role, body in content if message["role"] == role), [])
    return "".join(_run(inner, message, messages) for inner in body)
