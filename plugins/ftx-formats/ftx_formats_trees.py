"""Ranked message trees as OpenAssistant exports them: linear conversations and preference pairs (Köpf et al., 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from ftx import RowError
from ftx_formats_fields import Note, as_text, is_tree, kind
from ftx_formats_messages import MessageList, shown

ROLES = {"prompter": "user", "assistant": "assistant"}
Path = tuple[dict[str, Any], ...]


def best_conversation(tree: Any, name: str) -> MessageList:
    """The best-ranked answer at every step, as far as there are answers: a question that none follows is not in it.

    Rank 0 is best and unranked answers come last; the file's order decides between equals, and between follow-up
    questions, which carry no rank.
    """
    return _messages(min(_to_last_answers(_paths(tree, name), name), key=_order))


def all_conversations(tree: Any, name: str, note: Note, *, trim: bool) -> list[MessageList]:
    """Every branch that ends with an answer, in file order; notes how many do not.

    With `trim` those are used too, up to their last answer, where that answer is not in another branch.
    """
    paths = _paths(tree, name, note)
    parents = {id(path[-2]) for path in paths if len(path) > 1}
    leaves = [path for path in paths if id(path[-1]) not in parents]
    complete = [path for path in leaves if path[-1]["role"] == "assistant"]
    if trim:
        complete = _to_last_answers(paths, name)
    elif not complete:
        raise RowError(f"field '{name}': no branch of the tree ends with an answer (-o formatter.trim=true drops the last questions)")
    questions = sum(path[-1]["role"] == "prompter" for path in leaves)
    if questions:
        note(f"dropped {questions} question(s) that no answer follows" if trim else f"left out {questions} branch(es) of the tree that end with a question")
    return [_messages(path) for path in complete]


def ranked_pairs(tree: Any, name: str, which: str, note: Note) -> list[tuple[MessageList, MessageList, MessageList]]:
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


def _paths(tree: Any, name: str, note: Note | None = None) -> list[Path]:
    """Root-to-message paths of every message that is not deleted, in file order; notes how many are."""
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
    if deleted and note is not None:
        note(f"left out {deleted} deleted message(s) of the tree, with what follows them")
    return paths


def _to_last_answers(paths: list[Path], name: str) -> list[Path]:
    """The paths to answers that no further answer follows."""
    answers = [path for path in paths if path[-1]["role"] == "assistant"]
    continued = {id(path[-3]) for path in answers if len(path) > 2}
    if not answers:
        raise RowError(f"field '{name}': the tree has no answer")
    return [path for path in answers if id(path[-1]) not in continued]


def _replies(path: Path, name: str) -> list[dict[str, Any]]:
    """Check the last message of a path and give its replies."""
    message = path[-1]
    where = f"field '{name}', message {len(path)} of a branch"
    as_text(message.get("text"), where)
    wanted = "prompter" if len(path) % 2 else "assistant"
    if message.get("role") != wanted:
        raise RowError(f"{where}: the role must be '{wanted}', this is {shown(message.get('role'))}")
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
    for parent, message in pairwise(path):
        yield message, next(place for place, reply in enumerate(parent["replies"]) if reply is message)


def _messages(path: Path) -> MessageList:
    return [{"role": ROLES[message["role"]], "content": message["text"]} for message in path]
