"""The Bradley–Terry loss."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.objective import preference_loss


def test_by_hand():
  losses = preference_loss.bradley_terry_loss(
    jnp.array([1.0, 0.0, 3.0]), jnp.array([1.0, jnp.log(3.0), 3 - jnp.log(3.0)])
  )
  # σ(0) = 1/2; σ(−log 3) = 1/4; σ(log 3) = 3/4.
  wanted = [np.log(2), np.log(4), np.log(4 / 3)]
  np.testing.assert_allclose(losses, wanted, rtol=1e-6)


def test_it_is_a_likelihood_and_a_difference():
  chosen, rejected = jnp.array([0.4, -2.0]), jnp.array([1.3, 0.7])
  one = preference_loss.bradley_terry_loss(chosen, rejected)
  other = preference_loss.bradley_terry_loss(rejected, chosen)
  np.testing.assert_allclose(jnp.exp(-one) + jnp.exp(-other), 1.0, rtol=1e-6)
  moved = preference_loss.bradley_terry_loss(chosen + 8, rejected + 8)
  np.testing.assert_allclose(one, moved, rtol=1e-6)


def test_the_gradient_far_away_is_finite_and_right():
  """Trap 17: d/dΔ −log σ(Δ) = −σ(−Δ)."""
  loss = lambda x: preference_loss.bradley_terry_loss(x, jnp.zeros(3)).sum()
  value, gradient = jax.value_and_grad(loss)(jnp.array([-200.0, 0.0, 200.0]))
  np.testing.assert_allclose(value, 200 + np.log(2), rtol=1e-6)
  np.testing.assert_allclose(gradient, [-1.0, -0.5, 0.0], atol=1e-6)
