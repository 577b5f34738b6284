"""The figures of `reference_ceiling`: its references, arms and slopes."""

from typing import NamedTuple

import numpy as np
from scipy import stats

from rlhf_jax.studies import intervals, toy_runs


class Reference(NamedTuple):
  """An SFT policy; its loss is in nats per token."""

  sft_steps: int
  heldout_loss: float
  gold: float


class Curves(NamedTuple):
  """What the runs of one reference and β did: a row a seed, a column a step."""

  gold: np.ndarray
  kl: np.ndarray
  score: np.ndarray


class Arm(NamedTuple):
  """A reference under a β, over the last steps: means over seeds.

  `low` and `high` are of gold's 95 % interval; `gain` is over the reference's
  gold; `late` is what the last steps have more than as many before them;
  `score` is the reward model's.
  """

  sft_steps: int
  beta: float
  gold: float
  low: float
  high: float
  gain: float
  late: float
  late_low: float
  late_high: float
  kl: float
  score: float


class Slope(NamedTuple):
  """Gold at the end against the reference's own, at a β.

  `spearman` is the rank correlation and `late` the slope's change over the last
  steps, means over seeds; `projected` is the slope after as many steps again,
  if it goes on changing so.
  """

  beta: float
  spearman: float
  spearman_low: float
  slope: float
  low: float
  high: float
  late: float
  projected: float
  projected_low: float


def of_reference(sft_steps: int, summary: dict) -> Reference:
  """What an SFT says of its policy."""
  metrics = summary["metrics"]
  return Reference(
    sft_steps, metrics["sft/heldout_loss"], metrics["reward/gold"]
  )


def of_members(
  sft_steps: int, members: list[toy_runs.Member]
) -> dict[tuple[int, float], Curves]:
  """A sweep's curves by reference and β."""
  stack = lambda name, beta: np.array(
    [toy_runs.column(m.rows, name) for m in members if m.beta == beta]
  )
  return {
    (sft_steps, beta): Curves(
      stack("reward/gold", beta),
      stack("kl/reverse_exact", beta),
      stack("reward/score", beta),
    )
    for beta in dict.fromkeys(member.beta for member in members)
  }


def of_arm(reference: Reference, beta: float, curves: Curves, last: int) -> Arm:
  """Where the runs of an arm ended, and whether they were still rising."""
  gold = intervals.of_mean(_end(curves.gold, last))
  late = intervals.of_difference(
    _end(curves.gold, last), _before(curves.gold, last)
  )
  return Arm(
    reference.sft_steps,
    beta,
    *gold,
    gold.mean - reference.gold,
    *late,
    float(_end(curves.kl, last).mean()),
    float(_end(curves.score, last).mean()),
  )


def slopes_by_seed(references: list[Reference], ends: np.ndarray) -> np.ndarray:
  """Least-squares slopes of `ends`, `[seed, reference]`, over the golds."""
  golds = np.array([reference.gold for reference in references])
  centred = golds - golds.mean()
  return ends @ centred / (centred @ centred)


def of_beta(
  beta: float,
  references: list[Reference],
  curves: dict[tuple[int, float], Curves],
  *,
  last: int,
) -> Slope:
  """The line's slope, and where it leads if it goes on."""
  golds = [reference.gold for reference in references]
  runs = [curves[reference.sft_steps, beta].gold for reference in references]
  ends = np.stack([_end(gold, last) for gold in runs], axis=1)
  before = np.stack([_before(gold, last) for gold in runs], axis=1)
  by_seed = slopes_by_seed(references, ends)
  late = by_seed - slopes_by_seed(references, before)
  more = runs[0].shape[1] / last  # as many steps again
  projected = intervals.of_mean(by_seed + more * late)
  ranks = intervals.of_mean(
    [stats.spearmanr(golds, row).statistic for row in ends]
  )
  return Slope(
    beta,
    ranks.mean,
    ranks.low,
    *intervals.of_mean(by_seed),
    float(late.mean()),
    projected.mean,
    projected.low,
  )


def of_loosening(
  references: list[Reference],
  curves: dict[tuple[int, float], Curves],
  large: float,
  small: float,
  *,
  last: int,
) -> intervals.Interval:
  """How much larger the slope is under one β than under another."""
  by_beta = [
    slopes_by_seed(
      references,
      np.stack(
        [_end(curves[r.sft_steps, beta].gold, last) for r in references], axis=1
      ),
    )
    for beta in (large, small)
  ]
  return intervals.of_difference(*by_beta)


def _end(values: np.ndarray, last: int) -> np.ndarray:
  """Each seed's mean over the last steps."""
  return values[:, -last:].mean(axis=1)


def _before(values: np.ndarray, last: int) -> np.ndarray:
  """Each seed's mean over as many steps before them."""
  return values[:, -2 * last : -last].mean(axis=1)
