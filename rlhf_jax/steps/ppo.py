"""One iteration of KL-penalised PPO as one compiled function.

    state, metrics = step(state, reference, reward_model, prompts, key)

Read `make_step` from its top: rollout → reference → KL → rewards →
advantages → epochs × minibatches → β. The KL enters once, per token, in the
reward (`kl.penalised_rewards`, −β ℓ_t): with γ = 1 its expected policy
gradient is that of −β KL(π‖π_ref), the sequence's reverse KL.

Source: Schulman et al. 2017 (arXiv:1707.06347) as used by Stiennon et al. 2020
(arXiv:2009.01325) and Ouyang et al. 2022 (arXiv:2203.02155). Differs from
them: policy and value share a trunk; the reference's logprobs and the
policy's are taken by the same teacher-forced pass, so that equal models are
at KL 0 exactly.

Left out: an entropy bonus (the KL is the regulariser under study) and the
PPO-ptx pretraining mix.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
import optax

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import advantages as advantages_lib
from rlhf_jax.objective import beta as beta_lib
from rlhf_jax.objective import kl, masking, policy_loss
from rlhf_jax.objective import logprobs as logprobs_lib
from rlhf_jax.steps import rewards as rewards_lib
from rlhf_jax.steps import rollout as rollout_lib

Step = Callable[
  [types.TrainState, types.Params, types.Params, types.Prompts, PRNGKeyArray],
  tuple[types.TrainState, types.Metrics],
]
Gold = Callable[[types.Sequences], Float[Array, "B"]]


@dataclasses.dataclass(frozen=True)
class PPOConfig:
  """What is fixed when a step is compiled; β and the learning state are not.

  Attributes:
    microbatches: Pieces of a minibatch whose gradients are added up; changes
      memory and not the result.
    logits_per_chunk: See `objective.logprobs`.
  """

  model: transformer.TransformerConfig
  rollout: rollout_lib.RolloutConfig
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


def init_state(
  policy: types.Params,
  *,
  beta: float | Float[Array, ""],
  optimizer: optax.GradientTransformation,
  controller: beta_lib.Controller,
) -> types.TrainState:
  """The state before step 0. `policy`: `{"transformer", "value_head"}`."""
  return types.TrainState(
    step=jnp.int32(0),
    params=policy,
    optimizer=optimizer.init(policy),
    beta=controller.init(beta),
  )


def make_step(
  config: PPOConfig,
  *,
  score: rewards_lib.Score,
  optimizer: optax.GradientTransformation,
  controller: beta_lib.Controller,
  gold: Gold | None = None,
  member_axis: str | None = None,
) -> Step:
  """The step, to be jitted with its state donated.

  Args:
    config: Static settings.
    score: The reward, from `steps.rewards`.
    optimizer: From `steps.optimizer`.
    controller: From `objective.beta`.
    gold: The true reward, where there is one: reported, never trained on.
    member_axis: Name of the `vmap` axis, if many βs or seeds run at once.
  """

  def step(state, reference, reward_model, prompts, key):
    step_key = jax.random.fold_in(key, state.step)
    rollout_key, update_key = jax.random.split(step_key)
    beta = controller.value(state.beta)

    rollout = rollout_lib.rollout(
      state.params["transformer"],
      prompts,
      rollout_key,
      model=config.model,
      config=config.rollout,
      member_axis=member_axis,
    )
    sequences = rollout.sequences
    lengths = sequences.response_lengths
    size = config.rollout.response_length
    mask = masking.response_mask(lengths, size)

    comparison, values = compare(state.params, reference, sequences, config)

    log_ratio, clamped = kl.clamp_log_ratio(
      comparison.logprobs - comparison.reference_logprobs
    )
    scores = score(reward_model, sequences, state.step)
    rewards = kl.penalised_rewards(scores, log_ratio, lengths, beta=beta)

    advantages, returns = advantages_lib.generalized_advantages(
      rewards,
      values,
      mask,
      gamma=config.gamma,
      gae_lambda=config.gae_lambda,
    )
    if config.whiten_advantages:
      advantages = masking.masked_whiten(advantages, mask)

    experience = {
      "sequences": sequences,
      "logprobs": rollout.logprobs,
      "values": values,
      "advantages": advantages,
      "returns": returns,
    }
    params, optimizer_state, learning = update(
      state.params,
      state.optimizer,
      experience,
      update_key,
      config=config,
      optimizer=optimizer,
    )

    ledger = _ledger(rollout, comparison, log_ratio, clamped, mask)
    kl_per_response = ledger["kl/reverse_k1"]
    scalars = ledger | learning
    scalars["kl/beta"] = beta
    scalars["kl/penalty"] = beta * kl_per_response
    scalars |= _with_error("reward/score", scores)
    scalars |= _with_error("reward/total", rewards.sum(1))
    if gold is not None:
      scalars |= _with_error("reward/gold", gold(sequences))
    samples = types.Samples(
      sequences=sequences,
      scores=scores,
      logprobs=comparison.logprobs,
      reference_logprobs=comparison.reference_logprobs,
    )
    state = types.TrainState(
      step=state.step + 1,
      params=params,
      optimizer=optimizer_state,
      beta=controller.update(state.beta, kl_per_response),
    )
    return state, types.Metrics(scalars, samples)

  return step


def _response_hidden(params, sequences, config: PPOConfig):
  hidden = rollout_lib.teacher_forced(
    params["transformer"], sequences, model=config.model
  )
  return masking.response_states(hidden, config.rollout.response_length)


def compare(
  policy: types.Params,
  reference: types.Params,
  sequences: types.Sequences,
  config: PPOConfig,
) -> tuple[logprobs_lib.Comparison, Float[Array, "B R"]]:
  """Policy against reference on the responses, and the policy's values.

  Both models go through the same teacher-forced pass, although the policy's
  logprobs are known from the rollout: the difference of two equal models is
  then 0 to the last bit, and what decoding added is read off beside it.
  """
  hidden = _response_hidden(policy, sequences, config)
  comparison = logprobs_lib.compare(
    (hidden, transformer.head(policy["transformer"])),
    (
      _response_hidden(reference, sequences, config),
      transformer.head(reference["transformer"]),
    ),
    sequences.response_tokens,
    temperature=config.rollout.temperature,
    logits_per_chunk=config.logits_per_chunk,
  )
  values = transformer.apply_scalar_head(policy["value_head"], hidden)
  return comparison, values


def update(
  params: types.Params,
  optimizer_state: optax.OptState,
  experience: dict[str, Any],
  key: PRNGKeyArray,
  *,
  config: PPOConfig,
  optimizer: optax.GradientTransformation,
) -> tuple[types.Params, optax.OptState, dict[str, Float[Array, ""]]]:
  """Epochs of minibatches over the experience, all in `lax.scan`.

  Args:
    params: The policy.
    optimizer_state: Of `optimizer`.
    experience: `sequences`, and `logprobs`, `values`, `advantages` and
      `returns` of shape `[B, R]`.
    key: Of the permutations.
    config: Static settings.
    optimizer: From `steps.optimizer`.

  Returns:
    Parameters and optimiser state after the last update, and figures.
  """
  batch = experience["advantages"].shape[0]
  shape = (config.minibatches, config.microbatches, -1)

  def minibatch_step(carry, rows):
    params, optimizer_state = carry
    minibatch = jax.tree.map(lambda x: x[rows], experience)
    tokens = minibatch["sequences"].response_lengths.sum()
    gradient, sums = _gradient(params, minibatch, tokens, config)
    updates, optimizer_state = optimizer.update(
      gradient, optimizer_state, params
    )
    params = optax.apply_updates(params, updates)
    sums["grad_norm"] = optax.global_norm(gradient)
    return (params, optimizer_state), sums | {"tokens": tokens}

  def epoch(carry, epoch_key):
    rows = jax.random.permutation(epoch_key, batch).reshape(shape)
    return lax.scan(minibatch_step, carry, rows)

  carry, sums = lax.scan(
    epoch,
    (params, optimizer_state),
    jax.random.split(key, config.epochs),
  )
  tokens = sums["tokens"].sum()
  metrics = {
    "ppo/policy_loss": sums["policy_loss"].sum() / tokens,
    "ppo/value_loss": sums["value_loss"].sum() / tokens,
    "ppo/clip_fraction": sums["clipped"].sum() / tokens,
    "ppo/grad_norm": sums["grad_norm"].mean(),
    # KL(π_old‖π_new) by k3 on the rollout, as the last epoch found it.
    "kl/to_old_policy": sums["moved"][-1].sum() / batch,
  }
  return *carry, metrics


def _gradient(params, minibatch, tokens, config: PPOConfig):
  """Gradient of the mean loss per token, and sums of what it was made of.

  Every microbatch is divided by the tokens of the whole minibatch, so that
  the split, padding and devices leave the result alone.
  """

  def loss(params, experience):
    sequences = experience["sequences"]
    mask = masking.response_mask(
      sequences.response_lengths, config.rollout.response_length
    )
    hidden = _response_hidden(params, sequences, config)
    new_logprobs = logprobs_lib.token_logprobs(
      hidden,
      transformer.head(params["transformer"]),
      sequences.response_tokens,
      temperature=config.rollout.temperature,
      logits_per_chunk=config.logits_per_chunk,
    )
    # Equal numbers under the mask: ratio 1, and no gradient through `where`.
    new_logprobs = jnp.where(mask, new_logprobs, experience["logprobs"])
    policy_losses, clipped = policy_loss.clipped_policy_loss(
      new_logprobs,
      experience["logprobs"],
      experience["advantages"],
      clip_epsilon=config.clip_epsilon,
    )
    value_losses = policy_loss.clipped_value_loss(
      transformer.apply_scalar_head(params["value_head"], hidden),
      experience["values"],
      experience["returns"],
      clip_epsilon=config.value_clip_epsilon,
    )
    sums = {
      "policy_loss": masking.masked_sum(policy_losses, mask),
      "value_loss": masking.masked_sum(value_losses, mask),
      "clipped": (clipped & mask).sum(),
      "moved": kl.k3(experience["logprobs"] - new_logprobs).sum(),
    }
    total = sums["policy_loss"] + config.value_coefficient * sums["value_loss"]
    return total / tokens, sums

  gradient = jax.grad(loss, has_aux=True)
  if config.microbatches == 1:
    whole = jax.tree.map(lambda x: transformer.shard_batch(x[0]), minibatch)
    return gradient(params, whole)

  def accumulate(total, microbatch):
    microbatch = jax.tree.map(transformer.shard_batch, microbatch)
    added = gradient(params, microbatch)
    return jax.tree.map(jnp.add, total, added), None

  first = jax.tree.map(lambda x: x[0], minibatch)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(gradient, params, first),
  )
  return lax.scan(accumulate, zeros, minibatch)[0]


def _ledger(rollout, comparison, log_ratio, clamped, mask):
  """Every KL figure, in nats, with standard errors over responses."""
  per_response = lambda x: jnp.where(mask, x, 0.0).sum(1)
  reverse_k1 = per_response(kl.k1(log_ratio))
  lengths = rollout.sequences.response_lengths
  difference = jnp.abs(comparison.logprobs - rollout.logprobs)
  ledger = (
    _with_error("kl/reverse_k1", reverse_k1)
    | _with_error("kl/reverse_k3", per_response(kl.k3(log_ratio)))
    | _with_error("kl/reverse_exact", per_response(comparison.reverse_kl))
    | _with_error("kl/forward_exact", per_response(comparison.forward_kl))
  )
  return ledger | {
    "kl/per_token": masking.masked_mean(kl.k1(log_ratio), mask),
    "kl/clamp_fraction": masking.masked_mean(clamped * 1.0, mask),
    "ppo/entropy": masking.masked_mean(comparison.entropy, mask),
    "rollout/response_tokens": lengths.mean(),
    "rollout/reference_nll": -masking.masked_mean(
      comparison.reference_logprobs, mask
    ),
    "rollout/truncated_fraction": rollout.truncated.mean(),
    "rollout/logprob_max_abs_diff": jnp.where(mask, difference, 0.0).max(),
  }


def _with_error(name, per_response):
  mean, error = masking.mean_and_error(per_response)
  return {name: mean, f"{name}_se": error}
