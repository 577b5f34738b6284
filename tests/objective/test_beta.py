"""Controllers of β."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objective import beta


@pytest.mark.parametrize("start", [0.0, 0.05, 2])
def test_a_fixed_beta_stays(start):
  """Trap 12: β is an array of the state, whatever type it came as."""
  controller = beta.fixed()
  state = controller.init(start)
  for kl in (0.0, 1e3, -5.0):
    state = controller.update(state, jnp.float32(kl))
  value = controller.value(state)
  assert value.dtype == jnp.float32 and value.shape == ()
  assert value == np.float32(start)


def test_many_betas_run_in_one_traced_program():
  controller = beta.fixed()

  @jax.jit
  @jax.vmap
  def twice(start):
    state = controller.init(start)
    state = controller.update(state, jnp.float32(3.0))
    return controller.value(state)

  betas = jnp.array([0.0, 0.1, 0.4])
  np.testing.assert_array_equal(twice(betas), betas)
