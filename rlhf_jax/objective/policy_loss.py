"""PPO's two clipped losses, per token."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def clipped_policy_loss(
  new_logprobs: Float[Array, "*N"],
  logprobs: Float[Array, "*N"],
  advantages: Float[Array, "*N"],
  *,
  clip_epsilon: float,
) -> tuple[Float[Array, "*N"], Bool[Array, "*N"]]:
  """The clipped surrogate, negated, and whether the clip decided it.

      −min(ρ A, clip(ρ, 1 − ε, 1 + ε) A),   ρ = exp(new_logprobs − logprobs)

  Source: Schulman et al. 2017 (arXiv:1707.06347), equation 7, negated because
  we minimise. The log-ratio is clamped to ±20 before the exponential, where
  ρ is far outside any clip: an overflow would make the other branch's
  gradient NaN.
  """
  log_ratio = jnp.clip(new_logprobs - logprobs, -20.0, 20.0)
  importance_ratio = jnp.exp(log_ratio)
  clipped = jnp.clip(importance_ratio, 1 - clip_epsilon, 1 + clip_epsilon)
  loss = jnp.maximum(-importance_ratio * advantages, -clipped * advantages)
  return loss, -clipped * advantages > -importance_ratio * advantages


def clipped_value_loss(
  new_values: Float[Array, "*N"],
  values: Float[Array, "*N"],
  returns: Float[Array, "*N"],
  *,
  clip_epsilon: float,
) -> Float[Array, "*N"]:
  """Squared error that stops rewarding moves beyond ε from the old value.

      ½ max((V − R)², (V_old + clip(V − V_old, −ε, ε) − R)²)

  Source: the PPO2 implementation that accompanied Schulman et al. 2017; not
  in the paper.
  """
  moved = jnp.clip(new_values - values, -clip_epsilon, clip_epsilon)
  clipped = values + moved
  errors = jnp.square(new_values - returns), jnp.square(clipped - returns)
  return 0.5 * jnp.maximum(*errors)
