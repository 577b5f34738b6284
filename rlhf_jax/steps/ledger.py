"""The KL ledger of a step: its figures with errors, whole and by position."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax import types
from rlhf_jax.objective import kl, masking
from rlhf_jax.objective import logprobs as logprobs_lib


def of_rollout(
  rollout: types.Rollout,
  comparison: logprobs_lib.Comparison,
  log_ratio: Float[Array, "B R"],
  clamped: Bool[Array, "B R"],
  mask: Bool[Array, "B R"],
  *,
  group_size: int,
) -> tuple[dict[str, Float[Array, ""]], dict[str, Array]]:
  """Every KL figure, in nats, with standard errors over responses.

  Three meters are of one kind, k3 summed over a response of whoever sampled:
  `kl/reverse_k3` (π‖π_ref), `kl/to_old_policy` (π_old‖π, from `update`) and
  `kl/decode_mismatch` (decoding‖learner).
  """
  mismatch = comparison.logprobs - rollout.logprobs
  per_token = {
    "kl/reverse_k1": kl.k1(log_ratio),
    "kl/reverse_k3": kl.k3(log_ratio),
    "kl/reverse_exact": comparison.reverse_kl,
    "kl/forward_exact": comparison.forward_kl,
    "kl/decode_mismatch": kl.k3(kl.clamp_log_ratio(-mismatch)[0]),
  }
  scalars, by_position = {}, {}
  for name, nats in per_token.items():
    scalars |= with_error(
      name, jnp.where(mask, nats, 0.0).sum(1), group_size=group_size
    )
    mean, error = masking.mean_and_error_by_column(nats, mask)
    by_position |= {name: mean, f"{name}_se": error}
  lengths = rollout.sequences.response_lengths
  scalars |= {
    "kl/per_token": masking.masked_mean(kl.k1(log_ratio), mask),
    "kl/clamp_fraction": masking.masked_mean(clamped * 1.0, mask),
    "ppo/entropy": masking.masked_mean(comparison.entropy, mask),
    "rollout/response_tokens": lengths.mean(),
    "rollout/reference_nll": -masking.masked_mean(
      comparison.reference_logprobs, mask
    ),
    "rollout/truncated_fraction": rollout.truncated.mean(),
    "rollout/logprob_max_abs_diff": jnp.where(
      mask, jnp.abs(mismatch), 0.0
    ).max(),
  }
  by_position["responses"] = mask.sum(0)
  return scalars, by_position


def of_anchored(
  terms: kl.Terms, mask: Bool[Array, "B R"], *, group_size: int
) -> dict[str, Float[Array, ""]]:
  """KL of the policy given its prefix to the reference without it (`anchor`).

  `kl/anchored` is exact over the vocabulary, `kl/anchored_k1` sampled; nats
  per response, with standard errors.
  """
  scalars = {}
  for name, nats in (
    ("kl/anchored", terms.reverse_kl),
    ("kl/anchored_k1", kl.k1(terms.log_ratio)),
  ):
    per_response = jnp.where(mask, nats, 0.0).sum(1)
    scalars |= with_error(name, per_response, group_size=group_size)
  return scalars


def with_error(
  name: str, per_response: Float[Array, "B"], *, group_size: int
) -> dict[str, Float[Array, ""]]:
  """The mean over responses under its name, its standard error beside it."""
  mean, error = masking.mean_and_error(per_response, group_size=group_size)
  return {name: mean, f"{name}_se": error}
