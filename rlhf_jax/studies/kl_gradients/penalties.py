"""Every KL penalty against its target, and against the sequence's KL."""

from collections.abc import Iterator, Mapping
import math
from typing import NamedTuple

import jax
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.objective import kl
from rlhf_jax.studies import kl_measurements as measure
from rlhf_jax.studies import listed, study

_SEQUENCE = "sequence_reverse"


class OfPenalty(NamedTuple):
  """One penalty on one model."""

  penalty: str
  estimator: str
  where: str
  target: str | None
  error: float
  cosine: float
  to_sequence: float
  variance: float
  variance_v: float
  sampled: float
  half_width: float


class OfModel(NamedTuple):
  """What the verdict rests on: one model, all penalties."""

  model: str
  ours: float
  published: float
  sampled: float
  rao_bl: float
  sampled_v: float
  rao_bl_v: float
  inside: int


def models(
  config: ConfigDict, rng: np.random.Generator
) -> Iterator[tuple[str, dict[float, listed.Model]]]:
  """Names, and models by their distance from the reference.

  Stops and none, pads that stop and that are words, tied prefixes.
  """
  middle = sorted(config.distances)[len(config.distances) // 2]
  for name, distances, vocab_size, response_length, stop_ids, tied in (
    ("V=3 R=3, stop 0", config.distances, 3, 3, (0,), 0),
    ("V=4 R=3, no stop", (middle,), 4, 3, (), 0),
    ("V=4 R=4, stops 0 2", (middle,), 4, 4, (0, 2), 0),
    ("V=3 R=4, stop 1, tied", (middle,), 3, 4, (1,), 5),
  ):
    sizes = {"vocab_size": vocab_size, "response_length": response_length}
    model = listed.make(rng, **sizes, stop_ids=stop_ids, tied=tied)
    moved = listed.moved(model, rng, distances, field="distances")
    yield name, dict(zip(distances, moved))


def on_models(
  name: str,
  models: dict[float, listed.Model],
  config: ConfigDict,
  rng: np.random.Generator,
) -> dict[str, list[OfPenalty]]:
  """Every penalty on models that differ in nothing but the policy."""
  (any_model, *_) = models.values()

  @jax.jit
  def measurements(policy):
    model = any_model._replace(policy=policy)
    targets = measure.target_gradients(model)
    gradients = measure.response_gradients(model, kl.PENALTIES.values())
    return targets, gradients, model.probabilities(policy)

  shape = len(kl.PENALTIES), config.batches, config.responses // config.batches
  rows = {}
  for nats, model in models.items():
    key = jax.random.key(rng.integers(2**32))
    batches = listed.sample(model, key, math.prod(shape)).reshape(shape)
    targets, gradients, weights = jax.device_get(measurements(model.policy))
    rows[f"{name}, {nats:g} nats"] = [
      _of_penalty(names, targets, both, weights, drawn)
      for names, both, drawn in zip(kl.PENALTIES, gradients, batches)
    ]
  return rows


def _of_penalty(
  names: measure.Name, targets, gradients, weights, batches
) -> OfPenalty:
  penalty, (alone, with_critic) = kl.PENALTIES[names], gradients
  nothing = np.full_like(targets[_SEQUENCE], math.nan)
  target = targets.get(penalty.target, nothing)
  expected = weights @ alone
  errors = [measure.relative_error(weights @ x, target) for x in gradients]
  where = "reward" if penalty.in_loss is None else "both"
  return OfPenalty(
    *names,
    "loss" if penalty.in_reward is None else where,
    penalty.target or None,
    float(np.max(errors)),
    measure.cosine(expected, target),
    measure.relative_error(expected, targets[_SEQUENCE]),
    measure.variance(alone, weights),
    measure.variance(with_critic, weights),
    *measure.sampled_distance(alone, weights, batches),
  )


def of_model(name: str, rows: list[OfPenalty]) -> OfModel:
  """The rows of a model in one. NaN counts as the worst there is."""
  of = {(row.penalty, row.estimator): row for row in rows}
  sampled = of[_SEQUENCE, "sampled"]
  rao_bl = of[_SEQUENCE, "rao_blackwellised"]
  ours = [row.error for row in rows if row.penalty in kl.TARGETS]
  others = [row.to_sequence for row in rows if row.penalty not in kl.TARGETS]
  return OfModel(
    name,
    float(np.max(ours)),
    float(np.min(others)),
    *(sampled.variance, rao_bl.variance),
    *(sampled.variance_v, rao_bl.variance_v),
    sum(abs(row.sampled - 1) <= row.half_width for row in rows),
  )


def tables(
  rows: Mapping[str, list[OfPenalty]], models: list[OfModel]
) -> dict[str, study.Table]:
  """Over all models, by model, and everything."""
  over_models = study.Table(
    f"Expected gradients on {len(rows)} models. error, cosine: to the target's,"
    " the worst; least, most: relative error to the gradient of the sequence's"
    " reverse KL",
    (*OfPenalty._fields[:6], "least", "most"),
    [
      (
        *of[0][:4],
        np.max([row.error for row in of]),
        np.min([row.cosine for row in of]),
        np.min([row.to_sequence for row in of]),
        np.max([row.to_sequence for row in of]),
      )
      for of in zip(*rows.values())
    ],
  )
  by_model = study.table_of(
    "By model. ours: largest error to a target; published: smallest error to"
    " the sequence's KL; variance of the sequence KL's gradient, sampled and"
    " Rao-Blackwellised, without a critic and with a perfect one (v); inside:"
    f" how many of {len(kl.PENALTIES)} 95 % intervals of sampled gradients hold"
    " the expectation",
    models,
  )
  everything = {
    f"gradients: {name}": study.table_of(
      "error, cosine: of the expected gradient to the target's (error: the"
      " larger one without and with a critic); to_sequence: relative error to"
      " that of the sequence's reverse KL; variance: trace of"
      " the covariance of a response's gradient, without a critic and with a"
      " perfect one (v); sampled: n |mean − expectation|² / variance, over"
      " batches of n samples, in theory 1, and half of its 95 % interval",
      of,
      shown=False,
    )
    for name, of in rows.items()
  }
  return {"gradients": over_models, "models": by_model} | everything
