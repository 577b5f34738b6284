"""DPO on an enumerable task, from as many responses as the others see.

In each step a member draws pairs of responses from π_ref, which a judge labels
by Bradley and Terry with the task's reward, and takes as many updates on them
as PPO does on its responses. Its optimum is the same π*, for the likelihood of
its preferences is greatest where β log π/π_ref is the reward up to a constant.
But its samples stay π_ref's: what π_ref seldom writes it seldom sees, and a
label says less than a reward.
"""

from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax import types
from rlhf_jax.objective import exact
from rlhf_jax.steps import dpo
from rlhf_jax.studies import enumerable
from rlhf_jax.studies.closed_form import runs


def train(
  task: enumerable.Task,
  config: ConfigDict,
  members: runs.Members,
  *,
  tell: Callable[[], None],
) -> runs.Trained:
  """Trains the members, from the reference on; their penalty is not used.

  Args:
    task: What to learn.
    config: The study's.
    members: Who they are.
    tell: Called after each evaluation.
  """
  updates = config.steps * config.epochs * config.minibatches
  optimizer = runs.make_optimizer(config, updates)
  update = dpo.make_step(dpo.DPOConfig(task.model, "dpo"), optimizer)
  draw = _pairs(task, config)

  def step(state, key):
    rows = draw(jax.random.fold_in(key, state.step))
    batches = jax.tree.map(
      lambda x: x.reshape(config.minibatches, -1, *x.shape[1:]), rows
    )
    epoch = lambda state, _: (lax.scan(update, state, batches)[0], None)
    return lax.scan(epoch, state, length=config.epochs)[0]

  @functools.partial(jax.jit, donate_argnums=0)
  def go_on(state, keys):
    """To the next evaluation."""
    state, _ = lax.scan(
      lambda state, _: (jax.vmap(step)(state, keys), None),
      state,
      length=config.steps // config.evaluations,
    )
    return state, jax.vmap(task.levels)(state.params)

  @jax.vmap
  def start(beta):
    transformer = {"transformer": task.policy["transformer"]}
    return dpo.init_state(transformer, beta=beta, optimizer=optimizer)

  # Read first: the state, which is donated, may hold the very array.
  betas = np.tile(np.asarray(members.beta), (config.evaluations, 1))
  state, evaluations = start(members.beta), []
  for _ in range(config.evaluations):
    state, levels = go_on(state, members.key)
    evaluations.append(jax.device_get(levels))
    tell()
  levels = jax.tree.map(lambda *x: np.stack(x), *evaluations)
  return runs.Trained(levels, betas)


def _pairs(task, config):
  """Key → a step's pairs; the responses are drawn from their whole list."""
  size = config.response_length
  listing = exact.sequences(
    vocab_size=config.vocab_size,
    response_length=size,
    stop_ids=(enumerable.STOP,),
  )
  logprobs = exact.token_logprobs(task.levels(task.policy), listing).sum(1)
  prompt = jnp.array(enumerable.PROMPT)

  def sequences(index):
    count = len(index)
    return types.Sequences(
      prompt_tokens=jnp.tile(prompt, (count, 1)),
      prompt_lengths=jnp.full(count, len(prompt)),
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
