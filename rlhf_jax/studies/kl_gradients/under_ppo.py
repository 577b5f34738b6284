"""What PPO makes of a KL gradient that is right on the first minibatch.

A perfect critic, λ = 1, γ = 1 and a policy that has not moved leave nothing to
be wrong; each row of the table takes one of these away.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.objective import exact, kl
from rlhf_jax.studies import kl_measurements as measure
from rlhf_jax.studies import listed, study

# PPO's settings, and the sd of the critic's error over that of its values.
_RIGHT = measure.RIGHT, 0.0


class Row(NamedTuple):
  """Against the true gradient, sampled and Rao-Blackwellised (rb).

  `moved` is KL(π_old‖π), nats per response, 0 on the first minibatch; `outside`
  is the share of tokens whose importance ratio is outside 1 ± ε.
  """

  setting: str
  moved: float
  outside: float
  error: float
  cosine: float
  error_rb: float
  cosine_rb: float


def measured(config: ConfigDict, rng: np.random.Generator) -> list[Row]:
  """PPO's expected gradient of J = E[r] − β KL(π‖π_ref) against the true one.

  At the policy that learns, on responses of the one that the model has.
  """
  size, beta = config.response_length, config.beta
  model = listed.make(rng, vocab_size=3, response_length=size, stop_ids=(0,))
  (model,) = listed.moved(model, rng, [config.distance], field="ppo.distance")
  rewards = model.levels(jnp.asarray(rng.normal(size=model.policy.shape)))
  critic_noise = jnp.asarray(rng.normal(size=len(model.features)))
  on_policy = _on_the_first_minibatch(config)
  clipped = measure.Setting(clip_epsilon=config.clip_epsilon), 0.0
  settings = [*on_policy.values(), clipped]

  @jax.jit
  @jax.grad
  def gradient(policy):
    levels = model.levels(policy), model.levels(model.reference)
    return exact.objective(*levels, rewards, beta=beta, stop_ids=model.stop_ids)

  def expected(penalty, policy):
    """∇J as PPO expects it to be, with each of the settings."""
    scores = exact.scores(rewards, model.listing)
    penalised = measure.penalised_rewards(model, penalty, scores, beta=beta)
    values = measure.true_values(model, penalised)
    noise = values.std(where=model.mask) * critic_noise[model.states]

    def surrogates(policy):
      new = model.compare(policy)
      args = model, penalty, new, penalised
      losses = [
        measure.losses(*args, values + off * noise, beta=beta, setting=setting)
        for setting, off in settings
      ]
      return -jnp.stack(losses) @ model.probabilities(model.policy)

    return jax.jacrev(surrogates)(policy)

  both = [
    kl.PENALTIES["sequence_reverse", estimator]
    for estimator in ("sampled", "rao_blackwellised")
  ]
  all_expected = jax.jit(lambda policy: [expected(p, policy) for p in both])

  def rows(policy, moved, names):
    true = jax.device_get(gradient(policy))
    outside = _outside(model, policy, config.clip_epsilon)
    estimates = jax.device_get(all_expected(policy))
    for name, setting in names.items():
      figures = [
        compare(found[settings.index(setting)], true)
        for found in estimates
        for compare in (measure.relative_error, measure.cosine)
      ]
      yield Row(name, moved, outside, *figures)

  start = model.policy
  distance = jax.jit(lambda policy: model.divergence(start, policy))
  found = list(rows(start, 0.0, on_policy))
  for nats in config.moves:
    move = distance, start, gradient(start), nats
    policy = listed.at_distance(*move, field="ppo.moves")
    found += rows(policy, nats, {"later": _RIGHT, "later, clipped": clipped})
  return found


def _on_the_first_minibatch(config):
  """By name, the right setting and those with one thing taken away."""
  settings, off = {"first minibatch": _RIGHT}, config.critic_error
  for x in config.gae_lambdas:
    name = f"λ = {x:g}, critic off by {off:g} sd"
    settings[name] = measure.Setting(gae_lambda=x), off
  for x in config.gammas:
    settings[f"γ = {x:g}"] = measure.Setting(gamma=x), 0.0
  return settings


def _outside(model, policy, epsilon) -> float:
  """The share of tokens whose importance ratio is outside 1 ± ε."""
  new, old = (model.compare(x).logprobs for x in (policy, model.policy))
  weight = model.probabilities(model.policy)[:, None] * model.mask
  is_outside = jnp.abs(jnp.expm1(new - old)) > epsilon
  return float((weight * is_outside).sum() / weight.sum())


def table(config: ConfigDict, rows: list[Row]) -> study.Table:
  """For people."""
  return study.table_of(
    f"PPO's expected gradient of J (β = {config.beta:g}) against the true one"
    " at the current policy: relative error and cosine, sampled and"
    " Rao-Blackwellised (rb) sequence_reverse; moved: KL(π_old‖π), nats per"
    " response; outside: share of tokens whose ratio is outside 1 ±"
    f" {config.clip_epsilon:g}",
    rows,
  )
