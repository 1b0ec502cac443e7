"""For tests: a proxy that stands before an OpenAI-compatible server, and spoils a share of the requests in every way that servers know."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: The longest an upstream may take, in seconds.
PATIENCE = 600


class Handler(BaseHTTPRequestHandler):
    """One request: passed on and answered as upstream does, or spoiled as the proxy's plan says."""

    proxy: Proxy

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        fault = self.proxy.fault(body)
        if fault:
            FAULTS[fault](self, body)
        else:
            self.pass_on(body)

    def pass_on(self, body: bytes) -> None:
        status, content = self.upstream(body)
        self.reply(status, content)

    def upstream(self, body: bytes) -> tuple[int, bytes]:
        url = self.proxy.upstream + self.path.removeprefix("/v1")
        request = urllib.request.Request(url, body, {"Content-Type": "application/json", "Authorization": self.headers.get("Authorization", "")})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def reply(self, status: int, content: bytes, *, kind: str = "application/json", announced: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content) if announced is None else announced), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def error(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        self.reply(status, json.dumps({"error": {"message": message, "type": code, "code": code, "param": None}}).encode(), **headers)

    def drop(self) -> None:
        self.close_connection = True
        self.connection.close()

    def half(self, body: bytes) -> None:
        """Half of the body, and then the connection is closed."""
        status, content = self.upstream(body)
        self.reply(status, content[: len(content) // 2], announced=len(content))
        self.close_connection = True

    def half_json(self, body: bytes) -> None:
        """Half of the body as if it were all of it."""
        status, content = self.upstream(body)
        self.reply(status, content[: len(content) // 2])

    def say(self, body: bytes, text: str) -> None:
        """What upstream answers, with another text."""
        status, content = self.upstream(body)
        changed = json.loads(content)
        changed["choices"][0]["message"]["content"] = text
        self.reply(status, json.dumps(changed).encode())

    def silence(self) -> None:
        time.sleep(self.proxy.silence)
        self.drop()

    def log_message(self, *_: Any) -> None:
        pass


#: What passes when it is asked again: name -> what is done with a request.
PASSING: dict[str, Callable[[Handler, bytes], None]] = {
    "429": lambda it, _: it.error(429, "slow down", "rate_limit_exceeded"),
    "429, Retry-After in seconds": lambda it, _: it.error(429, "slow down", "rate_limit_exceeded", Retry_After="1"),
    "429, Retry-After as a date": lambda it, _: it.error(429, "slow down", "rate_limit_exceeded", Retry_After=formatdate(time.time() + 1, usegmt=True)),
    "500": lambda it, _: it.error(500, "internal error"),
    "529": lambda it, _: it.error(529, "overloaded"),
    "dropped connection": lambda it, _: it.drop(),
    "silence": lambda it, _: it.silence(),
    "half a body": lambda it, body: it.half(body),
    "half of the JSON": lambda it, body: it.half_json(body),
    "HTML": lambda it, _: it.reply(200, b"<html><body><h1>502 Bad Gateway</h1> Score: 5</body></html>", kind="text/html"),
    "wrong shape": lambda it, _: it.reply(200, b'{"choices": [{"score": 5}], "score": 5}'),
    "error with status 200": lambda it, _: it.error(200, "overloaded"),
    "another language": lambda it, body: it.say(body, "Cette r\u00e9ponse m\u00e9rite quatre points sur cinq."),
}
#: What does not pass.
FINAL: dict[str, Callable[[Handler, bytes], None]] = {
    "insufficient_quota": lambda it, _: it.error(429, "You exceeded your current quota", "insufficient_quota"),
    "400": lambda it, _: it.error(400, "the prompt is too long"),
    "401": lambda it, _: it.error(401, f"Incorrect key: {it.headers.get('Authorization')}", "invalid_api_key"),
    "403": lambda it, _: it.error(403, f"not for {it.headers.get('Authorization')}"),
    "404": lambda it, _: it.error(404, "no such model", "model_not_found"),
}
FAULTS = PASSING | FINAL


class Proxy:
    """What is done to whom. Each third conversation is spoiled the first time it is asked, by the faults in turn.

    A conversation is known by its first question, so that no request to repair an answer is spoiled again. `arrived`: for
    each conversation the times at which it came; `done`: how often each fault happened.
    """

    def __init__(self, upstream: str, faults: Sequence[str], *, every: int, silence: float) -> None:
        self.upstream, self.faults, self.every, self.silence = upstream.rstrip("/"), faults, every, silence
        self.arrived: dict[str, list[float]] = {}
        self.done: Counter[str] = Counter()
        self.address = ""
        self._lock = threading.Lock()

    @property
    def requests(self) -> int:
        return sum(map(len, self.arrived.values()))

    def fault(self, body: bytes) -> str | None:
        conversation = json.dumps([message for message in json.loads(body)["messages"] if message["role"] != "assistant"][:2])
        with self._lock:
            times = self.arrived.setdefault(conversation, [])
            times.append(time.monotonic())
            number = len(self.arrived) - 1
            if len(times) > 1 or number % self.every:
                return None
            fault = self.faults[number // self.every % len(self.faults)]
            self.done[fault] += 1
            return fault


@contextmanager
def faulty(upstream: str, faults: Sequence[str] = tuple(PASSING), *, every: int = 3, silence: float = 30.0) -> Iterator[Proxy]:
    """A proxy on loopback before the server whose base URL is `upstream` (it ends in /v1); `address` is its own base URL."""
    proxy = Proxy(upstream, faults, every=every, silence=silence)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("ProxyHandler", (Handler,), {"proxy": proxy}))
    proxy.address = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
