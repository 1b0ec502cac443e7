"""The formatter for Argilla's records: its JSON and its flattened export in, its JSON out, with no server and no SDK."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

from ftx import RowError, format_rows, hookimpl, option, plugin
from ftx.encode import as_messages
from ftx.errors import DataError, one_line

if TYPE_CHECKING:
    from datasets import Dataset

    from ftx import Run

#: Fields and questions by the names in use, the likeliest first.
FIELDS = ("prompt", "instruction", "question", "chat", "messages", "text", "input")
ANSWERS = ("answer", "response", "completion", "output", "label")
#: What a record has beside its fields in the flattened export.
OWN = ("id", "status", "_server_id", "external_id", "inserted_at", "updated_at")
Messages = list[dict[str, Any]]


@plugin
class Argilla:
    """Argilla's records: a field is the prompt, what annotators submitted for a question (else its suggestion) the answer."""

    produces = ("prompt-completion",)
    exam = {
        "rows": [
            {
                "fields": {"prompt": "2 + 2?"},
                "responses": {"answer": [{"value": "4", "user_id": "a", "status": "submitted"}]},
                "suggestions": {},
                "status": "completed",
            },
            {"fields": {"prompt": "3 + 3?"}, "responses": {}, "suggestions": {"answer": {"value": "6", "score": 0.9, "agent": "m"}}, "status": "pending"},
        ],
        "bad_rows": [
            {"fields": {"prompt": "5 + 5?"}, "responses": {}, "suggestions": {}, "status": "pending"},
            {"fields": {"prompt": "5 + 5?"}, "responses": {"answer": [{"value": "9", "user_id": "a", "status": "discarded"}]}, "status": "completed"},
        ],
    }

    field: str | None = option(None, "Field of the prompt; none: found by the names in use, else the first.")
    question: str | None = option(None, "Question of the answer; none: found by the names in use, else the first that has a value.")
    system_field: str | None = option("system", "Field of the system text, if there is one.")
    take: Literal["both", "responses", "suggestions"] = option("both", "Responses and, where there is none, suggestions; or only one of the two.")
    drafts: bool = option(False, "Take responses that are drafts as well as those that were submitted.")
    style: Literal["chat", "text"] = option("chat", "Prompt and answer are turns, or texts as they stand.")
    write: Literal["suggestion", "response"] = option("suggestion", "Write answers as suggestions to be checked, or as submitted responses.")
    user_id: str | None = option(None, "Argilla's id of the user whose responses are written; needed with write=response.")
    agent: str | None = option(None, "Name of the agent whose suggestions are written.")

    def __post_init__(self) -> None:
        if self.write == "response" and not self.user_id:
            raise ValueError("write=response needs user_id: a response belongs to somebody")

    @hookimpl
    def format_dataset(self, dataset: Dataset, run: Run) -> Dataset:
        """One record gives one prompt and completion."""
        columns = [column for column in dataset.column_names if column not in ("_file", "_line")]
        if "fields" not in columns and not any(column.endswith((".responses", ".suggestion")) for column in columns):
            raise DataError(
                f"no record of Argilla's: neither a column 'fields' nor one that ends in '.responses'; the file has: {one_line(', '.join(columns))}.",
                "Export the records with to_json, or with to_datasets: see Argilla's documentation.",
            )
        unused = [column for column in columns if column in ("id", "metadata", "vectors") or column.startswith("metadata.")]
        if unused:
            run.say(f"formatter argilla: not used: {', '.join(unused)}")
        self._note_unread(dataset, run)
        return format_rows(dataset, self._record, run)

    @hookimpl
    def unformat_row(self, row: dict[str, Any], run: Run) -> dict[str, Any]:
        """A record of one field and one question, to be imported with Argilla's from_json."""
        if "chosen" in row or "label" in row or "text" in row:
            raise RowError("argilla's record has one prompt and one answer")
        if isinstance(row.get("messages"), list):
            row = {"prompt": row["messages"][:-1], "completion": row["messages"][-1:], "tools": row.get("tools")}
        prompt, answer = row.get("prompt"), row.get("completion")
        if isinstance(answer, list):
            turns, (last, *more) = prompt or [], answer
            if more or not isinstance(turns, list) or any(set(turn) != {"role", "content"} for turn in [*turns, last]) or row.get("tools"):
                raise RowError("argilla's record holds texts, and one answer behind them")
            fields, answer = self._fields(turns), last["content"]
        else:
            fields = {self.field or "prompt": prompt}
        record: dict[str, Any] = {"fields": fields, "metadata": {}, "suggestions": {}, "responses": {}, "vectors": {}, "status": "pending"}
        question = self.question or "answer"
        if self.write == "response":
            record |= {"responses": {question: [{"value": answer, "user_id": self.user_id, "status": "submitted"}]}, "status": "completed"}
        else:
            record["suggestions"] = {question: {"value": answer, "score": None, "agent": self.agent}}
        wanted = {"prompt": row.get("prompt"), "completion": row.get("completion")}
        if self._record(record) != wanted:
            raise RowError("argilla would read another row from what it would write (style=text holds texts, style=chat turns)")
        return record

    def _fields(self, turns: Messages) -> dict[str, Any]:
        """A single question as a text under its system text; a longer conversation as a chat field."""
        if [turn["role"] for turn in turns] == ["user"]:
            return {self.field or "prompt": turns[0]["content"]}
        if [turn["role"] for turn in turns] == ["system", "user"] and self.system_field:
            return {self.field or "prompt": turns[1]["content"], self.system_field: turns[0]["content"]}
        return {self.field or "chat": turns}

    def _note_unread(self, dataset: Dataset, run: Run) -> None:
        """Fields and questions that no row is made of: each in the ledger once. DataError for several fields where none is named."""
        from ftx.columns import chunks

        found: dict[str, tuple[str, int]] = {}
        for row in (row for rows in chunks(dataset) for row in rows):
            place = str(row.pop("_file", "row")), int(row.pop("_line", 0))
            record = _nested(row)
            used = (self._field_of(record["fields"]), self.system_field)
            fields = [name for name, value in record["fields"].items() if name not in used and value not in (None, "", [])]
            if fields and self.field is None:
                raise DataError(
                    f"{place[0]}:{place[1]}: the record has more fields than its prompt '{one_line(used[0])}': {one_line(', '.join(fields))}.",
                    f"Name the one that is the prompt, field={one_line(used[0])}: then the others are left out. Else put them together in one field.",
                )
            questions = [name for name in self._questions(record) if name != self._question_of(record)]
            for what in (*(f"field '{name}'" for name in fields), *(f"question '{name}'" for name in questions)):
                found.setdefault(what, place)
        for what, (file, line) in found.items():
            run.ledger.add(file, line, f"{what} is left out of every record", "cut")
        if found:
            run.say(f"formatter argilla: not used: {', '.join(found)}")

    def _record(self, row: dict[str, Any]) -> dict[str, Any]:
        record = _nested(row)
        if record.get("status") == "discarded":
            raise RowError("the record is discarded")
        prompt = self._prompt(record["fields"])
        answer = self._answer(record)
        if self.style == "text" and isinstance(prompt, str):
            return {"prompt": prompt, "completion": answer}
        system = record["fields"].get(self.system_field) if self.system_field else None
        turns = as_messages(prompt, "user")
        if isinstance(system, str) and system.strip():
            turns = [{"role": "system", "content": system}, *turns]
        return {"prompt": turns, "completion": as_messages(answer, "assistant")}

    def _prompt(self, fields: dict[str, Any]) -> str | Messages:
        name = self._field_of(fields)
        value = fields.get(name)
        if isinstance(value, str) and value.strip():
            return value
        if isinstance(value, list) and value and all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in value):
            return [{"role": turn["role"], "content": turn["content"]} for turn in value]
        raise RowError(f"field '{name}' holds neither a text nor a chat")

    def _field_of(self, fields: dict[str, Any]) -> str:
        names = [name for name in fields if name != self.system_field]
        return self.field or next((one for one in FIELDS if fields.get(one)), names[0] if names else "")

    def _questions(self, record: dict[str, Any]) -> list[str]:
        return list(dict.fromkeys([*(record.get("responses") or {}), *(record.get("suggestions") or {})]))

    def _question_of(self, record: dict[str, Any]) -> str:
        known = self._questions(record)
        return self.question or next((one for one in ANSWERS if one in known), known[0] if known else "answer")

    def _answer(self, record: dict[str, Any]) -> str:
        """What was submitted (by most, where several did), else suggested. RowError for none, and for a tie."""
        responses, suggestions = record.get("responses") or {}, record.get("suggestions") or {}
        name = self._question_of(record)
        if self.take != "suggestions" and responses.get(name):
            given = [one for one in responses[name] if self._counts(one, record)]
            ranked = Counter(_text(one.get("value"), name) for one in given).most_common()
            if len(ranked) > 1 and ranked[0][1] == ranked[1][1]:
                raise RowError(f"question '{name}': annotators disagree ({len(given)} responses, none has a majority)")
            if ranked:
                return ranked[0][0]
            if self.take == "responses" or all(one.get("status") == "discarded" for one in responses[name]):
                raise RowError(f"question '{name}': no response was submitted")
        if self.take != "responses" and isinstance(suggestions.get(name), dict) and suggestions[name].get("value") is not None:
            return _text(suggestions[name]["value"], name)
        lacking = {"responses": "response", "suggestions": "suggestion", "both": "response and no suggestion"}[self.take]
        raise RowError(f"question '{name}' has no {lacking}")

    def _counts(self, response: dict[str, Any], record: dict[str, Any]) -> bool:
        """Argilla's own JSON has lost the status of each response; then that of the record stands for it."""
        status = response.get("status") or ("submitted" if record.get("status") == "completed" else "draft")
        return status == "submitted" or (self.drafts and status == "draft")


def _nested(row: dict[str, Any]) -> dict[str, Any]:
    return row if isinstance(row.get("fields"), dict) else nested(row)


def nested(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the flattened export (`q.responses`, `q.responses.users`, `q.responses.status`, `q.suggestion`) as a record."""
    record: dict[str, Any] = {"fields": {}, "responses": {}, "suggestions": {}, "metadata": {}, "vectors": {}, "status": row.get("status")}
    for column, value in row.items():
        name, dot, what = column.rpartition(".")
        if column.endswith(".responses") and isinstance(value, list):
            users, states = (row.get(f"{column}.{more}") or [None] * len(value) for more in ("users", "status"))
            record["responses"][name] = [
                {"value": one, "user_id": user, "status": status} for one, user, status in zip(value, users, states, strict=True) if one is not None
            ]
        elif what == "suggestion" and dot and value is not None:
            record["suggestions"][name] = {"value": value, "score": row.get(f"{column}.score"), "agent": row.get(f"{column}.agent")}
        elif column.startswith("metadata."):
            record["metadata"][column.removeprefix("metadata.")] = value
        elif not dot and column not in OWN and value is not None:
            record["fields"][column] = value
    return record


def _text(value: Any, question: str) -> str:
    """An answer, a label or a rating as text; several labels as JSON. RowError for what is none of them."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        return json.dumps(value, ensure_ascii=False)
    raise RowError(f"question '{question}' has a value that is no answer: {json.dumps(value, ensure_ascii=False)[:60]}")
