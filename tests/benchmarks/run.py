"""make bench, make bench-full: ftx beside TRL as it comes and TRL tuned, on the same rows, settings and seed; writes docs/benchmarks.md.

`run.py [--more] [--steps N] [--repeats N]`; `run.py WORKLOAD...` prints only. Each run is a process of its own and the sides take turns,
A B C A B C. Times are seconds from one optimizer step's beginning to the next one's, by one clock for every side (tests/toys/clock.py); the
first two of each run are left out, so that start-up does not count (the difference of two lengths of run would have the noise of two start-ups).
Memory is what the process held at most, and that above what it held when training began. Losses and gradient norms stand beside
them, so that nobody wins by not learning. Where FTX_BENCH_PEERS names the directory of an environment with LLaMA-Factory, that
takes its turn too.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata as metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from peers import llama_factory, version_of
from picture import bars

REPO = Path(__file__).resolve().parent.parent.parent
DATA = REPO.parent / "shared" / "data"
TOYS = REPO / "tests" / "toys"
PAGE = REPO / "docs" / "benchmarks.md"
MARKS = "<!-- make bench: begin -->", "<!-- make bench: end -->"
MORE_MARKS = "<!-- more: begin -->", "<!-- more: end -->"
#: TRL as it comes loads fp32, computes in bf16 autocast and recomputes activations; tuned it does neither.
TRL = {"TRL": {"dtype": "float32", "bf16": True, "checkpointing": True}, "TRL tuned": {"dtype": "bfloat16", "bf16": False, "checkpointing": False}}
ALL = ["ftx", "TRL", "TRL tuned"]
#: What is trained on, how, and beside what.
WORKLOADS = {
    "snips, LoRA": ("snips", "lora", ALL),
    "alpaca, LoRA": ("alpaca", "lora", ALL),
    "snips, DoRA": ("snips", "dora", ALL),
    "DPO, LoRA": ("pairs", "lora", ALL),
}
MORE = {
    "snips, QLoRA": ("snips", "qlora", ALL),
    "snips, full": ("snips", "full", ALL),
    "snips, LoRA on attention": ("snips", "attention", ALL),
    "alpaca, QLoRA": ("alpaca", "qlora", ALL),
    "alpaca, full": ("alpaca", "full", ALL),
    "alpaca, LoRA on attention": ("alpaca", "attention", ALL),
    "alpaca, DoRA": ("alpaca", "dora", ALL),
    "gsm8k, LoRA": ("gsm8k", "lora", ALL),
    "gsm8k, LoRA on attention": ("gsm8k", "attention", ALL),
    "gsm8k, DoRA": ("gsm8k", "dora", ALL),
    "gsm8k, QLoRA": ("gsm8k", "qlora", ALL),
    "gsm8k, full": ("gsm8k", "full", ALL),
}
#: What is asked for: title, workload, the other side, what is compared, bound.
BARS = [
    ("tokens/s, LoRA on snips, ftx / TRL", "snips, LoRA", "TRL", "step", 3.5),
    ("tokens/s, LoRA on alpaca, ftx / TRL", "alpaca, LoRA", "TRL", "step", 3.5),
    ("tokens/s, LoRA on snips, ftx / TRL tuned", "snips, LoRA", "TRL tuned", "step", 2.5),
    ("tokens/s, LoRA on alpaca, ftx / TRL tuned", "alpaca, LoRA", "TRL tuned", "step", 2.5),
    ("tokens/s, LoRA on snips, ftx / LLaMA-Factory", "snips, LoRA", "LLaMA-Factory", "step", 2.5),
    ("tokens/s, LoRA on alpaca, ftx / LLaMA-Factory", "alpaca, LoRA", "LLaMA-Factory", "step", 2.5),
    ("tokens/s, DPO, ftx / TRL", "DPO, LoRA", "TRL", "step", 3.0),
    ("memory above load, LoRA on snips, ftx / TRL", "snips, LoRA", "TRL", "peak", 0.7),
]
#: A row is at most this long, in bytes of UTF-8: some 300 tokens, and never more than the 1,024 that all sides take. Nothing is cut, by nobody.
LONGEST = 960


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("workloads", nargs="*", help=f"some of: {', '.join({**WORKLOADS, **MORE})}")
    parser.add_argument("--more", action="store_true", help="the workloads that only make bench-full takes")
    parser.add_argument("--steps", type=at_least(4), default=6)
    parser.add_argument("--repeats", type=at_least(1), default=2)
    asked = parser.parse_args()
    known = {**WORKLOADS, **MORE}
    if unknown := set(asked.workloads) - set(known):
        parser.error(f"no such workload: {', '.join(unknown)}")
    if not DATA.is_dir():
        sys.exit("the data is not at ../shared/data: nothing was measured")
    os.environ["HF_HUB_OFFLINE"] = "1"
    found: dict[str, dict[str, list[dict]]] = {}
    asked.began = time.monotonic()
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_data(Path(folder))
        for name in asked.workloads or (MORE if asked.more else WORKLOADS):
            kind, adapter, sides = known[name]
            if os.environ.get("FTX_BENCH_PEERS") and adapter != "qlora" and kind != "pairs":  # on a CPU it has no 4 bits
                sides = [*sides, "LLaMA-Factory"]
            found[name], lost = in_turns(name, sides, files[kind], Path(folder), asked)
            failed += [f"{name}: {side}" for side in lost]
            if "ftx" in lost:
                del found[name]
            elif not asked.workloads:  # what was measured stands there, whatever becomes of the rest
                write(found, asked)
    if found:
        print("\n".join(page_of(found, asked)))
    sys.exit(f"not measured: {', '.join(failed)}" if failed else 0)


def write(found: dict[str, dict[str, list[dict]]], asked: argparse.Namespace) -> None:
    """The table and its picture."""
    picture = "benchmarks-more.svg" if asked.more else "benchmarks.svg"
    (PAGE.parent / picture).write_text(bars(useful(found), "useful tokens a second"), encoding="utf-8")
    replace(MORE_MARKS if asked.more else MARKS, [*page_of(found, asked), "", f"![Useful tokens a second]({picture})"], say=False)


def in_turns(name: str, sides: list[str], data: Path, folder: Path, asked: argparse.Namespace) -> tuple[dict[str, list[dict]], list[str]]:
    """The runs of each side of a workload, and the sides that failed: of those nothing is kept, of the others all."""
    kind, adapter, _ = {**WORKLOADS, **MORE}[name]
    found: dict[str, list[dict]] = {side: [] for side in sides}
    for repeat in range(asked.repeats):
        for side in list(found):
            work = folder / f"{name}-{side}-{repeat}".replace(" ", "").replace(",", "")
            try:
                run = measure(side, kind, adapter, data, asked.steps, work)
            except SystemExit as failure:  # out of memory, for one
                print(f"{name}: {side}: not measured: {failure}", file=sys.stderr)
                del found[side]
                continue
            found[side].append(run)
            print(f"{name}: {side}: {step_of(run):.2f} s a step, loss {run['losses'][-1]:.4f}", flush=True)
    return found, [side for side in sides if side not in found]


def write_data(work: Path) -> dict[str, Path]:
    """The rows of each kind, in forms that both sides read."""
    subprocess.run([sys.executable, REPO / "examples" / "snips.py", DATA / "snips", work], check=True, stdout=subprocess.DEVNULL)
    alpaca = json.loads((DATA / "alpaca_en_demo" / "alpaca_en_demo.json").read_text("utf-8"))
    alpaca = [row for row in alpaca if size(row["instruction"] + row["input"] + row["output"]) < LONGEST and row["output"]]
    maths = [json.loads(line) for line in (DATA / "gsm8k" / "train.first2000.jsonl").read_text("utf-8").splitlines()]
    maths = [{"instruction": row["question"], "input": "", "output": row["answer"]} for row in maths]
    pairs = [
        {"prompt": row["conversations"][0]["value"], "chosen": row["chosen"]["value"], "rejected": row["rejected"]["value"]}
        for row in json.loads((DATA / "dpo_en_demo" / "dpo_en_demo.json").read_text("utf-8"))
        if len(row["conversations"]) == 1
    ]
    pairs = [row for row in pairs if all(row.values()) and size(row["prompt"]) + max(size(row["chosen"]), size(row["rejected"])) < LONGEST]
    for name, kept in (("alpaca", alpaca), ("gsm8k", maths), ("pairs", pairs)):
        (work / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return {"snips": work / "snips-train.jsonl", **{name: work / f"{name}.jsonl" for name in ("alpaca", "gsm8k", "pairs")}}


def size(text: str) -> int:
    return len(text.encode())


def measure(side: str, kind: str, adapter: str, data: Path, steps: int, work: Path, more: tuple[str, ...] = ()) -> dict:
    """One run in a process of its own -> what tests/toys/clock.py notes, and for ftx `tokens`. `more`: words for ftx."""
    work.mkdir()
    pairs = kind == "pairs"
    batch, rate = (2, 1e-4) if pairs else (16, 1e-5 if adapter == "full" else 2e-4)
    if side == "LLaMA-Factory":
        return llama_factory(Path(os.environ["FTX_BENCH_PEERS"]), adapter, data, steps, batch, rate, work)
    if side.startswith("TRL"):
        settings = {"model": "smollm2", "data": str(data), "steps": steps, "batch": batch, "accumulation": 1, "learning_rate": rate, **precision(side)}
        settings |= {"trainer": "dpo" if pairs else "sft", "adapter": adapter, "output": str(work), "result": str(work / "noted.json")}
        (work / "settings.json").write_text(json.dumps(settings))
        call([sys.executable, TOYS / "plain_trl.py", work / "settings.json"], work)
        return json.loads((work / "noted.json").read_text())
    words = words_of(kind, adapter, data, steps, batch, rate)
    probe = ["--observer", "watch:Probe", "-o", f"watch:Probe.file={work / 'noted.json'}"]
    call([sys.executable, "-m", "ftx", "run", *words, *more, *probe, "--output", work / "run"], work)
    last = json.loads((work / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    return json.loads((work / "noted.json").read_text()) | {"tokens": last["tokens"]}


def words_of(kind: str, adapter: str, data: Path, steps: int, batch: int, rate: float) -> list[str]:
    """What `ftx run` is told."""
    pairs, named = kind == "pairs", "lora" if adapter == "attention" else adapter
    plugins = ["--formatter", "preference" if pairs else "alpaca", "--adapter", named, "--trainer", "dpo" if pairs else "sft"]
    given = {"max_steps": steps, "per_device_train_batch_size": batch, "gradient_accumulation_steps": 1, "learning_rate": rate, "logging_steps": 1}
    options = [word for name, value in {**given, "save_strategy": "no"}.items() for word in ("-o", f"trainer.{name}={value}")]
    if adapter == "attention":
        options += ["-o", "adapter.target_modules=[q_proj,k_proj,v_proj,o_proj]"]
    return ["--data", str(data), *plugins, *options]


def precision(side: str) -> dict[str, object]:
    """A TRL side's settings. Where ftx does not take bfloat16, neither does TRL: a processor that emulates it needs days."""
    import torch

    from ftx.device import best_dtype

    return TRL[side] if best_dtype("cpu") is torch.bfloat16 else {**TRL[side], "dtype": "float32", "bf16": False}


def call(command: list, work: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(TOYS)}
    with (work / "said.txt").open("w") as said:
        done = subprocess.run([str(word) for word in command], env=environment, stdout=said, stderr=said, check=False)
    if done.returncode:
        sys.exit(f"{(work / 'said.txt').read_text()[-3000:]}\nexit status {done.returncode}")


def step_of(run: dict) -> float:
    return statistics.median(run["seconds"][2:])


def middle_of(ratios: list[float]) -> tuple[float, float]:
    """The median, and how sure it is: half the middle half's width by the root of their number."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, (high - low) / 2 / len(ratios) ** 0.5


def slower(one: list[float], other: list[float], skip: int = 2) -> tuple[float, float]:
    """How many times as long a step of the first takes as the same step of the second, without the first `skip`: the median, and how sure it is."""
    return middle_of([a / b for a, b in zip(one[skip:], other[skip:], strict=True)])


def ratio(sides: dict[str, list[dict]], other: str, what: str) -> float:
    """Median over the turns: how many times ftx is faster, or what share of the other's memory it takes."""
    if what == "peak":
        return statistics.median(ours["peak"] / theirs["peak"] for ours, theirs in zip(sides["ftx"], sides[other], strict=True))
    return statistics.median(step_of(theirs) / step_of(ours) for ours, theirs in zip(sides["ftx"], sides[other], strict=True))


def table_rows(name: str, sides: dict[str, list[dict]]) -> list[str]:
    """A line for each side: its time, ftx against it (median of the ratios of each turn), tokens, memory, loss."""
    tokens = sides["ftx"][0]["tokens"]
    lines = []
    for side, runs in sides.items():
        step, steps = statistics.median(map(step_of, runs)), len(runs[0]["losses"])
        faster = "" if side == "ftx" else f"{ratio(sides, side, 'step'):.2f} times"
        share = f"{tokens / runs[0]['positions']:.0%}"
        held, peak = (f"{statistics.median(run[what] for run in runs) / 2**20:.0f}" for what in ("held", "peak"))
        losses, norm = (statistics.mean(run[what][-1] for run in runs) for what in ("losses", "grad_norms"))
        lines.append(f"| {name} | {side} | {step:.2f} | {tokens / steps / step:.0f} | {share} | {faster} | {held} | {peak} | {losses:.4f} | {norm:.3f} |")
    return lines


def bar_rows(found: dict[str, dict[str, list[dict]]]) -> list[str]:
    """What is asked for beside what was measured."""
    lines = []
    for title, name, side, what, bound in BARS:
        if side in found.get(name, {}):
            value = ratio(found[name], side, what)
            sense = "at least" if what == "step" else "at most"
            met = value >= bound if what == "step" else value <= bound
            lines.append(f"| {title} | {sense} {bound} | {value:.3f} | {'yes' if met else 'no'} |")
    return lines


@functools.cache
def speeds() -> dict[str, float]:
    """GFLOP/s of 1200 x 576 x 1536 in each dtype, as the machine multiplies it at best."""
    import torch

    from ftx.device import fastest

    found = {}
    settings = torch.backends.mkldnn.matmul
    for name, dtype, setting in (("bfloat16", torch.bfloat16, "ieee"), ("float32", torch.float32, "ieee"), ("float32 through oneDNN", torch.float32, "bf16")):
        settings.fp32_precision, before = setting, settings.fp32_precision
        x, y = torch.ones(1200, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        found[name] = 2 * 1200 * 576 * 1536 / fastest(functools.partial(torch.nn.functional.linear, x, y), "cpu", times=30) / 1e9
        settings.fp32_precision = before
    return found


def page_of(found: dict[str, dict[str, list[dict]]], asked: argparse.Namespace) -> list[str]:
    """The lines of the page."""
    versions = [f"{name} {metadata.version(name)}" for name in ("ftx-core", "torch", "transformers", "trl", "peft")]
    if any("LLaMA-Factory" in sides for sides in found.values()):
        versions.append(f"LLaMA-Factory {version_of(Path(os.environ['FTX_BENCH_PEERS']))}".strip())
    machine = ", ".join(f"{name} {speed:.0f}" for name, speed in speeds().items())
    measured = bar_rows(found)
    return [
        f"`{command()}`, {datetime.date.today()}, {processor()}, {os.cpu_count()} cores, {', '.join(versions)}.",
        f"Matrix products of 1200 x 576 x 1536 in GFLOP/s: {machine}. SmolLM2-135M-Instruct, rank 16, 16 rows (DPO: 2 pairs) a step,",
        f"runs of {asked.steps} steps, {asked.repeats} of each side, in turns, all in {(time.monotonic() - asked.began) / 60:.0f} minutes.",
        "Useful: tokens that are no padding, of all positions that go through the model (DPO: not its reference); above 100 % where what rows",
        "begin with alike goes through once.",
        "",
        "| workload | | seconds a step | useful tokens/s | useful | ftx is faster | MiB at most | above load | last loss | last gradient norm |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(line for name, sides in found.items() for line in table_rows(name, sides)),
        *(["", "What was asked for, on a CPU that multiplies bfloat16 in hardware:", ""] if measured else []),
        *(["| ratio | bar | measured | reached |", "|---|---|---|---|", *measured] if measured else []),
    ]


def useful(found: dict[str, dict[str, list[dict]]]) -> dict[str, dict[str, float]]:
    """Tokens that are no padding, a second, of each side of each workload."""
    return {
        name: {side: sides["ftx"][0]["tokens"] / len(runs[0]["losses"]) / statistics.median(map(step_of, runs)) for side, runs in sides.items()}
        for name, sides in found.items()
    }


def at_least(least: int) -> Callable[[str], int]:
    """For argparse: a number below which there is nothing to take a median of."""

    def number(word: str) -> int:
        if (value := int(word)) < least:
            raise argparse.ArgumentTypeError(f"at least {least}")
        return value

    return number


def command() -> str:
    """What was asked for, as it is typed."""
    return shlex.join(["python", f"tests/benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def replace(marks: tuple[str, str], text: list[str], say: bool = True) -> None:
    """Put lines between two marks of the page, and print them."""
    if say:
        print("\n".join(text), flush=True)
    page = PAGE.read_text("utf-8")
    for mark in marks:
        if mark not in page:
            sys.exit(f"{PAGE} has no {mark}")
    before, _, rest = page.partition(marks[0])
    PAGE.write_text("\n".join([before + marks[0], "", *text, "", marks[1]]) + rest.partition(marks[1])[2], encoding="utf-8")


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    about = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line) if cpuinfo.exists() else {}
    about = {name.strip(): value.strip() for name, value in about.items()}
    name = about.get("model name") or platform.processor() or platform.machine()
    flags = [flag.replace("_", "-").upper() for flag in ("avx512f", "avx512_bf16", "amx_bf16") if flag in about.get("flags", "").split()]
    return f"{name} ({', '.join(flags)})" if flags else name


if __name__ == "__main__":
    main()
