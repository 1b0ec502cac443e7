"""Judges are asked here: cache, threads, retries and one repair. A failed item never raises; it is unscored."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftx import models
from ftx.errors import first_line
from ftx_llm_judge_backends import LONGEST_WAIT, Answer, Backend, Failure, Final, Passing, Request, connect
from ftx_llm_judge_cache import Cache, digest
from ftx_llm_judge_options import Judging, split
from ftx_llm_judge_usage import Usage

if TYPE_CHECKING:
    from tenacity import RetryCallState

    from ftx import Run

#: Seconds before the first repetition, doubled for each further one, with as much jitter again.
FIRST_WAIT = 1.0
DRY_RUN = "dry run"
REPAIR = "Your answer could not be read: {reason}. Answer again, in exactly the form that was asked for and with nothing else."
#: A key that is shorter is a placeholder such as "EMPTY", and no secret.
SHORTEST_KEY = 8


@dataclass(frozen=True)
class Ask:
    """One question to a judge. `schema` is the JSON schema of the verdict; None where it is free text.

    `temperature` and `max_tokens` default to the options'. `sample` tells repeated draws of one question apart, so that
    they are not served one cached answer. `what` is a label for people and changes nothing.
    """

    system: str
    user: str
    schema: dict[str, Any] | None = None
    schema_name: str = "verdict"
    temperature: float | None = None
    max_tokens: int | None = None
    sample: int = 0
    what: str = ""


@dataclass(frozen=True)
class Verdict:
    """What came of one Ask. `value` is what the parser made of the answer, or None with the `reason` why it is unscored.

    `text` is the judge's last raw answer; the tokens are those of all answers to it, `asked` the number of requests
    (repeated and repairing ones included; 0 from the cache).
    """

    value: Any | None
    reason: str
    text: str
    model: str
    input_tokens: int
    output_tokens: int
    cached: bool
    asked: int


class Unreadable(ValueError):
    """Raised by a parser for an answer that holds no verdict; its text is the reason."""


@dataclass
class _Spent:
    """What one question has taken so far, and the last answer to it."""

    asked: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    text: str = ""


class Judge:
    """One judge of an evaluation. `usage` counts for all judges of the same evaluator in this run; close() when done."""

    def __init__(self, options: Judging, model: str, run: Run) -> None:
        """RunError if the cache cannot be used, ModelError if there is no such local model."""
        self.name = model
        self.usage = Usage(options, model, run)
        self._options = options
        self._run = run
        self._key = options.key(model)
        self._cache = _cache(options)
        backend, name = split(model)
        self._place = models.fingerprint(models.resolve(name, run.say)) if backend == "local" else options.address(model)
        self._backend: Backend | None = None  # made when it is first needed: a dry run has neither client nor key
        self._over = ""  # why nothing more is asked
        self._stop = threading.Event()

    def verdicts(self, asks: Sequence[Ask], parse: Callable[[str], Any]) -> list[Verdict]:
        """One verdict an ask, in the order asked. Equal asks are asked once.

        `parse` makes the value of an answer or raises Unreadable; it is called in several threads. Interrupted, it keeps
        the answers that are under way and raises; asked again, it asks for the rest.
        """
        requests = [self._request(ask) for ask in asks]
        keys = [self._digest(request) for request in requests]
        done = {key: verdict for key in dict.fromkeys(keys) if (verdict := self._remembered(key, parse))}
        new = {key: request for key, request in zip(keys, requests, strict=True) if key not in done}
        if self._options.dry_run:
            for request in new.values():
                self.usage.estimate(request.text, request.max_tokens)
            return [self._unscored(DRY_RUN, _Spent())] * len(asks)
        done |= self._ask(new, parse) if new else {}
        return [done[key] for key in keys]

    def close(self) -> None:
        """Let go of the client, or of the local model."""
        if self._backend:
            self._backend.close()
            self._backend = None

    # ---- Cache

    def _request(self, ask: Ask) -> Request:
        return Request(
            system=_encodable(ask.system),
            turns=(_encodable(ask.user),),
            schema=ask.schema if self._options.structured == "auto" else None,
            schema_name=ask.schema_name,
            temperature=float(self._options.temperature if ask.temperature is None else ask.temperature),
            max_tokens=self._options.max_tokens if ask.max_tokens is None else ask.max_tokens,
            sample=ask.sample,
        )

    def _digest(self, request: Request) -> str:
        return digest(model=split(self.name), place=self._place, **vars(request))

    def _remembered(self, key: str, parse: Callable[[str], Any]) -> Verdict | None:
        """The verdict of a kept answer, unless today's parser cannot read it."""
        found = self._cache.get(key) if self._cache else None
        if found is None:
            return None
        text, input_tokens, output_tokens = found
        try:
            value = parse(text)
        except Unreadable:
            return None
        self.usage.from_cache()
        return Verdict(value, "", text, self.name, input_tokens, output_tokens, cached=True, asked=0)

    def _keep(self, key: str, spent: _Spent) -> None:
        try:
            if self._cache:
                self._cache.put(key, self.name, spent.text, spent.input_tokens, spent.output_tokens)
        except sqlite3.Error as error:  # a full disk costs the cache, not the verdict
            self._run.say(f"warning: a verdict could not be written to {self._options.cache or 'the cache'}: {first_line(error)}")

    # ---- Asking

    def _ask(self, new: dict[str, Request], parse: Callable[[str], Any]) -> dict[str, Verdict]:
        self._backend = self._backend or connect(self._options, self.name, self._run)
        self._stop.clear()
        keys, size = list(new), self._backend.batch or len(new)
        done: dict[str, Verdict] = {}
        for some in (keys[start : start + size] for start in range(0, len(keys), size)):
            self._backend.prepare([new[key] for key in some])
            pool = ThreadPoolExecutor(self._options.concurrency, thread_name_prefix="judge")
            try:
                futures = {key: pool.submit(self._verdict, key, new[key], parse) for key in some}
                done |= {key: future.result() for key, future in futures.items()}
            finally:
                # Interrupted: nothing new is asked, nobody waits to ask again, and what is under way is waited for: it is paid for.
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
            self._stop.clear()
        return done

    def _verdict(self, key: str, request: Request, parse: Callable[[str], Any]) -> Verdict:
        """Ask, read, and where that fails ask once more for an answer that can be read."""
        spent, reason = _Spent(), ""
        for _ in range(2):
            try:
                answer = self._answer(request, spent)
            except Failure as failure:
                said = self._redacted(str(failure))
                return self._unscored(f"{reason}; asked again: {said}" if reason else said, spent)
            try:
                value = parse(spent.text)
            except Unreadable as error:
                reason = f"the answer was cut at max_tokens={request.max_tokens}: {error}" if answer.cut else str(error)
                request = request.after(spent.text, REPAIR.format(reason=reason))
            else:
                self._keep(key, spent)
                return Verdict(value, "", spent.text, self.name, spent.input_tokens, spent.output_tokens, cached=False, asked=spent.asked)
        return self._unscored(reason, spent)

    def _answer(self, request: Request, spent: _Spent) -> Answer:
        """An answer, asked for until it comes; Failure with the reason where it does not."""
        from tenacity import Retrying, retry_if_exception_type, sleep_using_event, stop_after_attempt

        retrying = Retrying(
            stop=stop_after_attempt(self._options.retries + 1),
            wait=_wait,
            sleep=sleep_using_event(self._stop),
            retry=retry_if_exception_type(Passing),
            reraise=True,
        )
        try:
            return retrying(self._answer_once, request, spent)
        except Passing as failure:
            tries = retrying.statistics["attempt_number"]
            raise Final(f"{failure} (tried {tries} times)" if tries > 1 else str(failure)) from None

    def _answer_once(self, request: Request, spent: _Spent) -> Answer:
        if self._over or self._stop.is_set():
            raise Final(self._over or "interrupted")
        assert self._backend is not None
        try:
            with self.usage.call(request.text, request.max_tokens):
                spent.asked += 1
                answer = self._backend.answer(request)
                self.usage.answered(answer)
        except Final as failure:
            if failure.for_all:
                self._over = str(failure)
            raise
        spent.text = self._redacted(answer.text)
        spent.input_tokens += answer.input_tokens
        spent.output_tokens += answer.output_tokens
        return answer

    def _unscored(self, reason: str, spent: _Spent) -> Verdict:
        return Verdict(None, reason, spent.text, self.name, spent.input_tokens, spent.output_tokens, cached=False, asked=spent.asked)

    def _redacted(self, text: str) -> str:
        return redact(text, self._key)


def redact(text: str, key: str) -> str:
    """A text without the key, which some servers repeat in their errors."""
    return text.replace(key, "[key]") if len(key) >= SHORTEST_KEY else text


def _cache(options: Judging) -> Cache | None:
    if options.cache == "none":
        return None
    return Cache(Path(options.cache).expanduser() if options.cache else models.cache_directory() / "judge.sqlite")


def _encodable(text: str) -> str:
    """Without halves of surrogate pairs, which no request can carry."""
    return text.encode("utf-8", "replace").decode()


def _wait(state: RetryCallState) -> float:
    """Exponential with jitter, and at least as long as the server asks for."""
    from tenacity import wait_exponential_jitter

    failure = state.outcome.exception() if state.outcome else None
    asked = failure.wait if isinstance(failure, Passing) else 0.0
    return max(asked, wait_exponential_jitter(multiplier=FIRST_WAIT, max=LONGEST_WAIT, jitter=FIRST_WAIT)(state))
