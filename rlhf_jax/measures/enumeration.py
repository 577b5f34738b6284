"""The bridge from the real transformer to the exact oracle.

With a small vocabulary and short responses a transformer is a prefix tree of
logits and a reward a table, and `objective.exact` says what their J, KLs and
optimum are. Both are made here, for one prompt.

The network computes in float32, and its logits have float32's rounding; with
x64 enabled all that follows is float64. Measured with 262,144 responses (V =
8, R = 6; width 16, one layer) on two cores: 4.5 s with compilation, 0.5 s
without, for all figures of `objective.exact` and the gradient in the
parameters.
"""

from collections.abc import Callable

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import exact, masking
from rlhf_jax.objective import logprobs as logprobs_lib
from rlhf_jax.steps import rollout


def prefix_logits(
  params: types.Params,
  prompt: Int[Array, "P"],
  *,
  model: transformer.TransformerConfig,
  response_length: int,
  temperature: float,
  rows_per_chunk: int = 4096,
) -> exact.Levels:
  """The transformer's logits after every prefix of a response.

  All V**(R − 1) prefixes of R − 1 tokens are teacher-forced, and each shorter
  prefix is read off the first of them that begins with it. Differentiable in
  the parameters: `jax.grad` of `exact.objective` of this is the exact policy
  gradient. Prefixes that hold a stop token are dead to the oracle, whatever
  they get here.

  Args:
    params: The policy's transformer.
    prompt: Real tokens, without padding.
    model: The architecture.
    response_length: R.
    temperature: Of the scored distribution.
    rows_per_chunk: Prefixes that go through the network at once; backward
      computes them anew.
  """
  vocab_size, size = model.vocab_size, response_length
  params = transformer.unstack_layers(params, model)
  head = transformer.head(params, model)
  # A power of V, so that whole chunks make up the V**(R − 1) rows.
  powers = [vocab_size**d for d in range(size)]
  rows = max(power for power in powers if power <= rows_per_chunk)

  @jax.checkpoint
  def chunk_logits(chunk):
    index = chunk * rows + jnp.arange(rows)
    digits = [index // power % vocab_size for power in powers[-2::-1]]
    # The last column predicts nothing: its states would be beyond R.
    tokens = jnp.stack([*digits, jnp.zeros_like(index)], axis=1)
    lengths = jnp.full(rows, size - 1)
    sequences = _after_prompt(prompt, tokens, lengths)
    hidden = rollout.teacher_forced(params, sequences, model=model)
    states = masking.response_states(hidden, size)
    return logprobs_lib.token_logits(states, head, temperature=temperature)

  logits = lax.map(chunk_logits, jnp.arange(powers[-1] // rows))
  logits = logits.reshape(powers[-1], size, vocab_size).astype(float)
  return tuple(logits[:: powers[-1 - t], t] for t in range(size))


def table_of(
  score: Callable[[types.Sequences], Float[Array, "B"]],
  prompt: Int[Array, "P"],
  *,
  vocab_size: int,
  response_length: int,
  stop_ids: tuple[int, ...],
  rows_per_chunk: int = 4096,
) -> exact.Levels:
  """Rewards of every response, as the oracle reads them; 0 where none ends.

  Args:
    score: Reward units; sees whole responses only, padded with 0.
    prompt: Real tokens, without padding.
    vocab_size: V.
    response_length: R.
    stop_ids: End a response.
    rows_per_chunk: Responses that are scored at once.
  """
  listing = exact.sequences(
    vocab_size=vocab_size, response_length=response_length, stop_ids=stop_ids
  )
  count = len(listing.lengths)
  rows = min(rows_per_chunk, count)

  def chunks(x):
    """`[chunks, rows, …]`, filled up with the last response."""
    padding = ((0, -count % rows),) + ((0, 0),) * (x.ndim - 1)
    return jnp.pad(x, padding, mode="edge").reshape(-1, rows, *x.shape[1:])

  scores = lax.map(
    lambda chunk: score(_after_prompt(prompt, *chunk)),
    (chunks(listing.tokens), chunks(listing.lengths)),
  )
  scores = scores.reshape(-1)[:count].astype(float)
  tokens = masking.last_token(listing.tokens, listing.lengths)
  prefixes = masking.last_token(listing.rows, listing.lengths)

  def level(t):
    here = jnp.where(listing.lengths == t + 1, prefixes, vocab_size**t)
    table = jnp.zeros((vocab_size**t, vocab_size), scores.dtype)
    return table.at[here, tokens].set(scores, mode="drop")

  return tuple(level(t) for t in range(response_length))


def _after_prompt(prompt, tokens, lengths):
  """Responses to the one prompt."""
  count, size = len(tokens), prompt.shape[0]
  return types.Sequences(
    prompt_tokens=jnp.broadcast_to(prompt, (count, size)),
    prompt_lengths=jnp.full(count, size),
    response_tokens=tokens,
    response_lengths=lengths,
  )
