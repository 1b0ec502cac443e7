"""Numbers from verdicts: means, shares and rates with their intervals, the length-controlled win rate, and how far judges agree."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Sequence
from statistics import NormalDist, fmean
from typing import Any

RESAMPLES = 2000
#: A length-controlled rate rests on a regression with two coefficients; of fewer pairs it would say nothing.
FEWEST_PAIRS = 20

#: A value and its 95 % interval, None where there is none.
Estimate = tuple[float, float | None, float | None]


def mean(values: Sequence[float], seed: int) -> Estimate:
    """The mean of at least one value, with its percentile bootstrap interval; none for a single value.

    For a comparison give the differences of the pairs: resampling pairs is what makes the bootstrap a paired one.
    """
    value = fmean(values)
    if len(values) < 2:
        return value, None, None
    from scipy.stats import bootstrap

    rng = _generator(seed)
    interval = bootstrap((values,), _mean, n_resamples=RESAMPLES, method="percentile", vectorized=True, batch=100, rng=rng).confidence_interval
    # sums in another order differ in the last digit, which shows where all values are equal
    return value, min(value, float(interval.low)), max(value, float(interval.high))


def _mean(values: Any, axis: int) -> Any:
    return values.mean(axis=axis)


def rate(shares: Sequence[float]) -> Estimate:
    """The mean of values in 0..1 and the score interval of a share (Wilson, 1927).

    With halves in it (a tie is half a win) the variance is smaller than a share's, so the interval is too wide rather
    than too narrow; unlike the bootstrap's it does not shrink to nothing where all pairs were won.
    """
    n, value = len(shares), fmean(shares)
    z = NormalDist().inv_cdf(0.975)
    centre = value + z * z / (2 * n)
    half = z * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return value, max(0.0, min(value, (centre - half) / scale)), min(1.0, max(value, (centre + half) / scale))


def length_controlled(preferences: Sequence[float], longer_by: Sequence[float], seed: int) -> Estimate | None:
    """The win rate that would be if both answers were of one length, or None for too few pairs or equal lengths.

    AlpacaEval 2's idea (Dubois et al., 2024, arXiv 2404.04475): logit P(win) = a + b tanh(difference in length / its
    standard deviation), and of it sigmoid(a). `preferences`: 1 a win, 0 a loss, between them a tie; `longer_by`:
    characters, tuned minus base. The intercept a is the model's own merit (AlpacaEval's term for the model against the
    baseline) and is not penalised; b is, by sklearn's default L2. AlpacaEval's term for how hard each of its questions is
    needs its own table, and is not here. Interval: bootstrap over pairs.
    """
    import numpy

    y, delta = numpy.asarray(preferences, dtype=float), numpy.asarray(longer_by, dtype=float)
    if len(y) < FEWEST_PAIRS or delta.std() == 0:
        return None
    x = numpy.tanh(delta / delta.std())
    value = _at_equal_length(x, y)
    generator = _generator(seed)
    picks = (generator.integers(len(y), size=len(y)) for _ in range(RESAMPLES // 10))  # each is a fit of its own
    low, high = numpy.quantile([_at_equal_length(x[pick], y[pick]) for pick in picks], [0.025, 0.975])
    return value, min(value, float(low)), max(value, float(high))


def _at_equal_length(x: Any, y: Any) -> float:
    """sigmoid of the intercept; a preference between 0 and 1 is both a win and a loss, by weight."""
    import numpy
    from sklearn.linear_model import LogisticRegression

    if y.min() == y.max():
        return float(y[0])  # nothing for a length to explain, and no finite intercept if all are won
    wins = numpy.repeat([1, 0], len(y))
    model = LogisticRegression().fit(numpy.tile(x, 2)[:, None], wins, sample_weight=numpy.concatenate([y, 1 - y]))
    return float(1 / (1 + numpy.exp(-model.intercept_[0])))


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's, or None where it is not defined (fewer than three items, or all of them equal)."""
    if len(one) < 3 or len(set(one)) == 1 or len(set(other)) == 1:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(one, other).statistic)


def kappa(one: Sequence[int], other: Sequence[int], labels: Sequence[int], *, ordinal: bool) -> float | None:
    """Cohen's kappa of two raters who choose from `labels`, quadratically weighted if those are ordinal; None if undefined.

    It is undefined where both always say the same one thing: nothing is left for agreement beyond chance.
    """
    from sklearn.metrics import cohen_kappa_score

    if not one:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an undefined value is a NaN, and a warning
        # with the labels given, so that one that nobody chose still counts as a step of the scale
        value = float(cohen_kappa_score(list(one), list(other), labels=list(labels), weights="quadratic" if ordinal else None))
    return None if math.isnan(value) else value


def mean_kappa(ratings: Sequence[Sequence[int | None]], labels: Sequence[int], *, ordinal: bool) -> float | None:
    """The mean kappa over pairs of raters (rows), each over the units (columns) that both rated."""
    found = []
    for one, other in itertools.combinations(ratings, 2):
        both = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
        found.append(kappa([a for a, _ in both], [b for _, b in both], labels, ordinal=ordinal))
    values = [value for value in found if value is not None]
    return fmean(values) if values else None


def alpha(ratings: Sequence[Sequence[int | None]], *, ordinal: bool) -> float | None:
    """Krippendorff's alpha of raters (rows) over units (columns); a rating may be missing. None where it is undefined."""
    import krippendorff

    paired = [column for column in zip(*ratings, strict=True) if sum(value is not None for value in column) > 1]
    if len({value for column in paired for value in column} - {None}) < 2:
        return None
    data = [[math.nan if value is None else float(value) for value in row] for row in ratings]
    return float(krippendorff.alpha(reliability_data=data, level_of_measurement="ordinal" if ordinal else "nominal"))


def _generator(seed: int) -> Any:
    import numpy

    return numpy.random.default_rng(seed)
