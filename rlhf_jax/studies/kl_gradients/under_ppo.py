"""What PPO makes of a KL gradient that is right on the first minibatch.

A perfect critic, λ = 1, γ = 1 and a policy that has not moved leave nothing to
be wrong; each row of the table takes one of these away.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.objective import exact, kl
from rlhf_jax.studies import kl_measurements as measure
from rlhf_jax.studies import listed, study


class Setting(NamedTuple):
  """How an update differs from the one that has the right gradient.

  `critic_error` is the sd of the critic's error over the sd of its values.
  """

  gamma: float = 1.0
  gae_lambda: float = 1.0
  clip_epsilon: float = math.inf
  critic_error: float = 0.0


class Task(NamedTuple):
  """J(π) = E[r] − β KL(π‖π_ref), and responses that `model.policy` wrote.

  `critic_noise` has an error of sd 1 for each state.
  """

  model: listed.Model
  rewards: exact.Levels
  critic_noise: Float[Array, "N"]
  beta: float

  def objective(self, parameters: listed.Parameters) -> Array:
    """J, by definition."""
    return exact.objective(
      self.model.levels(parameters),
      self.model.levels(self.model.reference),
      self.rewards,
      beta=self.beta,
      stop_ids=self.model.stop_ids,
    )

  def gradients(
    self,
    penalty: kl.Penalty,
    settings: list[Setting],
    parameters: listed.Parameters,
  ) -> Float[Array, "K F V"]:
    """∇J at `parameters` as PPO expects it to be, with each of the settings."""
    model = self.model
    scores = exact.scores(self.rewards, model.listing)
    rewards = measure.penalised_rewards(model, penalty, scores, beta=self.beta)
    values = measure.true_values(model, rewards)
    noise = values.std(where=model.mask) * self.critic_noise[model.states]

    def surrogates(parameters):
      new = model.compare(parameters)
      each = [
        measure.losses(
          model,
          penalty,
          new,
          rewards,
          values + setting.critic_error * noise,
          beta=self.beta,
          gamma=setting.gamma,
          gae_lambda=setting.gae_lambda,
          clip_epsilon=setting.clip_epsilon,
        )
        for setting in settings
      ]
      return -jnp.stack(each) @ model.probabilities(model.policy)

    return jax.jacrev(surrogates)(parameters)

  def outside(self, parameters: listed.Parameters, epsilon: float) -> Array:
    """The share of tokens whose importance ratio is outside 1 ± ε."""
    model = self.model
    new, old = (model.compare(x).logprobs for x in (parameters, model.policy))
    weight = model.probabilities(model.policy)[:, None] * model.mask
    is_outside = jnp.abs(jnp.expm1(new - old)) > epsilon
    return (weight * is_outside).sum() / weight.sum()


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
  """PPO's expected gradient against the true one, at the current policy."""
  task = _task(config, rng)
  on_policy = _on_the_first_minibatch(config)
  clipped = Setting(clip_epsilon=config.clip_epsilon)
  settings = [*on_policy.values(), clipped]
  gradient = jax.jit(jax.grad(task.objective))

  @jax.jit
  def surrogates(policy):
    return [
      task.gradients(
        kl.PENALTIES["sequence_reverse", estimator], settings, policy
      )
      for estimator in ("sampled", "rao_blackwellised")
    ]

  def rows(policy, moved, names):
    true = jax.device_get(gradient(policy))
    outside = float(task.outside(policy, config.clip_epsilon))
    sampled, rao_bl = jax.device_get(surrogates(policy))
    for name, setting in names.items():
      here = settings.index(setting)
      yield Row(
        setting=name,
        moved=moved,
        outside=outside,
        error=measure.relative_error(sampled[here], true),
        cosine=measure.cosine(sampled[here], true),
        error_rb=measure.relative_error(rao_bl[here], true),
        cosine_rb=measure.cosine(rao_bl[here], true),
      )

  start = task.model.policy
  distance = jax.jit(lambda policy: task.model.divergence(start, policy))
  found = list(rows(start, 0.0, on_policy))
  for nats in config.moves:
    policy = listed.at_distance(
      distance, start, gradient(start), nats, field="ppo.moves"
    )
    found += rows(policy, nats, {"later": Setting(), "later, clipped": clipped})
  return found


def table(config: ConfigDict, rows: list[Row]) -> study.Table:
  """For people."""
  return study.Table(
    f"PPO's expected gradient of J (β = {config.beta:g}) against the true one"
    " at the current policy: relative error and cosine, sampled and"
    " Rao-Blackwellised (rb) sequence_reverse; moved: KL(π_old‖π), nats per"
    " response; outside: share of tokens whose ratio is outside 1 ±"
    f" {config.clip_epsilon:g}",
    Row._fields,
    rows,
  )


def _task(config: ConfigDict, rng: np.random.Generator) -> Task:
  model = listed.make(
    rng,
    vocab_size=3,
    response_length=config.response_length,
    stop_ids=(0,),
  )
  (model,) = listed.moved(model, rng, [config.distance], field="ppo.distance")
  return Task(
    model,
    rewards=model.levels(jnp.asarray(rng.normal(size=model.policy.shape))),
    critic_noise=jnp.asarray(rng.normal(size=len(model.features))),
    beta=config.beta,
  )


def _on_the_first_minibatch(config: ConfigDict) -> dict[str, Setting]:
  settings = {"first minibatch": Setting()}
  for gae_lambda in config.gae_lambdas:
    name = f"λ = {gae_lambda:g}, critic off by {config.critic_error:g} sd"
    settings[name] = Setting(
      gae_lambda=gae_lambda, critic_error=config.critic_error
    )
  for gamma in config.gammas:
    settings[f"γ = {gamma:g}"] = Setting(gamma=gamma)
  return settings
