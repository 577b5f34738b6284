"""The policy writes: prefill, then a decode loop that ends when all have.

What is written is read again by `teacher_forced`, all tokens at once.
"""

import dataclasses

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import logprobs as logprobs_lib
from rlhf_jax.objective import masking


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """How responses are drawn.

  Attributes:
    response_length: R, the most tokens of a response.
    temperature: Of what is sampled and scored.
    top_k: Draw among the k likeliest; 0 is off.
    top_p: Draw from the nucleus of this mass; 1 is off.
    stop_ids: A response ends with the first of these; () never stops early.
    pad_id: Fills the columns after a response's end. May be a stop id.
  """

  response_length: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  stop_ids: tuple[int, ...] = ()
  pad_id: int = 0


def rollout(
  params: types.Params,
  prompts: types.Prompts,
  key: PRNGKeyArray,
  *,
  model: transformer.TransformerConfig,
  config: RolloutConfig,
  member_axis: str | None = None,
) -> types.Rollout:
  """Samples a response to each prompt.

  Args:
    params: The policy's transformer.
    prompts: Left-padded.
    key: Every (row, token) draws its own number from it.
    model: The architecture.
    config: How to draw.
    member_axis: Name of the `vmap` axis, if there is one. The loop then ends
      when all members have; without the name each member would copy its
      whole cache every token to stay where it ended.
  """
  batch, prompt_size = prompts.tokens.shape
  size = config.response_length
  params = transformer.unstack_layers(params, model)
  head = transformer.head(params, model)
  prompt_mask = masking.prompt_mask(prompts.lengths, prompt_size)
  uniforms = jax.random.uniform(key, (size, batch))
  stop_ids = jnp.array(config.stop_ids, jnp.int32)

  def draw(hidden, t):
    logits = logprobs_lib.token_logits(
      hidden, head, temperature=config.temperature
    )
    allowed = logprobs_lib.filter_logits(
      logits, top_k=config.top_k, top_p=config.top_p
    )
    token = logprobs_lib.sample(allowed, uniforms[t])
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1)

  def record(loop, token, logprob, t):
    alive = loop["alive"]
    token = jnp.where(alive, token, config.pad_id)
    logprob = jnp.where(alive, logprob, 0.0)
    still = alive & ~jnp.isin(token, stop_ids)
    going = still.any()
    if member_axis is not None:
      going = lax.psum(going.astype(jnp.int32), member_axis) > 0
    column = lambda old, new: lax.dynamic_update_index_in_dim(old, new, t, 1)
    return {
      "tokens": column(loop["tokens"], token),
      "logprobs": column(loop["logprobs"], logprob),
      "lengths": loop["lengths"] + alive,
      "alive": still,
      "going": going & (t + 1 < size),
    }

  cache = transformer.init_cache(model, batch, prompt_size + size)
  hidden, cache = transformer.apply(
    params,
    prompts.tokens,
    config=model,
    positions=masking.positions(prompts.lengths, prompt_size, prompt_size),
    mask=masking.attention_mask(prompt_mask.astype(jnp.int32)),
    cache=jax.tree.map(transformer.shard_batch, cache),
    index=0,
  )
  loop = {
    "tokens": jnp.full((batch, size), config.pad_id, jnp.int32),
    "logprobs": jnp.zeros((batch, size)),
    "lengths": jnp.zeros((batch,), jnp.int32),
    "alive": jnp.ones((batch,), bool),
  }
  loop = record(loop, *draw(hidden[:, -1], 0), 0)

  def decode(carry):
    t, loop, cache = carry
    token = lax.dynamic_index_in_dim(loop["tokens"], t - 1, 1)
    written = masking.response_mask(jnp.full((batch,), t), size)
    mask = jnp.concatenate([prompt_mask, written], axis=1)
    hidden, cache = transformer.apply(
      params,
      token,
      config=model,
      positions=(prompts.lengths + t - 1)[:, None],
      mask=mask[:, None],
      cache=cache,
      index=prompt_size + t - 1,
    )
    return t + 1, record(loop, *draw(hidden[:, 0], t), t), cache

  carry = (jnp.int32(1), loop, cache)
  _, loop, _ = lax.while_loop(lambda c: c[1]["going"], decode, carry)
  sequences = types.Sequences(
    prompt_tokens=prompts.tokens,
    prompt_lengths=prompts.lengths,
    response_tokens=loop["tokens"],
    response_lengths=loop["lengths"],
  )
  return types.Rollout(sequences, loop["logprobs"], truncated=loop["alive"])


def teacher_forced(
  params: types.Params,
  sequences: types.Sequences,
  *,
  model: transformer.TransformerConfig,
) -> Float[Array, "B T D"]:
  """Hidden states of whole sequences, as the decode loop saw them."""
  prompt_size = sequences.prompt_tokens.shape[1]
  tokens = sequences.tokens
  mask = masking.sequence_mask(sequences)
  hidden, _ = transformer.apply(
    params,
    tokens,
    config=model,
    positions=masking.positions(
      sequences.prompt_lengths, prompt_size, tokens.shape[1]
    ),
    mask=masking.attention_mask(mask.astype(jnp.int32)),
  )
  return hidden


def response_states(
  params: types.Params,
  sequences: types.Sequences,
  *,
  model: transformer.TransformerConfig,
) -> Float[Array, "B R D"]:
  """The teacher-forced states that predict the response's tokens."""
  hidden = teacher_forced(params, sequences, model=model)
  return masking.response_states(hidden, sequences.response_tokens.shape[1])
