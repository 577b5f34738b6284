"""What the study `kl_noise` measures, and its rule.

Intervals of the estimates are of a bootstrap over responses; those of k3, whose
tail is long, are too narrow. Those of learning are Student's, over pairs.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.studies import intervals, rao_blackwell, study, toy_runs
from rlhf_jax.studies.kl_noise import task as task_lib

_ESTIMATES = task_lib.ESTIMATES


class Noise(NamedTuple):
  """Estimates of a response's KL, by estimator.

  Attributes:
    kl: Mean of the exact one, nats per response, by length.
    deviations: Standard deviation of each, nats per response, by length.
    exponents: Of the length, as which each deviation grows.
    left: Deviation of the exact one over that of k1, at the longest length.
  """

  kl: list[float]
  deviations: dict[str, list[intervals.Interval]]
  exponents: dict[str, intervals.Interval]
  left: intervals.Interval


class Pace(NamedTuple):
  """Learning at one length: means of runs, and Rao-Blackwellised − sampled.

  Attributes:
    length: Tokens of a response.
    beta: Reward units per nat.
    sampled: Runs; their objective stands for their gold.
    rao_bl: The same.
    learning: The objective, mean of all iterations: the area under the curve.
    end: The objective over the last iterations.
    kl: Nats per response over the last iterations.
  """

  length: int
  beta: float
  sampled: list[rao_blackwell.Run]
  rao_bl: list[rao_blackwell.Run]
  learning: rao_blackwell.Pairs
  end: rao_blackwell.Pairs
  kl: rao_blackwell.Pairs


def noise_of(
  lengths: tuple[int, ...],
  estimates: Mapping[str, np.ndarray],
  rng: np.random.Generator,
  *,
  resamples: int,
) -> Noise:
  """Deviations over responses and how they grow, with bootstrap intervals.

  Args:
    lengths: Of responses, tokens.
    estimates: By estimator, nats `[N, lengths]`.
    rng: Draws the samples; one of responses serves all figures.
    resamples: How many.
  """
  drawn = {}
  count = len(estimates[_ESTIMATES[0]])
  # The first sample is what was seen.
  weights = rng.multinomial(count, np.full(count, 1 / count), resamples)
  weights = np.concatenate([np.ones((1, count)), weights])
  for name in _ESTIMATES:
    nats = estimates[name] - estimates[name].mean(axis=0)
    mean, square = weights @ nats / count, weights @ nats**2 / count
    drawn[name] = np.sqrt((square - mean**2) * count / (count - 1))
  logs = np.log(np.array(lengths, np.float64))
  centred = logs - logs.mean()
  slope = lambda sd: np.log(sd) @ centred / (centred @ centred)
  ends = drawn["exact"][:, -1] / drawn["k1"][:, -1]
  return Noise(
    kl=estimates["exact"].mean(axis=0).tolist(),
    deviations={
      name: [_of_draws(column) for column in sd.T] for name, sd in drawn.items()
    },
    exponents={name: _of_draws(slope(sd)) for name, sd in drawn.items()},
    left=_of_draws(ends),
  )


def _of_draws(draws: np.ndarray) -> intervals.Interval:
  """What was seen, and the interval of the rest, the samples."""
  low, high = np.quantile(draws[1:], (0.025, 0.975))
  return intervals.Interval(float(draws[0]), float(low), float(high))


def of_run(rows: toy_runs.Rows, *, last: int) -> rao_blackwell.Run:
  """A run's objective, score − β · KL with the exact KL, for its gold."""
  objective = [{**row, "reward/gold": row["reward/total"]} for row in rows]
  return rao_blackwell.of_run(objective, last=last)


def pace_of(
  config: ConfigDict,
  length: int,
  sampled: list[rao_blackwell.Run],
  rao_bl: list[rao_blackwell.Run],
) -> Pace:
  """Both kinds of run at a length."""
  pairs = lambda name, of: rao_blackwell.compare(
    name, [of(run) for run in sampled], [of(run) for run in rao_bl]
  )
  return Pace(
    length=length,
    beta=config.tilt / length**0.5,
    sampled=sampled,
    rao_bl=rao_bl,
    learning=pairs(
      "score − β · KL, mean of all iterations",
      lambda run: float(run.golds.mean()),
    ),
    end=pairs("score − β · KL at the end", lambda run: run.gold),
    kl=pairs("KL at the end, nats per response", lambda run: run.kl),
  )


def verdict(noise: Noise, paces: list[Pace], *, left: float) -> str:
  """The rule: a part on the estimates, and one on learning.

  The noise is there and is cured where k1's deviation grows with length and
  the exact estimate's is less than `left` of it at the longest. The intervals
  are of responses of one policy, and say nothing of others.

  It slows learning, and that is cured, where at the longest length that was
  trained, and at no other, Rao-Blackwellising raises the mean objective of all
  iterations. That learning suffers more from longer responses is not asked: β
  is tilt / √length, so that β times a deviation that goes as the length's root,
  the noise that is charged, is alike at all lengths. (The iteration at which a
  run reaches a share of its gain says the same with far more noise: a run's
  curve crosses it several times.)
  """
  parts = {
    "the estimates": noise.exponents["k1"].low > 0 and noise.left.high < left,
    "learning": paces[-1].learning.low > 0,
  }
  return study.verdict(parts, "it is about")
