"""KL between policy and reference: values per token, and the penalty.

Both arguments, always: *reverse* is KL(π‖π_ref), the penalty of RLHF; some
texts call it "forward". *forward* here is KL(π_ref‖π). Tokens are sampled
from π, and ℓ = log π(y_t|s_t) − log π_ref(y_t|s_t) is their log-ratio.

Left out: any KL term in the loss. The penalty enters the reward once
(`penalised_rewards`), where with γ = 1 its expected policy gradient is that
of the sequence's reverse KL.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax.objective import masking

LOG_RATIO_LIMIT = 60.0  # nats per token; beyond it float32 overflows in k3


def k1(log_ratio: Float[Array, "*N"]) -> Float[Array, "*N"]:
  """ℓ: unbiased for the reverse KL, any sign, nats per token.

  Source: Schulman 2020, "Approximating KL divergence".
  """
  return log_ratio


def k3(log_ratio: Float[Array, "*N"]) -> Float[Array, "*N"]:
  """e^{−ℓ} − 1 + ℓ: unbiased for the reverse KL and never negative.

  Good near the reference only: its variance grows with e^{−ℓ}. Source:
  Schulman 2020. expm1 keeps small ratios exact.
  """
  return jnp.expm1(-log_ratio) + log_ratio


def clamp_log_ratio(
  log_ratio: Float[Array, "*N"],
) -> tuple[Float[Array, "*N"], Bool[Array, "*N"]]:
  """ℓ within ±60 nats, and where it had to be moved."""
  clamped = jnp.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
  return clamped, clamped != log_ratio


def exact(
  log_p: Float[Array, "*N V"], log_q: Float[Array, "*N V"]
) -> Float[Array, "*N"]:
  """KL(p‖q) = Σ_v p(v) (log p(v) − log q(v)), nats; 0 · ∞ counts as 0."""
  p = jnp.exp(log_p)
  return jnp.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def penalised_rewards(
  score: Float[Array, "B"],
  log_ratio: Float[Array, "B R"],
  lengths: Int[Array, "B"],
  *,
  beta: Float[Array, ""],
) -> Float[Array, "B R"]:
  """The one place where the KL penalty enters.

      r_t = −β ℓ_t + score · [t is the last token]

  so that Σ_t r_t = r(x, y) − β log π(y|x)/π_ref(y|x), whose expectation over
  y ~ π is the penalised objective. Source: Stiennon et al. 2020
  (arXiv:2009.01325), section 3.4; Ouyang et al. 2022, equation 2 with γ = 0.

  Args:
    score: One per response, reward units.
    log_ratio: ℓ, policy − reference, nats per token. No gradient flows.
    lengths: Real tokens of each response.
    beta: Reward units per nat.
  """
  mask = masking.response_mask(lengths, log_ratio.shape[1])
  log_ratio = jax.lax.stop_gradient(log_ratio)
  penalty = jnp.where(mask, beta * log_ratio, 0.0)
  return masking.place_on_last(score, lengths, log_ratio.shape[1]) - penalty
