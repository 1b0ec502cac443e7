"""Rows as the model sees them: supervised tokens coloured, special tokens and line ends visible."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ftx.encode import IGNORE
from ftx.errors import printable

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from ftx.console import Console

#: What stands around supervised tokens where there is no colour.
OPEN, CLOSE = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"
MARKS = {"\n": "\N{RETURN SYMBOL}\n", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}
#: (supervised, special) -> how rich prints it.
STYLES = {(True, True): "bold green reverse", (True, False): "green", (False, True): "dim reverse", (False, False): "dim"}


def show_rows(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, count: int, console: Console) -> None:
    """Print the first `count` encoded rows (`input_ids` and `labels`, or a pair of each): what the loss counts is green, else in
    brackets where the console has no colours. Text from data cannot move the cursor or recolour the terminal."""
    if console.quiet or not len(dataset) or count < 1:
        return
    colours = console.rich.color_system is not None and not console.rich.no_color
    console.say("Supervised tokens are green, special ones reversed:" if colours else f"Supervised tokens stand in {OPEN} {CLOSE}:")
    sides = [""] if "labels" in dataset.column_names else ["chosen_", "rejected_"]
    for number, row in enumerate(dataset.select(range(min(count, len(dataset)))), start=1):
        for side in sides:
            ids, labels = row[f"{side}input_ids"], row[f"{side}labels"]
            supervised = sum(label != IGNORE for label in labels[1:])
            source = f"{row['_file']}:{row['_line']}" if "_line" in row else f"row {number}"
            console.say(f"-- {source}{', ' + side.rstrip('_') if side else ''}: {len(ids)} tokens, {supervised} supervised")
            console.rich.print(_painted(ids, labels, tokenizer, colours))


def pieces(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, bool, bool]]:
    """(text, supervised, special) of each run of tokens of a kind; a special token is a run of its own.

    The first label never counts: a loss predicts each token from those before it. Texts come from the difference of what
    longer and longer beginnings decode to, so that no tokenizer swallows the space at a border.
    """
    known = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    kinds = [(at > 0 and label != IGNORE, token in known) for at, (token, label) in enumerate(zip(ids, labels, strict=True))]
    start, before = 0, ""
    for at in range(1, len(ids) + 1):
        if at < len(ids) and kinds[at] == kinds[start] and not kinds[at][1]:
            continue
        whole = _decoded(ids[:at], tokenizer)
        text = whole[len(before) :] if whole.startswith(before) else _decoded(ids[start:at], tokenizer)
        yield text, *kinds[start]
        start, before = at, whole


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _painted(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase, colours: bool) -> Any:
    from rich.text import Text

    text, open_ = Text(), False
    for piece, supervised, special in pieces(ids, labels, tokenizer):
        if not colours and supervised != open_:
            text.append(OPEN if supervised else CLOSE)
            open_ = supervised
        visible = "".join(MARKS.get(character, character) for character in printable(piece))
        text.append(visible, style=STYLES[supervised, special] if colours else "")
    if open_:
        text.append(CLOSE)
    return text
