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


def table(config: ConfigDict, rng: np.random.Generator) -> study.Table:
  """A `Row` for each distance, all in one direction from the reference."""
  vocab_size, size = config.vocab_size, config.response_length
  start = listed.make(rng, vocab_size=vocab_size, response_length=size)
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
    means, deviations = jax.tree.map(float, found)
    biases = [mean - nats for mean in means[:4]]
    row = nats, *deviations[:4], *biases, *means[4:]
    rows.append(Row(*row))
  return study.Table(
    "Estimates of KL(π‖π_ref), nats per response: standard deviation and bias"
    f" (V={vocab_size} R={size}); the exact forward KL at the visited states;"
    f" the distance of the top-k bounds, k={config.top_k}",
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
  estimates = *(k(log_ratio) for k in (kl.k1, kl.k2, kl.k3)), of.reverse_kl
  weights = model.probabilities(model.policy)
  means, deviations = [], []
  for nats in (*estimates, of.forward_kl, upper - lower):
    total = jnp.where(model.mask, nats, 0.0).sum(1)
    means.append(weights @ total)
    deviations.append(jnp.sqrt(weights @ jnp.square(total - means[-1])))
  return means, deviations
