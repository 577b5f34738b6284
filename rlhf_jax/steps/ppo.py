"""One iteration of KL-penalised PPO as one compiled function.

    state, metrics = step(state, reference, reward_model, prompts, key)

Read `make_step` from its top: rollout → reference → KL → rewards →
advantages → epochs × minibatches → β. A penalty (`kl.PENALTIES`) enters where
it says, and nowhere else: in the rewards (`kl.penalised_rewards`, −β times
its nats per token), in the loss (`learner`, +β times its nats per
token), or for the Rao-Blackwellised sequence KL half in each. On the first
minibatch the expected gradient is that of the penalty's target, if tokens are
drawn from the whole distribution (no top-k, no top-p) and responses are not
normalised by their length; what clipping, later epochs, λ < 1 and a critic do
to it is measured by the study `kl_gradients`. A penalty in the loss is not
clipped.

Source: Schulman et al. 2017 (arXiv:1707.06347) as used by Stiennon et al. 2020
(arXiv:2009.01325) and Ouyang et al. 2022 (arXiv:2203.02155). Differs from
them: policy and value share a trunk; the reference's logprobs and the
policy's are taken by the same teacher-forced pass, so that equal models are
at KL 0 exactly; losses are sums over tokens divided by a constant, because a
mean over as many tokens as were sampled has another expected gradient.

Two options change what the step sees. With a mix (`text_mix`) it takes texts
beside the prompts, and they are part of the loss. With a prefix in front of
the prompts (`anchor`) policy and reference read it and the rewards do not, and
the ledger also has the KL to the reference without it.

Left out: an entropy bonus (the KL is the regulariser under study).
"""

from collections.abc import Callable
import functools
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
from rlhf_jax.objective import kl, masking, preference_loss
from rlhf_jax.objective import logprobs as logprobs_lib
from rlhf_jax.steps import anchor, learner, ledger, text_mix
from rlhf_jax.steps import rewards as rewards_lib
from rlhf_jax.steps import rollout as rollout_lib

Step = Callable[
  [
    types.TrainState,
    types.Params,
    types.Params,
    types.Prompts | text_mix.Batch,
    PRNGKeyArray,
  ],
  tuple[types.TrainState, types.Metrics],
]
Gold = Callable[[types.Sequences], Float[Array, "B"]]
PPOConfig = learner.PPOConfig


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
  score_scale: Callable[[types.Params], Float[Array, ""]] | None = None,
  agreement: rewards_lib.Agreement | None = None,
  member_axis: str | None = None,
) -> Step:
  """The step, to be jitted with its state donated.

  It takes prompts, or with `config.mix` a `text_mix.Batch` in their place.

  Args:
    config: Static settings.
    score: The reward, from `steps.rewards`.
    optimizer: From `steps.optimizer`.
    controller: From `objective.beta`.
    gold: The true reward, where there is one: reported, never trained on.
    score_scale: Raw reward units in a unit of the score, where the reward
      model normalises.
    agreement: How far an ensemble of reward models agrees, if there is one.
    member_axis: Name of the `vmap` axis, if many βs or seeds run at once.
  """

  def step(state, reference, reward_model, batch, key):
    step_key = jax.random.fold_in(key, state.step)
    rollout_key, update_key = jax.random.split(step_key)
    beta = controller.value(state.beta)
    prompts = batch if config.mix is None else batch.prompts

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
    mask = masking.response_mask(lengths, config.rollout.response_length)

    hidden = learner.response_hidden(
      state.params, sequences, model=config.model
    )
    comparison, reference_hidden = compare_states(
      state.params, hidden, reference, sequences, config
    )
    values = transformer.apply_scalar_head(state.params["value_head"], hidden)
    terms, clamped = _terms(comparison)
    charged, held_logprobs = terms, comparison.reference_logprobs
    judged, anchored = sequences, None
    if config.prefix is not None:
      # The rewards judge an answer to the prompt, whoever stands before it.
      judged = anchor.without_prefix(sequences, config.prefix)
      clean, clean_hidden = compare_states(
        state.params, hidden, reference, judged, config
      )
      anchored, _ = _terms(clean)
      if config.anchored:
        charged, held_logprobs = anchored, clean.reference_logprobs
        reference_hidden = clean_hidden

    scores = score(reward_model, judged, state.step)
    nats = kl.reward_penalty(config.penalty, charged, mask)
    rewards = kl.penalised_rewards(scores, nats, lengths, beta=beta)

    estimated = _advantages(scores, beta * nats, rewards, values, mask, config)
    advantages, returns, scale, divisors = estimated
    experience = {
      "sequences": sequences,
      "logprobs": rollout.logprobs,
      "reference_logprobs": held_logprobs,
      "values": values,
      "advantages": advantages,
      "returns": returns,
    }
    if config.penalty.needs_reference:
      experience["reference_hidden"] = reference_hidden
    texts = None
    if config.mix is not None:
      texts = text_mix.prepare(
        batch.texts,
        reference["transformer"],
        mix=config.mix,
        scale=scale,
        minibatches=config.minibatches,
        reference_model=config.reference or config.model,
      )
    params, optimizer_state, learning = update(
      state.params,
      state.optimizer,
      experience,
      update_key,
      config=config,
      optimizer=optimizer,
      # Whatever multiplied the rewards multiplies the penalty in the loss.
      price=scale * beta,
      reference_head=transformer.head(reference["transformer"]),
      texts=texts,
    )

    scalars, by_position = ledger.of_rollout(
      rollout,
      comparison,
      terms.log_ratio,
      clamped,
      mask,
      group_size=config.group_size,
    )
    with_error = functools.partial(
      ledger.with_error, group_size=config.group_size
    )
    scalars |= learning
    charged_kl = "kl/reverse_exact"
    if anchored is not None:
      scalars |= ledger.of_anchored(
        anchored, mask, group_size=config.group_size
      )
      charged_kl = "kl/anchored" if config.anchored else charged_kl
    total = scores - beta * jnp.where(mask, charged.reverse_kl, 0.0).sum(1)
    scalars |= with_error("reward/score", scores)
    scalars |= with_error("reward/total", total)
    scalars["kl/beta"] = beta
    scalars["kl/penalty"] = beta * scalars[charged_kl]
    normalised = config.advantages == "grpo" and config.normalise_groups
    if normalised:
      scalars["ppo/equal_groups"] = (divisors == 0).mean()
    if normalised or score_scale is not None:
      raw = 1.0 if score_scale is None else score_scale(reward_model)
      unequal = masking.masked_mean(divisors, divisors > 0)
      scalars["kl/beta_effective"] = beta * raw * unequal
    reliability = jnp.float32(jnp.nan)
    if agreement is not None:
      reliability = agreement(reward_model, judged, state.step)
      scalars["reward/agreement"] = reliability
    if gold is not None:
      golds = gold(judged)
      reliability = preference_loss.concordance(
        scores, golds, group_size=config.group_size
      )
      scalars |= with_error("reward/gold", golds)
      scalars["reward/pair_accuracy"] = reliability
    samples = types.Samples(
      sequences=sequences,
      scores=scores,
      logprobs=comparison.logprobs,
      reference_logprobs=comparison.reference_logprobs,
      reverse_kl=comparison.reverse_kl,
    )
    state = types.TrainState(
      step=state.step + 1,
      params=params,
      optimizer=optimizer_state,
      beta=controller.update(state.beta, scalars[charged_kl], reliability),
    )
    return state, types.Metrics(scalars, samples, by_position)

  return step


def compare(
  policy: types.Params,
  reference: types.Params,
  sequences: types.Sequences,
  config: PPOConfig,
) -> tuple[logprobs_lib.Comparison, Float[Array, "B R"], Float[Array, "B R E"]]:
  """Policy against reference on the responses, and the policy's values.

  Both models go through the same teacher-forced pass, although the policy's
  logprobs are known from the rollout: the difference of two equal models is
  then 0 to the last bit, and what decoding added is read off beside it.

  Returns:
    The comparison, the values, and the reference's hidden states.
  """
  hidden = learner.response_hidden(policy, sequences, model=config.model)
  comparison, reference_hidden = compare_states(
    policy, hidden, reference, sequences, config
  )
  values = transformer.apply_scalar_head(policy["value_head"], hidden)
  return comparison, values, reference_hidden


def compare_states(
  policy: types.Params,
  hidden: Float[Array, "B R D"],
  reference: types.Params,
  sequences: types.Sequences,
  config: PPOConfig,
) -> tuple[logprobs_lib.Comparison, Float[Array, "B R E"]]:
  """Policy against reference, where the policy's states are at hand.

  Args:
    policy: Whose states they are.
    hidden: That predict the response's tokens, whatever preceded these.
    reference: The other model.
    sequences: What the reference reads, and the response.
    config: Static settings.

  Returns:
    The comparison, and the reference's hidden states.
  """
  reference_hidden = learner.response_hidden(
    reference, sequences, model=config.reference or config.model
  )
  comparison = logprobs_lib.compare(
    (hidden, transformer.head(policy["transformer"])),
    (reference_hidden, transformer.head(reference["transformer"])),
    sequences.response_tokens,
    temperature=config.rollout.temperature,
    logits_per_chunk=config.logits_per_chunk,
  )
  return comparison, reference_hidden


def _terms(comparison: logprobs_lib.Comparison):
  """What a penalty is made of at the rollout, and where it was clamped."""
  log_ratio, clamped = kl.clamp_log_ratio(
    comparison.logprobs - comparison.reference_logprobs
  )
  terms = kl.Terms(
    log_ratio=log_ratio,
    reverse_kl=comparison.reverse_kl,
    forward_kl=comparison.forward_kl,
    importance_ratio=jnp.ones_like(log_ratio),
  )
  return terms, clamped


def _advantages(scores, penalties, rewards, values, mask, config: PPOConfig):
  """Advantages; the critic's targets; the scale; the groups' deviations.

  The scale is what the rewards were multiplied by on their way, the
  deviations what the scores alone were divided by.
  """
  returns, divisors = values, jnp.ones(1)
  if config.advantages == "gae":
    advantages, returns = advantages_lib.generalized_advantages(
      rewards, values, mask, gamma=config.gamma, gae_lambda=config.gae_lambda
    )
  elif config.advantages == "rloo":
    advantages = advantages_lib.leave_one_out(
      rewards, mask, group_size=config.group_size
    )
  elif config.advantages == "grpo":
    advantages, divisors = advantages_lib.group_relative(
      scores,
      penalties,
      mask,
      group_size=config.group_size,
      normalise=config.normalise_groups,
    )
  else:
    advantages = advantages_lib.returns_to_go(rewards, mask, gamma=config.gamma)
  scale = jnp.ones(())
  if config.whiten_advantages:
    advantages, scale = advantages_lib.whiten(advantages, mask)
  return advantages, returns, scale, divisors


def update(
  params: types.Params,
  optimizer_state: optax.OptState,
  experience: dict[str, Any],
  key: PRNGKeyArray,
  *,
  config: PPOConfig,
  optimizer: optax.GradientTransformation,
  price: Float[Array, ""],
  reference_head: Float[Array, "V E"],
  texts: text_mix.Texts | None = None,
) -> tuple[types.Params, optax.OptState, dict[str, Float[Array, ""]]]:
  """Epochs of minibatches over the experience, all in `lax.scan`.

  Args:
    params: The policy.
    optimizer_state: Of `optimizer`.
    experience: `sequences`; `logprobs`, `reference_logprobs`, `values`,
      `advantages` and `returns` of shape `[B, R]`; `reference_hidden`
      `[B, R, E]` if the penalty needs the reference.
    key: Of the permutations.
    config: Static settings.
    optimizer: From `steps.optimizer`.
    price: What a nat in the loss costs, in the units of the advantages.
    reference_head: The reference's matrix of the logits.
    texts: Of `config.mix`; cut into minibatches as the experience is.

  Returns:
    Parameters and optimiser state after the last update, and figures.
  """
  batch = experience["advantages"].shape[0]
  shape = (config.minibatches, config.microbatches, -1)

  def minibatch_step(carry, rows):
    params, optimizer_state = carry
    rows, text_rows = rows
    minibatch = jax.tree.map(lambda x: x[rows], experience)
    if texts is not None:
      minibatch["texts"] = jax.tree.map(lambda x: x[text_rows], texts)
    gradient, sums = learner.gradient(
      params, minibatch, price, reference_head, config
    )
    updates, optimizer_state = optimizer.update(
      gradient, optimizer_state, params
    )
    params = optax.apply_updates(params, updates)
    sums["grad_norm"] = optax.global_norm(gradient)
    return (params, optimizer_state), sums

  def epoch(carry, epoch_key):
    rows = jax.random.permutation(epoch_key, batch).reshape(shape)
    text_rows = None
    if texts is not None:
      text_key = jax.random.fold_in(epoch_key, 0)
      text_rows = jax.random.permutation(text_key, texts.weights.shape[0])
      text_rows = text_rows.reshape(shape)
    return lax.scan(minibatch_step, carry, (rows, text_rows))

  carry, sums = lax.scan(
    epoch,
    (params, optimizer_state),
    jax.random.split(key, config.epochs),
  )
  tokens = config.epochs * experience["sequences"].response_lengths.sum()
  metrics = {
    "ppo/policy_loss": sums["policy_loss"].sum() / tokens,
    "ppo/value_loss": sums["value_loss"].sum() / tokens,
    "ppo/clip_fraction": sums["clipped"].sum() / tokens,
    "ppo/grad_norm": sums["grad_norm"].mean(),
  }
  if texts is not None:
    metrics |= text_mix.figures(sums["texts"], texts, epochs=config.epochs)
  # KL(π_old‖π_new) on the rollout, as the last epoch found it.
  moved, squared = sums["moved"][-1].sum(), sums["moved_squared"][-1].sum()
  variance = (squared - moved**2 / batch) / max(batch - 1, 1)
  metrics["kl/to_old_policy"] = moved / batch
  metrics["kl/to_old_policy_se"] = jnp.sqrt(jnp.maximum(variance, 0.0) / batch)
  return *carry, metrics
