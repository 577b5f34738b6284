"""Supervised fine-tuning: one compiled update on packed texts.

    state, scalars = step(state, batch)

The loss is −log π(token) averaged over all tokens that are to be predicted in
the batch: prompts are masked, and texts packed into one row do not see each
other.
"""

from collections.abc import Callable
import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
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


def states(
  params: types.Params,
  texts: types.PackedTexts,
  *,
  model: transformer.TransformerConfig,
) -> Float[Array, "B S D"]:
  """The states that predict all tokens but a row's first (S = T − 1)."""
  hidden, _ = transformer.apply(
    params,
    texts.tokens,
    config=model,
    positions=texts.positions,
    mask=masking.attention_mask(texts.segments),
  )
  return masking.response_states(hidden, texts.tokens.shape[1] - 1)


def predicted(texts: types.PackedTexts) -> Bool[Array, "B S"]:
  """Where a token is predicted, from a row's second on."""
  return texts.loss_mask[:, 1:]


def row_logprobs(
  params: types.Params, batch: types.PackedTexts, config: SFTConfig
) -> tuple[Float[Array, "B"], Int[Array, "B"]]:
  """Each row's sum of log π over its predicted tokens, and their number."""
  network = params["transformer"]
  per_token = logprobs.token_logprobs(
    states(network, batch, model=config.model),
    transformer.head(network, config.model),
    batch.tokens[:, 1:],
    temperature=1.0,
    logits_per_chunk=config.logits_per_chunk,
  )
  mask = predicted(batch)
  return masking.per_response(per_token, mask), mask.sum(1)


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
  tuple[types.TrainState, optimizer_lib.Scalars],
]:
  """The step, to be jitted with its state donated."""

  def loss(params, batch, beta):
    del beta
    nll = negative_log_likelihood(params, batch, config)
    return nll, {"sft/loss": nll}

  return optimizer_lib.one_update_step(loss, optimizer, name="sft")
