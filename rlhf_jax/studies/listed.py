"""Models so small that all their responses are listed, at a chosen KL.

What `objective.exact` does for a tree of logits, with parameters: a policy is
log-linear, so that prefixes can be a table or share what they learn. Callers
turn float64 on.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from rlhf_jax import errors
from rlhf_jax.objective import exact, logprobs, masking

Parameters = Float[Array, "F V"]


class Model(NamedTuple):
  """A policy over a tree of N prefixes, its reference, and all S responses.

  The logits of all prefixes are `features @ parameters`; with the identity as
  features, each prefix has logits of its own.
  """

  response_length: int
  stop_ids: tuple[int, ...]
  features: Float[Array, "N F"]
  policy: Parameters
  reference: Parameters
  listing: exact.Listing

  @property
  def mask(self) -> Bool[Array, "S R"]:
    """Which tokens of the listing are real."""
    return masking.response_mask(self.listing.lengths, self.response_length)

  @property
  def states(self) -> Int[Array, "S R"]:
    """Which row of the logits each listed token is drawn from."""
    return self.listing.rows + jnp.asarray(self.starts()[:-1])

  def starts(self) -> list[int]:
    """The first row of the logits of each level of prefixes, and the end."""
    counts = [self.policy.shape[1] ** t for t in range(self.response_length)]
    return [sum(counts[:t]) for t in range(self.response_length + 1)]

  def levels(self, parameters: Parameters) -> exact.Levels:
    """The logits as `objective.exact` wants them."""
    return tuple(jnp.split(self.features @ parameters, self.starts()[1:-1]))

  def token_logits(self, parameters: Parameters) -> Float[Array, "S R V"]:
    """Of all listed tokens; those beyond an end are another prefix's."""
    return (self.features @ parameters)[self.states]

  def compare(self, parameters: Parameters) -> logprobs.Comparison:
    """With the reference, at all listed tokens; garbage beyond an end."""
    logits, reference = map(self.token_logits, (parameters, self.reference))
    return logprobs.statistics(logits, reference, self.listing.tokens)

  def probabilities(self, parameters: Parameters) -> Float[Array, "S"]:
    """Of the listed responses."""
    token = jnp.where(self.mask, self.compare(parameters).logprobs, 0.0)
    return jnp.exp(token.sum(1))

  def divergence(self, policy: Parameters, other: Parameters) -> Array:
    """KL(policy‖other), nats per response."""
    return exact.sequence_kl(
      self.levels(policy), self.levels(other), stop_ids=self.stop_ids
    )


def make(
  rng: np.random.Generator,
  *,
  vocab_size: int,
  response_length: int,
  stop_ids: tuple[int, ...] = (),
  tied: int = 0,
) -> Model:
  """A random reference, and a policy that equals it.

  All prefixes share `tied` features; with 0 they are a table.
  """
  rows = sum(vocab_size**t for t in range(response_length))
  features = rng.normal(size=(rows, tied)) if tied else np.eye(rows)
  reference = jnp.asarray(rng.normal(size=(features.shape[1], vocab_size)))
  listing = exact.sequences(
    vocab_size=vocab_size, response_length=response_length, stop_ids=stop_ids
  )
  features = jnp.asarray(features)
  return Model(
    response_length, stop_ids, features, reference, reference, listing
  )


def moved(
  model: Model,
  rng: np.random.Generator,
  distances: Sequence[float],
  *,
  field: str,
) -> list[Model]:
  """The model at each KL(π‖π_ref), all in one random direction.

  Raises:
    UserError: It does not lead so far; says so of the config's `field`.
  """
  distance = jax.jit(lambda policy: model.divergence(policy, model.reference))
  draws = [jnp.asarray(rng.normal(size=model.policy.shape)) for _ in range(20)]
  # The one that leads furthest: in others a policy that is far away writes the
  # same response nearly always.
  direction = max(draws, key=lambda draw: distance(model.reference + 10 * draw))
  at = lambda x: at_distance(distance, model.reference, direction, x, field)
  return [model._replace(policy=at(x)) for x in distances]


def at_distance(
  distance: Callable[[Parameters], Array],
  start: Parameters,
  direction: Parameters,
  nats: float,
  field: str,
) -> Parameters:
  """`start` moved along a direction until `distance` is `nats`, by bisection.

  Raises:
    UserError: It does not get there; says so of the config's `field`.
  """
  at = lambda scale: float(distance(start + scale * direction))
  low, high = 0.0, 1.0
  while at(high) < nats:
    low, high = high, 2 * high
    if high > 1e4:
      raise errors.UserError(
        f"config.{field}: {nats:g} nats; wanted less than {at(low):.3g}, which"
        " is as far as the policy of this model goes"
      )
  for _ in range(60):
    middle = (low + high) / 2
    low, high = (middle, high) if at(middle) < nats else (low, middle)
  return start + high * direction


def truncated(model: Model, top_p: float) -> Model:
  """A table's policy on its nuclei, and the reference on the same.

  Tokens beyond lose so many nats that they are never drawn: with −∞ both
  logprobs, and so what is said of them, would be NaN.
  """
  kept = logprobs.filter_logits(model.policy, top_k=0, top_p=top_p)
  lost = jnp.where(jnp.isneginf(kept), 60.0, 0.0)
  return model._replace(
    policy=model.policy - lost, reference=model.reference - lost
  )


def sample(model: Model, key: Array, count: int) -> Int[np.ndarray, "count"]:
  """Rows of the listing, written token by token by the production sampler."""
  logits = model.features @ model.policy
  starts, vocab_size = model.starts(), logits.shape[1]
  row = np.zeros(count, int)
  last = np.full(count, -1)  # The last prefix and token, as one number.
  for t in range(model.response_length):
    uniform = jax.random.uniform(jax.random.fold_in(key, t), (count,))
    state = starts[t] + np.where(last < 0, row, 0)
    # Blocks of 2, so that both levels of the sampler have a choice.
    token = np.asarray(logprobs.sample(logits[state], uniform, block=2))
    stops = np.isin(token, model.stop_ids) | (t == model.response_length - 1)
    last = np.where((last < 0) & stops, state * vocab_size + token, last)
    row = row * vocab_size + token
  ends = masking.last_token(
    model.states * vocab_size + model.listing.tokens, model.listing.lengths
  )
  order = np.argsort(ends)
  return order[np.searchsorted(np.asarray(ends)[order], last)]
