"""Uncertainty of shares and ratios, and the test of a change: Wilson, bootstrap, McNemar.

Written out because scipy is a large dependency for these few lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

RESAMPLES = 2000


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The score interval of a share of `n` > 0 (Wilson, 1927; formula 4 of Brown, Cai and DasGupta, 2001)."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # at 0 and n the bound is exact, whatever rounding makes of it
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def ratio_of_sums(numerators: Sequence[float], denominators: Sequence[float], seed: int) -> tuple[float, float | None, float | None]:
    """sum(numerators) / sum(denominators) over items, and its 95 % percentile bootstrap interval (Efron, 1979).

    Items are resampled whole, `RESAMPLES` times, by a generator of its own from `seed`. 0 where the denominator is 0;
    no interval for fewer than two items.
    """
    import numpy

    items = numpy.array([numerators, denominators], dtype=numpy.float64).T
    value = _ratio(items.sum(axis=0))
    if len(items) < 2:
        return value, None, None
    generator = numpy.random.default_rng(seed)
    resampled = [_ratio(items[generator.integers(len(items), size=len(items))].sum(axis=0)) for _ in range(RESAMPLES)]
    low, high = numpy.quantile(resampled, [0.025, 0.975])
    return value, float(low), float(high)


def _ratio(sums: Sequence[float]) -> float:
    return float(sums[0] / sums[1]) if sums[1] else 0.0


def mcnemar(fixed: int, broken: int) -> float:
    """The exact two-sided p of McNemar's test: that as many or more of the changed items went one way by tossing a coin.

    Twice the smaller tail of Binomial(fixed + broken, 1/2), at most 1 (McNemar, 1947; the exact conditional test of
    Fagerland, Lydersen and Laake, 2013). In whole numbers up to the last division, so that nothing rounds.
    """
    n, term, tail = fixed + broken, 1, 0
    for k in range(min(fixed, broken) + 1):
        tail += term
        term = term * (n - k) // (k + 1)  # math.comb(n, k + 1), without starting over each time
    return min(1.0, 2 * tail / 2**n)
