"""What the study `goodhart` measures under each β, and its rule.

A seed is one observation. What is compared, per seed:

- proxy and gold: means over the last steps of training, less those of the SFT
  policy on held-out prompts.
- gold's peak: the mean over as many steps that end where the *other* seeds'
  mean is highest. The highest of a seed's own means would be too high, for it
  is chosen for its noise as well, and a fall from it would be too deep.
- nonsense: ungrammatical pairs of words per held-out response.
- fluency: of the held-out responses with such pairs the share whose −log π_ref
  per token is no higher than that of most of the SFT policy's. The reference is
  a language model, and this is what a filter by perplexity would let pass. How
  the responses without such pairs look says nothing of the nonsense.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np

from rlhf_jax.studies import held_out, intervals, study, toy_runs


class Ends(NamedTuple):
  """Figures of one β, or of the SFT policy, a value a seed.

  Means of rewards, reward units; KL, nats per response; of held-out responses
  the ungrammatical pairs, and −log π_ref in nats per token; of those with such
  pairs the share that looks fluent, NaN where there are none. `peak` is gold's,
  and ends after `peak_step` steps.
  """

  proxy: np.ndarray
  gold: np.ndarray
  kl: np.ndarray
  faults: np.ndarray
  nll: np.ndarray
  fluent: np.ndarray
  peak: np.ndarray
  peak_step: np.ndarray


class Arm(NamedTuple):
  """One β: what changed, by seed, with intervals.

  Attributes:
    beta: Reward units per nat.
    kl: Nats per response at the end.
    proxy: Gained since the SFT policy.
    gold: The same.
    from_peak: Gold at the end less gold at its peak.
    kept: Gold gained less the wanted share of what had been gained at the peak.
    over_none: Gold less that without a penalty.
    faults: Ungrammatical pairs more than the SFT policy has.
    faults_over_none: Ungrammatical pairs less those without a penalty.
    nll: −log π_ref, nats per token.
    fluent: Share of responses with ungrammatical pairs.
  """

  beta: float
  kl: intervals.Interval
  proxy: intervals.Interval
  gold: intervals.Interval
  from_peak: intervals.Interval
  kept: intervals.Interval
  over_none: intervals.Interval
  faults: intervals.Interval
  faults_over_none: intervals.Interval
  nll: intervals.Interval
  fluent: intervals.Interval


def of_start(responses: Sequence[held_out.Responses], *, usual: float) -> Ends:
  """The SFT policy, whose gold is its own peak."""
  of = lambda figure: np.array([figure(r).mean() for r in responses])
  gold = of(lambda r: r.gold)
  return Ends(
    proxy=of(lambda r: r.score),
    gold=gold,
    kl=of(lambda r: r.kl),
    faults=of(lambda r: r.faults),
    nll=of(lambda r: r.nll),
    fluent=np.array([_fluent_nonsense(r, usual) for r in responses]),
    peak=gold,
    peak_step=np.zeros(len(gold)),
  )


def _fluent_nonsense(responses: held_out.Responses, usual: float) -> float:
  """Of the responses with ungrammatical pairs the share that looks fluent."""
  faulty = responses.faults > 0
  if not faulty.any():
    return math.nan
  return float((responses.nll[faulty] <= usual).mean())


def of_end(
  rows: Sequence[toy_runs.Rows],
  responses: Sequence[held_out.Responses],
  *,
  usual: float,
  window: int,
) -> Ends:
  """One β, from each seed's metrics and its policy's held-out responses."""
  smooth = lambda name: np.array(
    [toy_runs.trailing_mean(toy_runs.column(r, name), window) for r in rows]
  )
  golds = smooth("reward/gold")
  steps = peak_steps(golds)
  return of_start(responses, usual=usual)._replace(
    proxy=smooth("reward/score")[:, -1],
    gold=golds[:, -1],
    kl=smooth("kl/reverse_exact")[:, -1],
    peak=golds[np.arange(len(golds)), steps],
    peak_step=steps + 1.0,
  )


def peak_steps(curves: np.ndarray) -> np.ndarray:
  """For each row the step at which the mean of the other rows is highest."""
  others = (curves.sum(axis=0) - curves) / (len(curves) - 1)
  return np.nanargmax(others, axis=1)


def arm_of(
  beta: float,
  end: Ends,
  start: Ends,
  none: Ends,
  *,
  kept: float,
  level: float,
) -> Arm:
  """One β against the SFT policy, its own peak and no penalty."""
  mean = lambda values: intervals.of_mean(values, level=level)
  gained, at_peak = end.gold - start.gold, end.peak - start.gold
  return Arm(
    beta=beta,
    kl=mean(end.kl),
    proxy=mean(end.proxy - start.proxy),
    gold=mean(gained),
    from_peak=mean(end.gold - end.peak),
    kept=mean(gained - kept * at_peak),
    over_none=mean(end.gold - none.gold),
    faults=mean(end.faults - start.faults),
    faults_over_none=mean(end.faults - none.faults),
    nll=mean(end.nll),
    fluent=mean(end.fluent),
  )


def games(arm: Arm, *, nonsense: float) -> bool:
  """The proxy rises, gold falls from its peak, the texts turn to nonsense.

  Args:
    arm: Without a penalty.
    nonsense: Ungrammatical pairs per response, above the SFT policy's, that it
      must have at least.
  """
  overoptimises = arm.proxy.low > 0 and arm.from_peak.high < 0
  return overoptimises and arm.faults.low >= nonsense


def prevents(arm: Arm, *, nonsense: float) -> bool:
  """Gold has risen and stays; nonsense is rarer than without, and no longer so.

  Args:
    arm: Under a penalty.
    nonsense: As in `games`.
  """
  rises = arm.gold.low > 0 and arm.over_none.low > 0
  stays_clean = arm.faults.high < nonsense and arm.faults_over_none.high < 0
  return rises and arm.kept.low >= 0 and stays_clean


def looks_fluent(arm: Arm) -> bool:
  """Most ungrammatical responses pass for the reference's own."""
  return arm.fluent.low > 0.5


def verdict(arms: Sequence[Arm], *, nonsense: float) -> str:
  """The rule: all parts of the claim, or all but how the nonsense looks.

  The first arm has no penalty and must game the proxy; at least one of the
  others must prevent it. Their intervals are wider, so that all of them are
  right at once with 95 %: choosing one costs nothing.

  Args:
    arms: By rising β.
    nonsense: As in `games`.
  """
  none, *penalised = arms
  prevented = any(prevents(arm, nonsense=nonsense) for arm in penalised)
  if not games(none, nonsense=nonsense) or not prevented:
    return study.DOES_NOT_HOLD
  if not looks_fluent(none):
    return study.holds_when("the nonsense need not look fluent")
  return study.HOLDS
