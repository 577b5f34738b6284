"""From rewards per token to advantages per token."""

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def generalized_advantages(
  rewards: Float[Array, "B R"],
  values: Float[Array, "B R"],
  mask: Bool[Array, "B R"],
  *,
  gamma: float,
  gae_lambda: float,
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
  """Generalised advantage estimation and the returns that it implies.

      A_t = Σ_{k ≥ 0} (γλ)^k δ_{t+k},   δ_t = r_t + γ V(s_{t+1}) − V(s_t)

  with V = 0 after the last real token: a response is a whole episode, also
  where it was cut off. Returns are A + V. Both are 0 where the mask is False.

  Source: Schulman et al. 2015 (arXiv:1506.02438), equations 11 and 16; as in
  the paper, for finite episodes.

  Args:
    rewards: Reward units; `rewards[b, t]` follows the token t.
    values: V(s_t), the value before the token t.
    mask: Real tokens; they come first in their row.
    gamma: Discount.
    gae_lambda: λ; 1 gives return − value, 0 gives δ.
  """
  rewards = jnp.where(mask, rewards, 0.0)
  values = jnp.where(mask, values, 0.0)
  next_values = jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
  deltas = rewards + gamma * next_values - values

  def accumulate(advantage, delta):
    advantage = delta + gamma * gae_lambda * advantage
    return advantage, advantage

  start = jnp.zeros_like(deltas[:, 0])
  _, advantages = lax.scan(accumulate, start, deltas.T, reverse=True)
  advantages = jnp.where(mask, advantages.T, 0.0)
  return advantages, advantages + values
