"""From hidden states to logprobs, and from logprobs to tokens.

One function makes logits (`token_logits`), so what is sampled, what is scored
and what the reference is asked are the same distribution: temperature-scaled,
over the whole vocabulary. top-k and top-p narrow what is drawn and never what
is scored: a filtered logprob is −∞ wherever the filters of two models differ.

No function here holds logits for a whole batch of responses. Those that need
a response's worth walk over it in columns, `logits_per_chunk` at a time.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_logits(
  hidden: Float[Array, "*N D"], head: Float[Array, "V D"], *, temperature: float
) -> Float[Array, "*N V"]:
  """float32 logits at a temperature: h Eᵀ / temperature."""
  rows = hidden.reshape(-1, hidden.shape[-1])
  logits = lax.dot_general(
    rows,
    head.astype(hidden.dtype),
    (((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  logits = logits.reshape((*hidden.shape[:-1], head.shape[0]))
  return logits if temperature == 1.0 else logits / temperature


def filter_logits(
  logits: Float[Array, "B V"], *, top_k: int, top_p: float
) -> Float[Array, "B V"]:
  """−∞ outside the k likeliest tokens and outside the nucleus of mass p.

  The nucleus is the smallest set of likeliest tokens whose mass reaches p
  (Holtzman et al. 2020, arXiv:1904.09751); it is taken after the k are.

  Args:
    logits: At the sampling temperature.
    top_k: 0 keeps all.
    top_p: 1 keeps all.
  """
  if 0 < top_k < logits.shape[-1]:
    smallest = lax.top_k(logits, top_k)[0][:, -1:]
    logits = jnp.where(logits < smallest, -jnp.inf, logits)
  if top_p < 1.0:
    descending = jnp.sort(logits, axis=-1, descending=True)
    mass = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(mass, axis=-1) - mass
    smallest = jnp.where(before < top_p, descending, jnp.inf).min(-1)
    logits = jnp.where(logits < smallest[:, None], -jnp.inf, logits)
  return logits


def sample(
  logits: Float[Array, "B V"], uniform: Float[Array, "B"], *, block: int = 256
) -> Int[Array, "B"]:
  """Draws a token a row by inverting the cumulative distribution.

  Two levels, first the block of the vocabulary and then the token in it: one
  uniform number a row in place of V Gumbel variates, which cost more than the
  matmul of the head for a large vocabulary.

  Args:
    logits: −∞ for tokens that must not be drawn.
    uniform: In [0, 1).
    block: Tokens of a block.
  """
  weights = jnp.exp(logits - logits.max(-1, keepdims=True))
  weights = jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % block)))
  weights = weights.reshape(weights.shape[0], -1, block)
  masses = weights.sum(-1)
  target = uniform * masses.sum(-1)
  chosen, before = _invert(masses, target)
  inner = jnp.take_along_axis(weights, chosen[:, None, None], axis=1)[:, 0]
  token, _ = _invert(inner, target - before)
  return chosen * block + token


def _invert(masses, target):
  """First index whose cumulative mass exceeds the target, and what precedes.

  Rounding can leave the target outside the total, or between two equal sums.
  So an index without mass never counts, and beyond the total it is the last
  one that has any: a token of probability 0 is never drawn.
  """
  cumulative = jnp.cumsum(masses, axis=-1)
  has_mass = masses > 0
  exceeds = has_mass & (cumulative > target[:, None])
  last = masses.shape[-1] - 1 - jnp.argmax(has_mass[:, ::-1], axis=-1)
  index = jnp.where(exceeds.any(-1), jnp.argmax(exceeds, axis=-1), last)
  reached = jnp.take_along_axis(cumulative, index[:, None], axis=-1)[:, 0]
  mass = jnp.take_along_axis(masses, index[:, None], axis=-1)[:, 0]
  return index, reached - mass


def token_logprobs(
  hidden: Float[Array, "B R D"],
  head: Float[Array, "V D"],
  targets: Int[Array, "B R"],
  *,
  temperature: float,
  logits_per_chunk: int,
) -> Float[Array, "B R"]:
  """Log π(target | state), differentiable, without keeping the logits.

  Args:
    hidden: The states that predict the targets.
    head: The matrix of the logits.
    targets: The tokens.
    temperature: Of the scored distribution.
    logits_per_chunk: Logits that may exist at once; backward makes them anew.
  """

  def logprobs(hidden, targets):
    logits = token_logits(hidden, head, temperature=temperature)
    # h · e_target rather than a gather from the logits: cheaper, and so is
    # its gradient, a scatter of rows.
    chosen = head[targets].astype(hidden.dtype).astype(jnp.float32)
    chosen = (hidden.astype(jnp.float32) * chosen).sum(-1) / temperature
    return chosen - jax.nn.logsumexp(logits, axis=-1)

  return _in_columns(
    logprobs, (hidden, targets), logits_per_chunk // head.shape[0]
  )


class Comparison(NamedTuple):
  """Policy against reference at each sampled token, nats.

  `reverse_kl` and `forward_kl` are exact at the state (all tokens summed);
  summed over a sampled response, `reverse_kl` is the Rao-Blackwellised
  estimate of the sequence's reverse KL.
  """

  logprobs: Float[Array, "B R"]
  reference_logprobs: Float[Array, "B R"]
  reverse_kl: Float[Array, "B R"]
  forward_kl: Float[Array, "B R"]
  entropy: Float[Array, "B R"]


def compare(
  policy: tuple[Float[Array, "B R D"], Float[Array, "V D"]],
  reference: tuple[Float[Array, "B R E"], Float[Array, "V E"]],
  targets: Int[Array, "B R"],
  *,
  temperature: float,
  logits_per_chunk: int,
) -> Comparison:
  """All that the ledger needs of two models, in one pass over the tokens.

  With logits a, b, their log-sum-exps and p = softmax(a), q = softmax(b):

      KL(p‖q) = Σ p (a − b) − lse(a) + lse(b)
      KL(q‖p) = Σ q (b − a) − lse(b) + lse(a)
      H(p)    = lse(a) − Σ p a

  Equal models give exactly 0: each term of the sum is, and so is the rest.

  Args:
    policy: Hidden states that predict the targets, and the head.
    reference: The same of the reference.
    targets: The sampled tokens.
    temperature: Of both distributions.
    logits_per_chunk: Logits and probabilities that may exist at once.
  """

  def statistics(policy_hidden, reference_hidden, targets):
    a = token_logits(policy_hidden, policy[1], temperature=temperature)
    b = token_logits(reference_hidden, reference[1], temperature=temperature)
    a = a - a.max(-1, keepdims=True)
    b = b - b.max(-1, keepdims=True)
    p, q = jnp.exp(a), jnp.exp(b)
    p_sum, q_sum = p.sum(-1), q.sum(-1)
    shift = jnp.log(p_sum) - jnp.log(q_sum)
    chosen = lambda x: jnp.take_along_axis(x, targets[..., None], -1)[..., 0]
    return Comparison(
      logprobs=chosen(a) - jnp.log(p_sum),
      reference_logprobs=chosen(b) - jnp.log(q_sum),
      reverse_kl=(p * (a - b)).sum(-1) / p_sum - shift,
      forward_kl=(q * (b - a)).sum(-1) / q_sum + shift,
      entropy=jnp.log(p_sum) - (p * a).sum(-1) / p_sum,
    )

  arrays = policy[0], reference[0], targets
  # Four arrays of logits are alive at once, two models' and their softmaxes.
  tokens = logits_per_chunk // 4 // policy[1].shape[0]
  return _in_columns(statistics, arrays, tokens)


def _in_columns(function: Callable, arrays: tuple, tokens: int):
  """Applies `function` to `[B, c, …]` pieces with B · c ≤ tokens (or c = 1).

  Columns and not rows: the batch stays divided over the devices.
  """
  batch, columns = arrays[0].shape[:2]
  size = min(max(tokens // batch, 1), columns)
  if size == columns:
    return function(*arrays)
  padding = -columns % size

  def split(x):
    x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape((batch, -1, size, *x.shape[2:]))
    return jnp.moveaxis(x, 1, 0)

  def join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape((batch, -1, *x.shape[3:]))[:, :columns]

  pieces = jax.tree.map(split, arrays)
  apply = jax.checkpoint(lambda piece: function(*piece))
  return jax.tree.map(join, lax.map(apply, pieces))
