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

Each option has one seam. `rewards.judge` is all that judges a response: score,
gold, agreement. `reference.compare` has the prefix (`anchor`), `charged` says
which reference is paid for. `learner.Experience` is what the loss is made of,
texts (`text_mix`) included. `ledger.of_iteration` is all that is reported.

Left out: an entropy bonus (the KL is the regulariser under study).
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
import optax

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import advantages as advantages_lib
from rlhf_jax.objective import beta as beta_lib
from rlhf_jax.objective import kl, masking
from rlhf_jax.steps import learner, ledger, text_mix
from rlhf_jax.steps import optimizer as optimizer_lib
from rlhf_jax.steps import reference as reference_lib
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
  gold: rewards_lib.Gold | None = None,
  score_scale: rewards_lib.Scale | None = None,
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
  write = functools.partial(
    rollout_lib.rollout,
    model=config.model,
    config=config.rollout,
    member_axis=member_axis,
  )
  judge = rewards_lib.judge(
    score,
    group_size=config.group_size,
    gold=gold,
    agreement=agreement,
    score_scale=score_scale,
  )
  learn = functools.partial(update, config=config, optimizer=optimizer)

  def step(state, reference, reward_model, batch, key):
    step_key = jax.random.fold_in(key, state.step)
    rollout_key, update_key = jax.random.split(step_key)
    beta = controller.value(state.beta)
    prompts, texts = (batch, None) if config.mix is None else batch

    # Rollout: a response to each prompt.
    rollout = write(state.params["transformer"], prompts, rollout_key)
    sequences, lengths = rollout.sequences, rollout.sequences.response_lengths
    mask = masking.response_mask(lengths, config.rollout.response_length)

    # Reference logprobs: of the responses, beside the policy's own.
    compared = reference_lib.compare(state.params, reference, sequences, config)
    charged = compared.charged(anchored=config.anchored)

    # KL: nats that each token's reward pays for; 0 where the loss pays instead.
    nats = kl.reward_penalty(config.penalty, charged.terms, mask)

    # Rewards: −β nats at every token, and the response's score at its last.
    judgement = judge(reward_model, compared.judged, state.step)
    scores = judgement.scores
    rewards = kl.penalised_rewards(scores, nats, lengths, beta=beta)

    # Advantages: what each token was worth.
    values = transformer.apply_scalar_head(
      state.params["value_head"], compared.hidden
    )
    worth = _advantages(scores, beta * nats, rewards, values, mask, config)

    # Epochs × minibatches. The loss has a penalty of +price · nats per token:
    # whatever multiplied the rewards multiplies β.
    experience = _experience(
      rollout, charged, values, worth, texts, reference, config
    )
    params, optimizer_state, updates = learn(
      state, reference, experience, update_key, price=worth.scale * beta
    )

    # The next β: from the exact KL that was paid for, nats per response.
    paid, _ = masking.mean_and_error(
      masking.per_response(charged.terms.reverse_kl, mask),
      group_size=config.group_size,
    )
    next_beta = controller.update(state.beta, paid, judgement.reliability)

    # What is reported.
    iteration = ledger.Iteration(
      rollout, compared, judgement, beta, worth.divisors, experience, updates
    )
    metrics = ledger.of_iteration(iteration, config)
    state = types.TrainState(state.step + 1, params, optimizer_state, next_beta)
    return state, metrics

  return step


class Advantages(NamedTuple):
  """What each token was worth.

  Attributes:
    advantages: In the critic's or the group's eyes.
    returns: The critic's targets.
    scale: What the rewards were multiplied by on their way.
    divisors: What the scores alone were divided by, each group's deviation.
  """

  advantages: Float[Array, "B R"]
  returns: Float[Array, "B R"]
  scale: Float[Array, ""]
  divisors: Float[Array, "*G"]


def _advantages(
  scores, penalties, rewards, values, mask, config: PPOConfig
) -> Advantages:
  """By the estimator that the config names; `rewards` have both in them."""
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
    # Apart: the group's deviation is that of its scores.
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
  return Advantages(advantages, returns, scale, divisors)


def _experience(
  rollout, charged, values, worth, texts, reference, config: PPOConfig
) -> learner.Experience:
  """What joins the loss: responses, what the penalty needs, and texts."""
  if config.mix is not None:
    texts = text_mix.prepare(
      texts,
      reference["transformer"],
      mix=config.mix,
      scale=worth.scale,
      minibatches=config.minibatches,
      reference_model=config.reference_model,
    )
  needed = charged.hidden if config.penalty.needs_reference else None
  return learner.Experience(
    sequences=rollout.sequences,
    logprobs=rollout.logprobs,
    reference_logprobs=charged.comparison.reference_logprobs,
    reference_hidden=needed,
    values=values,
    advantages=worth.advantages,
    returns=worth.returns,
    texts=texts,
  )


def update(
  state: types.TrainState,
  reference: types.Params,
  experience: learner.Experience,
  key: PRNGKeyArray,
  *,
  config: PPOConfig,
  optimizer: optax.GradientTransformation,
  price: Float[Array, ""],
) -> tuple[types.Params, optax.OptState, dict[str, Any]]:
  """Epochs of minibatches over the experience, all in `lax.scan`.

  Args:
    state: Before them.
    reference: Whose head the penalty and the texts may need.
    experience: Of the whole step.
    key: Of the permutations.
    config: Static settings.
    optimizer: From `steps.optimizer`.
    price: What a nat in the loss costs, in the units of the advantages.

  Returns:
    Parameters and optimiser state after the last update, and
    `learner.gradient`'s sums as `[epochs, minibatches]`.
  """
  texts = experience.texts
  responses = experience._replace(texts=None)
  reference_head = transformer.head(
    reference["transformer"], config.reference_model
  )

  def minibatch_step(carry, rows):
    params, optimizer_state = carry
    rows, text_rows = rows
    minibatch = jax.tree.map(lambda x: x[rows], responses)
    minibatch = minibatch._replace(
      texts=jax.tree.map(lambda x: x[text_rows], texts)
    )
    gradient, sums = learner.gradient(
      params, minibatch, price, reference_head, config
    )
    sums["grad_norm"] = optax.global_norm(gradient)
    carry = optimizer_lib.apply(optimizer, params, optimizer_state, gradient)
    return carry, sums

  def shuffled(key, size):
    pieces = config.minibatches, config.microbatches, -1
    return jax.random.permutation(key, size).reshape(pieces)

  def epoch(carry, epoch_key):
    rows = shuffled(epoch_key, len(experience.advantages))
    text_rows = None
    if texts is not None:
      text_key = jax.random.fold_in(epoch_key, 0)
      text_rows = shuffled(text_key, len(texts.weights))
    return lax.scan(minibatch_step, carry, (rows, text_rows))

  carry = state.params, state.optimizer
  carry, sums = lax.scan(epoch, carry, jax.random.split(key, config.epochs))
  return *carry, sums
