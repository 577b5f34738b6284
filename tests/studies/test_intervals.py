"""Intervals against their definition, and against how often they are right."""

import math

import numpy as np
import pytest

from rlhf_jax.studies import intervals


def test_the_interval_by_hand():
  """Three values: t at 2 degrees of freedom is 4.3027, the error 1/√3."""
  found = intervals.of_mean([1.0, 2.0, 3.0])
  half = 4.302653 / math.sqrt(3)
  assert found == pytest.approx((2.0, 2 - half, 2 + half), rel=1e-6)


def test_pairs_leave_out_what_they_share():
  """A constant difference is certain, however the pairs differ."""
  found = intervals.of_difference([1.0, 5.0, 9.0], [0.5, 4.5, 8.5])
  assert found == pytest.approx((0.5, 0.5, 0.5))


def test_pairs_must_be_pairs():
  with pytest.raises(ValueError):
    intervals.of_difference([1.0], [1.0, 2.0])


def test_one_value_says_nothing():
  assert intervals.of_mean([3.0]) == (3.0, -math.inf, math.inf)


def test_95_of_100_intervals_hold_the_mean():
  draws = np.random.default_rng(0).normal(1.0, 2.0, (2000, 5))
  found = [intervals.of_mean(row) for row in draws]
  share = np.mean([i.low <= 1.0 <= i.high for i in found])
  assert share == pytest.approx(0.95, abs=0.015)
