"""The rule that chooses a β, on hand-made rows."""

import pytest

from rlhf_jax.measures import recommendation


def _rows(figures, *, half=0.1, name="gold"):
  """Rows from {β: (KL, reward)}."""
  around = lambda mean: {"mean": mean, "low": mean - half, "high": mean + half}
  return [
    {"beta": beta, "kl": around(float(kl)), name: around(float(reward))}
    for beta, (kl, reward) in sorted(figures.items())
  ]


def _golds(rows, noise=((0.0,),)):
  """β → seed → gold: the row's mean and the noise of its turn."""
  return {
    row["beta"]: {
      seed: row["gold"]["mean"] + extra
      for seed, extra in enumerate(noise[i % len(noise)])
    }
    for i, row in enumerate(rows)
  }


def _by_gold(figures, *, start=0.0, half=0.1, noise=((0.0,),)):
  rows = _rows(figures, half=half)
  return recommendation.by_gold(rows, _golds(rows, noise), start)


_RISE_AND_FALL = {
  0.0: (40, 0.5),
  0.01: (20, 1.2),
  0.03: (12, 1.6),
  0.1: (8, 1.5),
  0.3: (3, 1.0),
  1.0: (1, 0.4),
}


def test_the_largest_beta_that_is_like_the_best():
  # Intervals are ±0.1: 1.5 overlaps 1.6; 1.2 and 1.0 do not.
  found = _by_gold(_RISE_AND_FALL)
  assert found["beta"] == 0.1
  assert found["highest"] == 0.03
  assert found["alike"] == [0.03, 0.1]
  assert found["kl"] == 8
  assert found["expected"]["mean"] == 1.5
  assert found["above_start"]
  assert "From β = 0.03 to 0.1" in found["text"]
  assert "tried" not in found["text"]


def test_the_range_goes_down_as_well():
  found = _by_gold(_RISE_AND_FALL, half=0.21)
  assert found["alike"] == [0.01, 0.1]


def test_a_planted_reversal_recommends_the_largest_beta():
  """Gold falls with KL everywhere: whoever moves least loses least."""
  found = _by_gold({0.0: (40, -4), 0.1: (10, -2), 1.0: (1, -1)})
  assert found["beta"] == 1.0
  assert found["alike"] == [1.0, 1.0]
  assert not found["above_start"]
  assert "not surely a gain" in found["text"]
  assert "No larger β was tried" in found["text"]


def test_gold_that_rises_with_kl_recommends_the_smallest_beta():
  found = _by_gold({0.01: (40, 4), 0.1: (10, 2), 1.0: (1, 1)})
  assert found["beta"] == 0.01
  assert "No smaller β was tried" in found["text"]


def test_a_gap_ends_the_range():
  """1.0 is like the best by its interval, but 0.3 between them is not."""
  found = _by_gold({0.1: (8, 1.5), 0.3: (3, 1.0), 1.0: (1, 1.4)})
  assert found["beta"] == 0.1


def test_seeds_are_paired():
  """Seeds differ by 2, β by 0.2 in each: wide intervals, and yet a verdict."""
  figures = {0.1: (8, 1.2), 0.3: (4, 1.0)}
  shared = _by_gold(figures, half=3.0, noise=((-2, 0.01, 2), (-2, 0, 2.01)))
  assert shared["beta"] == 0.1
  # The same spread, not shared by the β of a seed.
  apart = _by_gold(figures, half=3.0, noise=((-2, 0, 2), (2, -2, 0)))
  assert apart["beta"] == 0.3
  # One seed has no pairs: the intervals overlap.
  assert _by_gold(figures, half=3.0)["beta"] == 0.3


def test_two_rows_are_the_paired_t_test():
  # Differences 0.1, 0.2, 0.3: mean 0.2, sd 0.1, t = 0.2/(0.1/√3) = 3.46, and
  # t(0.975, 2) = 4.30. Differences 0.13, 0.2, 0.27: t = 4.95.
  figures = {0.1: (8, 1.2), 0.3: (4, 1.0)}
  for spread, chosen in ((0.1, 0.3), (0.07, 0.1)):
    noise = ((-spread, 0.0, spread), (0.0, 0.0, 0.0))
    assert _by_gold(figures, noise=noise)["beta"] == chosen


def test_more_rows_know_the_spread_better():
  """Two seeds: t(0.975, 1) = 12.7 for two rows, t(0.975, 4) = 2.78 for five.

  Between 0.1 and 0.2 lie 0.5, and a seed's noise is ±0.05 here.
  """
  noise = ((-0.05, 0.05), (0.05, -0.05))
  two = {0.1: (8, 1.5), 0.2: (6, 1.0)}
  assert _by_gold(two, noise=noise)["beta"] == 0.2
  five = two | {0.3: (5, 0.9), 0.5: (4, 0.8), 1.0: (1, 0.2)}
  assert _by_gold(five, noise=noise)["beta"] == 0.1


def test_seeds_that_one_beta_lacks_are_not_paired():
  rows = _rows({0.1: (8, 1.2), 0.3: (4, 1.0)}, half=0.05)
  golds = {0.1: {0: 1.2, 1: 1.2, 2: 5.0}, 0.3: {0: 1.0, 1: 1.0}}
  assert recommendation.by_gold(rows, golds, 0.0)["beta"] == 0.1
  # No pair is left; the intervals ±0.05 do not overlap, ±0.2 do.
  alone = {0.1: {0: 1.2}, 0.3: {1: 1.0}}
  assert recommendation.by_gold(rows, alone, 0.0)["beta"] == 0.1
  wide = _rows({0.1: (8, 1.2), 0.3: (4, 1.0)}, half=0.2)
  assert recommendation.by_gold(wide, alone, 0.0)["beta"] == 0.3


@pytest.mark.parametrize("start, chosen", [(0.0, 0.1), (-2.0, 0.3)])
def test_without_gold_most_of_the_gain_is_kept(start, chosen):
  # From 0: 80 % of 2.0 is 1.6, and 1.5 is below. From −2: 80 % of 4.0 is
  # 3.2, and 1.5 is a gain of 3.5; 0.5 is one of 2.5.
  rows = _rows(
    {0.0: (40, 2.0), 0.1: (8, 1.7), 0.3: (4, 1.5), 1.0: (1, 0.5)},
    name="proxy",
  )
  found = recommendation.by_proxy(rows, start)
  assert (found["beta"], found["highest"]) == (chosen, 0.0)
  assert found["reward"] == "proxy"
  assert "80%" in found["text"] and "There is no gold" in found["text"]


def test_a_proxy_that_never_rose_is_called_so():
  rows = _rows({0.0: (40, -2.0), 1.0: (1, -0.5)}, name="proxy")
  found = recommendation.by_proxy(rows, 0.0)
  assert found["beta"] == 1.0
  assert "no β raised the proxy" in found["text"]
