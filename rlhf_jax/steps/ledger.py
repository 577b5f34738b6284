"""What a step reports: the KL ledger, what was charged, and what it learned.

`of_iteration` makes the metrics of a PPO step out of one record of it,
`of_offline` those of a look at a policy that is trained on given pairs. Both
have the meters of `of_rollout`: KL with errors, whole and by position.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from rlhf_jax import types
from rlhf_jax.objective import kl, masking
from rlhf_jax.objective import logprobs as logprobs_lib
from rlhf_jax.steps import learner, text_mix
from rlhf_jax.steps import reference as reference_lib
from rlhf_jax.steps import rewards as rewards_lib

Scalars = dict[str, Float[Array, ""]]


class Iteration(NamedTuple):
  """What happened in a PPO step, in its order.

  Attributes:
    rollout: The responses.
    compared: The policy beside its reference.
    judgement: What the responses are worth.
    beta: The price of a nat, reward units.
    divisors: What `grpo` divided each group's scores by; otherwise ones.
    experience: What the loss was made of.
    updates: Sums of the losses `[epochs, minibatches]`, from `ppo.update`.
  """

  rollout: types.Rollout
  compared: reference_lib.Compared
  judgement: rewards_lib.Judgement
  beta: Float[Array, ""]
  divisors: Float[Array, "*G"]
  experience: learner.Experience
  updates: dict[str, Any]


def of_iteration(
  iteration: Iteration, config: learner.PPOConfig
) -> types.Metrics:
  """All that a PPO step reports; no option adds a metric anywhere else."""
  asked, clean = iteration.compared.asked, iteration.compared.clean
  group_size = config.group_size
  scalars, by_position = of_rollout(
    iteration.rollout, asked.comparison, group_size=group_size
  )
  charged_kl = "kl/reverse_exact"
  if clean is not None:
    mask = _mask(asked.sequences)
    scalars |= _of_anchored(clean.terms, mask, group_size=group_size)
    charged_kl = "kl/anchored" if config.anchored else charged_kl
  scalars |= {
    "kl/beta": iteration.beta,
    "kl/penalty": iteration.beta * scalars[charged_kl],
  }
  scalars |= _of_judgement(iteration, config)
  scalars |= _of_normalisation(iteration, config)
  scalars |= _of_updates(iteration, config)
  samples = _samples(
    asked.sequences, asked.comparison, iteration.judgement.scores
  )
  return types.Metrics(scalars, samples, by_position)


def of_offline(
  rollout: types.Rollout,
  comparison: logprobs_lib.Comparison,
  beta: Float[Array, ""],
  gold: rewards_lib.Gold | None,
) -> types.Metrics:
  """The KL ledger of what `evaluate.written` returned, and the gold reward.

  A sample's score is its implicit reward, β Σ log π/π_ref.
  """
  sequences = rollout.sequences
  scalars, by_position = of_rollout(rollout, comparison, group_size=1)
  scalars["kl/penalty"] = beta * scalars["kl/reverse_exact"]
  if gold is not None:
    scalars |= _with_error("reward/gold", gold(sequences), group_size=1)
  log_ratio, _ = reference_lib.log_ratio(comparison)
  scores = beta * masking.per_response(log_ratio, _mask(sequences))
  return types.Metrics(
    scalars, _samples(sequences, comparison, scores), by_position
  )


def meters(
  comparison: logprobs_lib.Comparison,
) -> dict[str, Float[Array, "B R"]]:
  """The KL to the reference at each token, by every meter, nats."""
  log_ratio, _ = reference_lib.log_ratio(comparison)
  return {
    "kl/reverse_k1": kl.k1(log_ratio),
    "kl/reverse_k3": kl.k3(log_ratio),
    "kl/reverse_exact": comparison.reverse_kl,
    "kl/forward_exact": comparison.forward_kl,
  }


def of_rollout(
  rollout: types.Rollout,
  comparison: logprobs_lib.Comparison,
  *,
  group_size: int,
) -> tuple[Scalars, dict[str, Array]]:
  """Every KL figure, in nats, with standard errors over responses.

  Three meters are of one kind, k3 summed over a response of whoever sampled:
  `kl/reverse_k3` (π‖π_ref), `kl/to_old_policy` (π_old‖π, of the updates) and
  `kl/decode_mismatch` (decoding‖learner).
  """
  mask = _mask(rollout.sequences)
  log_ratio, clamped = reference_lib.log_ratio(comparison)
  mismatch = comparison.logprobs - rollout.logprobs
  per_token = meters(comparison)
  per_token["kl/decode_mismatch"] = kl.k3(kl.clamp_log_ratio(-mismatch)[0])
  scalars, by_position = {}, {}
  for name, nats in per_token.items():
    scalars |= _with_error(
      name, masking.per_response(nats, mask), group_size=group_size
    )
    mean, error = masking.mean_and_error_by_column(nats, mask)
    by_position |= {name: mean, f"{name}_se": error}
  by_position["responses"] = mask.sum(0)
  scalars |= {
    "kl/per_token": masking.masked_mean(kl.k1(log_ratio), mask),
    "kl/clamp_fraction": masking.masked_mean(clamped * 1.0, mask),
    "ppo/entropy": masking.masked_mean(comparison.entropy, mask),
    "rollout/response_tokens": rollout.sequences.response_lengths.mean(),
    "rollout/reference_nll": -masking.masked_mean(
      comparison.reference_logprobs, mask
    ),
    "rollout/truncated_fraction": rollout.truncated.mean(),
    "rollout/logprob_max_abs_diff": jnp.where(
      mask, jnp.abs(mismatch), 0.0
    ).max(),
  }
  return scalars, by_position


def _of_anchored(
  terms: kl.Terms, mask: Bool[Array, "B R"], *, group_size: int
) -> Scalars:
  """KL of the policy given its prefix to the reference without it (`anchor`).

  `kl/anchored` is exact over the vocabulary, `kl/anchored_k1` sampled; nats
  per response, with standard errors.
  """
  scalars = {}
  for name, nats in (
    ("kl/anchored", terms.reverse_kl),
    ("kl/anchored_k1", kl.k1(terms.log_ratio)),
  ):
    per_response = masking.per_response(nats, mask)
    scalars |= _with_error(name, per_response, group_size=group_size)
  return scalars


def _of_judgement(iteration: Iteration, config: learner.PPOConfig) -> Scalars:
  """Scores, alone and with the penalty, and how far they can be trusted."""
  judgement, compared = iteration.judgement, iteration.compared
  charged = compared.charged(anchored=config.anchored)
  spent = masking.per_response(
    charged.terms.reverse_kl, _mask(charged.sequences)
  )
  per_response = {
    "reward/score": judgement.scores,
    "reward/total": judgement.scores - iteration.beta * spent,
  }
  scalars = {}
  if judgement.agreement is not None:
    scalars["reward/agreement"] = judgement.agreement
  if judgement.golds is not None:
    per_response["reward/gold"] = judgement.golds
    scalars["reward/pair_accuracy"] = judgement.pair_accuracy
  for name, figures in per_response.items():
    scalars |= _with_error(name, figures, group_size=config.group_size)
  return scalars


def _of_normalisation(
  iteration: Iteration, config: learner.PPOConfig
) -> Scalars:
  """What β comes to where scores were divided by something, raw units."""
  divisors, scale = iteration.divisors, iteration.judgement.scale
  normalised = config.advantages == "grpo" and config.normalise_groups
  scalars = {}
  if normalised:
    scalars["ppo/equal_groups"] = (divisors == 0).mean()
  if normalised or scale is not None:
    raw = 1.0 if scale is None else scale
    unequal = masking.masked_mean(divisors, divisors > 0)
    scalars["kl/beta_effective"] = iteration.beta * raw * unequal
  return scalars


def _of_updates(iteration: Iteration, config: learner.PPOConfig) -> Scalars:
  """Losses per token, and how far the policy moved from the one that wrote."""
  sums, texts = iteration.updates, iteration.experience.texts
  lengths = iteration.rollout.sequences.response_lengths
  batch, tokens = len(lengths), config.epochs * lengths.sum()
  # KL(π_old‖π_new) on the rollout, as the last epoch found it.
  moved, squared = sums["moved"][-1].sum(), sums["moved_squared"][-1].sum()
  variance = (squared - moved**2 / batch) / max(batch - 1, 1)
  scalars = {
    "ppo/policy_loss": sums["policy_loss"].sum() / tokens,
    "ppo/value_loss": sums["value_loss"].sum() / tokens,
    "ppo/clip_fraction": sums["clipped"].sum() / tokens,
    "ppo/grad_norm": sums["grad_norm"].mean(),
    "kl/to_old_policy": moved / batch,
    "kl/to_old_policy_se": jnp.sqrt(jnp.maximum(variance, 0.0) / batch),
  }
  if texts is not None:
    scalars |= text_mix.figures(sums["texts"], texts, epochs=config.epochs)
  return scalars


def _mask(sequences: types.Sequences) -> Bool[Array, "B R"]:
  return masking.response_mask(
    sequences.response_lengths, sequences.response_tokens.shape[1]
  )


def _samples(
  sequences: types.Sequences,
  comparison: logprobs_lib.Comparison,
  scores: Float[Array, "B"],
) -> types.Samples:
  """The responses, for people."""
  return types.Samples(
    sequences=sequences,
    scores=scores,
    logprobs=comparison.logprobs,
    reference_logprobs=comparison.reference_logprobs,
    reverse_kl=comparison.reverse_kl,
  )


def _with_error(
  name: str, per_response: Float[Array, "B"], *, group_size: int
) -> Scalars:
  """The mean over responses under its name, its standard error beside it."""
  mean, error = masking.mean_and_error(per_response, group_size=group_size)
  return {name: mean, f"{name}_se": error}
