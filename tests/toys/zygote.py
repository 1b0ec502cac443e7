"""Runs of ftx that start at once: a process that has the libraries imported and forks for each call, to be killed on demand.

One JSON object a line comes in: `args`, `log` (a file for what is printed) and perhaps `kill`: seconds behind the start
(`after`), or a directory (`checkpoints`) in which the process dies as soon as a checkpoint is there that is not marked.
One a line goes out: `status` (negative: the signal) and `seconds`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path


def child(args: list[str], log: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdin.close()
    status = 70
    try:
        from ftx.cli import main

        main(args, prog_name="ftx")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def unmarked(folder: Path) -> bool:
    try:
        return any(not (path / "ftx-complete.json").exists() for path in folder.iterdir() if path.name.startswith("checkpoint-"))
    except FileNotFoundError:
        return False


def call(args: list[str], log: str, kill: dict | None) -> dict:
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(args, log)
    armed = kill is not None
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return {"status": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - started}
        if armed and (time.monotonic() - started > kill["after"] if "after" in kill else unmarked(Path(kill["checkpoints"]))):
            if kill.get("delay"):
                time.sleep(kill["delay"])
            os.kill(pid, signal.SIGKILL)
            armed = False
        time.sleep(0.0005)


def serve() -> None:
    import torch

    for name in ("evaluate", "peft", "scipy.stats", "ftx.callbacks", "ftx.pipeline", "ftx_dpo_trainer", "ftx_exact_match_metric", "ftx_sft_trainer"):
        import_module(name)
    torch.set_num_threads(1)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        ask = json.loads(line)
        print(json.dumps(call(ask["args"], ask["log"], ask.get("kill"))), flush=True)


if __name__ == "__main__":
    serve()
