"""Supervised fine-tuning: one compiled update on packed texts.

    state, scalars = step(state, batch)

The loss is −log π(token) averaged over all tokens that are to be predicted in
the batch: prompts are masked, and texts packed into one row do not see each
other.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import optax

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import logprobs, masking
from rlhf_jax.steps import optimizer as optimizer_lib


@dataclasses.dataclass(frozen=True)
class SFTConfig:
  """What is fixed when the step is compiled."""

  model: transformer.TransformerConfig
  logits_per_chunk: int = 2**24


def row_logprobs(
  params: types.Params, batch: types.PackedTexts, config: SFTConfig
) -> tuple[Float[Array, "B"], Int[Array, "B"]]:
  """Each row's sum of log π over its predicted tokens, and their number."""
  hidden, _ = transformer.apply(
    params["transformer"],
    batch.tokens,
    config=config.model,
    positions=batch.positions,
    mask=masking.attention_mask(batch.segments),
  )
  predicted = logprobs.token_logprobs(
    hidden[:, :-1],
    transformer.head(params["transformer"]),
    batch.tokens[:, 1:],
    temperature=1.0,
    logits_per_chunk=config.logits_per_chunk,
  )
  mask = batch.loss_mask[:, 1:]
  return jnp.where(mask, predicted, 0.0).sum(1), mask.sum(1)


def negative_log_likelihood(
  params: types.Params, batch: types.PackedTexts, config: SFTConfig
) -> Float[Array, ""]:
  """Mean over all predicted tokens of the batch, nats per token."""
  sums, counts = row_logprobs(params, batch, config)
  return -sums.sum() / jnp.maximum(counts.sum(), 1)


def make_step(
  config: SFTConfig, optimizer: optax.GradientTransformation
) -> Callable[
  [types.TrainState, types.PackedTexts],
  tuple[types.TrainState, dict[str, Float[Array, ""]]],
]:
  """The step, to be jitted with its state donated."""

  def step(state, batch):
    batch = jax.tree.map(transformer.shard_batch, batch)
    loss, gradient = jax.value_and_grad(negative_log_likelihood)(
      state.params, batch, config
    )
    state = optimizer_lib.descend(optimizer, state, gradient)
    grad_norm = optax.global_norm(gradient)
    return state, {"sft/loss": loss, "sft/grad_norm": grad_norm}

  return step
