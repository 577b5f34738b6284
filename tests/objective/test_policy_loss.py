"""PPO's losses: by hand, and reduced to the plain policy gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objective import policy_loss


def policy_losses(ratio, advantage, clip_epsilon=0.2):
  losses, clipped = policy_loss.clipped_policy_loss(
    jnp.log(jnp.asarray(ratio, jnp.float32)),
    jnp.zeros(len(ratio)),
    jnp.asarray(advantage, jnp.float32),
    clip_epsilon=clip_epsilon,
  )
  return np.asarray(losses), np.asarray(clipped)


def test_policy_loss_by_hand():
  losses, clipped = policy_losses(
    [1.5, 1.5, 0.5, 0.5, 1.1, 1.0], [2.0, -2.0, 2.0, -2.0, 3.0, 3.0]
  )
  # −min(ρA, clip(ρ)A): −min(3, 2.4), −min(−3, −2.4), −min(1, 1.6),
  # −min(−1, −1.6), and inside the clip −ρA.
  wanted = [-2.4, 3.0, -1.0, 1.6, -3.3, -3.0]
  np.testing.assert_allclose(losses, wanted, rtol=1e-6)
  decided = [True, False, False, True, False, False]
  np.testing.assert_array_equal(clipped, decided)


def gradient_of(new_logprobs, logprobs, advantages, clip_epsilon):
  loss = lambda new: policy_loss.clipped_policy_loss(
    new, logprobs, advantages, clip_epsilon=clip_epsilon
  )[0].sum()
  return np.asarray(jax.grad(loss)(new_logprobs))


def test_the_clip_stops_only_what_would_go_further():
  new_logprobs = jnp.log(jnp.array([1.5, 1.5, 0.5, 0.5]))
  advantages = jnp.array([2.0, -2.0, 2.0, -2.0])
  gradient = gradient_of(new_logprobs, jnp.zeros(4), advantages, 0.2)
  # d(−ρA)/d log ρ = −ρA where the clip does not decide.
  np.testing.assert_allclose(gradient, [0.0, 3.0, -1.0, 0.0], rtol=1e-6)


def test_without_a_clip_the_gradient_is_importance_weighted():
  rng = np.random.default_rng(0)
  new, old, advantages = jnp.asarray(rng.normal(size=(3, 64)), jnp.float32)
  gradient = gradient_of(new, old, advantages, 1e9)
  wanted = -np.exp(np.asarray(new, np.float64) - old) * advantages
  np.testing.assert_allclose(gradient, wanted, rtol=1e-5)


@pytest.mark.parametrize("clip_epsilon", [0.2, 1e-3])
def test_at_ratio_one_it_is_the_policy_gradient_of_a_softmax(clip_epsilon):
  """−A ∇log π, with ∇log π = onehot − softmax."""
  rng = np.random.default_rng(1)
  logits = rng.normal(size=(8, 5)).astype(np.float32)
  tokens = rng.integers(5, size=8)
  advantages = rng.normal(size=8).astype(np.float32)

  def logprobs(logits):
    return jax.nn.log_softmax(logits)[np.arange(8), tokens]

  def loss(new_logits):
    losses, clipped = policy_loss.clipped_policy_loss(
      logprobs(new_logits),
      logprobs(jnp.asarray(logits)),
      jnp.asarray(advantages),
      clip_epsilon=clip_epsilon,
    )
    return losses.sum(), clipped

  gradient, clipped = jax.grad(loss, has_aux=True)(jnp.asarray(logits))
  assert not clipped.any()
  wide = logits.astype(np.float64)
  softmax = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
  wanted = -advantages[:, None] * (np.eye(5)[tokens] - softmax)
  np.testing.assert_allclose(gradient, wanted, atol=1e-6)


@pytest.mark.parametrize("log_ratio", [-200.0, -60.0, 60.0, 200.0])
@pytest.mark.parametrize("advantage", [-1.5, 0.0, 1.5])
def test_far_away_everything_stays_finite(log_ratio, advantage):
  """Trap 17: an overflowing branch that `max` rejects must not leak."""
  args = jnp.array([log_ratio]), jnp.zeros(1), jnp.array([advantage])
  losses, _ = policy_loss.clipped_policy_loss(*args, clip_epsilon=0.2)
  assert np.isfinite(losses).all()
  gradient = gradient_of(*args, 0.2)
  assert np.isfinite(gradient).all()
  if advantage * log_ratio > 0:  # It has gone far enough: no push.
    assert gradient[0] == 0.0


def test_value_loss_by_hand():
  losses = policy_loss.clipped_value_loss(
    jnp.array([1.0, 1.0, 0.1, 3.0]),
    jnp.zeros(4),
    jnp.array([2.0, 0.0, 2.0, 2.9]),
    clip_epsilon=0.2,
  )
  # V, V_old = 0, R → ½ max((V − R)², (clip(V) − R)²)
  # 1, 2: ½ max(1, 1.8²) · 1, 0: ½ max(1, 0.04)
  # 0.1, 2: within ε, ½ 1.9² · 3, 2.9: ½ max(0.01, 2.7²)
  wanted = [1.62, 0.5, 1.805, 3.645]
  np.testing.assert_allclose(losses, wanted, rtol=1e-6)


def test_value_loss_without_a_clip_is_half_the_squared_error():
  rng = np.random.default_rng(2)
  new, old, returns = jnp.asarray(rng.normal(size=(3, 32)), jnp.float32)
  loss = lambda new: policy_loss.clipped_value_loss(
    new, old, returns, clip_epsilon=1e9
  ).sum()
  value, gradient = jax.value_and_grad(loss)(new)
  np.testing.assert_allclose(value, 0.5 * np.square(new - returns).sum(), 1e-5)
  np.testing.assert_allclose(gradient, new - returns, atol=1e-6)


def test_a_value_beyond_the_clip_is_not_pulled_further():
  loss = lambda new: policy_loss.clipped_value_loss(
    new, jnp.zeros(2), jnp.array([2.0, -2.0]), clip_epsilon=0.2
  ).sum()
  # Both moved 1 from V_old = 0: the first towards its return 2, which the
  # clip has had enough of; the second away from its return −2, gradient 3.
  gradient = jax.grad(loss)(jnp.array([1.0, 1.0]))
  np.testing.assert_allclose(gradient, [0.0, 3.0], rtol=1e-6)
