"""What a step of one training takes beside a step of another, in one process, step by step in turn, on the same batches.

`abreast.py SETTINGS RESULT`, both JSON: {name: [how, words, directory]} with `how` one of "run" (`ftx run` with these words) and "direct" (its
trainer called directly) -> {name: {"seconds": [...], "losses": [...]}}. Two processes that do the very same differ by a tenth on a machine that is
shared; two steps of one process, one after the other, do not.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from direct import direct
from turns import Turn, in_turns


def main() -> None:
    settings, result = map(Path, sys.argv[1:3])
    sides = {
        name: functools.partial({"run": whole, "direct": only}[how], name, words, Path(directory))
        for name, (how, words, directory) in json.loads(settings.read_text()).items()
    }
    found = in_turns(sides)
    result.write_text(json.dumps({name: {"seconds": turn.seconds, "losses": turn.losses} for name, turn in found.items()}))


def whole(name: str, words: list[str], directory: Path, turn: Turn) -> None:
    from ftx.cli import main

    taken = ["--observer", "turns:Taker", "-o", f"turns:Taker.place={name}"]
    main(["run", *words, *taken, "--output", str(directory)], standalone_mode=False)


def only(name: str, words: list[str], directory: Path, turn: Turn) -> None:
    direct(words, directory, turn)


def slower(found: dict[str, Any], one: str, other: str) -> tuple[float, float]:
    """How many times as long a step of `one` takes as the same step of `other`: the median, and half the middle half's width of it.

    The first two of each are left out.
    """
    times = sorted(a / b for a, b in zip(found[one]["seconds"][2:], found[other]["seconds"][2:], strict=True))
    low, _, high = statistics.quantiles(times, n=4)
    return statistics.median(times), (high - low) / 2 / len(times) ** 0.5


if __name__ == "__main__":
    main()
