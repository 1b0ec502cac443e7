"""Ranked message trees as OpenAssistant exports them: linear conversations and preference pairs (Köpf et al., 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ftx import RowError
from ftx_formats_fields import Note, as_text, is_tree, kind
from ftx_formats_messages import Messages

ROLES = {"prompter": "user", "assistant": "assistant"}
Path = tuple[dict[str, Any], ...]


def conversations(tree: Any, name: str, which: str, note: Note) -> list[Messages]:
    """The tree's conversations, root to last answer, in file order; with `which` = best only the best-ranked one.

    Best: the best-ranked answer at every step (rank 0 is best, unranked ones come last, the file's order decides
    between equals and between follow-up questions, which carry no rank) that leads on to an answer.
    """
    if which == "best":
        note = _unheard  # all but one conversation is left out by choice
    answers = [path for path in _paths(tree, name, note) if path[-1]["role"] == "assistant"]
    continued = {id(path[-3]) for path in answers if len(path) > 2}
    ends = [path for path in answers if id(path[-1]) not in continued]
    if not ends:
        raise RowError(f"field '{name}': the tree has no answer")
    return [_messages(path) for path in ([min(ends, key=_order)] if which == "best" else ends)]


def ranked_pairs(tree: Any, name: str, which: str, note: Note) -> list[tuple[Messages, Messages, Messages]]:
    """(prompt, chosen, rejected) for answers to one question that have different ranks.

    `which` = best-worst: the best and the worst answer of each question; all: every such two.
    """
    answers: dict[int, list[Path]] = {}
    for path in _paths(tree, name, note):
        if path[-1]["role"] == "assistant" and path[-1].get("rank") is not None:
            answers.setdefault(id(path[-2]), []).append(path)
    pairs = []
    for ranked in answers.values():
        ranked.sort(key=lambda path: path[-1]["rank"])
        two = [(ranked[0], ranked[-1])] if which == "best-worst" else [(a, b) for i, a in enumerate(ranked) for b in ranked[i + 1 :]]
        pairs += [(_messages(a[:-1]), _messages(a[-1:]), _messages(b[-1:])) for a, b in two if a[-1]["rank"] != b[-1]["rank"]]
    if not pairs:
        raise RowError(f"field '{name}': no two answers of the tree have different ranks")
    return pairs


def _paths(tree: Any, name: str, note: Note) -> list[Path]:
    """Root-to-message paths of every message that is not deleted, in file order; notes what is left out."""
    if not is_tree(tree):
        raise RowError(f"field '{name}' must be a tree of messages with replies, this is {kind(tree)}")
    paths: list[Path] = []
    deleted = 0
    waiting: list[Path] = [(tree,)]  # not recursive: a deep tree must not end in a RecursionError
    while waiting:
        path = waiting.pop()
        if path[-1].get("deleted") is True:
            deleted += 1
            continue
        paths.append(path)
        waiting += [(*path, reply) for reply in reversed(_replies(path, name))]
    if deleted:
        note(f"left out {deleted} deleted message(s) of the tree, with what follows them")
    answered = {id(path[-2]) for path in paths if len(path) > 1}
    unanswered = sum(path[-1]["role"] == "prompter" and id(path[-1]) not in answered for path in paths)
    if unanswered:
        note(f"left out {unanswered} question(s) of the tree that have no answer")
    return paths


def _replies(path: Path, name: str) -> list[dict[str, Any]]:
    """Check the last message of a path and give its replies."""
    message = path[-1]
    where = f"field '{name}', message {len(path)} of a branch"
    as_text(message.get("text"), where)
    wanted = "prompter" if len(path) % 2 else "assistant"
    if message.get("role") != wanted:
        raise RowError(f"{where}: the role must be '{wanted}', this is {message.get('role')!r}")
    rank, replies = message.get("rank"), message.get("replies") or []
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise RowError(f"{where}: the rank must be a whole number, this is {kind(rank)}")
    if not isinstance(replies, list) or not all(isinstance(reply, dict) for reply in replies):
        raise RowError(f"{where}: the replies must be a list of messages")
    return replies


def _order(path: Path) -> list[tuple[bool, int, int]]:
    """Sorts paths by rank from the root on; the place among the siblings decides between equals."""
    return [(message.get("rank") is None, message.get("rank") or 0, place) for message, place in _places(path)]


def _places(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    for parent, message in zip(path, path[1:], strict=False):
        yield message, next(place for place, reply in enumerate(parent["replies"]) if reply is message)


def _messages(path: Path) -> Messages:
    return [{"role": ROLES[message["role"]], "content": message["text"]} for message in path]


def _unheard(reason: str) -> None:
    """A note that nobody needs."""
