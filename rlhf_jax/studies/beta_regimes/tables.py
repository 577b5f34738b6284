"""What the study `beta_regimes` writes: its tables and its paragraph."""

from collections.abc import Mapping, Sequence

from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.studies import intervals, study
from rlhf_jax.studies.beta_regimes import rule


def bands_table(
  bands: Sequence[rule.Band],
  models: Sequence[rule.Model],
  agreed: Mapping[str, Sequence[str]],
) -> study.Table:
  """What each band gains, and whether its β are what the claim says."""
  rows = [
    (
      band.name,
      band.word,
      m.pairs,
      str(_gold(m, band)),
      float(m.runs.kl[list(band.places)].mean()),
      _lost(m, band),
      agreed[band.name][i],
    )
    for band in bands
    for i, m in enumerate(models)
  ]
  return study.Table(
    "For each band of β: the claim's word; pairs of the reward model; means of"
    " gold gained, reward units, with a 95 % interval over seeds, and of KL,"
    " nats per response; how many runs end with less gold than the SFT policy;"
    " whether all of its β are seen to do what the claim says. Under the fewest"
    " pairs the conservative band is to have more gold than the standard one",
    ("β", "claim", "pairs", "gold", "KL", "lost", "agrees"),
    rows,
  )


def _gold(model: rule.Model, band: rule.Band) -> intervals.Interval:
  """The mean of the band's β."""
  return intervals.of_mean(rule.gold_of(model.runs, band))


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
      *(str(intervals.of_mean(of[i])) for of in (m.runs.proxy, m.runs.gold)),
      float(m.runs.kl[i].mean()),
      m.words[i],
    )
    for m in models
    for i, beta in enumerate(betas)
  ]
  return study.Table(
    f"Every β: means over {config.seeds} seeds and the last {config.window}"
    " steps; gains since the SFT policy, reward units, with 95 % intervals; KL,"
    " nats per response",
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
  agreed: Mapping[str, Sequence[str]],
  useful: Sequence[intervals.Interval],
) -> str:
  """Which bands agree, what is seen in each of them, and the best β."""
  of_pairs = lambda of: "; ".join(
    f"{text} ({m.pairs} pairs)" for text, m in zip(of, models)
  )
  agreements = [
    f"{band.name} ({band.word}) {_counted(agreed[band.name])}" for band in bands
  ]
  seen = {
    band.name: [
      f"{_gold(m, band)}, {_lost(m, band)},"
      f" {_counted([m.words[place] for place in band.places])}"
      for m in models
    ]
    for band in bands
  }
  standard, conservative = bands[1:3]
  bests = [
    f"{betas[rule.best(m.runs)]:g}, correlation with gold {m.correlation:.2f}"
    for m in models
  ]
  return (
    f"With how many of {len(models)} reward models β is what the claim says"
    f" after {config.training.train.steps} steps: {'; '.join(agreements)}. Gold"
    " gained in the mean of a band, how many runs lost some, and what its β are"
    " seen to do:"
    f" {'. '.join(f'{name}: {of_pairs(of)}' for name, of in seen.items())}."
    f" The best β: {of_pairs(bests)}. Gold of {conservative.name} less that of"
    f" {standard.name}: {of_pairs(useful)}."
  )
