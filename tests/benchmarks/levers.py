"""What each part of ftx-fast brings: alone against none of them, and what is lost without it; writes its table into docs/benchmarks.md.

`python tests/benchmarks/levers.py [PART ...] [--steps N] [--repeats N]`: LoRA on snips, 16 rows a step, a process for each run, in turns. With
parts the rows of the others stay.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import tempfile
from pathlib import Path

from run import PAGE, command, measure, processor, replace, step_of, write_data

from ftx_fast import PARTS

#: Parts that want others: rows are joined only where attention keeps them apart, and grow together only where they are joined.
WITH = {"rows": ["attention", "rows"], "prefixes": ["attention", "rows", "prefixes"]}
MARKS = "<!-- levers: begin -->", "<!-- levers: end -->"


def ways(parts: list[str]) -> dict[str, str]:
    """What it is called -> trainer.fast."""
    alone = {f"{part} alone": f"[{','.join(WITH.get(part, [part]))}]" for part in parts}
    without = {f"all but {part}": f"[{','.join(other for other in PARTS if other != part)}]" for part in parts}
    return {"off": "off", **alone, "all": "auto", **without}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"some of: {', '.join(PARTS)}")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=2)
    asked = parser.parse_args()
    parts = asked.parts or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(unknown)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_data(Path(folder))["snips"]
        for repeat in range(asked.repeats):
            for number, (name, fast) in enumerate(ways(parts).items()):
                work = Path(folder) / f"{number}-{repeat}"
                found.setdefault(name, []).append(measure("ftx", "snips", "lora", data, asked.steps, work, ("-o", f"trainer.fast={fast}")))
                print(f"{name}: {step_of(found[name][-1]):.2f} s", flush=True)

    def against(name: str, base: str) -> str:
        return f"{statistics.median(step_of(b) / step_of(a) for a, b in zip(found[name], found[base], strict=True)):.2f} times"

    lines, today = earlier(), datetime.date.today()
    for part in parts:
        peak = statistics.median(run["peak"] for run in found[f"{part} alone"]) / 2**20
        lost = statistics.median(step_of(b) / step_of(a) for a, b in zip(found["all"], found[f"all but {part}"], strict=True))
        lines[f"`{part}`"] = f"| `{part}` | {PARTS[part]} | {against(f'{part} alone', 'off')} | {lost:.2f} times | {peak:.0f} | {today} |"
    off, everything = (statistics.median(run["peak"] for run in found[name]) / 2**20 for name in ("off", "all"))
    lines["all"] = f"| all | | {against('all', 'off')} | | {everything:.0f} (off: {off:.0f}) | {today} |"
    order = [*(f"`{part}`" for part in PARTS), "all"]
    replace(
        MARKS,
        [
            f"`{command()}`, {datetime.date.today()}, {processor()}, {os.cpu_count()} cores: LoRA on snips, 16 rows a step,",
            f"{asked.repeats} runs of {asked.steps} steps each, in turns; off takes {statistics.median(map(step_of, found['off'])):.2f} s a step.",
            "",
            "| part | | a step is faster with it alone | a step is slower without it alone | MiB above load, it alone | measured |",
            "|---|---|---|---|---|---|",
            *(lines[name] for name in order if name in lines),
        ],
    )


def earlier() -> dict[str, str]:
    """The rows of the page's table, by part."""
    inside = PAGE.read_text("utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
    return {line.split("|")[1].strip(): line for line in inside.splitlines() if line.startswith(("| `", "| all"))}


if __name__ == "__main__":
    main()
