"""The reference: the policy's transformer as it was, a value of its own.

It is an argument of the step: closed over, it would be compiled in as a
constant; donated, it would be gone; in the optimiser's state, it would move.
"""

import jax
import jax.numpy as jnp

from rlhf_jax import types


def freeze(policy: types.Params) -> types.Params:
  """A copy of the policy without its value head.

  A copy, because the step donates the train state: buffers that reference
  and state shared would be overwritten, or refused as already donated. This
  is the one place that makes it.
  """
  return {"transformer": jax.tree.map(jnp.copy, policy["transformer"])}
