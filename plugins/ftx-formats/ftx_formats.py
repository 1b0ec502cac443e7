"""The formatters for prompts with answers, conversations and plain text: alpaca, sharegpt, messages, completion, text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ftx import RowError, hookimpl, option, plugin
from ftx.encode import as_messages
from ftx_formats_back import conversation_of, plain, refuse_pairs, same, sharegpt_turn, turns_of
from ftx_formats_fields import Note, as_text, check_columns, columns_of, format_noted, is_tree, kind, optional_text, say_unused, text
from ftx_formats_messages import (
    TAGS,
    MessageList,
    check_conversation,
    either_messages,
    openai_messages,
    sharegpt_messages,
    tools_of,
    trimmed,
    with_system,
)
from ftx_formats_trees import all_conversations, best_conversation

if TYPE_CHECKING:
    from datasets import Dataset

    from ftx import Run

TRIM_HINT = " (-o formatter.trim=true drops such turns)"

#: What Stanford Alpaca (Taori et al., 2023) puts before the instruction, with and without an input.
PREAMBLE = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PREAMBLE_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


@plugin
class Alpaca:
    """Instruction, input and output, as in Stanford Alpaca, LLaMA-Factory and self-instruct."""

    produces = ("prompt-completion",)
    exam = {
        "rows": [{"instruction": "Name a colour.", "input": "", "output": "Blue."}, {"instruction": "Translate.", "input": "Haus", "output": "house"}],
        "bad_rows": [{"instruction": "Name a colour."}, {"instruction": 1, "output": "Blue."}],
    }

    style: Literal["chat", "instruction"] = option("chat", "chat: turns for the model's own chat template; instruction: Alpaca's '### Instruction:' text.")
    instruction_column: str = option("instruction", "Column of the instruction.")
    input_column: str | None = option("input", "Column of the input, which may be empty; none to read none.")
    output_column: str = option("output", "Column of the answer; without it, answers are read from self-instruct's `instances`.")
    system_column: str | None = option("system", "Column of the system text, if there is one.")
    history_column: str | None = option("history", "Column of earlier [question, answer] pairs, if there is one: context, not trained on.")

    @hookimpl
    def format_dataset(self, dataset: Dataset, run: Run) -> Dataset:
        """One row gives one prompt and completion, or one for each of its instances."""
        answers = "instances" if self.output_column not in columns_of(dataset) and "instances" in columns_of(dataset) else self.output_column
        check_columns(dataset, self, [self.instruction_column, answers])
        say_unused(dataset, run, "alpaca", [self.instruction_column, self.input_column, answers, self.system_column, self.history_column])

        def convert(row: dict[str, Any], note: Note) -> list[dict[str, Any]]:
            return [self._one(one) for one in (_instances(row) if answers == "instances" else [row])]

        return format_noted(dataset, convert, run)

    @hookimpl
    def unformat_row(self, row: dict[str, Any], run: Run) -> dict[str, Any]:
        """One answer and what stands before it: instruction, system text and earlier pairs, or Alpaca's own text taken apart."""
        written = self._classic_parts(row) if self.style == "instruction" else self._parts(row)
        return same({name: value for name, value in written.items() if name is not None}, self._one, row, "alpaca")  # type: ignore[return-value]

    def _parts(self, row: dict[str, Any]) -> dict[str | None, Any]:
        turns = turns_of(row, "alpaca")
        if turns.tools:
            raise RowError("alpaca has no place for tools")
        *before, answer = turns.messages
        if turns.first != len(before):
            raise RowError(f"alpaca trains on one answer, and {len(turns.messages) - turns.first} turns of this row count")
        system = [plain(before.pop(0), "alpaca")] if before and before[0]["role"] == "system" else []
        if [one["role"] for one in before] != ["user", "assistant"] * (len(before) // 2) + ["user"]:
            raise RowError("alpaca holds questions and answers in turn")
        said = [plain(one, "alpaca") for one in before]
        pairs = [list(pair) for pair in zip(said[:-1:2], said[1::2], strict=True)]
        return self._row(said[-1], "", plain(answer, "alpaca"), system, pairs)

    def _row(self, instruction: str, extra: str, answer: str, system: list[str], pairs: list[list[str]]) -> dict[str | None, Any]:
        for column, there, what in ((self.system_column, system, "a system text"), (self.history_column, pairs, "earlier turns")):
            if there and column is None:
                raise RowError(f"alpaca has no column for {what}")
        written: dict[str | None, Any] = {self.instruction_column: instruction, self.input_column: extra, self.output_column: answer}
        return written | ({self.system_column: system[0]} if system else {}) | ({self.history_column: pairs} if pairs else {})

    def _classic_parts(self, row: dict[str, Any]) -> dict[str | None, Any]:
        refuse_pairs(row, "alpaca")
        prompt, completion = row.get("prompt"), row.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            raise RowError("alpaca with style=instruction holds texts, this row has turns")
        body, end, rest = prompt.rpartition("\n\n### Response:")
        head, start, asked = body.partition("\n\n### Instruction:\n")
        if not end or rest or not start:
            raise RowError("the prompt is not Alpaca's own text")
        *earlier, last = asked.split("\n\n### Instruction:\n")
        pairs = [list(one.partition("\n\n### Response:")[::2]) for one in earlier]
        instruction, _, extra = last.partition("\n\n### Input:\n")
        return self._row(instruction, extra, completion, [] if head in (PREAMBLE, PREAMBLE_INPUT) else [head], pairs)

    def _one(self, row: dict[str, Any]) -> dict[str, Any]:
        output = text(row, self.output_column)
        system, history = optional_text(row, self.system_column), _history(row, self.history_column)
        if self.style == "instruction":
            return {"prompt": self._classic(row, system, history), "completion": output}
        turns = [*history, {"role": "user", "content": user_turn(row, self.instruction_column, self.input_column)}]
        return {"prompt": with_system(turns, system), "completion": as_messages(output, "assistant")}

    def _classic(self, row: dict[str, Any], system: str, history: MessageList) -> str:
        """Alpaca's own text: preamble (or system text), earlier turns, instruction, input; the answer follows directly."""
        instruction, extra = text(row, self.instruction_column), optional_text(row, self.input_column)
        parts = [system or (PREAMBLE_INPUT if extra else PREAMBLE)]
        for turn in history:
            parts.append(f"### Instruction:\n{turn['content']}" if turn["role"] == "user" else f"### Response:{turn['content']}")
        parts += [f"### Instruction:\n{instruction}", *([f"### Input:\n{extra}"] if extra else []), "### Response:"]
        return "\n\n".join(parts)


@plugin
class ShareGPT:
    """Conversations of from/value turns as in ShareGPT, FastChat and LLaMA-Factory, tools and observations included."""

    produces = ("conversation",)
    exam = {
        "rows": [{"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello!"}]}],
        "bad_rows": [{"conversations": [{"from": "human", "value": "Hi."}]}, {"conversations": []}, {"conversations": [{"from": "cat", "value": "Meow."}]}],
    }

    messages_column: str = option("conversations", "Column of the turns.")
    role_tag: str = option("from", "Key of a turn's role.")
    content_tag: str = option("value", "Key of a turn's text.")
    user_tag: str = option("human", "Role of a user turn.")
    assistant_tag: str = option("gpt", "Role of an assistant turn.")
    observation_tag: str = option("observation", "Role of what a tool gave back; `tool` is read as well.")
    function_tag: str = option("function_call", "Role of a tool call: JSON with name and arguments, or a list of them.")
    system_tag: str = option("system", "Role of a system turn.")
    system_column: str | None = option("system", "Column of the system text, if there is one.")
    tools_column: str | None = option("tools", "Column of the tools, as a list or its JSON text, if there is one.")
    trim: bool = option(False, "Drop turns before the first user turn and after the last answer; each such row is in the ledger as repaired.")

    def __post_init__(self) -> None:
        tags = [self.user_tag, self.assistant_tag, self.observation_tag, self.function_tag, self.system_tag]
        for tag in tags:
            if tags.count(tag) > 1:
                raise ValueError(f"two roles have the same tag '{tag}'")
        if self.role_tag == self.content_tag:
            raise ValueError(f"role_tag and content_tag are both '{self.role_tag}'")

    @hookimpl
    def format_dataset(self, dataset: Dataset, run: Run) -> Dataset:
        """One conversation a row, with its tools."""
        check_columns(dataset, self, [self.messages_column])
        say_unused(dataset, run, "sharegpt", [self.messages_column, self.system_column, self.tools_column])
        return format_noted(dataset, self._conversation, run)

    @hookimpl
    def unformat_row(self, row: dict[str, Any], run: Run) -> dict[str, Any]:
        """Turns under the formatter's own tags, calls as JSON text, the system text as the first turn."""
        turns = conversation_of(row, "sharegpt")
        tags = {role: tag for tag, role in self._tags().items() if tag != "tool" or self.observation_tag == "tool"}
        said = [dict(zip((self.role_tag, self.content_tag), sharegpt_turn(message, tags), strict=True)) for message in turns.messages]
        written: dict[str, Any] = {self.messages_column: said}
        return same(written | _tools(turns.tools, self.tools_column), lambda one: self._conversation(one, _ignore), row, "sharegpt")

    def _conversation(self, row: dict[str, Any], note: Note) -> dict[str, Any]:
        turns = sharegpt_messages(row.get(self.messages_column), self.messages_column, self.role_tag, self.content_tag, self._tags())
        return conversation(row, with_system(turns, optional_text(row, self.system_column)), self, note)

    def _tags(self) -> dict[str, str]:
        """Tag -> role; `function` for a turn that is a tool call."""
        names = dict(zip(TAGS, [self.user_tag, self.assistant_tag, self.observation_tag, self.function_tag, self.system_tag], strict=False))
        return {"tool": "tool"} | {names[usual]: role for usual, role in TAGS.items() if usual in names}


@plugin
class Messages:
    """Conversations of OpenAI role/content messages with tools and tool calls, and OpenAssistant's message trees."""

    produces = ("conversation",)
    exam = {
        "rows": [{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]}],
        "bad_rows": [{"messages": [{"role": "user", "content": "Hi."}]}, {"messages": []}, {"messages": [{"role": "cat", "content": "Meow."}]}],
    }

    messages_column: str = option("messages", "Column of the messages.")
    tools_column: str | None = option("tools", "Column of the tools, as a list or its JSON text, if there is one.")
    tree_column: str = option("prompt", "Column of the message tree, in files without messages.")
    trees: Literal["best", "all"] = option("best", "Of a message tree: its best-ranked conversation, or every branch that ends with an answer.")
    trim: bool = option(False, "Drop turns before the first user turn and after the last answer; each such row is in the ledger as repaired.")

    @hookimpl
    def format_dataset(self, dataset: Dataset, run: Run) -> Dataset:
        """One conversation a row with its tools; of a tree one or all."""
        columns = columns_of(dataset)
        if self.messages_column not in columns and self.tree_column in columns and any(is_tree(value) for value in dataset[self.tree_column]):
            say_unused(dataset, run, "messages", [self.tree_column])
            if self.trees == "best":
                run.say("formatter messages: of each tree the best-ranked conversation (trees=all gives every one)")
            return format_noted(dataset, self._tree, run)
        check_columns(dataset, self, [self.messages_column])
        say_unused(dataset, run, "messages", [self.messages_column, self.tools_column])
        return format_noted(dataset, self._conversation, run)

    @hookimpl
    def unformat_row(self, row: dict[str, Any], run: Run) -> dict[str, Any]:
        """The messages as they are, and the tools."""
        turns = conversation_of(row, "messages")
        written: dict[str, Any] = {self.messages_column: turns.messages}
        return same(written | _tools(turns.tools, self.tools_column), lambda one: self._conversation(one, _ignore), row, "messages")

    def _conversation(self, row: dict[str, Any], note: Note) -> dict[str, Any]:
        return conversation(row, openai_messages(row.get(self.messages_column), self.messages_column), self, note)

    def _tree(self, row: dict[str, Any], note: Note) -> list[dict[str, Any]]:
        tree, column = row.get(self.tree_column), self.tree_column
        found = [best_conversation(tree, column)] if self.trees == "best" else all_conversations(tree, column, note, trim=self.trim)
        return [{"messages": messages} for messages in found]


@plugin
class Completion:
    """A prompt and its completion, as texts or as message lists; questions and answers by naming their columns."""

    produces = ("prompt-completion",)
    exam = {"rows": [{"prompt": "2 + 2 =", "completion": " 4"}], "bad_rows": [{"prompt": "2 + 2 ="}, {"prompt": "2 + 2 =", "completion": ""}]}

    prompt_column: str = option("prompt", "Column of the prompt.")
    completion_column: str = option("completion", "Column of the completion.")
    style: Literal["text", "chat"] = option("text", "Texts are taken as they stand, one after the other (as in TRL), or as a user and an assistant turn.")
    tools_column: str | None = option("tools", "Column of the tools, as a list or its JSON text, if there is one.")

    @hookimpl
    def format_dataset(self, dataset: Dataset, run: Run) -> Dataset:
        """One prompt and completion a row: both texts, or both message lists."""
        check_columns(dataset, self, [self.prompt_column, self.completion_column])
        say_unused(dataset, run, "completion", [self.prompt_column, self.completion_column, self.tools_column])
        return format_noted(dataset, lambda row, note: self._one(row), run)

    @hookimpl
    def unformat_row(self, row: dict[str, Any], run: Run) -> dict[str, Any]:
        """Texts as texts. Turns as message lists, parted where the answers begin that count; with style=chat one question and
        one answer as texts."""
        refuse_pairs(row, "completion")
        if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            return same({self.prompt_column: row["prompt"], self.completion_column: row["completion"]}, self._one, row, "completion")
        turns = turns_of(row, "completion")
        prompt, completion = turns.messages[: turns.first], turns.messages[turns.first :]
        written: dict[str, Any] = {self.prompt_column: prompt, self.completion_column: completion}
        if self.style == "chat" and [set(one) for one in turns.messages] == [{"role", "content"}] * 2 and prompt and prompt[0]["role"] == "user":
            written = {self.prompt_column: prompt[0]["content"], self.completion_column: completion[0]["content"]}
        return same(written | _tools(turns.tools, self.tools_column), self._one, row, "completion")

    def _one(self, row: dict[str, Any]) -> dict[str, Any]:
        prompt, completion = side(row, self.prompt_column), side(row, self.completion_column)
        tools = tools_of(row.get(self.tools_column), self.tools_column) if self.tools_column is not None else []
        if tools and self.style == "text" and isinstance(prompt, str) and isinstance(completion, str):
            raise RowError(f"field '{self.tools_column}' holds tools, which plain text cannot name: use -o formatter.style=chat")
        prompt, (completion,) = one_kind(prompt, [completion], self.style, [self.completion_column])
        return {"prompt": prompt, "completion": completion, **({"tools": tools} if tools else {})}


@plugin
class Text:
    """Plain text, all of it trained on."""

    produces = ("text",)
    exam = {"rows": [{"text": "Once upon a time."}, {"text": "The end."}], "bad_rows": [{"text": ""}, {"text": None}]}

    text_column: str = option("text", "Column of the text.")

    @hookimpl
    def format_dataset(self, dataset: Dataset, run: Run) -> Dataset:
        """One text a row, as it stands."""
        check_columns(dataset, self, [self.text_column])
        say_unused(dataset, run, "text", [self.text_column])
        return format_noted(dataset, lambda row, note: {"text": text(row, self.text_column)}, run)

    @hookimpl
    def unformat_row(self, row: dict[str, Any], run: Run) -> dict[str, Any]:
        """The text; nothing else is one."""
        if not isinstance(row.get("text"), str):
            raise RowError("text is all trained on, and this row has a question, or turns")
        return same({self.text_column: row["text"]}, lambda one: {"text": text(one, self.text_column)}, row, "text")


# ---------------------------------------------------------------------------------------------------------------------
# What formatters share
# ---------------------------------------------------------------------------------------------------------------------


def conversation(row: dict[str, Any], messages: MessageList, formatter: ShareGPT | Messages, note: Note) -> dict[str, Any]:
    """A checked row of type conversation, trimmed first where the formatter's option says so."""
    tools = tools_of(row.get(formatter.tools_column), formatter.tools_column) if formatter.tools_column is not None else []
    messages = trimmed(messages, note) if formatter.trim else messages
    check_conversation(messages, f"field '{formatter.messages_column}'", "" if formatter.trim else TRIM_HINT)
    return {"messages": messages, **({"tools": tools} if tools else {})}


def _tools(tools: list[dict[str, Any]], column: str | None) -> dict[str, Any]:
    if tools and column is None:
        raise RowError("the format has no column for tools")
    return {column: tools} if tools and column is not None else {}


def _ignore(reason: str) -> None:
    """A note that nobody needs."""


def user_turn(row: dict[str, Any], instruction_column: str, input_column: str | None) -> str:
    """Instruction, newline, input; one of the two may be empty."""
    extra = optional_text(row, input_column)
    instruction = optional_text(row, instruction_column) if extra else text(row, instruction_column)
    return "\n".join(part for part in (instruction, extra) if part)


def side(row: dict[str, Any], name: str) -> str | MessageList:
    """A prompt or an answer: a text that is not empty, or messages."""
    value = row.get(name)
    return either_messages(value, name) if isinstance(value, list | dict) else as_text(value, f"field '{name}'")


def one_kind(prompt: str | MessageList, answers: list[str | MessageList], style: str, names: list[str]) -> tuple[str | MessageList, list[str | MessageList]]:
    """Prompt and answers all as texts (style text, and none of them messages), else all as checked message lists."""
    if style == "text" and all(isinstance(part, str) for part in (prompt, *answers)):
        return prompt, answers
    turns = as_messages(prompt, "user")
    lists = [as_messages(answer, "assistant") for answer in answers]
    for answer, name in zip(lists, names, strict=True):
        if answer[0]["role"] != "assistant":
            raise RowError(f"field '{name}' must begin with an assistant turn, this is a {answer[0]['role']} turn")
        check_conversation(turns + answer, f"the prompt with field '{name}'")
    return turns, list(lists)


def _instances(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One task of self-instruct (Wang et al., 2022) -> a row for each of its instances."""
    instances = row.get("instances")
    if not isinstance(instances, list) or not instances or not all(isinstance(one, dict) for one in instances):
        raise RowError("field 'instances' must be a list of objects with input and output, at least one")
    return [{**row, **one} for one in instances]


def _history(row: dict[str, Any], name: str | None) -> MessageList:
    history = row.get(name) if name is not None else None
    if history in (None, "", []):
        return []
    if not isinstance(history, list):
        raise RowError(f"field '{name}' must be a list of [question, answer] pairs, this is {kind(history)}")
    turns: MessageList = []
    for number, pair in enumerate(history, start=1):
        where = f"field '{name}', pair {number}"
        if not isinstance(pair, list) or len(pair) != 2:
            raise RowError(f"{where} must be a question and an answer")
        turns += [{"role": role, "content": as_text(said, where)} for role, said in zip(("user", "assistant"), pair, strict=True)]
    return turns
