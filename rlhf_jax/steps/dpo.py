"""DPO and its family: one compiled update on preference pairs.

    state, scalars = step(state, batch)

The reference's logprobs are part of the batch: they never change, so they are
made once (`storage.reference_cache`), and no reference model is in the step. β
is in the state, traced. All losses see a response as a whole, by the sum of
its tokens' logprobs; which loss it is, `_losses` says.

Offline training does not see what the policy would write:
`evaluate.with_ledger` adds that to some of the steps.
"""

from collections.abc import Callable
import dataclasses
from typing import Literal, NamedTuple, Optional

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import logprobs as logprobs_lib
from rlhf_jax.objective import masking
from rlhf_jax.objective import preference_loss as losses
from rlhf_jax.steps import optimizer as optimizer_lib
from rlhf_jax.steps import rollout as rollout_lib

PairLogprobs = tuple[Float[Array, "B"], Float[Array, "B"]]


@dataclasses.dataclass(frozen=True)
class DPOConfig:
  """What is fixed when the step is compiled; β is not.

  Attributes:
    loss: A function of `objective.preference_loss`.
    temperature: Of the distribution that is scored.
    label_smoothing: ε of `conservative` and `robust`.
    margin: γ of `simpo`, reward units.
    desirable_weight: λ_D of `kto`.
    undesirable_weight: λ_U of `kto`.
    reward_bound: R_max of `chi_po`, reward units.
  """

  model: transformer.TransformerConfig
  loss: Literal[
    "dpo", "conservative", "robust", "ipo", "kto", "simpo", "chi_po"
  ]
  temperature: float = 1.0
  label_smoothing: float = 0.0
  margin: float = 0.0
  desirable_weight: float = 1.0
  undesirable_weight: float = 1.0
  reward_bound: float = 10.0
  logits_per_chunk: int = 2**24


class Batch(NamedTuple):
  """Pairs with what the reference says of them.

  Attributes:
    pairs: To learn from.
    reference: Log π_ref of chosen and rejected; None for `simpo`.
    mismatched: For `kto` alone: the prompts with responses to other ones.
  """

  pairs: types.PreferencePairs
  reference: PairLogprobs | None = None
  mismatched: Optional["Batch"] = None


def pair_logprobs(
  params: types.Params, pairs: types.PreferencePairs, config: DPOConfig
) -> PairLogprobs:
  """Log π(response | prompt) of chosen and rejected, which pass as one batch.

  Nats, summed over the response's tokens; an empty response has 0. The
  reference is asked by this function, too.
  """
  both = jax.tree.map(transformer.shard_batch, pairs.both)
  network = params["transformer"]
  per_token = logprobs_lib.token_logprobs(
    rollout_lib.response_states(network, both, model=config.model),
    transformer.head(network, config.model),
    both.response_tokens,
    temperature=config.temperature,
    logits_per_chunk=config.logits_per_chunk,
  )
  mask = masking.response_mask(
    both.response_lengths, both.response_tokens.shape[1]
  )
  chosen, rejected = jnp.split(masking.per_response(per_token, mask), 2)
  return chosen, rejected


def pair_figures(
  params: types.Params,
  batch: Batch,
  beta: Float[Array, ""],
  config: DPOConfig,
) -> dict[str, Float[Array, "B"]]:
  """Each pair's loss and what it is made of, under the metrics' names.

  Rewards are implicit, those that the loss reads off the policy: β log π/π_ref,
  or what `simpo` and `chi_po` have in its place. A tie is half right.
  """
  logprobs = pair_logprobs(params, batch.pairs, config)
  rewards = _rewards(logprobs, batch, beta, config)
  margin = rewards[0] - rewards[1]
  return {
    "dpo/loss": _losses(params, logprobs, batch, beta, config),
    "dpo/reward_chosen": rewards[0],
    "dpo/reward_rejected": rewards[1],
    "dpo/margin": margin,
    "dpo/accuracy": (jnp.sign(margin) + 1) / 2,
    "dpo/logprob_chosen": logprobs[0],
    "dpo/logprob_rejected": logprobs[1],
  }


def _rewards(logprobs, batch, beta, config: DPOConfig):
  """The implicit rewards of chosen and rejected, reward units."""
  if config.loss == "simpo":
    sides = batch.pairs.chosen, batch.pairs.rejected
    return [
      losses.simpo_reward(logprob, side.response_lengths, beta=beta)
      for logprob, side in zip(logprobs, sides)
    ]
  log_ratios = _log_ratios(logprobs, batch)
  if config.loss == "chi_po":
    return [losses.chi_po_reward(ratio, beta=beta) for ratio in log_ratios]
  return [beta * ratio for ratio in log_ratios]


def _losses(params, logprobs, batch, beta, config: DPOConfig):
  """The loss of each pair."""
  if config.loss == "simpo":
    rewards = _rewards(logprobs, batch, beta, config)
    return losses.simpo_loss(*rewards, margin=config.margin)
  chosen, rejected = _log_ratios(logprobs, batch)
  smoothing = config.label_smoothing
  match config.loss:
    case "dpo":
      return losses.dpo_loss(chosen, rejected, beta=beta)
    case "conservative":
      return losses.conservative_dpo_loss(
        chosen, rejected, beta=beta, label_smoothing=smoothing
      )
    case "robust":
      return losses.robust_dpo_loss(
        chosen, rejected, beta=beta, label_smoothing=smoothing
      )
    case "ipo":
      return losses.ipo_loss(chosen, rejected, beta=beta)
    case "kto":
      return losses.kto_loss(
        chosen,
        rejected,
        _kto_baseline(params, batch.mismatched, config),
        beta=beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
      )
    case "chi_po":
      return losses.chi_po_loss(
        chosen, rejected, beta=beta, reward_bound=config.reward_bound
      )


def _log_ratios(logprobs, batch):
  """ρ of chosen and rejected."""
  chosen, rejected = (
    policy - held for policy, held in zip(logprobs, batch.reference)
  )
  return chosen, rejected


def _kto_baseline(params, mismatched, config):
  # Detached here as well, so that no backward pass is built.
  logprobs = pair_logprobs(lax.stop_gradient(params), mismatched.pairs, config)
  return losses.kto_baseline(jnp.concatenate(_log_ratios(logprobs, mismatched)))


def init_state(
  policy: types.Params,
  *,
  beta: float | Float[Array, ""],
  optimizer: optax.GradientTransformation,
) -> types.TrainState:
  """The state before step 0. `policy`: `{"transformer"}`."""
  return types.TrainState(
    jnp.int32(0), policy, optimizer.init(policy), jnp.float32(beta)
  )


def make_step(
  config: DPOConfig, optimizer: optax.GradientTransformation
) -> Callable[
  [types.TrainState, Batch], tuple[types.TrainState, optimizer_lib.Scalars]
]:
  """The step, to be jitted with its state donated."""

  def loss(params, batch, beta):
    figures = pair_figures(params, batch, beta, config)
    scalars = {name: figure.mean() for name, figure in figures.items()}
    return scalars["dpo/loss"], scalars | {"kl/beta": beta}

  return optimizer_lib.one_update_step(loss, optimizer, name="dpo")
