"""What the study `forgetting` measures of a policy, and its rule.

Forgetting is the rise of the NLL of the language's own texts, policy less
reference, where the texts begin as no prompt of PPO did. Its predictors are
KLs of whole responses, in both directions, on PPO's own prompts and on others.

A seed is one observation, and arms are compared seed by seed.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from rlhf_jax.studies import intervals, study


class Figures(NamedTuple):
  """One policy. On: prompts that begin as PPO's; off: those that do not.

  Attributes:
    gold: On, reward units.
    off_gold: Off, reward units.
    rise: Off, what the NLL of the language's texts rose by, nats per token.
    reverse: KL(π‖π_ref) on, nats per response.
    forward: KL(π_ref‖π) on, over the reference's responses, nats per response.
    off_reverse: As `reverse`, off.
    off_forward: As `forward`, off.
  """

  gold: float
  off_gold: float
  rise: float
  reverse: float
  forward: float
  off_reverse: float
  off_forward: float


class Finding(NamedTuple):
  """What the rule reads; nats per token.

  Attributes:
    best: The β whose on-task gold is the highest.
    prevented: Forgetting without a penalty less that under the best β.
    left: Forgetting under the best β.
    further: With each mix, the same β: how much less is forgotten.
  """

  best: float
  prevented: intervals.Interval
  left: intervals.Interval
  further: Mapping[str, intervals.Interval]


class Predictor(NamedTuple):
  """A KL, and Spearman's correlation of forgetting with it over all runs."""

  figure: str
  spearman: float
  low: float
  high: float


PREDICTORS = {
  "reverse": "reverse KL, on-task",
  "forward": "forward KL, on-task",
  "off_reverse": "reverse KL, off-task",
  "off_forward": "forward KL, off-task",
}
DIFFERENCE = "on-task: forward − reverse"


def column(runs: Sequence[Figures], name: str) -> np.ndarray:
  """A figure of each run."""
  return np.array([run._asdict()[name] for run in runs])


def best_beta(penalised: Mapping[float, Sequence[Figures]]) -> float:
  """The β of the highest mean gold on-task."""
  return max(
    penalised, key=lambda b: float(column(penalised[b], "gold").mean())
  )


def finding(
  none: Sequence[Figures],
  penalised: Mapping[float, Sequence[Figures]],
  mixes: Mapping[str, Sequence[Figures]],
) -> Finding:
  """What the rule reads off the runs, which have the same seeds in all arms.

  The mixes' intervals are right all at once with 95 % (Bonferroni).
  """
  best = best_beta(penalised)
  rises = column(penalised[best], "rise")
  level = 1 - 0.05 / max(len(mixes), 1)
  return Finding(
    best=best,
    prevented=intervals.of_difference(column(none, "rise"), rises),
    left=intervals.of_mean(rises),
    further={
      kind: intervals.of_difference(rises, column(runs, "rise"), level=level)
      for kind, runs in mixes.items()
    },
  )


def verdict(found: Finding, names: Mapping[str, str]) -> str:
  """The rule: some is prevented, not all, and texts prevent more.

  Args:
    found: From `finding`.
    names: Of the mixes, as the verdict calls them.
  """
  if not (found.prevented.low > 0 and found.left.low > 0):
    return study.DOES_NOT_HOLD
  helps = {names[k]: more.low > 0 for k, more in found.further.items()}
  if not any(helps.values()):
    return study.holds_when("texts in the loss need not prevent more")
  return study.verdict(helps, "the texts are held by")


def predictors(
  runs: Sequence[Figures], *, resamples: int, seed: int
) -> list[Predictor]:
  """Rank correlations of forgetting with each KL, over runs of all arms.

  Intervals are bootstrap percentiles over runs, at 95 %; the last row is the
  difference of two of them on the same resamples.
  """
  rng = np.random.default_rng(seed)
  rows = rng.integers(len(runs), size=(resamples, len(runs)))
  rows = np.concatenate([np.arange(len(runs))[None], rows])  # First: all once.
  rise = column(runs, "rise")
  of = {
    name: spearman(column(runs, name)[rows], rise[rows]) for name in PREDICTORS
  }
  row = lambda name, rho: Predictor(
    name, float(rho[0]), *map(float, np.nanquantile(rho[1:], (0.025, 0.975)))
  )
  return [
    *(row(PREDICTORS[name], rho) for name, rho in of.items()),
    row(DIFFERENCE, of["forward"] - of["reverse"]),
  ]


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Row by row; NaN where all of a row are equal."""
  ranks = [stats.rankdata(values, axis=1) for values in (x, y)]
  a, b = (r - r.mean(axis=1, keepdims=True) for r in ranks)
  spread = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
  unknown = np.full(len(spread), np.nan)
  return np.divide((a * b).sum(axis=1), spread, out=unknown, where=spread > 0)
