"""The gradient of one minibatch: clipped policy loss, penalty, value loss.

Everything with a vocabulary axis lives in `head_gradient`, which makes the
gradient chunk by chunk (`logprobs.gradient_in_columns`); the trunk's is pulled
back from what it returns. Losses are weighted sums over tokens, divided by a
constant and never by the number of tokens that were sampled. A mix of texts
(`text_mix`) adds the gradient of its own pass.
"""

import dataclasses
from typing import Any, Literal

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import kl, masking, policy_loss
from rlhf_jax.objective import logprobs as logprobs_lib
from rlhf_jax.steps import anchor, text_mix
from rlhf_jax.steps import rollout as rollout_lib


@dataclasses.dataclass(frozen=True)
class PPOConfig:
  """What is fixed when a step is compiled; β and the learning state are not.

  Attributes:
    reference: The reference's architecture, where it is not the policy's.
    penalty: A row of `kl.PENALTIES`.
    prefix: What stands in front of every prompt, where something does.
    anchored: The penalty holds the policy, with the prefix, to the reference
      without it.
    mix: Texts in the loss, where there are any.
    advantages: `gae` has a critic; `rloo` and `grpo` compare the responses to
      one prompt; `reinforce_pp` has the batch's mean and standard deviation.
    group_size: Responses to each prompt, in neighbouring rows.
    normalise_groups: `grpo` divides scores by their group's deviation.
    length_normalisation: A response weighs the same whatever its length, as
      in GRPO; without it every token weighs the same.
    microbatches: Pieces of a minibatch whose gradients are added up; changes
      memory and not the result.
    logits_per_chunk: See `objective.logprobs`.
  """

  model: transformer.TransformerConfig
  rollout: rollout_lib.RolloutConfig
  reference: transformer.TransformerConfig | None = None
  penalty: kl.Penalty = kl.PENALTIES["sequence_reverse", "sampled"]
  prefix: anchor.Prefix | None = None
  anchored: bool = False
  mix: text_mix.Mix | None = None
  advantages: Literal["gae", "rloo", "grpo", "reinforce_pp"] = "gae"
  group_size: int = 1
  normalise_groups: bool = True
  length_normalisation: bool = False
  epochs: int = 1
  minibatches: int = 1
  microbatches: int = 1
  clip_epsilon: float = 0.2
  value_clip_epsilon: float = 0.2
  value_coefficient: float = 0.1
  gamma: float = 1.0
  gae_lambda: float = 0.95
  whiten_advantages: bool = True
  logits_per_chunk: int = 2**24


def response_hidden(
  params: types.Params,
  sequences: types.Sequences,
  *,
  model: transformer.TransformerConfig,
) -> Float[Array, "B R D"]:
  """The teacher-forced states that predict the response's tokens."""
  hidden = rollout_lib.teacher_forced(
    params["transformer"], sequences, model=model
  )
  return masking.response_states(hidden, sequences.response_tokens.shape[1])


def states_and_head(
  params: types.Params,
  sequences: types.Sequences,
  *,
  model: transformer.TransformerConfig,
) -> tuple[Float[Array, "B R D"], Float[Array, "V D"]]:
  """What logprobs of the responses are made from; see `logprobs.compare`."""
  hidden = response_hidden(params, sequences, model=model)
  return hidden, transformer.head(params["transformer"])


def gradient(
  params: types.Params,
  minibatch: dict[str, Any],
  price: Float[Array, ""],
  reference_head: Float[Array, "V E"],
  config: PPOConfig,
) -> tuple[types.Params, dict[str, Any]]:
  """Gradient of the loss, and sums over tokens of what it was made of.

  Every sum is divided by the rows of the whole minibatch times R, a constant,
  so that the split, padding and devices leave the result alone.
  """
  rows = minibatch["advantages"].size // config.rollout.response_length
  divisor = rows * config.rollout.response_length

  def of_rows(experience):
    sequences = experience["sequences"]
    mask = masking.response_mask(
      sequences.response_lengths, config.rollout.response_length
    )

    def forward(params):
      hidden = response_hidden(params, sequences, model=config.model)
      values = transformer.apply_scalar_head(params["value_head"], hidden)
      return hidden, transformer.head(params["transformer"]), values

    (hidden, head, values), pull_back = jax.vjp(forward, params)
    weights = mask / divisor
    if config.length_normalisation:
      lengths = jnp.maximum(sequences.response_lengths, 1)[:, None]
      weights = mask / (rows * lengths)
    columns = {
      name: x for name, x in experience.items() if name not in _NOT_IN_COLUMNS
    }
    columns |= {"tokens": sequences.response_tokens, "mask": mask}
    columns |= {"weights": weights}
    sums, (of_hidden, of_head) = head_gradient(
      hidden, head, columns, price, reference_head, config
    )
    of_values = jnp.zeros_like(values)
    sums["value_loss"] = jnp.zeros(())
    if config.advantages == "gae":
      of_values, sums["value_loss"] = jax.grad(_value_loss, has_aux=True)(
        values, experience, mask, weights, config
      )
    (total,) = pull_back((of_hidden, of_head, of_values))
    moved = sums["moved"]
    sums |= {"moved": moved.sum(), "moved_squared": jnp.square(moved).sum()}
    if config.mix is not None:
      of_texts, sums["texts"] = text_mix.gradient(
        params["transformer"],
        experience["texts"],
        reference_head,
        mix=config.mix,
        model=config.model,
        logits_per_chunk=config.logits_per_chunk,
      )
      total["transformer"] = jax.tree.map(
        jnp.add, total["transformer"], of_texts
      )
    return total, sums

  if config.microbatches == 1:
    whole = jax.tree.map(lambda x: transformer.shard_batch(x[0]), minibatch)
    return of_rows(whole)

  def accumulate(total, microbatch):
    microbatch = jax.tree.map(transformer.shard_batch, microbatch)
    return jax.tree.map(jnp.add, total, of_rows(microbatch)), None

  first = jax.tree.map(lambda x: x[0], minibatch)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_rows, first)
  )
  return lax.scan(accumulate, zeros, minibatch)[0]


_NOT_IN_COLUMNS = ("sequences", "values", "returns", "texts")


def head_gradient(
  hidden: Float[Array, "B R D"],
  head: Float[Array, "V D"],
  columns: dict[str, Any],
  price: Float[Array, ""],
  reference_head: Float[Array, "V E"],
  config: PPOConfig,
):
  """Sums of the policy's losses, and their gradient in states and head.

  Here is the vocabulary: as many tokens at once as `logits_per_chunk` allows.
  """
  arrays = 4 if config.penalty.needs_reference else 2  # of logits, at once
  return logprobs_lib.gradient_in_columns(
    lambda hidden, head, columns: _token_losses(
      hidden, head, columns, price, reference_head, config
    ),
    hidden,
    head,
    columns,
    tokens=config.logits_per_chunk // arrays // head.shape[0],
  )


def _token_losses(hidden, head, columns, price, reference_head, config):
  """Policy loss and penalty of some columns: their weighted sum, and sums.

  Args as `logprobs.gradient_in_columns` gives them, then what is constant.
  """
  temperature = config.rollout.temperature
  mask = columns["mask"]
  real = lambda x, otherwise: jnp.where(mask, x, otherwise)
  # Before the logits, too: a gradient of 0 times NaN is NaN.
  real_states = lambda x: jnp.where(mask[..., None], x, 0.0)
  hidden, logprobs = real_states(hidden), real(columns["logprobs"], 0.0)
  reverse_kl = forward_kl = jnp.zeros_like(logprobs)
  if config.penalty.needs_reference:
    comparison = logprobs_lib.statistics(
      logprobs_lib.token_logits(hidden, head, temperature=temperature),
      logprobs_lib.token_logits(
        real_states(columns["reference_hidden"]),
        reference_head,
        temperature=temperature,
      ),
      columns["tokens"],
    )
    new_logprobs = comparison.logprobs
    reverse_kl = real(comparison.reverse_kl, 0.0)
    forward_kl = real(comparison.forward_kl, 0.0)
  else:
    new_logprobs = logprobs_lib.token_logprobs(
      hidden,
      head,
      columns["tokens"],
      temperature=temperature,
      logits_per_chunk=config.logits_per_chunk,
    )
  # Equal numbers under the mask: ratio 1, and no gradient through `where`.
  new_logprobs = real(new_logprobs, logprobs)
  losses, clipped = policy_loss.clipped_policy_loss(
    new_logprobs,
    logprobs,
    columns["advantages"],
    clip_epsilon=config.clip_epsilon,
  )
  total = masking.masked_sum(columns["weights"] * losses, mask)
  if config.penalty.in_loss is not None:
    log_ratio = real(new_logprobs - columns["reference_logprobs"], 0.0)
    terms = kl.Terms(
      log_ratio=kl.clamp_log_ratio(log_ratio)[0],
      reverse_kl=reverse_kl,
      forward_kl=forward_kl,
      importance_ratio=policy_loss.importance_ratio(new_logprobs, logprobs),
    )
    penalty = price * columns["weights"] * config.penalty.in_loss(terms)
    total += masking.masked_sum(penalty, mask)
  sums = {
    "policy_loss": masking.masked_sum(losses, mask),
    "clipped": (clipped & mask).sum(),
    "moved": kl.k3(logprobs - new_logprobs).sum(1),
  }
  return total, sums


def _value_loss(values, experience, mask, weights, config):
  """The critic's weighted loss, and its sum over tokens."""
  losses = policy_loss.clipped_value_loss(
    values,
    experience["values"],
    experience["returns"],
    clip_epsilon=config.value_clip_epsilon,
  )
  weighted = config.value_coefficient * weights * losses
  return masking.masked_sum(weighted, mask), masking.masked_sum(losses, mask)
