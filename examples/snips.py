"""The SNIPS requests (sonos/nlu-benchmark, CC0) -> rows that ask for the intent and the slots as JSON.

    python examples/snips.py SNIPS_DIR OUT_DIR

SNIPS_DIR holds train_INTENT.json and validate_INTENT.json; OUT_DIR gets snips-train.jsonl and snips-validation.jsonl.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

INSTRUCTION = "Give the intent and the slots of the request as JSON."


def convert(intent: str, request: list[dict[str, str]]) -> dict[str, str]:
    """One request (pieces of text, some of them slots) -> one row. A slot that occurs twice becomes a list; runs of white
    space, which some requests hold, become one space."""
    slots: dict[str, Any] = {}
    for piece in request:
        if "entity" not in piece:
            continue
        name, value = piece["entity"], _squeezed(piece["text"])
        if name not in slots:
            slots[name] = value
        else:
            slots[name] = [*(slots[name] if isinstance(slots[name], list) else [slots[name]]), value]
    text = _squeezed("".join(piece["text"] for piece in request))
    return {"instruction": INSTRUCTION, "input": text, "output": json.dumps({"intent": intent, "slots": slots}, ensure_ascii=False)}


def read(directory: Path, prefix: str) -> list[dict[str, str]]:
    """All rows of the files that begin with `prefix`, in the order of the files' names."""
    rows = []
    for file in sorted(directory.glob(f"{prefix}_*.json")):
        for intent, requests in json.loads(file.read_text("utf-8")).items():
            rows += [convert(intent, request["data"]) for request in requests]
    return rows


def _squeezed(text: str) -> str:
    return " ".join(text.split())


def _key(row: dict[str, str]) -> str:
    return row["input"].lower()


def main(source: Path, target: Path) -> None:
    """Write both files and say how many requests stand in them more than once."""
    train, validation = read(source, "train"), read(source, "validate")
    if not train or not validation:
        sys.exit(f"{source}: no train_*.json and validate_*.json there")
    target.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("validation", validation)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (target / f"snips-{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        print(f"snips-{name}.jsonl: {len(rows)} rows, {len(rows) - len({_key(row) for row in rows})} of them repeat an earlier request")
    known = {_key(row) for row in train}
    print(f"{sum(_key(row) in known for row in validation)} validation requests stand in the training rows too")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/snips.py SNIPS_DIR OUT_DIR")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
