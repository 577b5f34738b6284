"""A real transformer whose responses are all known, rewards, and the optimum.

The one prompt is the stop token, which no prefix of a response holds: a single
layer with relative positions gives a token and its repetition the same states,
and with another prompt could not tell it from a response that begins with it.

Left out: several prompts; the oracle would be applied to each.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from rlhf_jax import types
from rlhf_jax.measures import enumeration
from rlhf_jax.models import transformer
from rlhf_jax.objective import exact, kl
from rlhf_jax.steps import rewards
from rlhf_jax.studies import kl_measurements as measure
from rlhf_jax.studies import listed

STOP = 0
PROMPT = (STOP,)
_STOP_IDS = (STOP,)


class Figures(NamedTuple):
  """Where a policy stands: J and J*, reward units; KLs from it, nats.

  `reached` is (J − J(π_ref)) / (J* − J(π_ref)).
  """

  value: Float[Array, "*N"]
  best: Float[Array, "*N"]
  reached: Float[Array, "*N"]
  to_optimum: Float[Array, "*N"]
  to_reference: Float[Array, "*N"]


class Oracle(NamedTuple):
  """The reference and the rewards as prefix trees, in float64."""

  reference: exact.Levels
  rewards: exact.Levels

  def optimum(self, beta: Any) -> tuple[Array, exact.Levels]:
    """J* and π*."""
    log_z, policy = exact.optimum(
      self.reference, self.rewards, beta=beta, stop_ids=_STOP_IDS
    )
    return beta * log_z, policy

  def figures(self, policy: exact.Levels, beta: Any) -> Figures:
    """What the definitions say of a policy."""
    value, start = (
      exact.objective(
        levels, self.reference, self.rewards, beta=beta, stop_ids=_STOP_IDS
      )
      for levels in (policy, self.reference)
    )
    best, optimum = self.optimum(beta)
    divergence = functools.partial(
      exact.sequence_kl, policy, stop_ids=_STOP_IDS
    )
    return Figures(
      value,
      best,
      reached=(value - start) / (best - start),
      to_optimum=divergence(optimum),
      to_reference=divergence(self.reference),
    )

  def surrogates(
    self, logits: exact.Levels, old: exact.Levels, penalty: kl.Penalty, beta
  ) -> tuple[Float[Array, "S"], Float[Array, "S"]]:
    """PPO's loss of each response, and the responses' probabilities.

    With a perfect critic and γ = λ = 1: what a step expects on its first
    minibatch is the gradient of their product, the probabilities held fixed.
    `old` are the logits of the policy that sampled, a constant.
    """
    policy, reference = map(jnp.concatenate, (old, self.reference))
    listing = exact.sequences(
      vocab_size=policy.shape[1], response_length=len(old), stop_ids=_STOP_IDS
    )
    model = listed.Model(
      len(old),
      _STOP_IDS,
      features=jnp.eye(len(policy)),
      policy=jax.lax.stop_gradient(policy),
      reference=reference,
      listing=listing,
    )
    scores = exact.scores(self.rewards, listing)
    rewards = measure.penalised_rewards(model, penalty, scores, beta=beta)
    values = measure.true_values(model, rewards)
    new = model.compare(jnp.concatenate(logits))
    losses = measure.losses(model, penalty, new, rewards, values, beta=beta)
    return losses, model.probabilities(model.policy)

  def noise(self, policy: exact.Levels, penalty: kl.Penalty, beta) -> Array:
    """Variance of a response's gradient of J in all logits, summed."""
    of = lambda logits: self.surrogates(logits, policy, penalty, beta)
    gradients = jax.jacrev(lambda logits: of(logits)[0])(policy)
    each = jnp.concatenate([g.reshape(len(g), -1) for g in gradients], axis=1)
    return measure.variance(each, of(policy)[1])


class Task(NamedTuple):
  """A transformer with its value head, and the reward of each response.

  `scores[y_1, …, y_R]` is that of a response which is padded with `STOP`.
  """

  model: transformer.TransformerConfig
  policy: types.Params
  scores: Float[Array, "..."]

  def levels(self, params: types.Params) -> exact.Levels:
    """A policy as a prefix tree."""
    return enumeration.prefix_logits(
      params["transformer"],
      jnp.array(PROMPT),
      model=self.model,
      response_length=self.scores.ndim,
      temperature=1.0,
    )

  def score(self) -> rewards.Score:
    """The reward function of the step."""

    def function(tokens, mask):
      response = jnp.where(mask, tokens, STOP)[:, -self.scores.ndim :]
      return self.scores[tuple(response.T)]

    return rewards.from_function(function)

  def oracle(self) -> Oracle:
    """The same task for the oracle; callers turn float64 on."""
    table = enumeration.table_of(
      lambda sequences: self.score()({}, sequences, jnp.int32(0)),
      jnp.array(PROMPT),
      vocab_size=self.model.vocab_size,
      response_length=self.scores.ndim,
      stop_ids=_STOP_IDS,
    )
    return Oracle(self.levels(self.policy), table)


def make(config: ConfigDict, *, seed: int) -> Task:
  """A random task: the reference's logits and the rewards have sd 1."""
  size, width = config.response_length, config.width
  model = transformer.TransformerConfig(
    vocab_size=config.vocab_size,
    width=width,
    layers=1,
    heads=2,
    kv_heads=2,
    head_size=width // 2,
    mlp_width=4 * width,
    max_length=len(PROMPT) + size,
    tie_embeddings=False,
  )
  keys = jax.random.split(jax.random.key(seed), 4)
  shape = config.vocab_size, width
  # What `init` gives is small: all logits would be near 0.
  params = transformer.init(keys[0], model) | {
    "embedding": {"tokens": 0.3 * jax.random.normal(keys[1], shape)},
    "lm_head": {"kernel": width**-0.5 * jax.random.normal(keys[2], shape)},
  }
  return Task(
    model,
    policy={
      "transformer": params,
      "value_head": transformer.init_scalar_head(width, use_bias=True),
    },
    scores=jax.random.normal(keys[3], (config.vocab_size,) * size),
  )
