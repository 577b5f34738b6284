"""Fits against planted coefficients, and their intervals against their name."""

import math

import numpy as np
import pytest

from rlhf_jax.measures import scaling_fits

_D = np.array([0.4, 0.9, 1.5, 2.2, 3.0, 3.7, 4.5, 5.2, 6.0, 7.1])


def test_the_laws_at_hand_worked_points():
  # RL: e (2 − 0.5 · log e) = 1.5 e. Best of n: 3 (2 − 0.5 · 3) = 1.5.
  rl = scaling_fits.rl(np.array([0.0, 1.0, math.e]), 2.0, 0.5)
  np.testing.assert_allclose(rl, [0.0, 2.0, 1.5 * math.e], rtol=1e-12)
  bon = scaling_fits.best_of_n(np.array([0.0, 1.0, 3.0]), 2.0, 0.5)
  np.testing.assert_allclose(bon, [0.0, 1.5, 1.5], rtol=1e-12)


@pytest.mark.parametrize(
  "law, fit",
  [
    (scaling_fits.rl, scaling_fits.fit_rl),
    (scaling_fits.best_of_n, scaling_fits.fit_best_of_n),
  ],
)
def test_without_noise_the_planted_law_is_found(law, fit):
  alpha, beta = 1.7, 0.6
  found = fit(_D, law(_D, alpha, beta), 0.1 + 0.2 * _D)
  for estimate, planted in ((found.alpha, alpha), (found.beta, beta)):
    np.testing.assert_allclose(estimate, [planted] * 3, rtol=1e-9)
  # The peak by search, not by its formula.
  grid = np.linspace(0.01, 8, 200_000)
  highest = grid[law(grid, alpha, beta).argmax()]
  np.testing.assert_allclose(found.peak, [highest] * 3, atol=1e-4)
  assert found.r2 == pytest.approx(1.0, abs=1e-12)
  assert (found.points, found.reach) == (10, 7.1)


def test_precise_points_weigh_more():
  # Two planted laws; the points of the second have a hundredfold error, so
  # they count for 1/10,000 of the others.
  d = np.concatenate([_D, _D])
  gold = np.concatenate(
    [scaling_fits.rl(_D, 2.0, 0.5), scaling_fits.rl(_D, 1.0, 0.1)]
  )
  error = np.repeat([0.01, 1.0], len(_D))
  assert scaling_fits.fit_rl(d, gold, error).alpha.value == pytest.approx(
    2.0, abs=1e-3
  )
  equal = scaling_fits.fit_rl(d, gold)
  assert equal.alpha.value == pytest.approx(1.5)
  # An error of 0 (all responses alike) would be an infinite weight.
  error[0] = 0.0
  assert scaling_fits.fit_rl(d, gold, error) == equal


@pytest.mark.parametrize("errors_known", [True, False])
def test_intervals_hold_what_they_promise(errors_known):
  """Over 300 data sets 95 % intervals hold the planted value 95 % of times.

  The standard deviation of a share of 300 is 1.3 points; 91 to 99 is within
  three. Ten points with errors that differ threefold.
  """
  alpha, beta = 1.7, 0.6
  error = np.linspace(0.1, 0.3, len(_D))
  planted = (alpha, beta, math.exp(alpha / beta - 1))
  rng = np.random.default_rng(0)
  held = np.zeros(3)
  for _ in range(300):
    noisy = scaling_fits.rl(_D, alpha, beta) + error * rng.normal(size=len(_D))
    fit = scaling_fits.fit_rl(_D, noisy, error if errors_known else None)
    for i, estimate in enumerate((fit.alpha, fit.beta, fit.peak)):
      held[i] += estimate.low <= planted[i] <= estimate.high
  assert np.all(held / 300 > 0.91), held / 300
  assert np.all(held / 300 < 0.99), held / 300


def test_a_gold_that_never_falls_has_no_peak():
  fit = scaling_fits.fit_best_of_n(_D, 2.0 * _D + 0.1 * _D**2)
  assert fit.beta.value == pytest.approx(-0.1)
  assert fit.peak == (np.inf, np.inf, np.inf)


def test_a_gold_that_only_falls_has_its_peak_at_the_start():
  assert scaling_fits.fit_best_of_n(_D, -_D - 0.1 * _D**2).peak.value == 0


def test_points_of_one_training_are_resampled_together():
  """Two hundred points of five trainings are five pieces of evidence.

  Each training has its own alpha; within one there is no noise. Resampling
  points one by one would find the mean alpha far too precisely.
  """
  rng = np.random.default_rng(0)
  alphas = 1.7 + 0.3 * rng.normal(size=5)
  d = np.tile(np.linspace(0.1, 6.0, 40), 5)
  gold = np.concatenate([scaling_fits.rl(d[:40], a, 0.6) for a in alphas])
  groups = np.repeat(np.arange(5), 40)
  together = scaling_fits.fit_rl(d, gold, groups=groups)
  apart = scaling_fits.fit_rl(d, gold)
  assert together.alpha.value == pytest.approx(alphas.mean())
  width = lambda estimate: estimate.high - estimate.low
  # What Student's t gives for the mean of five; t(0.975, 4) = 2.776.
  expected = 2 * 2.776 * alphas.std(ddof=1) / math.sqrt(5)
  assert width(together.alpha) == pytest.approx(expected, rel=0.05)
  assert width(apart.alpha) < 0.6 * expected
  # beta is the same in every training.
  assert width(together.beta) < 1e-9


def test_one_training_has_no_interval():
  fit = scaling_fits.fit_rl(
    _D, scaling_fits.rl(_D, 1.7, 0.6), groups=np.zeros(len(_D), int)
  )
  assert fit.alpha.value == pytest.approx(1.7)
  assert math.isnan(fit.alpha.low) and math.isnan(fit.peak.high)


@pytest.mark.parametrize(
  "d, distinct", [([], 0), ([0.0, 0.0, 0.0], 0), ([0.0, 1.0, 2.0, 2.0], 2)]
)
def test_too_few_points_are_refused_with_the_reason(d, distinct):
  for fit in (scaling_fits.fit_rl, scaling_fits.fit_best_of_n):
    result = fit(np.array(d, float), np.ones(len(d)))
    assert isinstance(result, scaling_fits.Unfitted)
    assert f"{distinct} distinct points" in result.reason


def test_the_same_seed_gives_the_same_interval():
  gold = scaling_fits.rl(_D, 1.7, 0.6) + np.sin(50 * _D)
  first, again = (scaling_fits.fit_rl(_D, gold, seed=3) for _ in range(2))
  assert first == again
  assert first.alpha.low != scaling_fits.fit_rl(_D, gold, seed=4).alpha.low
