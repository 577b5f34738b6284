"""What the KL penalties do, on models whose responses are all listed.

Every gradient here goes the way of a PPO step, through the same functions: the
terms at the policy that sampled → `kl.reward_penalty` → `kl.penalised_rewards`
→ `advantages.generalized_advantages` → `policy_loss.clipped_policy_loss` plus
the penalty's part of the loss, summed over a response's tokens. Expectations
are sums over all responses. What they are compared with is autodiff of the
definitions, by `objective.exact` where it has them. Callers turn float64 on.
"""

from collections.abc import Iterable
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from rlhf_jax.objective import advantages, kl, logprobs, policy_loss
from rlhf_jax.studies import listed

Name = tuple[str, str]  # A key of `kl.PENALTIES`.


class Setting(NamedTuple):
  """How PPO makes its loss; with these defaults nothing makes it wrong."""

  gamma: float = 1.0
  gae_lambda: float = 1.0
  clip_epsilon: float = math.inf


RIGHT = Setting()


def penalised_rewards(
  model: listed.Model,
  penalty: kl.Penalty,
  scores: Float[Array, "S"],
  *,
  beta: float | Array,
) -> Float[Array, "S R"]:
  """Rewards of all responses, sampled from `model.policy`."""
  old = model.compare(model.policy)
  nats = kl.reward_penalty(penalty, _terms(old, old), model.mask)
  return kl.penalised_rewards(
    scores, nats, model.listing.lengths, beta=jnp.asarray(beta)
  )


def true_values(
  model: listed.Model, rewards: Float[Array, "S R"]
) -> Float[Array, "S R"]:
  """V(s_t) = E[Σ_{k ≥ t} r_k | s_t], of all listed tokens."""
  rewards = jnp.where(model.mask, rewards, 0.0)
  to_go = jnp.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]
  weight = model.probabilities(model.policy)[:, None] * model.mask
  zeros = jnp.zeros(len(model.features))
  total = zeros.at[model.states].add(weight * to_go)
  mass = zeros.at[model.states].add(weight)
  return (total / jnp.where(mass > 0, mass, 1.0))[model.states]


def losses(
  model: listed.Model,
  penalty: kl.Penalty,
  new: logprobs.Comparison,
  rewards: Float[Array, "S R"],
  values: Float[Array, "S R"],
  *,
  beta: float | Array,
  setting: Setting = RIGHT,
) -> Float[Array, "S"]:
  """PPO's loss of each response, sampled from `model.policy`.

  `new` is of the policy that learns, `rewards` are from `penalised_rewards`,
  `values` are the critic's, and `beta` is in reward units per nat.
  """
  old = model.compare(model.policy)
  estimated, _ = advantages.generalized_advantages(
    rewards,
    values,
    model.mask,
    gamma=setting.gamma,
    gae_lambda=setting.gae_lambda,
  )
  loss, _ = policy_loss.clipped_policy_loss(
    new.logprobs, old.logprobs, estimated, clip_epsilon=setting.clip_epsilon
  )
  if penalty.in_loss is not None:
    loss = loss + beta * penalty.in_loss(_terms(new, old))
  return jnp.where(model.mask, loss, 0.0).sum(1)


def _terms(new: logprobs.Comparison, old: logprobs.Comparison) -> kl.Terms:
  """A penalty's terms at `new`, on samples of `old`."""
  return kl.Terms(
    log_ratio=new.logprobs - new.reference_logprobs,
    reverse_kl=new.reverse_kl,
    forward_kl=new.forward_kl,
    importance_ratio=jnp.exp(new.logprobs - old.logprobs),
  )


def target_gradients(model: listed.Model) -> dict[str, Float[Array, "X"]]:
  """What the targets' names promise, by autodiff of their definitions."""
  weight = model.probabilities(model.policy)[:, None] * model.mask
  visited = lambda kind: (
    lambda parameters: (
      weight * model.compare(parameters)._asdict()[kind]
    ).sum()
  )
  definitions = {
    "sequence_reverse": lambda x: model.divergence(x, model.reference),
    "token_reverse": visited("reverse_kl"),
    "token_forward": visited("forward_kl"),
  }
  return {
    name: jax.grad(definition)(model.policy).ravel()
    for name, definition in definitions.items()
  }


def response_gradients(
  model: listed.Model,
  penalties: Iterable[kl.Penalty],
  *,
  drawn: listed.Model | None = None,
) -> Float[Array, "K 2 S X"]:
  """The gradient that each response gives, of the penalty alone, at β = 1.

  For each penalty, without a critic and with a perfect one; `drawn` has the
  policy that draws the tokens, if `model` only scores them.
  """
  nothing = jnp.zeros(len(model.listing.tokens))
  terms = []
  for penalty in penalties:
    rewards = penalised_rewards(model, penalty, nothing, beta=1.0)
    values = true_values(drawn or model, rewards)
    critics = jnp.stack([jnp.zeros_like(rewards), values])
    terms.append((penalty, rewards, critics))

  def loss(parameters):
    new = model.compare(parameters)
    each = [
      jax.vmap(lambda v, p=p, r=r: losses(model, p, new, r, v, beta=1.0))(both)
      for p, r, both in terms
    ]
    return jnp.stack(each)

  gradients = jax.jacrev(loss)(model.policy)
  return gradients.reshape((len(terms), 2, len(nothing), model.policy.size))


def under_top_p(
  model: listed.Model, top_ps: Iterable[float], penalties: Iterable[Name]
) -> Float[np.ndarray, "P 2 K 2"]:
  """What penalties lack of ∇KL(π‖π_ref) where tokens are drawn with top-p.

  For each top-p, scored by the policy, and by what drew (policy and reference
  both on the policy's nuclei); for each penalty, with the critic that is
  perfect for what is drawn: the error of its expected gradient, and the
  standard deviation of a response's, in norms of ∇KL.
  """
  names, found = tuple(penalties), []
  for drawn in (listed.truncated(model, top_p) for top_p in top_ps):
    for scores in (model, drawn):
      weights, wanted, gradients = jax.device_get(
        _gradients(model[:2], names, scores[2:], drawn[2:])
      )
      errors = [relative_error(weights @ each, wanted) for each in gradients]
      variances = np.array([variance(each, weights) for each in gradients])
      noises = variances**0.5 / np.linalg.norm(wanted)
      found.append(np.stack([errors, noises], axis=-1))
  return np.reshape(found, (-1, 2, len(names), 2))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(sizes, penalties, *arrays):
  model, drawn = (listed.Model(*sizes, *x) for x in arrays)
  rows = [kl.PENALTIES[name] for name in penalties]
  return (
    drawn.probabilities(drawn.policy),
    target_gradients(model)["sequence_reverse"],
    response_gradients(model, rows, drawn=drawn)[:, 1],
  )


# Of gradients: of one `[X]`, or of all responses `[S, X]`.


def variance(gradients, probabilities):
  """Trace of the covariance of a response's gradient."""
  centred = gradients - probabilities @ gradients
  return probabilities @ (centred * centred).sum(1)


def sampled_distance(
  gradients: np.ndarray, probabilities: np.ndarray, batches: np.ndarray
) -> tuple[float, float]:
  """How far the mean of sampled gradients is from the exact expectation.

      D = n ‖mean of n − expectation‖² / variance,   E[D] = 1

  The mean of D over the batches, sampled rows of the listing `[batches, n]`,
  and half of its 95 % interval; NaN where all responses have one gradient.
  """
  spread = variance(gradients, probabilities)
  if spread == 0:
    return math.nan, math.nan
  counts = [np.bincount(rows, minlength=len(gradients)) for rows in batches]
  means = np.stack(counts) @ gradients / batches.shape[1]
  squares = np.square(means - probabilities @ gradients).sum(1)
  squares *= batches.shape[1] / spread
  half_width = 1.96 * squares.std(ddof=1) / len(squares) ** 0.5
  return float(squares.mean()), float(half_width)


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
  """‖found − wanted‖ / ‖wanted‖."""
  return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def cosine(found: np.ndarray, wanted: np.ndarray) -> float:
  """Of the angle between two gradients; NaN where one is nothing."""
  norms = np.linalg.norm(found), np.linalg.norm(wanted)
  if norms[0] < 1e-12 * norms[1]:
    return math.nan
  return float(np.vdot(found, wanted) / norms[0] / norms[1])
