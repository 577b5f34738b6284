"""What estimates of the KL are worth, near the reference and far from it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.objective import kl
from rlhf_jax.studies import listed, study


class Row(NamedTuple):
  """At one KL(π‖π_ref): standard deviations and biases, nats per response.

  `forward` is the mean of the exact KL(π_ref‖π) at the visited states, `top_k`
  of the distance of the two bounds from the likeliest tokens.
  """

  kl: float
  sd_k1: float
  sd_k2: float
  sd_k3: float
  sd_exact: float
  bias_k1: float
  bias_k2: float
  bias_k3: float
  bias_exact: float
  forward: float
  top_k: float


def measured(config: ConfigDict, rng: np.random.Generator) -> list[Row]:
  """A row for each distance, all in one direction from the reference."""
  start = listed.make(
    rng, vocab_size=config.vocab_size, response_length=config.response_length
  )
  models = listed.moved(
    start, rng, config.distances, field="estimates.distances"
  )

  @jax.jit
  def moments(policy, reference):  # As a constant it would be folded, slowly.
    model = start._replace(policy=policy, reference=reference)
    return _moments(model, top_k=config.top_k)

  rows = []
  for nats, model in zip(config.distances, models):
    found = moments(model.policy, model.reference)
    mean, sd = jax.tree.map(float, found)
    of = {"kl": nats, "forward": mean["forward"], "top_k": mean["top_k"]}
    for name in ("k1", "k2", "k3", "exact"):
      of |= {f"sd_{name}": sd[name], f"bias_{name}": mean[name] - nats}
    rows.append(Row(**of))
  return rows


def table(config: ConfigDict, rows: list[Row]) -> study.Table:
  """For people."""
  return study.Table(
    "Estimates of KL(π‖π_ref), nats per response: standard deviation and bias"
    f" (V={config.vocab_size} R={config.response_length}); the exact forward KL"
    " at the visited states; the distance of the top-k bounds,"
    f" k={config.top_k}",
    Row._fields,
    rows,
  )


def _moments(model: listed.Model, *, top_k: int):
  """Mean and standard deviation of each estimate of a response's KL."""
  of = model.compare(model.policy)
  log_ratio = of.logprobs - of.reference_logprobs
  log_p, log_q = (
    jax.nn.log_softmax(model.token_logits(x))
    for x in (model.policy, model.reference)
  )
  lower, upper = kl.exact_top_k(log_p, log_q, k=top_k)
  per_token = {
    "k1": kl.k1(log_ratio),
    "k2": kl.k2(log_ratio),
    "k3": kl.k3(log_ratio),
    "exact": of.reverse_kl,
    "forward": of.forward_kl,
    "top_k": upper - lower,
  }
  weights = model.probabilities(model.policy)
  means, deviations = {}, {}
  for name, nats in per_token.items():
    total = jnp.where(model.mask, nats, 0.0).sum(1)
    means[name] = weights @ total
    deviations[name] = jnp.sqrt(weights @ jnp.square(total - means[name]))
  return means, deviations
