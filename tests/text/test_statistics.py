"""Diversity, counted by hand."""

import math

import pytest

from rlhf_jax.text import statistics as text_statistics

# Unigrams 1 2 1 2 | 1 2 3 | 4: 8, of which 1, 2, 3, 4 differ.
# Bigrams 12 21 12 | 12 23: 5, of which 12, 21, 23 differ.
# Trigrams 121 212 | 123: 3, all differ.
RESPONSES = [[1, 2, 1, 2], [1, 2, 3], [4], []]


@pytest.mark.parametrize("n, wanted", [(1, 4 / 8), (2, 3 / 5), (3, 1.0)])
def test_distinct(n, wanted):
  assert text_statistics.distinct(RESPONSES, n) == wanted


# Within the first response alone: 1 and 2 come again, and 12 does.
@pytest.mark.parametrize("n, wanted", [(1, 2 / 8), (2, 1 / 5), (3, 0.0)])
def test_self_repetition(n, wanted):
  assert text_statistics.self_repetition(RESPONSES, n) == wanted


def test_extremes():
  loop = [[5] * 10] * 3
  assert text_statistics.distinct(loop, 2) == 1 / 27
  assert text_statistics.self_repetition(loop, 2) == 24 / 27  # 8 of each 9
  # Between responses nothing counts as a repetition.
  assert text_statistics.self_repetition([[1, 2], [1, 2]], 2) == 0


def test_no_n_grams():
  assert math.isnan(text_statistics.distinct([[1], []], 2))
  assert math.isnan(text_statistics.self_repetition([], 4))
