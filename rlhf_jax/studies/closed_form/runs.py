"""The algorithms on an enumerable task, and what the oracle predicts of them.

The step of PPO and its kin is that of `ppo.make_step`, unchanged. Members of a
program, which is compiled once, differ in their penalty, their β and their
samples.

DPO learns from as many responses as the others see: in each step a member draws
pairs of them from π_ref, which a judge labels by Bradley and Terry with the
task's reward, and takes as many updates on them as PPO does. Its optimum is the
same π*, for the likelihood of its preferences is greatest where β log π/π_ref
is the reward up to a constant. But its samples stay π_ref's: what π_ref seldom
writes it seldom sees, and a label says less than a reward.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict
import numpy as np
import optax

from rlhf_jax import types
from rlhf_jax.objective import beta as beta_lib
from rlhf_jax.objective import exact, kl
from rlhf_jax.steps import dpo, ppo, reference, rollout
from rlhf_jax.steps import optimizer as optimizer_lib
from rlhf_jax.studies import enumerable
from rlhf_jax.studies import kl_measurements as measure

DPO = "DPO"
_AXIS = "member"


class Program(NamedTuple):
  """Arms that are compiled together: penalties, and the βs of each.

  `settings` are fields of `PPOConfig`; DPO has none, and uses no penalty.
  """

  algorithm: str
  settings: dict[str, Any]
  penalties: Sequence[measure.Name]
  betas: Sequence[tuple[float, ...]]


class Trained(NamedTuple):
  """Policies at each evaluation, `[E, M, …]`, and the price of a nat.

  `betas` is `kl/beta_effective` where scores are normalised, otherwise β.
  """

  levels: exact.Levels
  betas: Float[np.ndarray, "E M"]


class _Member(NamedTuple):
  """What the members differ in; `penalty` is its index in the program."""

  penalty: Array
  beta: Array
  key: Array


def train(
  task: enumerable.Task,
  config: ConfigDict,
  program: Program,
  *,
  tell: Callable[[], None],
) -> Trained:
  """A member for each penalty, each of its βs, and each seed.

  All begin at the reference; `tell` is called after each evaluation.
  """
  updates = config.steps * config.epochs * config.minibatches
  make = _dpo if program.algorithm == DPO else _ppo
  start, step = make(task, config, program, make_optimizer(config, updates))
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

  members = _members(config, program)
  # Copied: the state, which is donated, may hold an array of the members.
  state = jax.tree.map(jnp.copy, jax.vmap(start)(members))
  frozen, evaluations = reference.freeze(task.policy), []
  for _ in range(config.evaluations):
    state, evaluation = go_on(state, members, frozen)
    evaluations.append(jax.device_get(evaluation))
    tell()
  return Trained(*jax.tree.map(lambda *x: np.stack(x), *evaluations))


def _members(config, program) -> _Member:
  rows = [
    (penalty, beta, seed)
    for penalty, betas in enumerate(program.betas)
    for beta in betas
    for seed in range(config.seeds)
  ]
  penalty, beta, seed = map(jnp.array, zip(*rows))
  fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
  return _Member(penalty, beta, fold(jax.random.key(config.seed), seed))


def _ppo(task, config, program, optimizer):
  """A member's start and step."""
  controller = beta_lib.fixed()
  prompts = types.Prompts(
    jnp.tile(jnp.array(enumerable.PROMPT), (config.batch_size, 1)),
    jnp.full(config.batch_size, len(enumerable.PROMPT)),
  )

  def start(member):
    return ppo.init_state(
      task.policy, beta=member.beta, optimizer=optimizer, controller=controller
    )

  def step(state, member, frozen):
    ppo_config = ppo.PPOConfig(
      model=task.model,
      rollout=rollout.RolloutConfig(
        response_length=config.response_length, stop_ids=(enumerable.STOP,)
      ),
      penalty=chosen(program.penalties, member.penalty),
      group_size=config.group_size,
      epochs=config.epochs,
      minibatches=config.minibatches,
      **program.settings,
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

  return start, step


def _dpo(task, config, program, optimizer):
  """A member's start and step."""
  del program
  update = dpo.make_step(dpo.DPOConfig(task.model, "dpo"), optimizer)
  draw = _pairs(task, config)

  def start(member):
    transformer = {"transformer": task.policy["transformer"]}
    return dpo.init_state(transformer, beta=member.beta, optimizer=optimizer)

  def step(state, member, frozen):
    del frozen
    rows = draw(jax.random.fold_in(member.key, state.step))
    batches = jax.tree.map(
      lambda x: x.reshape(config.minibatches, -1, *x.shape[1:]), rows
    )
    epoch = lambda state, _: (lax.scan(update, state, batches)[0], None)
    return lax.scan(epoch, state, length=config.epochs)[0], member.beta

  return start, step


def _pairs(task, config):
  """Key → a step's pairs; the responses are drawn from their whole list."""
  listing = exact.sequences(
    vocab_size=config.vocab_size,
    response_length=config.response_length,
    stop_ids=(enumerable.STOP,),
  )
  logprobs = exact.token_logprobs(task.levels(task.policy), listing).sum(1)
  prompt = jnp.array(enumerable.PROMPT)

  def sequences(index):
    return types.Sequences(
      prompt_tokens=jnp.tile(prompt, (len(index), 1)),
      prompt_lengths=jnp.full(len(index), len(prompt)),
      response_tokens=listing.tokens[index],
      response_lengths=listing.lengths[index],
    )

  everything = sequences(jnp.arange(len(listing.lengths)))
  scores = task.score()({}, everything, jnp.int32(0))

  def draw(key):
    response_key, label_key = jax.random.split(key)
    first, second = jax.random.categorical(
      response_key, logprobs, shape=(2, config.batch_size // 2)
    )
    first_wins = jax.random.bernoulli(
      label_key, jax.nn.sigmoid(scores[first] - scores[second])
    )
    chosen = jnp.where(first_wins, first, second)
    rejected = jnp.where(first_wins, second, first)
    pairs = types.PreferencePairs(sequences(chosen), sequences(rejected))
    return dpo.Batch(pairs, (logprobs[chosen], logprobs[rejected]))

  return draw


def predict(
  task: enumerable.Task,
  config: ConfigDict,
  penalties: Sequence[measure.Name],
  index: Array,
  beta: Array,
) -> exact.Levels:
  """Where the same optimiser ends if every gradient is the expected one.

  With the penalty of that index, which may be traced, as β may be. The
  expectation is over all responses, of the current policy. Where the penalty
  holds the policy back, the end is the one point where the expected gradient
  vanishes. Where it does not, there are many, at the edge of the simplex, and
  which of them is reached depends on the way; hence this way, in the
  transformer's parameters, and not a shorter one. Callers turn float64 on.
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


def chosen(penalties: Sequence[measure.Name], index: Array) -> kl.Penalty:
  """One of the penalties, where members of a program differ in it."""
  rows = [kl.PENALTIES[name] for name in penalties]
  if len(rows) == 1:
    return rows[0]

  def stacked(parts, terms, *mask):
    nothing = jnp.zeros_like(terms.log_ratio)
    nats = [part(terms, *mask) if part else nothing for part in parts]
    return jnp.stack(nats)[index]

  return kl.Penalty(
    "",
    lambda terms, mask: stacked([p.in_reward for p in rows], terms, mask),
    lambda terms: stacked([p.in_loss for p in rows], terms),
    needs_reference=True,
  )


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
