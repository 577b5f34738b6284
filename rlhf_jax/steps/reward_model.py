"""Reward modelling: one compiled Bradley–Terry update on preference pairs.

    state, scalars = step(state, pairs)

After training, `moments` gives the mean and deviation of the raw score on
held-out samples of the reference, by which `rewards.from_model` normalises.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import optax

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import preference_loss
from rlhf_jax.steps import optimizer as optimizer_lib
from rlhf_jax.steps import rewards


@dataclasses.dataclass(frozen=True)
class RewardModelConfig:
  """What is fixed when the step is compiled."""

  model: transformer.TransformerConfig


def pair_scores(
  params: types.Params,
  pairs: types.PreferencePairs,
  config: RewardModelConfig,
) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
  """Raw scores of chosen and rejected, which pass through as one batch."""
  both = jax.tree.map(transformer.shard_batch, pairs.both)
  scores = rewards.raw_scores(params, both, model=config.model)
  chosen, rejected = jnp.split(scores, 2)
  return chosen, rejected


def pair_metrics(
  chosen: Float[Array, "B"], rejected: Float[Array, "B"]
) -> dict[str, Float[Array, ""]]:
  """Mean loss (nats per pair) and accuracy, where a tie is half right."""
  loss = preference_loss.bradley_terry_loss(chosen, rejected).mean()
  accuracy = (jnp.sign(chosen - rejected).mean() + 1) / 2
  return {"reward_model/loss": loss, "reward_model/accuracy": accuracy}


def make_step(
  config: RewardModelConfig, optimizer: optax.GradientTransformation
) -> Callable[
  [types.TrainState, types.PreferencePairs],
  tuple[types.TrainState, optimizer_lib.Scalars],
]:
  """The step, to be jitted with its state donated."""

  def loss(params, pairs, beta):
    del beta
    scalars = pair_metrics(*pair_scores(params, pairs, config))
    return scalars["reward_model/loss"], scalars

  return optimizer_lib.one_update_step(loss, optimizer, name="reward_model")


def moments(raw: Float[Array, "N"]) -> dict[str, Float[Array, ""]]:
  """Mean and standard deviation of raw scores, as a reward model stores them.

  Scores that do not differ are left unscaled: there is nothing to divide by.
  """
  # Not std > 0: the rounded mean of equal numbers need not be that number.
  differ = raw.max() > raw.min()
  return {"mean": raw.mean(), "std": jnp.where(differ, raw.std(), 1.0)}
