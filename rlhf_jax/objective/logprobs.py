"""From hidden states to logprobs, and from logprobs to tokens.

One function makes logits (`token_logits`), so what is sampled, what is scored
and what the reference is asked are the same distribution: temperature-scaled,
over the whole vocabulary. top-k and top-p narrow what is drawn and never what
is scored: a filtered logprob is −∞ wherever the filters of two models differ.

No function here holds logits for a whole batch of responses. Those that need
a response's worth walk over it in columns, `logits_per_chunk` at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlhf_jax import types

_NONE = -1e30  # A logit without mass.


def token_logits(
  hidden: Float[Array, "*N D"], head: types.Head, *, temperature: float
) -> Float[Array, "*N V"]:
  """float32 logits at a temperature: cap(h Eᵀ) / temperature.

  Ids that are no tokens have the lowest finite logit: no mass, in both models
  of a comparison, and no NaN.
  """
  rows = hidden.reshape(-1, hidden.shape[-1])
  logits = lax.dot_general(
    rows,
    head.kernel.astype(hidden.dtype),
    (((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  logits = logits.reshape((*hidden.shape[:-1], head.vocab_size))
  logits = _scaled(logits, head, temperature)
  if head.tokens is not None:
    logits = jnp.where(jnp.arange(head.vocab_size) < head.tokens, logits, _NONE)
  return logits


def _scaled(logits, head, temperature):
  if head.softcap is not None:
    logits = head.softcap * jnp.tanh(logits / head.softcap)
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
  head: types.Head,
  targets: Int[Array, "B R"],
  *,
  temperature: float,
  logits_per_chunk: int,
) -> Float[Array, "B R"]:
  """Log π(target | state), differentiable, without keeping the logits.

  Args:
    hidden: The states that predict the targets.
    head: What makes the logits.
    targets: The tokens.
    temperature: Of the scored distribution.
    logits_per_chunk: Logits that may exist at once; backward makes them anew.
  """

  def logprobs(hidden, targets):
    logits = token_logits(hidden, head, temperature=temperature)
    # h · e_target rather than a gather from the logits: cheaper, and so is
    # its gradient, a scatter of rows.
    rows = head.kernel[targets].astype(hidden.dtype).astype(jnp.float32)
    chosen = (hidden.astype(jnp.float32) * rows).sum(-1)
    chosen = _scaled(chosen, head, temperature)
    return chosen - jax.nn.logsumexp(logits, axis=-1)

  return _in_columns(
    logprobs, (hidden, targets), logits_per_chunk // head.vocab_size
  )


class Comparison(NamedTuple):
  """Policy against reference at each sampled token, nats.

  `reverse_kl` and `forward_kl` are exact at the state (all tokens summed);
  summed over a sampled response, `reverse_kl` is the Rao-Blackwellised
  estimate of the sequence's reverse KL.
  """

  logprobs: Float[Array, "*N"]
  reference_logprobs: Float[Array, "*N"]
  reverse_kl: Float[Array, "*N"]
  forward_kl: Float[Array, "*N"]
  entropy: Float[Array, "*N"]


def statistics(
  logits: Float[Array, "*N V"],
  reference_logits: Float[Array, "*N V"],
  targets: Int[Array, "*N"],
) -> Comparison:
  """All that the ledger and the penalties need of two distributions.

  With p, q their softmaxes and d = log p − log q:

      reverse = Σ p d,   forward = −Σ q d,   entropy = −Σ p log p

  Equal logits give exactly 0. Differentiable in `logits` alone: the reference
  is a constant. The gradient is written out, one pass over the vocabulary
  that is finite wherever the logits are.
  """
  return _statistics(logits, lax.stop_gradient(reference_logits), targets)


@jax.custom_vjp
def _statistics(logits, reference_logits, targets):
  return _statistics_forward(logits, reference_logits, targets)[0]


def _statistics_forward(logits, reference_logits, targets):
  # Shifted by their largest, and summed before they are normalised: one
  # exponential per token and model.
  a, b = (x - x.max(-1, keepdims=True) for x in (logits, reference_logits))
  p, q = jnp.exp(a), jnp.exp(b)
  p_sum, q_sum = p.sum(-1), q.sum(-1)
  shift = jnp.log(p_sum) - jnp.log(q_sum)
  chosen = lambda x: jnp.take_along_axis(x, targets[..., None], -1)[..., 0]
  comparison = Comparison(
    logprobs=chosen(a) - jnp.log(p_sum),
    reference_logprobs=chosen(b) - jnp.log(q_sum),
    reverse_kl=(p * (a - b)).sum(-1) / p_sum - shift,
    forward_kl=(q * (b - a)).sum(-1) / q_sum + shift,
    entropy=jnp.log(p_sum) - (p * a).sum(-1) / p_sum,
  )
  normalisers = tuple(
    x.max(-1) + jnp.log(total)
    for x, total in ((logits, p_sum), (reference_logits, q_sum))
  )
  residuals = logits, reference_logits, targets, comparison, normalisers
  return comparison, residuals


def _statistics_backward(residuals, cotangents):
  """∂/∂logits: δ − p, p (d − reverse), p − q and −p (log p + entropy)."""
  logits, reference_logits, targets, of, normalisers = residuals
  log_p, log_q = (
    x - normaliser[..., None]
    for x, normaliser in zip((logits, reference_logits), normalisers)
  )
  p = jnp.exp(log_p)
  rules = {
    "logprobs": lambda: jax.nn.one_hot(targets, p.shape[-1], dtype=p.dtype) - p,
    "reverse_kl": lambda: p * (log_p - log_q - of.reverse_kl[..., None]),
    "forward_kl": lambda: p - jnp.exp(log_q),
    "entropy": lambda: -p * (log_p + of.entropy[..., None]),
  }
  gradient = jnp.zeros_like(p)
  for name, rule in rules.items():
    cotangent = cotangents._asdict()[name]
    if not isinstance(cotangent, SymbolicZero):
      gradient += cotangent[..., None] * rule()
  return gradient, jnp.zeros_like(reference_logits), None


_statistics.defvjp(
  lambda *primals: _statistics_forward(*(x.value for x in primals)),
  _statistics_backward,
  symbolic_zeros=True,
)


def compare_tokens(
  policy: tuple[Float[Array, "*N D"], types.Head],
  reference: tuple[Float[Array, "*N E"], types.Head],
  targets: Int[Array, "*N"],
  *,
  temperature: float,
) -> Comparison:
  """`statistics` of two models' states, each beside its head, all at once."""
  logits, reference_logits = (
    token_logits(*model, temperature=temperature)
    for model in (policy, reference)
  )
  return statistics(logits, reference_logits, targets)


def compare(
  policy: tuple[Float[Array, "B R D"], types.Head],
  reference: tuple[Float[Array, "B R E"], types.Head],
  targets: Int[Array, "B R"],
  *,
  temperature: float,
  logits_per_chunk: int,
) -> Comparison:
  """`compare_tokens` of two models' responses, in one pass over the columns.

  Args:
    policy: Hidden states that predict the targets, and the head.
    reference: The same of the reference.
    targets: The sampled tokens.
    temperature: Of both distributions.
    logits_per_chunk: Logits that may exist at once.
  """

  def compared(policy_hidden, reference_hidden, targets):
    models = (policy_hidden, policy[1]), (reference_hidden, reference[1])
    return compare_tokens(*models, targets, temperature=temperature)

  arrays = policy[0], reference[0], targets
  # Four arrays of logits are alive at once, two models' and their softmaxes.
  tokens = logits_per_chunk // 4 // policy[1].vocab_size
  return _in_columns(compared, arrays, tokens)


def gradient_in_columns(
  loss: Callable[..., tuple[Float[Array, ""], Any]],
  hidden: Float[Array, "B R D"],
  head: types.Head,
  columns: Any,
  *,
  tokens: int,
) -> tuple[Any, tuple[Float[Array, "B R D"], types.Head]]:
  """Sums over all tokens, and their loss's gradient in states and head.

  A chunk's logits live through its forward and its backward pass and are
  gone before the next: nothing is kept and nothing is made twice. A loss of
  the whole response (and not a sum over its tokens) cannot be had this way;
  `token_logprobs` serves it.

  Args:
    loss: `(hidden, head, columns) → (loss, sums)` of a piece `[B, c, …]`;
      both add up over the pieces.
    hidden: The states that predict the targets.
    head: What makes the logits.
    columns: What else is per token, a pytree of `[B, R, …]`.
    tokens: Tokens of a chunk (at least one column).

  Returns:
    The sums, and the gradients.
  """
  gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
  size = _columns_at_once(hidden, tokens)
  if size == hidden.shape[1]:
    gradients, sums = gradient(hidden, head, columns)
    return sums, gradients
  batch, length = hidden.shape[:2]
  pieces = jax.tree.map(lambda x: _split(x, size), (hidden, columns))

  def add(carry, piece):
    hidden, columns = piece
    (of_hidden, of_head), sums = gradient(hidden, head, columns)
    return jax.tree.map(jnp.add, carry, (of_head, sums)), of_hidden

  first = jax.tree.map(lambda x: x[0], pieces)
  shapes = jax.eval_shape(gradient, first[0], head, first[1])
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0][1], shapes[1])
  )
  (of_head, sums), of_hidden = lax.scan(add, zeros, pieces)
  return sums, (_join(of_hidden, batch, length), of_head)


def _in_columns(function: Callable, arrays: tuple, tokens: int):
  """Applies `function` to `[B, c, …]` pieces with B · c ≤ tokens (or c = 1).

  Columns and not rows: the batch stays divided over the devices.
  """
  batch, length = arrays[0].shape[:2]
  size = _columns_at_once(arrays[0], tokens)
  if size == length:
    return function(*arrays)
  pieces = jax.tree.map(lambda x: _split(x, size), arrays)
  apply = jax.checkpoint(lambda piece: function(*piece))
  results = lax.map(apply, pieces)
  return jax.tree.map(lambda x: _join(x, batch, length), results)


def _columns_at_once(x, tokens: int) -> int:
  """The most columns of a piece; pieces of about the same size."""
  batch, length = x.shape[:2]
  most = min(max(tokens // batch, 1), length)
  return -(-length // -(-length // most))


def _split(x, size: int):
  """`[B, R, …]` as pieces `[n, B, size, …]`; the last is filled with zeros."""
  padding = -x.shape[1] % size
  x = jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2))
  x = x.reshape((x.shape[0], -1, size, *x.shape[2:]))
  return jnp.moveaxis(x, 1, 0)


def _join(x, batch: int, length: int):
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape((batch, -1, *x.shape[3:]))[:, :length]
