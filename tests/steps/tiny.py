"""Tiny models and what is given to them: what the tests of steps share."""

from collections.abc import Callable, Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import types
from rlhf_jax.models import transformer

# Grouped queries, and every size another.
MODEL = transformer.TransformerConfig(
  vocab_size=13,
  width=16,
  layers=2,
  heads=4,
  kv_heads=2,
  head_size=4,
  mlp_width=24,
  max_length=32,
  unroll=2,
)
SHALLOW = dataclasses.replace(MODEL, layers=1, unroll=1)
# Eight rewards, fractions of either sign.
SCORES = jnp.array([0.7, -1.9, 0.0, 2.5, -0.3, 1.0, 0.25, -4.0])


def random_like(
  make: Callable[[], types.Params], seed: int, scale: float = 0.5
) -> types.Params:
  """What `make` would return, random in every leaf: norms and biases too."""
  rng = np.random.default_rng(seed)
  draw = lambda x: jnp.asarray(scale * rng.normal(size=x.shape), x.dtype)
  return jax.tree.map(draw, jax.eval_shape(make))


def network(seed, model=MODEL, scale=0.5) -> types.Params:
  """A transformer whose logits are far from uniform."""
  return random_like(
    lambda: transformer.init(jax.random.key(0), model), seed, scale
  )


def initial_policy(model=MODEL) -> types.Params:
  """A policy as it is before training."""
  return {
    "transformer": transformer.init(jax.random.key(0), model),
    "value_head": transformer.init_scalar_head(model.width, use_bias=True),
  }


def policy(seed, model=MODEL, scale=0.5) -> types.Params:
  """A policy whose responses stop early and whose values are not 0."""
  return random_like(lambda: initial_policy(model), seed, scale)


def reward_model(
  seed, model=MODEL, *, mean=0.5, std=2.0, bias=False
) -> types.Params:
  """Random weights; stored moments that are not 0 and 1."""
  head = policy(seed + 1, model)["value_head"]
  return {
    "transformer": policy(seed, model)["transformer"],
    "score_head": head if bias else {"kernel": head["kernel"]},
    "normalisation": {"mean": jnp.float32(mean), "std": jnp.float32(std)},
  }


def left_padded(
  rows: Sequence[Sequence[int]], size: int, garbage: int = 0
) -> types.Prompts:
  """Prompts of these ids; `garbage` fills the padding."""
  tokens = np.full((len(rows), size), garbage, np.int32)
  for row, ids in enumerate(rows):
    tokens[row, size - len(ids) :] = ids
  lengths = np.array([len(ids) for ids in rows], np.int32)
  return types.Prompts(jnp.asarray(tokens), jnp.asarray(lengths))


def prompts(size=4, garbage=0) -> types.Prompts:
  """Eight, of 1 to 4 tokens: the same words at every padded size."""
  rng = np.random.default_rng(7)
  lengths = [1, 2, 3, 4, 4, 3, 2, 1]
  rows = [rng.integers(0, 13, 4)[:length] for length in lengths]
  return left_padded(rows, size, garbage)


def given_scores(reward_model, sequences, step):
  """A score for a step: the scores are the reward model."""
  del sequences, step
  return reward_model


def keep_gradient(learning_rate: float = 0.0) -> optax.GradientTransformation:
  """Plain SGD whose state is the gradient that it saw last."""

  def update(gradient, state, params):
    del state, params
    return jax.tree.map(lambda g: -learning_rate * g, gradient), gradient

  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params), update
  )


def to_numpy(tree):
  """A copy on the host."""
  return jax.tree.map(lambda x: np.array(x), tree)


def assert_same(found, wanted):
  """Bit for bit."""
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def assert_close(found, wanted, tolerance, floor=1e-9):
  """Within `tolerance` of each leaf's largest value, or within `floor`."""

  def compare(a, b):
    atol = tolerance * np.abs(b).max(initial=0.0)
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=atol + floor)

  jax.tree.map(compare, to_numpy(found), to_numpy(wanted))
