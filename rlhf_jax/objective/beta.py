"""Controllers of β, the price of KL in reward units per nat.

A controller is a pair of pure functions; its state is a pytree that lives in
the train state and in the checkpoint:

    state = controller.init(beta)
    beta = controller.value(state)
    state = controller.update(state, kl)      # kl: nats per response

β is traced: one compiled step serves every β, and `vmap` runs many at once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Controller(NamedTuple):
  """A β controller; see the module docstring."""

  init: Callable[[Any], Any]
  value: Callable[[Any], Float[Array, ""]]
  update: Callable[[Any, Float[Array, ""]], Any]


def fixed() -> Controller:
  """β stays what it was."""

  def init(beta):
    return {"beta": jnp.asarray(beta, jnp.float32)}

  return Controller(init, lambda state: state["beta"], lambda state, kl: state)
