"""What the study `beta_regimes` writes: its tables and its paragraph."""

from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.studies import intervals, study
from rlhf_jax.studies.beta_regimes import rule


def bands_table(
  bands: Sequence[rule.Band],
  models: Sequence[rule.Model],
  agreed: Mapping[str, Sequence[bool]],
) -> study.Table:
  """What is seen in each band, and whether the claim says so."""
  rows = [
    (
      band.name,
      band.word,
      m.pairs,
      _counted([m.words[place] for place in band.places]),
      float(m.runs.gold[list(band.places)].mean()),
      float(m.runs.kl[list(band.places)].mean()),
      _lost(m, band),
      agreed[band.name][i],
    )
    for band in bands
    for i, m in enumerate(models)
  ]
  return study.Table(
    "For each band of β: the claim's word; pairs of the reward model; what its"
    " β are seen to do; means of gold gained, reward units, and KL, nats per"
    " response; how many runs end with less gold than the SFT policy. Under the"
    " fewest pairs the conservative band is to have more gold than the standard"
    " one",
    ("β", "claim", "pairs", "seen", "gold", "KL", "lost", "agrees"),
    rows,
  )


def _lost(model: rule.Model, band: rule.Band) -> str:
  """Runs that end with less gold than the SFT policy."""
  gained = model.runs.gold[list(band.places)]
  return f"{np.sum(gained < 0)} of {gained.size}"


def _counted(words: Sequence[str]) -> str:
  return ", ".join(
    f"{word} {words.count(word)}" for word in dict.fromkeys(words)
  )


def models_table(
  betas: Sequence[float],
  models: Sequence[rule.Model],
  useful: Sequence[intervals.Interval],
) -> study.Table:
  """How good each reward model is, and what the best β is under it."""
  rows = [
    (
      m.pairs,
      m.steps,
      m.correlation,
      m.spread,
      betas[rule.best(m.runs)],
      betas[rule.best(m.runs)] * m.spread,
      float(m.runs.gold.mean(axis=1).max()),
      str(conservative),
    )
    for m, conservative in zip(models, useful)
  ]
  return study.Table(
    "Reward models: pairs; steps; correlation of score and gold on the SFT"
    " policy's responses; sd of raw scores; best β, and times the sd; the gold"
    " that it gains; gold of the conservative band less that of the standard"
    " one, with a 95 % interval",
    (
      *("pairs", "steps", "correlation", "sd", "best β", "β · sd", "gold"),
      "conservative − standard",
    ),
    rows,
  )


def betas_table(
  config: ConfigDict, betas: Sequence[float], models: Sequence[rule.Model]
) -> study.Table:
  """Means over seeds, and the words."""
  rows = [
    (
      m.pairs,
      f"{beta:g}",
      *(float(of[i].mean()) for of in m.runs),
      m.words[i],
    )
    for m in models
    for i, beta in enumerate(betas)
  ]
  return study.Table(
    f"Every β: means over {config.seeds} seeds and the last {config.window}"
    " steps; gains since the SFT policy, reward units; KL, nats per response",
    ("pairs", "β", "proxy", "gold", "KL", "seen"),
    rows,
  )


def runs_table(
  config: ConfigDict, betas: Sequence[float], models: Sequence[rule.Model]
) -> study.Table:
  """Every run, for who wants another statistic."""
  rows = [
    (m.pairs, f"{beta:g}", config.seed + j, *(float(of[i, j]) for of in m.runs))
    for m in models
    for i, beta in enumerate(betas)
    for j in range(config.seeds)
  ]
  return study.Table(
    "Every run, as the table of β",
    ("pairs", "β", "seed", "proxy", "gold", "KL"),
    rows,
    shown=False,
  )


def paragraph(
  config: ConfigDict,
  betas: Sequence[float],
  bands: Sequence[rule.Band],
  models: Sequence[rule.Model],
  agreed: Mapping[str, Sequence[bool]],
  useful: Sequence[intervals.Interval],
) -> str:
  """What each band does, and the best β of each reward model."""
  said = []
  for band in bands:
    seen = [
      f"{_counted([m.words[place] for place in band.places])} ({m.pairs}"
      f" pairs, {_lost(m, band)})"
      for m in models
    ]
    said.append(f"{band.name}, said to be {band.word}: {'; '.join(seen)}")
  bests = [
    f"{betas[rule.best(m.runs)]:g} ({m.pairs} pairs, correlation with gold"
    f" {m.correlation:.2f})"
    for m in models
  ]
  gains = [
    f"{interval} ({m.pairs} pairs)" for interval, m in zip(useful, models)
  ]
  right = sum(map(all, agreed.values()))
  return (
    f"{right} of {len(bands)} bands of β are what the claim says, under all"
    f" reward models, after {config.training.train.steps} steps. How many β are"
    " seen to do what, and how many runs end with less gold than the SFT"
    f" policy: {'. '.join(said)}. The best β is {', '.join(bests)}."
    f" The conservative band has {', '.join(gains)} more gold than the standard"
    " one."
  )
