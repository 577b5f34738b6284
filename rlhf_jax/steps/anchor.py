"""What a prefix hides: the KL to a reference that does not see it.

A text in front of every prompt (a system prompt, or an adversarial one) is
read by policy and reference alike, and may move both: their KL is small while
the policy writes what the reference, asked plainly, never would. The monitor
compares the policy given prefix and prompt with the reference given the clean
prompt,

    Σ_t KL(π(·|prefix, x, y_<t) ‖ π_ref(·|x, y_<t)),

nats per response, exact over the vocabulary, for y drawn from the first.
"""

import dataclasses

import jax.numpy as jnp

from rlhf_jax import types


@dataclasses.dataclass(frozen=True)
class Prefix:
  """Where the prefix stands in every prompt.

  Attributes:
    size: Its tokens.
    begin: Tokens of the prompt before it: 1 where the tokenizer puts BOS in
      front, otherwise 0.
  """

  size: int
  begin: int


def without_prefix(
  sequences: types.Sequences, prefix: Prefix
) -> types.Sequences:
  """The same responses to the prompts without their prefix.

  Every prompt must have the prefix whole. P is smaller by `prefix.size`, so
  that each row keeps its padding.
  """
  tokens, lengths = sequences.prompt_tokens, sequences.prompt_lengths
  size = tokens.shape[1]
  columns = jnp.arange(size - prefix.size)
  padding = size - lengths[:, None]
  source = jnp.where(
    columns < padding + prefix.begin, columns, columns + prefix.size
  )
  return dataclasses.replace(
    sequences,
    prompt_tokens=jnp.take_along_axis(tokens, source, axis=1),
    prompt_lengths=lengths - prefix.size,
  )
