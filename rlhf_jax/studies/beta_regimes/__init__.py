"""Which regimes does β have, for this reward scale and these reward models?

PPO on the built-in language under twelve β at once, with reward models that
were made from few, medium and many pairs; each is normalised on responses of
the SFT policy, so that β has the same unit for all: their standard deviation
per nat of a response. The claim names a word for each of four bands of β;
`rule` says which word is seen.

Left out: reward models of several seeds. Each size has one, and what is seen
of it is no statement on all of its size.
"""

from collections.abc import Sequence
import itertools
import math
import pathlib

from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.studies import held_out, limits, study, toy_runs
from rlhf_jax.studies.beta_regimes import figure as figure_lib
from rlhf_jax.studies.beta_regimes import rule
from rlhf_jax.studies.beta_regimes import tables as tables_lib

_FIXED = {
  "kl.controller": "fixed",
  "kl.beta": 0.05,
  "sweep.seeds": (),
  "pipeline.reward_model.data.size": 2048,
  "pipeline.reward_model.train.steps": 150,
}
_BANDS = {
  "hacks": rule.HACKS,
  "standard": rule.STANDARD,
  "conservative": rule.CONSERVATIVE,
  "barely_moves": rule.BARELY,
}


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense."""
  above, last = "", -math.inf
  for name in _BANDS:
    rising = lambda xs, last=last: limits.is_rising(xs, above=last)
    limits.check(config, {name: limits.Limit(f"rising numbers{above}", rising)})
    above = f" above the last of config.{name}={config[name]}"
    last = config[name][-1]
  count = len(config.pairs)
  limits.check(
    config,
    {
      "pairs": limits.Limit(
        "2 or more rising numbers", lambda xs: limits.is_rising(xs, count=2)
      ),
      "reward_steps": limits.Limit(
        f"as many numbers above 0 as config.pairs={config.pairs}",
        lambda xs: len(xs) == count and min(xs) > 0,
      ),
      "seeds": limits.SEEDS,
      "window": limits.steps_of(config),
      "prompts": limits.at_least(3),
      "most little": limits.inside(0, 1),
    },
  )
  toy_runs.check(config, {"sweep": _sweep(config)}, _FIXED)


def run(lab: study.Lab) -> study.Outcome:
  """Does the reward models and a sweep with each."""
  config = lab.config
  bands = rule.bands([(word, config[name]) for name, word in _BANDS.items()])
  sft = config.training.pipeline.sft
  policy = toy_runs.made(lab, "sft", sft)
  models = [
    _model(lab, policy, pairs, steps)
    for pairs, steps in zip(config.pairs, config.reward_steps)
  ]
  standard, conservative = bands[1:3]
  useful = [rule.more_gold(m.runs, conservative, standard) for m in models]
  agreed = rule.agreements([m.words for m in models], bands, useful[0])
  betas = _sweep(config).sweep.betas
  return study.Outcome(
    verdict=rule.verdict(agreed),
    paragraph=tables_lib.paragraph(
      config, betas, bands, models, agreed, useful
    ),
    tables={
      "bands": tables_lib.bands_table(bands, models, agreed),
      "models": tables_lib.models_table(betas, models, useful),
      "betas": tables_lib.betas_table(config, betas, models),
      "runs": tables_lib.runs_table(config, betas, models),
    },
    figure=figure_lib.draw(betas, bands, models),
  )


def _model(
  lab: study.Lab, policy: pathlib.Path, pairs: int, steps: int
) -> rule.Model:
  """Makes a reward model and the runs with it."""
  config = lab.config
  fields = {
    "policy.path": str(policy),
    "data.size": pairs,
    "train.steps": steps,
  }
  reward = toy_runs.made(
    lab,
    f"reward_model-{pairs}",
    toy_runs.varied(config.training.pipeline.reward_model, fields),
  )
  gold = toy_runs.summary(policy)["metrics"]["reward/gold"]
  begun = toy_runs.Start(policy, reward, gold)
  sweep = toy_runs.from_start(_sweep(config), begun)
  members = toy_runs.members(toy_runs.made(lab, f"sweep-{pairs}", sweep))
  seeds = sweep.sweep.seeds
  start = held_out.measure(
    config.training,
    begun,
    [(policy, seed) for seed in seeds],
    prompts=config.prompts,
  )
  runs = runs_of(members, start, window=config.window)
  scores, golds = (np.concatenate([r[i] for r in start]) for i in (0, 1))
  return rule.Model(
    pairs,
    steps,
    float(np.corrcoef(scores, golds)[0, 1]),
    toy_runs.summary(reward)["metrics"]["reward_model/raw_std"],
    runs,
    rule.regimes(runs, most=config.most, little=config.little),
  )


def runs_of(
  members: Sequence[toy_runs.Member],
  start: Sequence[held_out.Responses],
  *,
  window: int,
) -> rule.Runs:
  """Means over the last steps, of rewards less the SFT policy's of the seed.

  Args:
    members: All seeds of the first β, then those of the next.
    start: For each seed, the SFT policy's responses.
    window: Steps.
  """
  end = lambda name: np.array(
    [toy_runs.column(m.rows, name)[-window:].mean() for m in members]
  ).reshape(-1, len(start))
  return rule.Runs(
    proxy=end("reward/score") - [r.score.mean() for r in start],
    gold=end("reward/gold") - [r.gold.mean() for r in start],
    kl=end("kl/reverse_exact"),
  )


def _sweep(config: ConfigDict) -> ConfigDict:
  betas = itertools.chain(*(config[name] for name in _BANDS))
  seeds = range(config.seed, config.seed + config.seeds)
  fields = {"sweep.betas": tuple(betas), "sweep.seeds": tuple(seeds)}
  return toy_runs.varied(config.training, fields)
