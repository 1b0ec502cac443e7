"""OpenAI-compatible servers that others wrote, serving smollm2 on loopback."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Server:
    """Where it listens, what it calls its model, and whether it holds answers to a JSON schema."""

    address: str
    model: str
    schemas: bool


def missing(name: str) -> str:
    """The pip command that installs what a server lacks, or nothing."""
    needed, command = {
        "llama.cpp": (("llama_cpp", "uvicorn", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings"), "llama-cpp-python[server]"),
        "transformers serve": (("uvicorn", "fastapi"), "transformers[serving]"),
    }[name]
    return "" if all(importlib.util.find_spec(module) for module in needed) else f"pip install '{command}'"


@contextmanager
def serving(name: str, gguf: Path, directory: Path, log: Path) -> Iterator[Server]:
    """A server of smollm2: llama.cpp of its GGUF file as it is, transformers of the directory that ftx made of that."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if name == "llama.cpp":
        command = ["-m", "llama_cpp.server", "--model", str(gguf), "--n_ctx", "4096", "--host", "127.0.0.1", "--port", str(port), "--verbose", "False"]
        model, ready = "smollm2-served", "/v1/models"
    else:
        serve = "from transformers.cli.transformers import main; main()"
        command = ["-c", serve, "serve", str(directory), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
        model, ready = str(directory), "/health"
    with open(log, "w", encoding="utf-8") as stream:
        process = subprocess.Popen([sys.executable, *command], stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        _wait(process, f"http://127.0.0.1:{port}{ready}", log)
        yield Server(f"http://127.0.0.1:{port}/v1", model, schemas=name == "llama.cpp")
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen, address: str, log: Path, patience: float = 180) -> None:
    end = time.monotonic() + patience
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.3)
    raise AssertionError(f"the server did not start: {log.read_text('utf-8', 'replace')[-2000:]}")
