"""Losses on preferences."""

import jax
from jaxtyping import Array, Float


def bradley_terry_loss(
  chosen: Float[Array, "B"], rejected: Float[Array, "B"]
) -> Float[Array, "B"]:
  """Negative log-likelihood of a preference: −log σ(chosen − rejected).

  Source: Bradley & Terry 1952; as the reward model's loss, Ouyang et al. 2022
  (arXiv:2203.02155), equation 1 with K = 2.

  Args:
    chosen: Score of the preferred response, reward units.
    rejected: Score of the other.
  """
  return -jax.nn.log_sigmoid(chosen - rejected)
