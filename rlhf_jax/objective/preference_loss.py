"""Losses on preferences: the reward model's, and DPO's with its family.

Pure functions of one number per response. Those of the family take log-ratios
ρ = log π(y|x) − log π_ref(y|x) of whole responses, in nats (SimPO, which has
no reference, takes its own reward), and return a loss per pair. β is traced.
"""

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


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


def dpo_loss(
  chosen: Float[Array, "B"],
  rejected: Float[Array, "B"],
  *,
  beta: float | Float[Array, ""],
) -> Float[Array, "B"]:
  """Direct preference optimisation: −log σ(β ρ_c − β ρ_r).

  ρ = log π(y|x) − log π_ref(y|x): the Bradley–Terry likelihood of the reward
  whose KL-regularised optimum the policy is. Source: Rafailov et al. 2023
  (arXiv:2305.18290), equation 7.

  Args:
    chosen: ρ_c, log-ratio of the preferred response, nats.
    rejected: ρ_r, that of the other.
    beta: Reward units per nat of a response.
  """
  return bradley_terry_loss(beta * chosen, beta * rejected)


def conservative_dpo_loss(
  chosen: Float[Array, "B"],
  rejected: Float[Array, "B"],
  *,
  beta: float | Float[Array, ""],
  label_smoothing: float,
) -> Float[Array, "B"]:
  """DPO with smoothed labels: −(1 − ε) log σ(Δ) − ε log σ(−Δ).

  Δ = β (ρ_c − ρ_r). Smallest at σ(Δ) = 1 − ε, and not at infinity. Source:
  Mitchell 2023, A note on DPO with noisy preferences, equation 3.

  Args:
    chosen: ρ_c, log-ratio of the preferred response, nats.
    rejected: ρ_r, that of the other.
    beta: Reward units per nat of a response.
    label_smoothing: ε, the share of labels that are taken to be flipped.
  """
  given = dpo_loss(chosen, rejected, beta=beta)
  flipped = dpo_loss(rejected, chosen, beta=beta)
  return (1 - label_smoothing) * given + label_smoothing * flipped


def robust_dpo_loss(
  chosen: Float[Array, "B"],
  rejected: Float[Array, "B"],
  *,
  beta: float | Float[Array, ""],
  label_smoothing: float,
) -> Float[Array, "B"]:
  """DPO unbiased by flipped labels: ((1−ε) L(c, r) − ε L(r, c)) / (1 − 2ε).

  With a share ε of the labels flipped its expectation is DPO's loss L on the
  true ones. It has no lower bound: a pair that both losses see can be paid
  for by the subtracted one. Source: Chowdhury et al. 2024 (arXiv:2403.00409),
  section 3.

  Args:
    chosen: ρ_c, log-ratio of the preferred response, nats.
    rejected: ρ_r, that of the other.
    beta: Reward units per nat of a response.
    label_smoothing: ε, in [0, ½).
  """
  given = dpo_loss(chosen, rejected, beta=beta)
  flipped = dpo_loss(rejected, chosen, beta=beta)
  unbiased = (1 - label_smoothing) * given - label_smoothing * flipped
  return unbiased / (1 - 2 * label_smoothing)


def ipo_loss(
  chosen: Float[Array, "B"],
  rejected: Float[Array, "B"],
  *,
  beta: float | Float[Array, ""],
) -> Float[Array, "B"]:
  """Identity preference optimisation: (ρ_c − ρ_r − 1/(2β))².

  Log-ratios of whole responses, as in the paper; nats². Source: Azar et al.
  2023 (arXiv:2310.12036), equation 17, whose τ is β.

  Args:
    chosen: ρ_c, log-ratio of the preferred response, nats.
    rejected: ρ_r, that of the other.
    beta: Units of preference probability per nat of a response.
  """
  return jnp.square(chosen - rejected - 1 / (2 * beta))


def kto_baseline(mismatched: Float[Array, "N"]) -> Float[Array, ""]:
  """KTO's reference point: max(0, mean log-ratio), without a gradient.

  An estimate of KL(π‖π_ref), biased, that needs no samples of the policy.
  Source: Ethayarajh et al. 2024 (arXiv:2402.01306), section 4.1 (ẑ₀).

  Args:
    mismatched: Log-ratios of responses to other prompts than their own, nats.
  """
  return lax.stop_gradient(jnp.maximum(mismatched.mean(), 0.0))


def kto_loss(
  chosen: Float[Array, "B"],
  rejected: Float[Array, "B"],
  baseline: Float[Array, ""],
  *,
  beta: float | Float[Array, ""],
  desirable_weight: float,
  undesirable_weight: float,
) -> Float[Array, "B"]:
  """Kahneman–Tversky optimisation, each response an example of its own.

  λ_D (1 − σ(β (ρ_c − z))) and λ_U (1 − σ(β (z − ρ_r))), the mean of the two.
  Source: Ethayarajh et al. 2024 (arXiv:2402.01306), section 4.1, without the
  constant. Differs from the paper: on pairs, so that as many examples are
  desirable as are not.

  Args:
    chosen: ρ_c, log-ratio of the desirable response, nats.
    rejected: ρ_r, that of the undesirable one.
    baseline: z, from `kto_baseline`.
    beta: Reward units per nat of a response.
    desirable_weight: λ_D.
    undesirable_weight: λ_U.
  """
  desirable = desirable_weight * jax.nn.sigmoid(beta * (baseline - chosen))
  undesirable = undesirable_weight * jax.nn.sigmoid(
    beta * (rejected - baseline)
  )
  return (desirable + undesirable) / 2


def simpo_reward(
  logprobs: Float[Array, "B"],
  lengths: Int[Array, "B"],
  *,
  beta: float | Float[Array, ""],
) -> Float[Array, "B"]:
  """SimPO's implicit reward, β/|y| log π(y|x); of an empty response 0.

  Source: Meng et al. 2024 (arXiv:2405.14734), equation 4.

  Args:
    logprobs: Log π(y|x), nats.
    lengths: |y|, tokens.
    beta: Reward units per nat per token.
  """
  return beta * logprobs / jnp.maximum(lengths, 1)


def simpo_loss(
  chosen: Float[Array, "B"],
  rejected: Float[Array, "B"],
  *,
  margin: float,
) -> Float[Array, "B"]:
  """Simple preference optimisation: −log σ(s_c − s_r − γ). No reference.

  Source: Meng et al. 2024 (arXiv:2405.14734), equation 6.

  Args:
    chosen: `simpo_reward` of the preferred response, reward units.
    rejected: That of the other.
    margin: γ, by how much the one is to be better, reward units.
  """
  return bradley_terry_loss(chosen, rejected + margin)


def chi_po_reward(
  log_ratio: Float[Array, "B"], *, beta: float | Float[Array, ""]
) -> Float[Array, "B"]:
  """χPO's implicit reward: β φ(e^ρ) with φ(z) = z + log z.

  The reward that a policy is best for under β (KL + χ²/2), up to a constant:
  the linear term makes leaving the reference exponentially dear. Source: Huang
  et al. 2024 (arXiv:2407.13399), algorithm 1. The exponent is clipped to
  [−88, 20], in which float32 has neither 0 nor ∞; beyond, the gradient is the
  logarithm's alone.

  Args:
    log_ratio: ρ = log π(y|x) − log π_ref(y|x), nats.
    beta: Reward units per unit of the divergence.
  """
  return beta * (jnp.exp(jnp.clip(log_ratio, -88.0, 20.0)) + log_ratio)


def chi_po_loss(
  chosen: Float[Array, "B"],
  rejected: Float[Array, "B"],
  *,
  beta: float | Float[Array, ""],
  reward_bound: float,
) -> Float[Array, "B"]:
  """χ² preference optimisation: −log σ(clip(Δ, ±2 R_max)).

  Δ is the difference of `chi_po_reward`. A pair beyond the clip has no
  gradient, whichever way it is ordered. Source: Huang et al. 2024
  (arXiv:2407.13399), algorithm 1.

  Args:
    chosen: ρ_c, log-ratio of the preferred response, nats.
    rejected: ρ_r, that of the other.
    beta: Reward units per unit of the divergence.
    reward_bound: R_max, the range of the true reward.
  """
  margin = chi_po_reward(chosen, beta=beta) - chi_po_reward(rejected, beta=beta)
  clipped = jnp.clip(margin, -2 * reward_bound, 2 * reward_bound)
  return -jax.nn.log_sigmoid(clipped)


def concordance(
  first: Float[Array, "B"], second: Float[Array, "B"], *, group_size: int
) -> Float[Array, ""]:
  """The share of pairs that both scores order alike; ½ is chance.

  Pairs of responses to the same prompt (`group_size` neighbours), which is
  what a reward model was trained to order; with one response to a prompt, all
  pairs of the batch, and with them whatever a score thinks of the prompts.
  Pairs that the second score ties do not count, a tie of the first alone
  counts ½. Without a pair that counts it is ½.
  """
  sign = lambda x: jnp.sign(x[:, None] - x[None, :])
  agree = (sign(first) * sign(second) + 1) / 2
  counts = sign(second) != 0
  if group_size > 1:
    group = jnp.arange(first.shape[0]) // group_size
    counts &= group[:, None] == group[None, :]
  pairs = counts.sum()
  share = jnp.where(counts, agree, 0.0).sum() / jnp.maximum(pairs, 1)
  return jnp.where(pairs > 0, share, 0.5)
