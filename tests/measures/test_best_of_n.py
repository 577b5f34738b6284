"""Best-of-n against all subsets, and its KL against exact distributions."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

from rlhf_jax.measures import best_of_n


def by_brute_force(proxy, gold, n):
  """Mean over all subsets of size n of the best's proxy and gold."""
  proxies, golds = [], []
  for subset in itertools.combinations(range(len(proxy)), n):
    subset = list(subset)
    best = proxy[subset] == proxy[subset].max()
    proxies.append(proxy[subset].max())
    golds.append(gold[subset][best].mean())  # Ties: any of them.
  return np.mean(proxies), np.mean(golds)


def samples(ties, prompts=3, size=7):
  rng = np.random.default_rng(0)
  proxy = rng.normal(size=(prompts, size))
  if ties:
    proxy = rng.integers(3, size=(prompts, size)) * 1.0
  return proxy, rng.normal(size=(prompts, size))


@pytest.mark.parametrize("ties", [False, True])
def test_scores_are_means_over_all_subsets(ties):
  proxy, gold = samples(ties)
  ns = range(1, 8)
  for n, found in zip(ns, best_of_n.best_of_n(proxy, gold, ns), strict=True):
    each = np.array([by_brute_force(p, g, n) for p, g in zip(proxy, gold)])
    mean, error = each.mean(0), each.std(0, ddof=1) / math.sqrt(3)
    wanted = (n, mean[0], error[0], mean[1], error[1])
    np.testing.assert_allclose(
      dataclasses.astuple(found)[:5], wanted, atol=1e-12
    )


def test_one_of_one_is_the_policy():
  proxy, gold = samples(ties=True)
  (found,) = best_of_n.best_of_n(proxy, gold, [1])
  assert found.proxy == pytest.approx(proxy.mean())
  assert found.gold == pytest.approx(gold.mean())
  assert found.kl_bound == 0
  assert found.kl_estimate == pytest.approx(0, abs=1e-15)


def test_no_gold():
  (found,) = best_of_n.best_of_n(samples(ties=True)[0], None, [2])
  assert found.gold is None and found.gold_se is None


def test_kl_of_a_known_distribution():
  """A fair coin: best-of-2 shows heads in 3 of 4 cases.

  KL = ¾ log(¾ / ½) + ¼ log(¼ / ½) = ¾ log 3 − log 2 = 0.1308 nats, below
  log 2 − ½ = 0.1931.
  """
  kl = best_of_n.kl_to_policy(np.array([1.0, 0.0, 0.0, 1.0]), 2)
  np.testing.assert_allclose(kl, 0.75 * math.log(3) - math.log(2))
  assert kl < math.log(2) - 0.5


@pytest.mark.parametrize("n", [2, 4, 16])
def test_kl_by_enumeration(n):
  """The law of the best of n draws, enumerated by how many are of each kind."""
  shares = np.array([0.5, 0.25, 0.25])
  scores = np.array([0.0, 0.0, 1.0, 2.0])
  law = np.zeros(3)
  for kinds in itertools.combinations_with_replacement(range(3), n):
    counts = np.bincount(kinds, minlength=3)
    ways = math.factorial(n) / np.prod([math.factorial(c) for c in counts])
    law[max(kinds)] += ways * np.prod(shares**counts)
  wanted = (law * np.log(law / shares)).sum()
  found = best_of_n.kl_to_policy(scores, n)
  np.testing.assert_allclose(found, wanted, rtol=1e-10)
  assert found < math.log(n) - (n - 1) / n


@pytest.mark.parametrize("n", [2, 4, 16])
def test_without_ties_the_bound_is_the_kl(n):
  scores = np.random.default_rng(0).normal(size=(2, 4096))
  for row in scores:
    np.testing.assert_allclose(
      best_of_n.kl_to_policy(row, n), math.log(n) - (n - 1) / n, atol=1e-4
    )


def test_equal_scores_leave_the_policy_as_it_is():
  (found,) = best_of_n.best_of_n(np.zeros((2, 8)), None, [8])
  assert found.kl_estimate == 0 and found.kl_bound > 1


def test_refusals():
  proxy, _ = samples(ties=False)
  for n in (0, 8):
    with pytest.raises(ValueError, match=f"n = {n}; wanted 1 to the 7"):
      best_of_n.best_of_n(proxy, None, [n])
  with pytest.raises(ValueError, match="1 prompts"):
    best_of_n.best_of_n(proxy[:1], None, [1])
