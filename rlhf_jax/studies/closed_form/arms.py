"""What was trained, read by the oracle: where each arm ended, and on what way.

Everything here is on the host or in float64.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.objective import kl
from rlhf_jax.studies import enumerable, intervals
from rlhf_jax.studies import kl_measurements as measure
from rlhf_jax.studies.closed_form import runs

SEQUENCE = "sequence_reverse"
SAMPLED = (SEQUENCE, "sampled")
RAO_BLACKWELLISED = (SEQUENCE, "rao_blackwellised")
PAIRS = (SEQUENCE, "pairs")  # DPO's: its loss is of preferences
NORMALISED = "GRPO, norm."
RIGHT: dict[str, dict[str, Any]] = {
  "PPO": {"advantages": "gae", "gae_lambda": 1.0},
  "RLOO": {"advantages": "rloo"},
  "REINFORCE++": {"advantages": "reinforce_pp"},
  "GRPO": {"advantages": "grpo", "normalise_groups": False},
  runs.DPO: {},
}
WRONG = {name: key for key in kl.PENALTIES if (name := key[0]) != SEQUENCE}

ENOUGH = 0.99  # share of J* − J(π_ref) that a right arm reaches
TOLERANCE = 0.02  # of that share, between what is reached and predicted
_NO_SPREAD = 1e-6  # β σ of a policy that always writes the same


class Arm(NamedTuple):
  """A row of the table `arms`.

  `reached`, `low` and `high`: the mean of the seeds' shares of J* − J(π_ref),
  each a mean over the last evaluations, and its 95 % interval; KLs, medians, in
  nats.
  """

  algorithm: str
  penalty: str
  estimator: str
  beta: float
  reached: float
  low: float
  high: float
  predicted: float | None
  to_optimum: float
  to_reference: float

  @property
  def is_wrong(self) -> bool:
    """Whether its penalty has another gradient than the sequence's KL."""
    return self.penalty != SEQUENCE

  @property
  def is_right(self) -> bool:
    """Whether it should end at π*."""
    return self.algorithm in RIGHT and not self.is_wrong

  @property
  def apart(self) -> float:
    """How far the interval goes from what is predicted; NaN without that."""
    predicted = math.nan if self.predicted is None else self.predicted
    return max(abs(self.low - predicted), abs(self.high - predicted))

  @property
  def as_claimed(self) -> bool:
    """Right, and at π*; or wrong, as predicted, and short of it.

    With all of the interval.
    """
    if self.is_right:
      return self.low >= ENOUGH
    return self.apart <= TOLERANCE and self.high < ENOUGH


class Way(NamedTuple):
  """How an arm came there, medians of the seeds at each evaluation.

  `shares` are what each seed reached at the end; `best` is J*.
  """

  arm: Arm
  shares: Float[np.ndarray, "S"]
  best: float
  value: Float[np.ndarray, "E"]
  to_optimum: Float[np.ndarray, "E"]


class Normalised(NamedTuple):
  """A row of the table `normalised`: GRPO, and the optimum at β σ."""

  beta: float
  beta_effective: float
  reached: float
  predicted: float
  to_optimum: float
  to_effective: float


class Noise(NamedTuple):
  """A row of the table `noise`: variances of a response's gradient of J."""

  beta: float
  start_sampled: float
  start_rao_bl: float
  end_sampled: float
  end_rao_bl: float


class Plateaus(NamedTuple):
  """A row of the table `plateaus`, of other random tasks."""

  beta: float
  enough: float
  lowest: float


def programs(config: ConfigDict) -> list[runs.Program]:
  """All that is trained."""
  # Near π* the penalised reward of all responses is the same. Whitening, which
  # is what REINFORCE++ has for a baseline, makes noise of what is left.
  plain = lambda settings: (
    {"whiten_advantages": settings["advantages"] == "reinforce_pp"} | settings
  )
  both = (SAMPLED, RAO_BLACKWELLISED), (config.betas, config.betas)
  one = (SAMPLED,), (config.betas,)
  wrong = tuple(WRONG[name] for name in config.wrong)
  penalties = {
    "PPO": both,
    "RLOO": (both[0] + wrong, both[1] + len(wrong) * (config.wrong_betas,)),
    runs.DPO: ((PAIRS,), (config.betas,)),
  }
  settings = {name: RIGHT[name] for name in config.algorithms}
  if config.others:
    settings[NORMALISED] = {"advantages": "grpo"}
    for name, field in (("λ", "gae_lambda"), ("γ", "gamma")):
      changed = RIGHT["PPO"] | {field: config[field]}
      settings[f"PPO, {name} = {config[field]:g}"] = changed
  return [
    runs.Program(name, of and plain(of), *penalties.get(name, one))
    for name, of in settings.items()
  ]


def predictions(
  task: enumerable.Task, config: ConfigDict
) -> dict[tuple[measure.Name, float], float]:
  """Share of J* − J(π_ref) that every penalty leads to, at every β."""
  wrong = [WRONG[name] for name in config.wrong]
  penalties = (SAMPLED, RAO_BLACKWELLISED, *wrong)
  betas = sorted({*config.betas, *config.wrong_betas})

  @jax.jit
  def reached(betas):
    oracle = task.oracle()

    def one(index, beta):
      policy = runs.predict(task, config, penalties, index, beta)
      return oracle.figures(policy, beta).reached

    return _outer(one)(jnp.arange(len(penalties)), betas)

  found = np.asarray(reached(jnp.array(betas)))
  return {
    (penalty, beta): float(found[i, j])
    for i, penalty in enumerate(penalties)
    for j, beta in enumerate(betas)
  }


def ways(
  task: enumerable.Task,
  config: ConfigDict,
  trained: Sequence[tuple[runs.Program, runs.Trained]],
) -> list[Way]:
  """Every arm, in the order of its training."""
  predicted = predictions(task, config)
  names = [
    (program.algorithm, penalty, beta)
    for program, _ in trained
    for penalty, betas in zip(program.penalties, program.betas)
    for beta in betas
  ]
  figures = _figures(task, names, [of.levels for _, of in trained])
  by_arm = [
    x.reshape(len(x), len(names), -1).transpose(1, 0, 2) for x in figures
  ]
  last = lambda x: x[-config.last :].mean(0)
  median = lambda x: np.median(x, axis=1)
  found = []
  for name, value, best, reached, optimum, reference in zip(names, *by_arm):
    (algorithm, (gradient, estimator), beta), shares = name, last(reached)
    has_prediction = algorithm in RIGHT and algorithm != runs.DPO
    prediction = (gradient, estimator), beta
    arm = Arm(
      *(algorithm, gradient, estimator, beta, *intervals.of_mean(shares)),
      predicted=predicted[prediction] if has_prediction else None,
      to_optimum=float(np.median(last(optimum))),
      to_reference=float(np.median(last(reference))),
    )
    curves = median(value), median(optimum)
    found.append(Way(arm, shares, float(best.max()), *curves))
  return found


def _figures(task, names, levels) -> enumerable.Figures:
  """Of all members of all programs, `[E, M]`, in one pass."""
  levels = jax.tree.map(lambda *x: jnp.concatenate(x, 1).astype(float), *levels)
  seeds = levels[0].shape[1] // len(names)
  betas = jnp.array([beta for *_, beta in names]).repeat(seeds)

  @jax.jit
  def figures(levels, betas):
    oracle = task.oracle()
    return jax.vmap(jax.vmap(oracle.figures), in_axes=(0, None))(levels, betas)

  return jax.device_get(figures(levels, betas))


def normalised(
  task: enumerable.Task, config: ConfigDict, trained: runs.Trained
) -> list[Normalised]:
  """Where GRPO with normalised groups ended, medians of the seeds."""

  @jax.jit
  @jax.vmap
  def compare(policy, beta, effective):
    oracle = task.oracle()
    elsewhere = oracle.optimum(effective)[1]
    figures = oracle.figures(policy, beta)
    to_effective = oracle.figures(policy, effective).to_optimum
    return (
      beta,
      effective,
      figures.reached,
      oracle.figures(elsewhere, beta).reached,
      figures.to_optimum,
      jnp.where(effective > _NO_SPREAD, to_effective, jnp.nan),
    )

  effective = np.maximum(trained.betas[-config.last :].mean(0), _NO_SPREAD)
  rows = compare(
    tuple(jnp.asarray(level[-1], float) for level in trained.levels),
    jnp.array(config.betas).repeat(config.seeds),
    jnp.asarray(effective, float),
  )
  medians = [np.median(x.reshape(len(config.betas), -1), axis=1) for x in rows]
  return [Normalised(*row) for row in zip(*medians)]


def noise(task: enumerable.Task, config: ConfigDict) -> list[Noise]:
  """How noisy the gradient of J is where training begins, and where it ends."""
  rows = [kl.PENALTIES[key] for key in (SAMPLED, RAO_BLACKWELLISED)]

  @jax.jit
  @jax.vmap
  def variances(beta):
    oracle = task.oracle()
    ends = oracle.reference, oracle.optimum(beta)[1]
    each = [oracle.noise(end, row, beta) for end in ends for row in rows]
    return beta, *each

  found = jax.device_get(variances(jnp.array(config.betas)))
  return [Noise(*row) for row in zip(*found)]


def plateaus(
  tasks: Sequence[enumerable.Task], config: ConfigDict
) -> list[Plateaus]:
  """What the exact gradient of J itself reaches on other random tasks."""
  policies, scores = (
    jax.tree.map(lambda *x: jnp.stack(x), *column)
    for column in zip(*((task.policy, task.scores) for task in tasks))
  )

  @jax.jit
  def reached(policies, scores, betas):
    def one(policy_and_scores, beta):
      policy, scores = policy_and_scores
      task = tasks[0]._replace(policy=policy, scores=scores)
      end = runs.predict(task, config, [SAMPLED], jnp.array(0), beta)
      return task.oracle().figures(end, beta).reached

    return _outer(one)((policies, scores), betas)

  found = np.asarray(reached(policies, scores, jnp.array(config.betas)))
  return [
    Plateaus(beta, (column >= ENOUGH).mean(), column.min())
    for beta, column in zip(config.betas, found.T)
  ]


def _outer(function):
  """`function` of every first argument with every second."""
  inner = jax.vmap(function, in_axes=(None, 0))
  return jax.vmap(inner, in_axes=(0, None))
