"""What judging takes: calls, tokens and money, counted in the run's notes, and the caps on them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ftx_llm_judge_backends import Answer, Final, tokens
from ftx_llm_judge_options import Judging, split

if TYPE_CHECKING:
    from ftx import Run


class Usage:
    """The counts of one evaluator's judges over the whole run: base, tuned and change.

    They stand in `run.notes["usage"]`, one entry a judge, and so in the manifest; those of a dry run, which uses nothing, in
    `run.notes["estimate"]`. Judges that work at the same time keep the caps only each by itself.
    """

    def __init__(self, options: Judging, model: str, run: Run) -> None:
        self._options = options
        self._model = model
        kind = "estimate" if options.dry_run else "usage"
        self._judges: dict[str, dict[str, Any]] = run.notes.setdefault(kind, {}).setdefault(options.called, {})
        self._counts = self._judges.setdefault(model, dict.fromkeys(("calls", "cached", "input_tokens", "output_tokens"), 0))
        self._under_way = 0.0  # USD that the requests under way may cost at most
        self._changed = threading.Condition()

    @property
    def calls(self) -> int:
        """Requests made, repeated and repairing ones included; in a dry run those that would be made."""
        return self._sum("calls")

    @property
    def cached(self) -> int:
        return self._sum("cached")

    @property
    def input_tokens(self) -> int:
        return self._sum("input_tokens")

    @property
    def output_tokens(self) -> int:
        """In a dry run the most that there can be."""
        return self._sum("output_tokens")

    @property
    def cost(self) -> float | None:
        """USD; None where a judge has no price."""
        return self._cost(with_output=True)

    def from_cache(self) -> None:
        with self._changed:
            self._counts["cached"] += 1

    def estimate(self, prompt: str, max_tokens: int) -> None:
        """Count a call that a dry run does not make."""
        with self._changed:
            self._add(1, tokens(prompt), max_tokens)

    @contextmanager
    def call(self, prompt: str, max_tokens: int) -> Iterator[None]:
        """Around one request. Final where it could exceed a cap, whose money is that of the longest possible answer; where
        only the requests under way stand in between it waits for them."""
        most = self._money(self._model, tokens(prompt), max_tokens) or 0.0
        with self._changed:
            self._changed.wait_for(lambda: self._refusal(most) or self._fits(most + self._under_way))
            if refusal := self._refusal(most):
                raise Final(refusal, for_all=True)
            self._add(1, 0, 0)
            self._under_way += most
        try:
            yield
        finally:
            with self._changed:
                self._under_way -= most
                self._changed.notify_all()

    def answered(self, answer: Answer) -> None:
        """Count an answer's tokens; call it inside `call`, or the cap would not see the money for a moment."""
        with self._changed:
            self._add(0, answer.input_tokens, answer.output_tokens)

    def line(self) -> str:
        """`judge gpt-4o: 160 calls, 12 from the cache, 1.2M + 0.1M tokens, $3.40`."""
        who = f"{'judge' if len(self._judges) == 1 else 'judges'} {', '.join(self._judges)}"
        cached = f", {self.cached} from the cache" if self.cached else ""
        given, made = short(self.input_tokens), short(self.output_tokens)
        if self._options.dry_run:
            money = f", {_usd(self._cost(with_output=False) or 0.0)} to {_usd(self.cost)}" if self.cost is not None else ""
            return f"{who} would make {self.calls} calls{cached}, about {given} input and up to {made} output tokens{money}"
        return f"{who}: {self.calls} calls{cached}, {given} + {made} tokens" + (f", {_usd(self.cost)}" if self.cost is not None else "")

    def _refusal(self, most: float) -> str:
        """Why a request that costs at most so many USD is not made, if it is not."""
        if self._options.max_calls is not None and self.calls >= self._options.max_calls:
            return f"the cap of {self._options.max_calls} calls is reached"
        return "" if self._fits(most) else f"the cap of {_usd(self._options.max_cost or 0.0)} is reached"

    def _fits(self, more: float) -> bool:
        return self._options.max_cost is None or (self.cost or 0.0) + more <= self._options.max_cost

    def _sum(self, what: str) -> int:
        return sum(counts[what] for counts in self._judges.values())

    def _add(self, calls: int, input_tokens: int, output_tokens: int) -> None:
        for what, more in (("calls", calls), ("input_tokens", input_tokens), ("output_tokens", output_tokens)):
            self._counts[what] += more
        cost = self._money(self._model, self._counts["input_tokens"], self._counts["output_tokens"])
        if cost is not None:
            self._counts["cost"] = cost

    def _cost(self, *, with_output: bool) -> float | None:
        each = [self._money(model, counts["input_tokens"], counts["output_tokens"] * with_output) for model, counts in self._judges.items()]
        return None if None in each else sum(money for money in each if money is not None)

    def _money(self, model: str, input_tokens: int, output_tokens: int) -> float | None:
        price = self._options.price(model) or ((0.0, 0.0) if split(model)[0] == "local" and self._options.prices else None)
        return None if price is None else (input_tokens * price[0] + output_tokens * price[1]) / 1e6


def short(count: int) -> str:
    """950, 12k, 1.2M."""
    return str(count) if count < 1000 else f"{count / 1000:.0f}k" if count < 999_500 else f"{count / 1e6:.1f}M"


def _usd(money: float) -> str:
    """$3.40, $0.0028."""
    return f"${money:.2f}" if money >= 0.1 or money == 0 else f"${money:.2g}"
