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
    none: Forgetting without a penalty.
    prevented: That less forgetting under the best β.
    left: Forgetting under the best β.
    beyond: That less the wanted share of forgetting without a penalty.
    further: With each mix, the same β: how much less is forgotten.
    gold: With each mix, the same β: how much more gold on-task, reward units.
  """

  best: float
  none: intervals.Interval
  prevented: intervals.Interval
  left: intervals.Interval
  beyond: intervals.Interval
  further: Mapping[str, intervals.Interval]
  gold: Mapping[str, intervals.Interval]


class Predictor(NamedTuple):
  """A KL, and Spearman's correlation of forgetting with it, 95 % interval."""

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
  *,
  partly: float,
) -> Finding:
  """What the rule reads off the runs, which have the same seeds in all arms.

  The mixes' intervals of a figure are right all at once with 95 % (Bonferroni).

  Args:
    none: Without a penalty.
    penalised: By β.
    mixes: By kind.
    partly: Share of forgetting without a penalty; what is left must be more.
  """
  best = best_beta(penalised)
  all_rises = column(none, "rise")
  rises, golds = (column(penalised[best], name) for name in ("rise", "gold"))
  less = lambda first, second: intervals.of_difference(
    first, second, level=1 - 0.05 / len(mixes)
  )
  return Finding(
    best=best,
    none=intervals.of_mean(all_rises),
    prevented=intervals.of_difference(all_rises, rises),
    left=intervals.of_mean(rises),
    beyond=intervals.of_mean(rises - partly * all_rises),
    further={k: less(rises, column(r, "rise")) for k, r in mixes.items()},
    gold={k: less(column(r, "gold"), golds) for k, r in mixes.items()},
  )


def verdict(found: Finding, names: Mapping[str, str]) -> str:
  """The rule: some is prevented, a share is left, and texts prevent more.

  Args:
    found: From `finding`.
    names: Of the mixes, as the verdict calls them.
  """
  if not (found.prevented.low > 0 and found.beyond.low > 0):
    return study.DOES_NOT_HOLD
  helps = {names[k]: more.low > 0 for k, more in found.further.items()}
  if not any(helps.values()):
    return study.holds_when("texts in the loss need not prevent more")
  return study.verdict(helps, "the texts are held by")


def predictors(arms: Sequence[Sequence[Figures]]) -> list[Predictor]:
  """Rank correlations of forgetting with each KL, over the arms of a seed.

  The arms of a seed share its prompts and its random numbers, so that a seed is
  one observation here as well: means over seeds, with Student's intervals. The
  last row is the difference of two correlations, seed by seed.
  """
  by_seed = lambda name: np.stack([column(runs, name) for runs in arms], axis=1)
  rises = by_seed("rise")
  of = {name: spearman(by_seed(name), rises) for name in PREDICTORS}
  row = lambda name, rho: Predictor(name, *intervals.of_mean(rho))
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
