"""GAE against the double sum of its definition, and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objective import advantages

LENGTHS = np.array([5, 3, 1, 0])  # truncated, stopped, one token, empty
SIZE = 5
MASK = np.arange(SIZE) < LENGTHS[:, None]
RNG = np.random.default_rng(0)
REWARDS = RNG.normal(size=MASK.shape)
VALUES = RNG.normal(size=MASK.shape)


def estimate(rewards, values, mask, gamma, gae_lambda):
  return advantages.generalized_advantages(
    jnp.asarray(rewards, jnp.float32),
    jnp.asarray(values, jnp.float32),
    jnp.asarray(mask),
    gamma=gamma,
    gae_lambda=gae_lambda,
  )


def by_definition(rewards, values, lengths, gamma, gae_lambda):
  """A_t = Σ_k (γλ)^k (r_{t+k} + γ V(s_{t+k+1}) − V(s_{t+k})), one by one."""
  result = np.zeros(rewards.shape)
  for row, length in enumerate(lengths):
    for t in range(length):
      for i in range(t, length):
        k = i - t
        after = values[row, i + 1] if i + 1 < length else 0.0
        delta = rewards[row, i] + gamma * after - values[row, i]
        result[row, t] += (gamma * gae_lambda) ** k * delta
  return result


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 0.95, 1.0])
def test_gae_is_the_double_sum(gamma, gae_lambda):
  """Stopped, truncated, one-token and empty responses in one batch."""
  found, returns = estimate(REWARDS, VALUES, MASK, gamma, gae_lambda)
  wanted = by_definition(REWARDS, VALUES, LENGTHS, gamma, gae_lambda)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
  wanted_returns = np.where(MASK, wanted + VALUES, 0.0)
  np.testing.assert_allclose(returns, wanted_returns, atol=1e-5)


@pytest.mark.parametrize(
  ("length", "wanted"),
  [
    # γ = ½, λ = ½, so γλ = ¼; rewards 1, 2, 3; values 4, 8, 2.
    # Three tokens: δ = 1 + 4 − 4 = 1, 2 + 1 − 8 = −5, 3 − 2 = 1
    #   A = 1 − 5/4 + 1/16, −5 + 1/4, 1
    (3, [-0.1875, -4.75, 1.0]),
    # Two tokens: δ_1 = 2 − 8 = −6, nothing after it; A_0 = 1 − 6/4
    (2, [-0.5, -6.0, 0.0]),
    # One token: δ_0 = 1 − 4
    (1, [-3.0, 0.0, 0.0]),
    (0, [0.0, 0.0, 0.0]),
  ],
)
def test_by_hand(length, wanted):
  mask = np.arange(3)[None] < length
  found, returns = estimate(
    np.array([[1.0, 2.0, 3.0]]), np.array([[4.0, 8.0, 2.0]]), mask, 0.5, 0.5
  )
  np.testing.assert_allclose(found[0], wanted, rtol=1e-6)
  wanted_returns = np.add(wanted, [4.0, 8.0, 2.0]) * mask[0]
  np.testing.assert_allclose(returns[0], wanted_returns, rtol=1e-6)


def test_lambda_one_is_return_minus_value():
  found, returns = estimate(REWARDS, VALUES, MASK, 1.0, 1.0)
  rewards_to_go = np.cumsum((REWARDS * MASK)[:, ::-1], axis=1)[:, ::-1]
  np.testing.assert_allclose(found, (rewards_to_go - VALUES) * MASK, atol=1e-5)
  np.testing.assert_allclose(returns, rewards_to_go * MASK, atol=1e-5)


def test_lambda_zero_is_the_temporal_difference():
  found, _ = estimate(REWARDS, VALUES, MASK, 0.9, 0.0)
  values = np.pad(VALUES * MASK, ((0, 0), (0, 1)))
  deltas = REWARDS + 0.9 * values[:, 1:] - values[:, :-1]
  np.testing.assert_allclose(found, deltas * MASK, atol=1e-5)


@pytest.mark.parametrize("garbage", [1e30, np.nan])
def test_garbage_after_the_end_changes_no_bit(garbage):
  """Traps 16 and 17: values, returns and gradients."""

  def total(rewards, values):
    found, returns = advantages.generalized_advantages(
      rewards, values, jnp.asarray(MASK), gamma=0.9, gae_lambda=0.7
    )
    return jnp.sin(found).sum() + jnp.cos(returns).sum(), (found, returns)

  clean = [jnp.asarray(x, jnp.float32) for x in (REWARDS, VALUES)]
  dirty = [jnp.where(MASK, x, garbage) for x in clean]
  gradient = jax.grad(total, argnums=(0, 1), has_aux=True)
  for one, other in zip(
    jax.tree.leaves(gradient(*clean)), jax.tree.leaves(gradient(*dirty))
  ):
    np.testing.assert_array_equal(one, other)
    assert not np.asarray(one)[~MASK].any()
