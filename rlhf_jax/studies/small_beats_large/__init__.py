"""Is a small RLHF policy preferred to a raw model 100 times its size?

A small language model, a reward model of the same size on top of it, PPO from
both with several seeds, and a large language model. The two language models
are trained alike, by next-token prediction on the texts of the built-in
language, for as many steps; only PPO has seen preferences. The judge is the
gold reward, on responses to held-out prompts. A seed draws PPO's samples, and
the prompts, responses and texts of a comparison; it is one observation, and
intervals are over seeds. The models that PPO begins with, and the large one,
are the same throughout.

That the large model is large is not enough: it must be the better language
model as well, by its loss on texts that neither was trained on.

Differs from the paper: GPT-3 was pretrained on another distribution than that
of its instructions, and prompted; here the large model was trained on just the
texts that the small one's SFT saw. All that it lacks is RLHF. And size buys
little here: the language is so plain that the small model comes within some
hundredths of a nat of its entropy, so that the two are nearly even before RLHF,
where GPT-3 of 175B is far ahead of that of 1.3B.
"""

from typing import NamedTuple

import jax
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax import errors
from rlhf_jax.models import transformer
from rlhf_jax.settings import devices, validate
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.studies import intervals, limits, study, toy_runs
from rlhf_jax.studies.small_beats_large import figure as figure_lib
from rlhf_jax.studies.small_beats_large import models as models_lib
from rlhf_jax.text import toy_language

_LARGE = {"stage": "sft", "policy.path": "", "data.path": ""}


class Judged(NamedTuple):
  """A model over all seeds; `low` and `high` end 95 % intervals."""

  model: str
  parameters: int
  above_floor: float
  gold: float
  gold_low: float
  gold_high: float
  wins: float
  wins_low: float
  wins_high: float
  by_score: float


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense.

  Raises:
    UserError: With the field, its value and what is wanted.
  """
  limits.check(
    config,
    {
      "times": limits.Limit("above 1", lambda x: x > 1),
      "seeds": limits.SEEDS,
      "prompts": limits.at_least(2),
    },
  )
  toy_runs.check(config, {"sweep": _sweep(config)}, {"sweep.seeds": ()})
  only = "it is only pretrained, on the built-in language"
  limits.check(
    config,
    {
      f"large.{field}": limits.Limit(
        f"{value!r}: {only}", lambda x, value=value: x == value
      )
      for field, value in _LARGE.items()
    },
  )
  try:
    validate.validate(config.large, device_count=devices.count())
  except errors.UserError as error:
    line = str(error).replace("config.", "config.large.", 1)
    raise errors.UserError(line) from error
  small, large = map(_parameters, (config.training, config.large))
  wanted = limits.Limit(
    f"at most {large / small:.1f}: large has {large:,} parameters and training"
    f" {small:,}",
    lambda times: times * small <= large,
  )
  limits.check(config, {"times": wanted})


def run(lab: study.Lab) -> study.Outcome:
  """Makes the models, in sub-workdirs, and compares them."""
  config = lab.config
  begun = toy_runs.start(lab)
  large = toy_runs.made(lab, "large", config.large)
  models = models_lib.Models(config, begun, large)
  measured, samples = [], []
  for member in toy_runs.swept(lab, "ppo", _sweep(config), begun):
    rows, texts = models.compare(member, lab.console)
    measured += rows
    samples = samples or texts
  judged = [
    judge(measured, model)
    for model in (models_lib.SMALL, models_lib.RLHF, models_lib.LARGE)
  ]
  return study.Outcome(
    verdict=verdict(measured),
    paragraph=_paragraph(config, measured, judged),
    tables=_tables(config, measured, judged, samples),
    figure=figure_lib.draw(measured, judged),
  )


def verdict(measured: list[models_lib.Measured]) -> str:
  """The rule: the small policy wins, against the better language model.

  Both by intervals over seeds: more than half of the prompts, and a loss that
  is lower than that of the small language model.
  """
  wins = intervals.of_mean(_column(measured, models_lib.RLHF, "wins"))
  lead = intervals.of_difference(
    _column(measured, models_lib.SMALL, "nll"),
    _column(measured, models_lib.LARGE, "nll"),
  )
  holds = wins.low > 0.5 and lead.low > 0
  return study.HOLDS if holds else study.DOES_NOT_HOLD


def judge(measured: list[models_lib.Measured], model: str) -> Judged:
  """One model's means, with intervals over seeds."""
  column = lambda field: _column(measured, model, field)
  return Judged(
    model,
    int(column("parameters")[0]),
    float(np.mean(column("above_floor"))),
    *intervals.of_mean(column("gold")),
    *intervals.of_mean(column("wins")),
    float(np.mean(column("wins_by_score"))),
  )


def _column(
  measured: list[models_lib.Measured], model: str, field: str
) -> list[float]:
  return [row._asdict()[field] for row in measured if row.model == model]


def _sweep(config: ConfigDict) -> ConfigDict:
  seeds = tuple(range(config.seed, config.seed + config.seeds))
  return toy_runs.varied(config.training, {"sweep.seeds": seeds})


def _parameters(config: ConfigDict) -> int:
  """Of the model that would start at random."""
  vocab_size = len(toy_language.of(config).vocabulary)
  model = pretrained_lib.architecture(config, vocab_size=vocab_size)
  return models_lib.count(
    jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))
  )


def _tables(config, measured, judged, samples) -> dict[str, study.Table]:
  return {
    "models": study.Table(
      f"Means over {config.seeds} seeds, lo and hi: ends of 95 % intervals."
      " excess: held-out loss above the language's entropy, nats per token;"
      f" gold reward; wins: share of {config.prompts} held-out prompts where"
      " its gold is above the large model's, a tie counting half; the same by"
      " the reward model's score",
      (
        *("model", "parameters", "excess", "gold", "gold_lo", "gold_hi"),
        *("wins", "wins_lo", "wins_hi", "by_score"),
      ),
      [_without_itself(row) for row in judged],
    ),
    "samples": study.Table(
      f"What they write, seed {config.seed}; | ends the prompt",
      ("model", "text"),
      samples,
    ),
    "seeds": study.Table(
      "Every seed; the intervals of wins are over its prompts",
      models_lib.Measured._fields,
      measured,
      shown=False,
    ),
  }


def _without_itself(row: Judged) -> tuple[study.Cell, ...]:
  """The large model does not play against itself."""
  if row.model != models_lib.LARGE:
    return row
  return (*row[: Judged._fields.index("wins")], None, None, None, None)


def _paragraph(config, measured, judged) -> str:
  small, rlhf, large = judged
  nats = float(np.mean(_column(measured, models_lib.RLHF, "kl")))
  lead = intervals.of_difference(
    _column(measured, models_lib.SMALL, "nll"),
    _column(measured, models_lib.LARGE, "nll"),
  )
  return (
    f"The RLHF policy of {rlhf.parameters:,} parameters is preferred to the raw"
    f" model of {large.parameters:,}"
    f" ({large.parameters / rlhf.parameters:.1f} times as many) on"
    f" {rlhf.wins:.1%} of held-out prompts ({rlhf.wins_low:.1%} to"
    f" {rlhf.wins_high:.1%} over {config.seeds} seeds). Before PPO it was on"
    f" {small.wins:.1%} ({small.wins_low:.1%} to {small.wins_high:.1%}). Mean"
    f" gold: {small.gold:.2f} before PPO, {rlhf.gold:.2f} after it at"
    f" {nats:.1f} nats, {large.gold:.2f} of the large model, whose held-out"
    f" loss is lower than the small one's by {lead.mean:.3f} nats per token"
    f" ({lead.low:.3f} to {lead.high:.3f}): {large.above_floor:.3f} above the"
    f" language's entropy against {small.above_floor:.3f}, and"
    f" {rlhf.above_floor:.3f} after PPO."
  )
