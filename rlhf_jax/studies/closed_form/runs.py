"""PPO and its kin on an enumerable task, and what the oracle predicts of them.

The step is that of `ppo.make_step`, unchanged. Members of a program, which is
compiled once, differ in their penalty, their β and their samples.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict
import numpy as np
import optax

from rlhf_jax import types
from rlhf_jax.objective import beta as beta_lib
from rlhf_jax.objective import exact, kl
from rlhf_jax.steps import optimizer as optimizer_lib
from rlhf_jax.steps import ppo, reference, rollout
from rlhf_jax.studies import enumerable

PenaltyName = tuple[str, str]  # A key of `kl.PENALTIES`.
_AXIS = "member"


class Members(NamedTuple):
  """What the members of a program differ in, a row each.

  `penalty` is an index into the program's penalties.
  """

  penalty: Int[Array, "M"]
  beta: Float[Array, "M"]
  key: Array


class Trained(NamedTuple):
  """Policies at each evaluation, `[E, M, …]`, and the price of a nat.

  `betas` is `kl/beta_effective` where scores are normalised, otherwise β.
  """

  levels: exact.Levels
  betas: Float[np.ndarray, "E M"]


def members(
  penalties: Sequence[Sequence[float]], *, seeds: int, key: Array
) -> Members:
  """A member for each penalty, each of its βs, and each seed.

  Args:
    penalties: The βs of each penalty.
    seeds: How many.
    key: Of the seeds' samples.
  """
  rows = [
    (penalty, beta, seed)
    for penalty, betas in enumerate(penalties)
    for beta in betas
    for seed in range(seeds)
  ]
  penalty, beta, seed = map(jnp.array, zip(*rows))
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  return Members(penalty, beta, fold(key, seed))


def train(
  task: enumerable.Task,
  config: ConfigDict,
  penalties: Sequence[PenaltyName],
  members: Members,
  settings: Mapping[str, Any],
  *,
  tell: Callable[[], None],
) -> Trained:
  """Trains the members, from the reference on.

  Args:
    task: What to learn.
    config: The study's.
    penalties: That members choose from.
    members: Who they are.
    settings: Fields of `PPOConfig`.
    tell: Called after each evaluation.
  """
  updates = config.steps * config.epochs * config.minibatches
  optimizer = make_optimizer(config, updates)
  controller = beta_lib.fixed()
  prompts = types.Prompts(
    jnp.tile(jnp.array(enumerable.PROMPT), (config.batch_size, 1)),
    jnp.full(config.batch_size, len(enumerable.PROMPT)),
  )

  def step(state, member, frozen):
    ppo_config = ppo.PPOConfig(
      model=task.model,
      rollout=rollout.RolloutConfig(
        response_length=config.response_length, stop_ids=(enumerable.STOP,)
      ),
      penalty=chosen(penalties, member.penalty),
      group_size=config.group_size,
      epochs=config.epochs,
      minibatches=config.minibatches,
      **settings,
    )
    function = ppo.make_step(
      ppo_config,
      score=task.score(),
      optimizer=optimizer,
      controller=controller,
      member_axis=_AXIS,
    )
    state, metrics = function(state, frozen, {}, prompts, member.key)
    prices = {"kl/beta_effective": metrics.scalars["kl/beta"]}
    prices |= metrics.scalars
    return state, prices["kl/beta_effective"]

  every = jax.vmap(step, in_axes=(0, 0, None), axis_name=_AXIS)

  @functools.partial(jax.jit, donate_argnums=0)
  def go_on(state, members, frozen):
    """To the next evaluation."""
    state, betas = lax.scan(
      lambda state, _: every(state, members, frozen),
      state,
      length=config.steps // config.evaluations,
    )
    return state, (jax.vmap(task.levels)(state.params), betas.mean(0))

  @jax.vmap
  def start(member):
    return ppo.init_state(
      task.policy, beta=member.beta, optimizer=optimizer, controller=controller
    )

  state, frozen, evaluations = start(members), reference.freeze(task.policy), []
  for _ in range(config.evaluations):
    state, evaluation = go_on(state, members, frozen)
    evaluations.append(jax.device_get(evaluation))
    tell()
  return Trained(*jax.tree.map(lambda *x: np.stack(x), *evaluations))


def predict(
  task: enumerable.Task,
  config: ConfigDict,
  penalties: Sequence[PenaltyName],
  index: Array,
  beta: Array,
) -> exact.Levels:
  """Where the same optimiser ends if every gradient is the expected one.

  The expectation is over all responses, of the current policy. Where the
  penalty holds the policy back, the end is the one point where the expected
  gradient vanishes. Where it does not, there are many, at the edge of the
  simplex, and which of them is reached depends on the way; hence this way, in
  the transformer's parameters, and not a shorter one. Callers turn float64 on.

  Args:
    task: What to learn.
    config: The study's.
    penalties: To choose from.
    index: Which; may be traced, as β may.
    beta: Reward units per nat.
  """
  oracle = task.oracle()
  penalty = chosen(penalties, index)
  optimizer = make_optimizer(config, config.prediction_steps)

  def expected_loss(params):
    logits = task.levels(params)
    losses, weights = oracle.surrogates(logits, logits, penalty, beta)
    return losses @ weights

  def update(carry, _):
    params, state = carry
    gradient = jax.grad(expected_loss)(params)
    updates, state = optimizer.update(gradient, state, params)
    return (optax.apply_updates(params, updates), state), None

  carry = task.policy, optimizer.init(task.policy)
  (params, _), _ = lax.scan(update, carry, length=config.prediction_steps)
  return task.levels(params)


def chosen(penalties: Sequence[PenaltyName], index: Array) -> kl.Penalty:
  """One of the penalties, where members of a program differ in it."""
  rows = [kl.PENALTIES[name] for name in penalties]
  if len(rows) == 1:
    return rows[0]

  def in_reward(terms, mask):
    nothing = jnp.zeros_like(terms.log_ratio)
    nats = [p.in_reward(terms, mask) if p.in_reward else nothing for p in rows]
    return jnp.stack(nats)[index]

  def in_loss(terms):
    nothing = jnp.zeros_like(terms.log_ratio)
    nats = [p.in_loss(terms) if p.in_loss else nothing for p in rows]
    return jnp.stack(nats)[index]

  return kl.Penalty("", in_reward, in_loss, needs_reference=True)


def make_optimizer(
  config: ConfigDict, updates: int
) -> optax.GradientTransformation:
  """Adam with a learning rate that falls to 0 over the updates."""
  return optimizer_lib.make(
    optimizer_lib.OptimizerConfig(
      learning_rate=config.learning_rate,
      updates=updates,
      schedule="cosine",
      b2=config.b2,
    )
  )
