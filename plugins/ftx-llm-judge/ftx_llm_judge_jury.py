"""A jury: all judges of an evaluation, what they say together, and how far they agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING, Literal

from ftx import Score
from ftx_llm_judge_asking import Judge

if TYPE_CHECKING:
    from ftx import Run
    from ftx_llm_judge_options import Judging

#: Above this share of items without a verdict the person is warned.
FEW_UNSCORED = 0.02

How = Literal["majority", "mean"]


@contextmanager
def jury(options: Judging, run: Run) -> Iterator[list[Judge]]:
    """The judges that the options name; afterwards what they cost is said, and they are closed."""
    judges: list[Judge] = []
    try:
        for model in options.models:
            judges.append(Judge(options, model, run))
        yield judges
    finally:
        for judge in judges:
            judge.close()
        if judges:
            run.say(judges[0].usage.line())


def together(values: Sequence[float], how: How) -> float:
    """One value for those of the judges who gave one: their mean, or the most frequent (the mean of those, if several are)."""
    if how == "majority":
        counts = Counter(values)
        values = [value for value, count in counts.items() if count == max(counts.values())]
    return fmean(values)


def agreement(ratings: Sequence[Sequence[int | None]], labels: Sequence[int], *, ordinal: bool, n: int, unscored: int) -> list[Score]:
    """How far the judges (rows) agree over the units (columns): `agreement_kappa` and `agreement_alpha`, where they are defined."""
    from ftx_llm_judge_numbers import alpha, mean_kappa

    if len(ratings) < 2:
        return []
    values = {"agreement_kappa": mean_kappa(ratings, labels, ordinal=ordinal), "agreement_alpha": alpha(ratings, ordinal=ordinal)}
    return [Score(metric=metric, value=value, n=n, unscored=unscored) for metric, value in values.items() if value is not None]


def warn_of_unscored(unscored: int, of: int, reasons: Sequence[str], run: Run) -> None:
    """A line with the most frequent reason, if more than a few are unscored."""
    if of and unscored / of > FEW_UNSCORED:
        reason = f" (most often: {Counter(reasons).most_common(1)[0][0]})" if reasons else ""
        run.say(f"warning: {unscored} of {of} are unscored{reason}; the items say why.")
