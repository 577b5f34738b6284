"""Schedules by hand, what decays, and the clip."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.models import transformer
from rlhf_jax.steps import optimizer


def rates(counts, **settings):
  config = optimizer.OptimizerConfig(learning_rate=0.8, **settings)
  schedule = optimizer.learning_rate(config)
  return [float(schedule(count)) for count in counts]


@pytest.mark.parametrize(
  ("settings", "counts", "wanted"),
  [
    ({"updates": 10}, [0, 5, 10], [0.8, 0.8, 0.8]),
    # Warm-up of 4: a quarter more each time, full at its last update.
    (
      {"updates": 10, "warmup_updates": 4},
      [0, 1, 2, 3, 4, 9],
      [0.2, 0.4, 0.6, 0.8, 0.8, 0.8],
    ),
    ({"updates": 10, "warmup_updates": 1}, [0, 1, 9], [0.8, 0.8, 0.8]),
    # 8 updates down to 0: an eighth of 0.8 each time.
    (
      {"updates": 8, "schedule": "linear"},
      [0, 1, 4, 7, 8, 20],
      [0.8, 0.7, 0.4, 0.1, 0.0, 0.0],
    ),
    # After 2 of warm-up, 8 remain.
    (
      {"updates": 10, "schedule": "linear", "warmup_updates": 2},
      [0, 1, 2, 6, 10],
      [0.4, 0.8, 0.8, 0.4, 0.0],
    ),
    # 0.4 (1 + cos π t/8): t = 0, 4, 6, 8.
    (
      {"updates": 8, "schedule": "cosine"},
      [0, 4, 6, 8],
      [0.8, 0.4, 0.4 * (1 - np.sqrt(0.5)), 0.0],
    ),
  ],
)
def test_schedules_by_hand(settings, counts, wanted):
  np.testing.assert_allclose(rates(counts, **settings), wanted, atol=1e-6)


def test_weights_decay_and_norms_and_biases_do_not():
  """With a gradient of 0, AdamW moves by −lr · decay · weight alone."""
  model = transformer.TransformerConfig(
    vocab_size=5,
    width=8,
    layers=1,
    heads=2,
    kv_heads=2,
    head_size=4,
    mlp_width=8,
    max_length=8,
    norm="layer",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tie_embeddings=False,
  )
  init = lambda: {
    "transformer": transformer.init(jax.random.key(0), model),
    "value_head": transformer.init_scalar_head(8, use_bias=True),
  }
  params = jax.tree.map(lambda x: np.ones(x.shape), jax.eval_shape(init))
  config = optimizer.OptimizerConfig(
    learning_rate=0.1, updates=1, weight_decay=0.5
  )
  made = optimizer.make(config)
  zeros = jax.tree.map(np.zeros_like, params)
  updates, _ = jax.jit(made.update)(zeros, jax.jit(made.init)(params), params)
  moved = {
    jax.tree_util.keystr(path, simple=True, separator="/"): update
    for path, update in jax.tree_util.tree_leaves_with_path(updates)
  }
  decays = {name for name, update in moved.items() if update.any()}
  network = "transformer/"
  assert decays == {
    network + "embedding/tokens",
    network + "layers/attention/qkv/kernel",
    network + "layers/attention/out/kernel",
    network + "layers/mlp/in/kernel",
    network + "layers/mlp/out/kernel",
    network + "lm_head/kernel",
    "value_head/kernel",
  }
  for name in decays:  # −0.1 · 0.5 · 1
    np.testing.assert_allclose(moved[name], -0.05, rtol=1e-6)


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_long_gradients_are_scaled_down_and_short_ones_are_not(scale):
  """Seen in Adam's first moment, (1 − b1) · clipped gradient."""
  params = {"kernel": jnp.zeros(2)}
  config = optimizer.OptimizerConfig(
    learning_rate=0.1, updates=1, max_grad_norm=1.0
  )
  made = optimizer.make(config)
  gradient = {"kernel": scale * jnp.array([0.6, 0.8])}  # Of length `scale`.
  _, state = made.update(gradient, made.init(params), params)
  (moment,) = jax.tree.leaves(optax.tree.get(state, "mu"))
  wanted = 0.1 * min(scale, 1.0) * np.array([0.6, 0.8])
  np.testing.assert_allclose(moment, wanted, rtol=1e-5)


def test_the_first_update_is_one_learning_rate_long():
  """Adam's bias correction: m̂ / (√v̂ + ε) is the sign of the gradient."""
  params = {"kernel": jnp.zeros(2)}
  config = optimizer.OptimizerConfig(learning_rate=0.1, updates=1)
  made = optimizer.make(config)
  gradient = {"kernel": jnp.array([0.3, -1e-4])}
  updates, _ = made.update(gradient, made.init(params), params)
  np.testing.assert_allclose(updates["kernel"], [-0.1, 0.1], rtol=1e-3)
