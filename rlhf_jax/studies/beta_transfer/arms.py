"""What the study `beta_transfer` measures, and its rule.

A seed is one observation, and so are the tasks together: an interval is of the
mean over all pairs of tasks, over the seeds. The tasks are those of the study,
and no sample of tasks.

The regret of a pair is the gold that is lost on a task with what was best on
another, as a share of what the task's own best β gains over its SFT policy. The
β of the task itself is chosen, for each seed, by the *other* seeds' gold: the
one that happened to come out best would flatter it. What comes from another
task was chosen without a look at this one. Where the seeds do not show a gain,
there is nothing to lose a share of: regrets on that task are NaN, and so is
their mean over the pairs.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np

from rlhf_jax.studies import intervals, study


class Task(NamedTuple):
  """What a sweep over β says of a task; figures are `[β, seed]`.

  Attributes:
    name: Its language.
    betas: Rising.
    start: The SFT policy's gold.
    gold: At the end, reward units.
    kl: At the end, nats per response.
    tokens: At the end, per response.
  """

  name: str
  betas: tuple[float, ...]
  start: float
  gold: np.ndarray
  kl: np.ndarray
  tokens: np.ndarray

  @property
  def best(self) -> int:
    """Place of the β with the highest mean gold."""
    return int(self.gold.mean(axis=1).argmax())

  @property
  def best_beta(self) -> float:
    """What other tasks are given, and where the runs to its target begin."""
    return self.betas[self.best]

  @property
  def own(self) -> np.ndarray:
    """`[seed]`: gold under the β that is best by the other seeds."""
    others = self.gold.sum(axis=1, keepdims=True) - self.gold
    return self.gold[others.argmax(axis=0), np.arange(self.gold.shape[1])]

  @property
  def gains(self) -> np.ndarray:
    """`[seed]`: of the task's own β."""
    return self.own - self.start

  @property
  def has_gain(self) -> bool:
    """Whether the seeds show one."""
    return intervals.of_mean(self.gains).low > 0

  @property
  def target(self) -> float:
    """KL under the best β, nats per response; what the task would hold."""
    return float(f"{self.kl[self.best].mean():.3g}")

  @property
  def per_token(self) -> float:
    """The same in nats per token."""
    return float((self.kl[self.best] / self.tokens[self.best]).mean())


class Transfer(NamedTuple):
  """What was best on one task, on another; arrays are `[seed]`.

  Attributes:
    source: The task that it comes from.
    task: The task that it is used on.
    beta: The source's best.
    target: The source's KL under it, nats per response.
    kl: Reached with the target, nats per response.
    of_beta: Regret of β, shares of the task's gain.
    of_target: Regret of the KL target.
    of_front: What the task's front says of the regret of that target.
    of_tokens: What it says of the source's KL in nats per token.
  """

  source: str
  task: str
  beta: float
  target: float
  kl: np.ndarray
  of_beta: np.ndarray
  of_target: np.ndarray
  of_front: np.ndarray
  of_tokens: np.ndarray

  @property
  def reached(self) -> float:
    """Of the target, the share that the KL has come to, mean over seeds."""
    return float(self.kl.mean()) / self.target


class Regrets(NamedTuple):
  """Means over pairs of tasks, shares of the gain, with intervals.

  `saved` is the regret of β less that of the KL target; `saved_by_tokens` less
  what the fronts say of a target in nats per token.
  """

  beta: intervals.Interval
  target: intervals.Interval
  saved: intervals.Interval
  tokens: intervals.Interval
  saved_by_tokens: intervals.Interval


def transfer_of(
  source: Task, task: Task, gold: np.ndarray, kl: np.ndarray
) -> Transfer:
  """One pair; `gold` and `kl`, `[seed]`, are of runs with source.target."""
  gain = float(task.gains.mean()) if task.has_gain else math.nan
  share = lambda lost: lost / gain
  tokens = source.per_token * task.tokens[task.best].mean()
  return Transfer(
    source=source.name,
    task=task.name,
    beta=source.best_beta,
    target=source.target,
    kl=kl,
    of_beta=share(task.own - task.gold[source.best]),
    of_target=share(task.own - gold),
    of_front=share(task.own - on_front(task, source.target)),
    of_tokens=share(task.own - on_front(task, tokens)),
  )


def on_front(task: Task, nats: float) -> np.ndarray:
  """`[seed]`: gold where a seed's sweep, over its β, has this KL.

  Interpolated in log KL; beyond the sweep's ends, the end's.
  """
  golds = []
  for gold, kl in zip(task.gold.T, task.kl.T):
    order = kl.argsort()
    golds.append(np.interp(math.log(nats), np.log(kl[order]), gold[order]))
  return np.array(golds)


def regrets_of(transfers: Sequence[Transfer]) -> Regrets:
  """Means over the pairs of tasks for each seed, then over the seeds."""
  beta = np.mean([t.of_beta for t in transfers], axis=0)
  target = np.mean([t.of_target for t in transfers], axis=0)
  tokens = np.mean([t.of_tokens for t in transfers], axis=0)
  return Regrets(
    beta=intervals.of_mean(beta),
    target=intervals.of_mean(target),
    saved=intervals.of_difference(beta, target),
    tokens=intervals.of_mean(tokens),
    saved_by_tokens=intervals.of_difference(beta, tokens),
  )


def are_held(transfers: Sequence[Transfer], held: float) -> bool:
  """Whether every KL that was reached is within a share of its target."""
  return all(abs(t.reached - 1) <= held for t in transfers)


def verdict(
  transfers: Sequence[Transfer], regrets: Regrets, *, fails: float, held: float
) -> str:
  """The rule: a part on β and a part on the target.

  A transferred β fails where its mean regret is above `fails`; the target
  transfers better where it saves some of that. A run that was not held within
  `held` of its target is a run at another KL: it may lose little because it
  stayed near the β that it began with. So one pair of tasks that was not held
  is enough for the part on targets not to hold. Regrets that are NaN, for want
  of a gain on some task, are no evidence for either.
  """
  parts = {
    "a β fails on other tasks": regrets.beta.low > fails,
    "a KL target transfers better": (
      regrets.saved.low > 0 and are_held(transfers, held)
    ),
  }
  return study.verdict(parts, "the question is whether")
