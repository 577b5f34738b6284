"""The reference is the policy's transformer, and buffers of its own."""

import jax
import jax.numpy as jnp
import numpy as np

from rlhf_jax.steps import reference


def make_policy():
  return {
    "transformer": {"embedding": {"tokens": jnp.arange(6.0).reshape(3, 2)}},
    "value_head": {"kernel": jnp.ones(2)},
  }


def test_it_is_the_transformer_alone_bit_for_bit():
  policy = make_policy()
  frozen = reference.freeze(policy)
  assert set(frozen) == {"transformer"}
  jax.tree.map(
    np.testing.assert_array_equal,
    frozen["transformer"],
    policy["transformer"],
  )


def test_it_outlives_the_donated_policy():
  """Trap 30: shared buffers would be gone with the state."""
  policy = make_policy()
  wanted = np.asarray(policy["transformer"]["embedding"]["tokens"]).copy()
  frozen = reference.freeze(policy)
  one, other = (
    tree["transformer"]["embedding"]["tokens"] for tree in (policy, frozen)
  )
  assert one.unsafe_buffer_pointer() != other.unsafe_buffer_pointer()
  update = jax.jit(
    lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0
  )
  update(policy)
  assert one.is_deleted()
  np.testing.assert_array_equal(other, wanted)
