"""The formatter for preferences: pairs of a chosen and a rejected answer, and answers labelled good or bad."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from ftx import RowError, hookimpl, option, plugin
from ftx.encode import as_messages
from ftx_formats import one_kind, side, user_turn
from ftx_formats_back import same
from ftx_formats_fields import ASKED, LABELS, PROMPTS, Note, check_columns, columns_of, format_noted, is_label, is_tree, kind, optional_text, say_unused
from ftx_formats_messages import MessageList, check_conversation, either_messages, transcript_messages, with_system
from ftx_formats_trees import ranked_pairs

if TYPE_CHECKING:
    from datasets import Dataset

    from ftx import Run

Side = str | MessageList


@plugin
class Preference:
    """Chosen and rejected answers (TRL, LLaMA-Factory, hh-rlhf, OpenAssistant's trees), and answers labelled good or bad (KTO)."""

    produces = ("preference", "unpaired-preference")
    exam = {
        "rows": [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}],
        "bad_rows": [{"prompt": "2 + 2 =", "chosen": " 4"}, {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 4"}],
    }

    chosen_column: str = option("chosen", "Column of the better answer, or of the conversation that ends with it.")
    rejected_column: str = option("rejected", "Column of the worse answer, or of the conversation that ends with it.")
    prompt_column: str | None = option(None, "Column of the prompt, conversation or tree; none: found by its usual names.")
    input_column: str | None = option("input", "Column of the input that belongs to an instruction, if there is one.")
    system_column: str | None = option("system", "Column of the system text, if there is one.")
    label_column: str | None = option(None, "Column that calls an answer good (true) or bad (false); none: label or kto_tag, in files without pairs.")
    completion_column: str | None = option(None, "Column of the labelled answer; none: completion or output, else the conversation's last turn.")
    style: Literal["text", "chat"] = option("text", "Prompt and answers that are texts: as they stand (as in TRL), or as turns. Instructions are always turns.")
    pairs: Literal["best-worst", "all"] = option("best-worst", "Of the ranked answers to one question: the best against the worst, or every two.")

    @hookimpl
    def format_dataset(self, dataset: Dataset, run: Run) -> Dataset:
        """Pairs where the file has chosen and rejected, else labelled answers where it has a label, else a tree's pairs."""
        columns = columns_of(dataset)
        paired = {self.chosen_column, self.rejected_column} <= set(columns)
        label = self.label_column or next((name for name in LABELS if name in columns and not paired), None)
        if label is not None:
            return self._labelled(dataset, label, run)
        tree = self.prompt_column or "prompt"
        if not paired and tree in columns and any(is_tree(value) for value in dataset[tree]):
            say_unused(dataset, run, "preference", [tree])
            if self.pairs == "best-worst":
                run.say("formatter preference: of each question the best answer against the worst (pairs=all gives every two)")
            return format_noted(dataset, lambda row, note: self._tree(row, tree, note), run)
        check_columns(dataset, self, [self.chosen_column, self.rejected_column])
        prompt = self._named(columns, self.prompt_column, PROMPTS)
        self._say_unused(dataset, run, [prompt, self.chosen_column, self.rejected_column])
        return format_noted(dataset, lambda row, note: self._pair(row, prompt), run)

    @hookimpl
    def unformat_row(self, row: dict[str, Any], run: Run) -> dict[str, Any]:
        """Pairs under their columns, texts or message lists as they are; labelled answers as prompt, completion and label."""
        prompt = self.prompt_column or "prompt"
        if "chosen" in row:
            written = {prompt: row.get("prompt"), self.chosen_column: row["chosen"], self.rejected_column: row["rejected"]}
            return same(written, lambda one: self._pair(one, prompt), row, "preference")
        if "label" in row:
            label, completion = self.label_column or "label", self.completion_column or "completion"
            written = {prompt: row["prompt"], completion: row["completion"], label: row["label"]}
            return same(written, lambda one: self._label(one, prompt, completion, label), row, "preference")
        raise RowError("preference holds pairs of answers, or answers with a label, and this row has one answer")

    # --- pairs -------------------------------------------------------------------------------------------------------

    def _pair(self, row: dict[str, Any], prompt_column: str | None) -> dict[str, Any]:
        names = [self.chosen_column, self.rejected_column]
        chosen, rejected = (side(row, name) for name in names)
        if chosen == rejected:
            raise RowError(f"fields '{names[0]}' and '{names[1]}' are equal")
        prompt = self._prompt(row, prompt_column)
        if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
            if chosen.lstrip().startswith("Human:"):
                chosen, rejected = transcript_messages(chosen, names[0]), transcript_messages(rejected, names[1])
            else:
                self._refuse_unread(row, prompt_column)
                prompt, chosen, rejected = _split_texts(chosen, rejected)
        if prompt is None or (isinstance(chosen, list) and chosen[0]["role"] != "assistant"):
            if isinstance(chosen, str) or isinstance(rejected, str):
                raise RowError(f"fields '{names[0]}' and '{names[1]}' must both be texts or both be messages")
            given = prompt
            prompt, chosen, rejected = _split_conversations(chosen, rejected, names)
            _check_given(given, prompt)
            prompt = with_system(prompt, optional_text(row, self.system_column))
        prompt, answers = one_kind(prompt, [chosen, rejected], self.style, names)
        return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}

    def _tree(self, row: dict[str, Any], column: str, note: Note) -> list[dict[str, Any]]:
        pairs = ranked_pairs(row.get(column), column, self.pairs, note)
        return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]

    def _refuse_unread(self, row: dict[str, Any], prompt_column: str | None) -> None:
        """Two texts hold their prompt only where nothing in the row asks for them. RowError where something does."""
        if prompt_column is not None:
            raise RowError(f"field '{prompt_column}' is missing or null")
        asked = next((name for name, value in row.items() if name.lower() in ASKED and isinstance(value, str) and value.strip()), None)
        if asked is not None:
            raise RowError(f"no prompt was found, and field '{asked}' is not used: name the prompt's column, -o formatter.prompt_column={asked}")

    # --- labelled answers --------------------------------------------------------------------------------------------

    def _labelled(self, dataset: Dataset, label: str, run: Run) -> Dataset:
        columns = columns_of(dataset)
        completion = self._named(columns, self.completion_column, ("completion", "output"))
        whole = ("messages", "conversations")
        prompt = self._named(columns, self.prompt_column, ("prompt", "instruction", *whole) if completion else whole)
        check_columns(dataset, self, [label, *([prompt] if prompt else ["prompt" if completion else "messages"])])
        self._say_unused(dataset, run, [prompt, completion, label])

        return format_noted(dataset, lambda row, note: self._label(row, prompt, completion, label), run)

    def _label(self, row: dict[str, Any], prompt: str | None, completion: str | None, label: str) -> dict[str, Any]:
        if not is_label(row.get(label)):
            raise RowError(f"field '{label}' must be true or false, this is {kind(row.get(label))}")
        good = str(row[label]).strip().lower() == "true"
        if completion is not None:
            asked = self._prompt(row, prompt)
            if asked is None:
                raise RowError(f"field '{prompt}' is missing or null")
            asked, (answer,) = one_kind(asked, [side(row, completion)], self.style, [completion])
        else:
            turns = with_system(either_messages(row.get(prompt or ""), str(prompt)), optional_text(row, self.system_column))
            check_conversation(turns, f"field '{prompt}'")
            asked, answer = turns[:-1], turns[-1:]
        return {"prompt": asked, "completion": answer, "label": good}

    # --- prompts -----------------------------------------------------------------------------------------------------

    def _prompt(self, row: dict[str, Any], column: str | None) -> Side | None:
        """The prompt in the row, under its system text; None where the answers hold it."""
        if column is None or row.get(column) is None:
            return None
        system = optional_text(row, self.system_column)
        if column == "instruction":
            return with_system(as_messages(user_turn(row, column, self.input_column), "user"), system)
        prompt = side(row, column)
        return with_system(as_messages(prompt, "user"), system) if system else prompt

    def _named(self, columns: list[str], named: str | None, usual: tuple[str, ...]) -> str | None:
        return named or next((column for column in usual if column in columns), None)

    def _say_unused(self, dataset: Dataset, run: Run, used: list[str | None]) -> None:
        extra = [self.input_column] if "instruction" in used else []
        say_unused(dataset, run, "preference", [*used, self.system_column, *extra])


def _split_conversations(chosen: MessageList, rejected: MessageList, names: list[str]) -> tuple[MessageList, MessageList, MessageList]:
    """Two conversations -> what they share (the prompt) and how each goes on; both must go on with an answer."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if not shared:
        raise RowError(f"fields '{names[0]}' and '{names[1]}' share no prompt, and the row has none beside them")
    for rest, name in ((chosen[shared:], names[0]), (rejected[shared:], names[1])):
        if not rest or rest[0]["role"] != "assistant":
            raise RowError(f"field '{name}' does not go on with an assistant turn where the two part")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Two texts -> their shared beginning, up to the last space in it so that no word is cut, and how each goes on."""
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), min(len(chosen), len(rejected)))
    while shared and not chosen[shared : shared + 1].isspace():
        shared -= 1
    prompt = chosen[:shared]
    if not prompt.strip():
        raise RowError("the two answers share no beginning, and the row has no prompt beside them")
    if not chosen[shared:].strip() or not rejected[shared:].strip():
        raise RowError("one of the two answers is empty behind what they share")
    return prompt, chosen[shared:], rejected[shared:]


def _check_given(given: Side | None, found: MessageList) -> None:
    """A prompt that stands beside whole conversations must be the one in them (HF's ultrafeedback_binarized has both)."""
    said = [message["content"].strip() for message in found if message["role"] == "user"]
    if isinstance(given, str) and given.strip() not in said:
        raise RowError("the prompt beside the conversations is not in them")
    if isinstance(given, list) and not all(message["content"].strip() in said for message in given if message["role"] == "user"):
        raise RowError("the prompt beside the conversations is not in them")
