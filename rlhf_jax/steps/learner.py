"""The gradient of one minibatch: clipped policy loss, penalty, value loss.

Everything with a vocabulary axis lives in `head_gradient`, which makes the
gradient chunk by chunk (`logprobs.gradient_in_columns`); the trunk's is pulled
back from what it returns. Losses are weighted sums over tokens, divided by a
constant and never by the number of tokens that were sampled. A mix of texts
(`text_mix`) adds the gradient of its own pass.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import kl, masking, policy_loss
from rlhf_jax.objective import logprobs as logprobs_lib
from rlhf_jax.steps import reference as reference_lib
from rlhf_jax.steps import rollout as rollout_lib
from rlhf_jax.steps import text_mix


@dataclasses.dataclass(frozen=True)
class PPOConfig(reference_lib.ComparisonConfig):
  """What is fixed when a step is compiled; β and the learning state are not.

  Attributes:
    penalty: A row of `kl.PENALTIES`.
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
  """

  penalty: kl.Penalty = kl.PENALTIES["sequence_reverse", "sampled"]
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


class Experience(NamedTuple):
  """What the loss is made of: the rows of a step or of a minibatch.

  Attributes:
    sequences: Prompts and responses.
    logprobs: Of the policy that sampled, from the rollout.
    reference_logprobs: Of the reference that the penalty holds to.
    reference_hidden: Its states, if the penalty needs its distributions.
    values: The critic's, before the updates.
    advantages: What a token was worth, in the critic's or the group's eyes.
    returns: The critic's targets.
    texts: Of the mix, if there is one; cut into minibatches as the rest is.
  """

  sequences: types.Sequences
  logprobs: Float[Array, "B R"]
  reference_logprobs: Float[Array, "B R"]
  reference_hidden: Float[Array, "B R E"] | None
  values: Float[Array, "B R"]
  advantages: Float[Array, "B R"]
  returns: Float[Array, "B R"]
  texts: text_mix.Texts | None = None


def gradient(
  params: types.Params,
  minibatch: Experience,
  price: Float[Array, ""],
  reference_head: types.Head,
  config: PPOConfig,
) -> tuple[types.Params, dict[str, Any]]:
  """Gradient of the loss, and sums over tokens of what it was made of.

  Args:
    params: The policy.
    minibatch: Every array as `[microbatches, rows, …]`.
    price: What a nat in the loss costs, in the units of the advantages.
    reference_head: The reference's matrix of the logits.
    config: Static settings.
  """
  # A constant, so that the split, padding and devices leave the result alone.
  rows = minibatch.advantages.size // config.rollout.response_length

  def of_rows(experience):
    return _gradient_of_rows(
      params, experience, rows, price, reference_head, config
    )

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


def _gradient_of_rows(params, experience, rows, price, reference_head, config):
  """That of some of a minibatch's `rows`: policy, penalty, critic and texts."""
  sequences = experience.sequences
  mask = masking.response_mask(
    sequences.response_lengths, config.rollout.response_length
  )

  def forward(params):
    hidden = rollout_lib.response_states(
      params["transformer"], sequences, model=config.model
    )
    values = transformer.apply_scalar_head(params["value_head"], hidden)
    return hidden, transformer.head(params["transformer"], config.model), values

  (hidden, head, values), pull_back = jax.vjp(forward, params)
  weights = mask / (rows * config.rollout.response_length)
  if config.length_normalisation:
    lengths = jnp.maximum(sequences.response_lengths, 1)[:, None]
    weights = mask / (rows * lengths)
  columns = {
    "tokens": sequences.response_tokens,
    "mask": mask,
    "weights": weights,
    "logprobs": experience.logprobs,
    "advantages": experience.advantages,
    "reference_logprobs": experience.reference_logprobs,
    "reference_hidden": experience.reference_hidden,
  }
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
      experience.texts,
      reference_head,
      mix=config.mix,
      model=config.model,
      logits_per_chunk=config.logits_per_chunk,
    )
    total["transformer"] = jax.tree.map(jnp.add, total["transformer"], of_texts)
  return total, sums


def head_gradient(
  hidden: Float[Array, "B R D"],
  head: types.Head,
  columns: dict[str, Any],
  price: Float[Array, ""],
  reference_head: types.Head,
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
    tokens=config.logits_per_chunk // arrays // head.vocab_size,
  )


def _token_losses(hidden, head, columns, price, reference_head, config):
  """Policy loss and penalty of some columns: their weighted sum, and sums.

  Args as `logprobs.gradient_in_columns` gives them, then what is constant.
  """
  mask, weights = columns["mask"], columns["weights"]
  real = lambda x, otherwise: jnp.where(mask, x, otherwise)
  logprobs = real(columns["logprobs"], 0.0)
  new_logprobs, *both_kls = _new_logprobs_and_kls(
    hidden, head, columns, reference_head, config
  )
  # Equal numbers under the mask: ratio 1, and no gradient through `where`.
  new_logprobs = real(new_logprobs, logprobs)
  losses, clipped = policy_loss.clipped_policy_loss(
    new_logprobs,
    logprobs,
    columns["advantages"],
    clip_epsilon=config.clip_epsilon,
  )
  total = masking.masked_sum(weights * losses, mask)
  if config.penalty.in_loss is not None:
    log_ratio = real(new_logprobs - columns["reference_logprobs"], 0.0)
    reverse_kl, forward_kl = (real(nats, 0.0) for nats in both_kls)
    terms = kl.Terms(
      log_ratio=kl.clamp_log_ratio(log_ratio)[0],
      reverse_kl=reverse_kl,
      forward_kl=forward_kl,
      importance_ratio=policy_loss.importance_ratio(new_logprobs, logprobs),
    )
    penalty = price * weights * config.penalty.in_loss(terms)
    total += masking.masked_sum(penalty, mask)
  sums = {
    "policy_loss": masking.masked_sum(losses, mask),
    "clipped": (clipped & mask).sum(),
    "moved": kl.k3(logprobs - new_logprobs).sum(1),
  }
  return total, sums


def _new_logprobs_and_kls(hidden, head, columns, reference_head, config):
  """Of the tokens; KL to the reference, reverse and forward, if one asks."""
  mask, tokens = columns["mask"], columns["tokens"]
  temperature = config.rollout.temperature
  hidden = masking.real_states(hidden, mask)
  if config.penalty.needs_reference:
    theirs = masking.real_states(columns["reference_hidden"], mask)
    comparison = logprobs_lib.compare_tokens(
      (hidden, head), (theirs, reference_head), tokens, temperature=temperature
    )
    return comparison.logprobs, comparison.reverse_kl, comparison.forward_kl
  new_logprobs = logprobs_lib.token_logprobs(
    hidden,
    head,
    tokens,
    temperature=temperature,
    logits_per_chunk=config.logits_per_chunk,
  )
  return new_logprobs, *(jnp.zeros_like(new_logprobs),) * 2


def _value_loss(values, experience, mask, weights, config):
  """The critic's weighted loss, and its sum over tokens."""
  losses = policy_loss.clipped_value_loss(
    values,
    experience.values,
    experience.returns,
    clip_epsilon=config.value_clip_epsilon,
  )
  weighted = config.value_coefficient * weights * losses
  return masking.masked_sum(weighted, mask), masking.masked_sum(losses, mask)
