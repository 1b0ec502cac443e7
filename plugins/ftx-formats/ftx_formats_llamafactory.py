"""LLaMA-Factory's dataset_info.json: where a data set lies, and its rows under the usual names of columns and tags."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ftx import RowError
from ftx.errors import DataError, did_you_mean, first_line
from ftx.readers import Source
from ftx_formats_fields import kind
from ftx_formats_messages import shown

#: Its names for columns -> the columns that formatters know, and what they are called where the entry says nothing.
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history", "kto_tag": "kto_tag"}
SHAREGPT = {"messages": "conversations", "system": "system", "tools": "tools", "kto_tag": "kto_tag"}
PAIR = {"chosen": "chosen", "rejected": "rejected"}
DEFAULTS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
#: Its tags -> what ShareGPT calls them.
TAGS = {"user_tag": "human", "assistant_tag": "gpt", "observation_tag": "observation", "function_tag": "function_call", "system_tag": "system"}
OPENAI = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
KEYS = {
    "file_name",
    "hf_hub_url",
    "ms_hub_url",
    "om_hub_url",
    "script_url",
    "formatting",
    "ranking",
    "columns",
    "tags",
    "subset",
    "split",
    "folder",
    "num_samples",
}
MEDIA = ("images", "videos", "audios")


def read(file: Path, name: str) -> list[Source]:
    """The data sets `name` (several with commas between them) of a dataset_info.json. Raises DataError."""
    try:
        entries = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read as JSON ({first_line(error)}).", "Mend the file.") from error
    if not isinstance(entries, dict):
        raise DataError(f"{file}: must map names to data sets, this is {kind(entries)}.", "See LLaMA-Factory's data/README.md.")
    names = [one.strip() for one in name.split(",") if one.strip()]
    if not names:
        some = ", ".join(list(entries)[:8]) + (", ..." if len(entries) > 8 else "")
        raise DataError(f"{file} lists {len(entries)} data sets: {some}.", f"Name one, or several with commas: --data {file}:NAME")
    unknown = next((one for one in names if one not in entries), None)
    if unknown is not None:
        raise DataError(f"{file} has no data set '{unknown}'.{did_you_mean(unknown, entries)}", f"It has: {', '.join(entries)}.")
    return [_source(file, one, entries[one]) for one in names]


def _source(file: Path, name: str, entry: Any) -> Source:
    where = f"{file}: data set '{name}'"
    if not isinstance(entry, dict):
        raise DataError(f"{where} must be an object, this is {kind(entry)}.", "Mend the entry.")
    _refuse(where, entry)
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    formatting = entry.get("formatting", "alpaca")
    reference = entry.get("hf_hub_url") or (str(file.parent / entry["file_name"]) if entry.get("file_name") else "")
    if not reference:
        raise DataError(f"{where} lies neither in a file nor on the hub ({', '.join(entry)}).", "Fetch it, and name the file: file_name.")
    names = {**(ALPACA if formatting == "alpaca" else SHAREGPT), **(PAIR if entry.get("ranking") else {})}
    if entry.get("ranking"):
        names.pop("response", None)
    taken = {columns.get(key) or DEFAULTS.get(key): ours for key, ours in names.items() if columns.get(key) or key in DEFAULTS}
    openai = formatting == "openai" or (formatting == "sharegpt" and {key: tags.get(key) for key in OPENAI} == OPENAI and set(tags) <= {*OPENAI, "system_tag"})
    turns = None if formatting == "alpaca" else _as_messages if openai else _renamer(tags)
    plain = formatting == "alpaca" and set(columns) == {"prompt"}  # pre-training: the prompt is all there is

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        own = {
            "text" if plain and DEFAULTS["response"] not in row and ours == "instruction" else ours: row[column]
            for column, ours in taken.items()
            if column in row
        }
        if turns is not None:
            for column in ("conversations", "chosen", "rejected"):
                if column in own:
                    own[column] = turns(own[column], column)
            if openai and "conversations" in own:
                own = {"messages": own.pop("conversations"), **own}
        rest = {column: value for column, value in row.items() if column not in taken}
        usual = {*ALPACA.values(), *SHAREGPT.values(), *PAIR, "messages", "text", "label", "prompt", "completion"}
        # what the entry does not name is not read by LLaMA-Factory: here under names that no formatter takes for its own
        return own | {(f"undeclared_{column}" if column in usual else column): value for column, value in rest.items()}

    return Source(reference, convert)


def _refuse(where: str, entry: dict[str, Any]) -> None:
    """DataError for what would be read otherwise than LLaMA-Factory reads it."""
    unknown = next((key for key in entry if key not in KEYS), None)
    if unknown:
        raise DataError(f"{where} has an unknown key '{unknown}'.{did_you_mean(unknown, KEYS)}", f"Keys: {', '.join(sorted(KEYS))}.")
    formatting = entry.get("formatting", "alpaca")
    if formatting not in ("alpaca", "sharegpt", "openai"):
        raise DataError(f"{where}: formatting {shown(formatting)} is not known.", "Use alpaca, sharegpt or openai.")
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    known = {*ALPACA, *SHAREGPT, *PAIR, *MEDIA}
    for part, given, allowed in (("columns", columns, known), ("tags", tags, {*TAGS, "role_tag", "content_tag"})):
        unknown = next((key for key in given if key not in allowed), None)
        if unknown:
            raise DataError(f"{where}: {part} has an unknown key '{unknown}'.{did_you_mean(unknown, allowed)}", f"Keys: {', '.join(sorted(allowed))}.")
    media = next((key for key in MEDIA if key in columns), None)
    if media:
        raise DataError(f"{where} has {media}.", "ftx trains on text.")
    if entry.get("split") not in (None, "train") or entry.get("subset") or entry.get("folder") or entry.get("num_samples"):
        what = next(key for key in ("subset", "folder", "num_samples", "split") if entry.get(key))
        raise DataError(f"{where} takes a part of the data ({what}: {entry[what]}).", "Put that part into a file of its own: `ftx data sample`, or `datasets`.")


def _renamer(tags: dict[str, str]) -> Callable[[Any, str], Any]:
    """Turns under tags of their own -> from/value turns. A single turn (of a pair) becomes a list of one."""
    role_tag, content_tag = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    names = {tags.get(key, usual): usual for key, usual in TAGS.items()}

    def renamed(value: Any, column: str) -> Any:
        turns = [value] if isinstance(value, dict) else value
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            return value  # the formatter says what is wrong with it
        made = []
        for number, turn in enumerate(turns, start=1):
            more = sorted(set(turn) - {role_tag, content_tag})
            if more:
                raise RowError(f"field '{column}', message {number} has {', '.join(more)} beside '{role_tag}' and '{content_tag}'")
            role = turn.get(role_tag)
            made.append({"from": names.get(role, role) if isinstance(role, str) else role, "value": turn.get(content_tag)})
        return made

    return renamed


def _as_messages(value: Any, column: str) -> Any:
    return [value] if isinstance(value, dict) else value
