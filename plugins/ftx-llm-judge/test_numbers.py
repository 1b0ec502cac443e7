"""The numbers against published ones, and at their edges."""

from __future__ import annotations

import random

import pytest

from ftx_llm_judge_numbers import alpha, kappa, length_controlled, mean, mean_kappa, rank_correlation, rate


def test_mean():
    value, low, high = mean([1, 2, 3, 4, 5] * 20, 42)
    assert value == 3 and 2.6 < low < 2.8 and 3.2 < high < 3.4
    assert mean([1, 2, 3, 4, 5] * 20, 42) == (value, low, high)
    assert mean([4.0], 42) == (4.0, None, None)
    assert mean([0.1] * 7, 42) == pytest.approx((0.1, 0.1, 0.1))


def test_rate_is_wilsons():
    # Newcombe (1998), table I: 81 of 263
    assert rate([1.0] * 81 + [0.0] * 182)[1:] == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert rate([0.5] * 10)[0] == 0.5
    assert rate([1.0] * 5)[1:] == pytest.approx((0.5655, 1.0), abs=5e-5)
    assert rate([0.0] * 5)[1] == 0.0


def test_length_controlled_win_rate_of_length_alone_is_even():
    generator = random.Random(1)
    longer_by = [generator.gauss(150, 200) for _ in range(200)]
    preferences = [float(delta > 0) for delta in longer_by]
    value, low, high = length_controlled(preferences, longer_by, 1)
    assert sum(preferences) / 200 > 0.7
    assert low <= value <= high and abs(value - 0.5) < 0.12


def test_length_controlled_win_rate_without_an_influence_is_the_win_rate():
    generator = random.Random(2)
    longer_by = [generator.gauss(100, 200) for _ in range(400)]
    preferences = [1.0 if generator.random() < 0.7 else 0.5 if generator.random() < 0.5 else 0.0 for _ in longer_by]
    value, _, _ = length_controlled(preferences, longer_by, 1)
    assert value == pytest.approx(sum(preferences) / 400, abs=0.04)
    # seen from the other side it is the rest to 1
    other, _, _ = length_controlled([1 - one for one in preferences], [-one for one in longer_by], 1)
    assert value + other == pytest.approx(1, abs=1e-3)


def test_length_controlled_win_rate_where_there_is_none():
    assert length_controlled([1.0] * 19, list(range(19)), 1) is None
    assert length_controlled([1.0, 0.0] * 20, [7] * 40, 1) is None
    assert length_controlled([1.0] * 40, list(range(40)), 1) == (1.0, 1.0, 1.0)


def test_kappa():
    # Cohen's example in Wikipedia's article: 20 both yes, 5 and 10 apart, 15 both no
    one, other = [1] * 25 + [0] * 25, [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert kappa(one, other, (0, 1), ordinal=False) == pytest.approx(0.4)
    assert kappa([1, 1], [1, 1], (0, 1), ordinal=False) is None
    assert kappa([], [], (0, 1), ordinal=False) is None
    # a miss by four weighs sixteen times one by one, also if nobody chose what lies between
    assert kappa([1, 5, 1, 5], [1, 5, 1, 1], range(1, 6), ordinal=True) == pytest.approx(0.5)


def test_alpha_is_krippendorffs():
    # Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", example C
    ratings = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    assert alpha(ratings, ordinal=False) == pytest.approx(0.743, abs=5e-4)
    assert alpha(ratings, ordinal=True) == pytest.approx(0.815, abs=5e-4)
    assert alpha([[1, 1], [1, 1]], ordinal=True) is None
    assert alpha([[1, None], [None, 2]], ordinal=True) is None


def test_mean_kappa_over_the_pairs_of_raters():
    ratings = [[0, 1, 0, 1, None], [0, 1, 0, 1, 1], [0, 1, 1, 0, 0]]
    assert mean_kappa(ratings, (0, 1), ordinal=False) == pytest.approx((1 + 0 + kappa([0, 1, 0, 1, 1], [0, 1, 1, 0, 0], (0, 1), ordinal=False)) / 3)


def test_rank_correlation():
    assert rank_correlation([1, 2, 3], [10, 20, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2], [10, 20]) is None
    assert rank_correlation([3, 3, 3], [10, 20, 40]) is None
