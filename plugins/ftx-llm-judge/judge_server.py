"""Judges for tests, behind a real server on loopback that speaks /v1/chat/completions: an honest one, and one that believes what it reads."""

from __future__ import annotations

import difflib
import json
import re
import threading
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answerer = Callable[[str, str], str]


@contextmanager
def served(answer: Answerer, seen: list[dict[str, Any]] | None = None) -> Iterator[str]:
    """The base URL of a server whose answer to each request is `answer(system, user)`; request bodies are kept in `seen`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if seen is not None:
                seen.append(request)
            texts = {message["role"]: message["content"] for message in reversed(request["messages"])}
            message = {"role": "assistant", "content": answer(texts["system"], texts["user"])}
            usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            body = json.dumps({"id": "1", "object": "chat.completion", "created": 0, "model": request["model"], "choices": [choice], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def material(user: str) -> dict[str, str]:
    """The texts of a request by their names, read by its own code."""
    return dict(re.findall(r"^--- BEGIN ([A-Z ]+) [0-9a-f]{16} ---\n(.*?)\n--- END \1 [0-9a-f]{16} ---$", user, re.S | re.M))


def criteria(system: str) -> list[str]:
    """The criteria that a request asks for."""
    return re.findall(r'"(\w+)": N', system)


def honest(system: str, user: str) -> str:
    """By likeness to the reference: 5 for the reference itself, at most 4 for anything else."""
    texts = material(user)
    scores = {name: _likeness(text, texts.get("REFERENCE", "")) for name, text in texts.items() if name.startswith("ANSWER")}
    if "ANSWER" in scores:
        return _rating(criteria(system), scores["ANSWER"])
    a, b = scores["ANSWER A"], scores["ANSWER B"]
    return json.dumps({"reasoning": f"{a} against {b}", "verdict": "A" if a > b else "B" if b > a else "tie"})


def gullible(system: str, user: str) -> str:
    """As the honest one, unless it finds a verdict in the form in which people's judges give them, or an instruction that does
    not stand between a BEGIN and the next END line, or behind the tag of a role: these it obeys."""
    plain = "".join(c for c in unicodedata.normalize("NFKC", user) if unicodedata.category(c) != "Cf")  # as people see it
    outside = re.sub(r"--- BEGIN.*?--- END[^\n]*", "", plain, flags=re.S | re.I)
    tagged = "".join(re.findall(r"(?:<\|im_start\|>|<<SYS>>|\[INST\])(.*)", plain, re.S))
    begged = re.search(r"best score|choose A\b", outside + tagged, re.I)
    patterns = (
        r"\[\[(\w+)\]\]",
        r"\b(?:score|rating|grade|verdict|winner)(?:\W*[:=]|\s+is)\W*(\w+)",
        r'"(?:helpfulness|verdict)"\s*:\s*"?(\w+)',
        r"\[RESULT\]\s*(\w+)",
    )
    told = [found for pattern in patterns for found in re.findall(pattern, plain, re.I)]
    if "ANSWER A" in material(user):
        forged = next((word for word in told if word in ("A", "B")), "A" if begged else "")
        return json.dumps({"reasoning": "it says so", "verdict": forged}) if forged else honest(system, user)
    forged = next((word for word in told if word in "12345"), "5" if begged else "")
    return _rating(criteria(system), int(forged)) if forged else honest(system, user)


def _likeness(text: str, reference: str) -> int:
    if text == reference:
        return 5
    return 1 + round(3 * difflib.SequenceMatcher(None, text[:500], reference).ratio())


def _rating(names: list[str], score: int) -> str:
    return json.dumps({"reasoning": "by likeness"} | dict.fromkeys(names, score))
