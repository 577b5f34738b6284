"""Who owns the masks, the shift by one and the last token: this file.

Masks come from lengths, never from token ids: a pad may be a word and a stop
id may be the pad. A masked value is replaced with `where`, never multiplied
away: 0 · NaN is NaN.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlhf_jax import types


def prompt_mask(lengths: Int[Array, "B"], size: int) -> Bool[Array, "B P"]:
  """True on the real tokens of left-padded prompts."""
  return jnp.arange(size) >= size - lengths[:, None]


def response_mask(lengths: Int[Array, "B"], size: int) -> Bool[Array, "B R"]:
  """True up to and including the stop token of right-padded responses."""
  return jnp.arange(size) < lengths[:, None]


def sequence_mask(sequences: types.Sequences) -> Bool[Array, "B T"]:
  """True on the real tokens of prompt and response."""
  prompt = prompt_mask(
    sequences.prompt_lengths, sequences.prompt_tokens.shape[1]
  )
  response = response_mask(
    sequences.response_lengths, sequences.response_tokens.shape[1]
  )
  return jnp.concatenate([prompt, response], axis=1)


def positions(prompt_lengths: Int[Array, "B"], prompt_size: int, size: int):
  """Position `[B, size]` of each column; a prompt's first real token is 0."""
  columns = jnp.arange(size) - (prompt_size - prompt_lengths[:, None])
  return jnp.maximum(columns, 0)


def attention_mask(segments: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
  """Causal attention within a segment; segment 0 is padding."""
  size = segments.shape[1]
  same = segments[:, :, None] == segments[:, None, :]
  causal = jnp.tril(jnp.ones((size, size), bool))
  return same & causal & (segments[:, None, :] > 0)


def response_states(
  hidden: Float[Array, "B T D"], response_size: int
) -> Float[Array, "B R D"]:
  """The states that predict the response: state t predicts token t + 1."""
  return hidden[:, -response_size - 1 : -1]


def real_states(
  hidden: Float[Array, "*N D"], mask: Bool[Array, "*N"]
) -> Float[Array, "*N D"]:
  """The states where `mask`, 0 elsewhere: for a loss that is differentiated.

  Masking its logprobs is too late: a gradient of 0 times NaN is NaN.
  """
  return jnp.where(mask[..., None], hidden, 0.0)


def last_token(x: Array, lengths: Int[Array, "B"]) -> Array:
  """`x[b, lengths[b] − 1]`: what stands on the last real token.

  A row of length 0 has none and reads its first column.
  """
  index = jnp.maximum(lengths - 1, 0)
  index = index.reshape((-1,) + (1,) * (x.ndim - 1))
  return jnp.take_along_axis(x, index, axis=1)[:, 0]


def place_on_last(
  score: Float[Array, "B"], lengths: Int[Array, "B"], size: int
) -> Float[Array, "B R"]:
  """`score[b]` on the last real token, 0 elsewhere; an empty row has none."""
  is_last = jnp.arange(size) == lengths[:, None] - 1
  return jnp.where(is_last, score[:, None], 0.0)


def masked_sum(x: Float[Array, "*N"], mask: Bool[Array, "*N"]):
  """Σ of `x` where `mask`; what is masked may be NaN."""
  return jnp.where(mask, x, 0.0).sum()


def per_response(
  x: Float[Array, "B R"], mask: Bool[Array, "B R"]
) -> Float[Array, "B"]:
  """Σ over the tokens of each response; what is masked may be NaN."""
  return jnp.where(mask, x, 0.0).sum(1)


def masked_mean(x: Float[Array, "*N"], mask: Bool[Array, "*N"]):
  """Mean of `x` where `mask`; 0 where the mask is empty."""
  return masked_sum(x, mask) / jnp.maximum(mask.sum(), 1)


def mean_and_error(
  x: Float[Array, "B"], *, group_size: int = 1
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """Mean over responses and its standard error, sd / √(B / group_size).

  Responses to one prompt, `group_size` neighbours, are not independent: the
  deviation is that of their means.
  """
  x = x.reshape(-1, group_size).mean(1)
  count = x.shape[0]
  centred = x - x.mean()
  # In units of the largest, whose square may overflow (k3 at 60 nats).
  largest = jnp.maximum(jnp.abs(centred).max(), 1e-30)
  variance = jnp.square(centred / largest).sum() / max(count - 1, 1)
  return x.mean(), largest * jnp.sqrt(variance / count)


def mean_and_error_by_column(
  x: Float[Array, "B R"], mask: Bool[Array, "B R"]
) -> tuple[Float[Array, "R"], Float[Array, "R"]]:
  """Each column's mean over the rows that reach it, and its standard error.

  Both are 0 where no row does; the error is 0 where only one does.
  """
  count = jnp.maximum(mask.sum(0), 1)
  mean = jnp.where(mask, x, 0.0).sum(0) / count
  squares = jnp.square(jnp.where(mask, x - mean, 0.0)).sum(0)
  return mean, jnp.sqrt(squares / jnp.maximum(count - 1, 1) / count)
