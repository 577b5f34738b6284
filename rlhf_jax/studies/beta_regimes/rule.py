"""Regimes of β: what the study `beta_regimes` calls by which word.

Under one reward model every β has a gain in proxy and in gold, a value a seed.
With the best β the one of the highest mean gold, a β

- barely moves, where its proxy gains less than a little of the largest gain;
- is standard, where it has most of the best β's gain in gold;
- hacks, where gold lacks more, and the proxy is above the best β's;
- is conservative, where gold lacks more, and the proxy is below the best β's.

Less, above and the like are said of 95 % intervals of differences of pairs;
what they leave open is unclear. Few seeds give wide intervals, so that the
neighbours in a band pool their variance: they are alike in what they are.
The best β is chosen by the same runs, which makes its gain a little too large.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from rlhf_jax.studies import intervals, study

BARELY, STANDARD = "barely moves", "standard"
HACKS, CONSERVATIVE = "hacks", "conservative"
UNCLEAR = "unclear"


class Runs(NamedTuple):
  """Runs under one reward model, `[β, seed]`.

  Gains of rewards since the SFT policy, reward units; KL, nats per response.
  """

  proxy: np.ndarray
  gold: np.ndarray
  kl: np.ndarray


class Model(NamedTuple):
  """A reward model, and what PPO makes of it.

  Attributes:
    pairs: That it was made from.
    steps: Of its training.
    correlation: Of score and gold, over responses of the SFT policy.
    spread: Standard deviation of its raw scores, raw units: β in raw units per
      nat is β times this.
    runs: Of every β.
    words: For each β, as seen.
  """

  pairs: int
  steps: int
  correlation: float
  spread: float
  runs: Runs
  words: list[str]


class Band(NamedTuple):
  """Neighbouring β of which the claim says one word.

  Attributes:
    name: Such as `0.02 to 0.1`.
    word: The claim's.
    places: Of its β among all.
  """

  name: str
  word: str
  places: range


def bands(betas: Sequence[tuple[str, Sequence[float]]]) -> list[Band]:
  """The bands of words with their β, one after the other."""
  found, first = [], 0
  for word, of in betas:
    places = range(first, first + len(of))
    name = " to ".join(f"{beta:g}" for beta in dict.fromkeys((of[0], of[-1])))
    found.append(Band(name, word, places))
    first = places.stop
  return found


def pooled(values: np.ndarray) -> list[intervals.Interval]:
  """Student's 95 % interval of each row's mean, from the variance of all.

  Rows are β of a band, columns are seeds; each row has its own mean.
  """
  rows, seeds = values.shape
  error = math.sqrt(values.var(axis=1, ddof=1).mean() / seeds)
  half = float(stats.t.ppf(0.975, rows * (seeds - 1))) * error
  return [
    intervals.Interval(mean, mean - half, mean + half)
    for mean in map(float, values.mean(axis=1))
  ]


def best(runs: Runs) -> int:
  """The place of the β with the most gold."""
  return int(runs.gold.mean(axis=1).argmax())


def regimes(
  runs: Runs, all_bands: Sequence[Band], *, most: float, little: float
) -> list[str]:
  """The word for each β, by what is seen."""
  place, largest = best(runs), int(runs.proxy.mean(axis=1).argmax())
  words = []
  for band in all_bands:
    of = list(band.places)
    moves = pooled(runs.proxy[of] - little * runs.proxy[largest])
    enough = pooled(runs.gold[of] - most * runs.gold[place])
    above = pooled(runs.proxy[of] - runs.proxy[place])
    words += map(_word, moves, enough, above)
  return words


def _word(
  moves: intervals.Interval,
  enough: intervals.Interval,
  above: intervals.Interval,
) -> str:
  if moves.high < 0:
    return BARELY
  if enough.low >= 0:
    return STANDARD
  if enough.high < 0 and above.low > 0:
    return HACKS
  if enough.high < 0 and above.high < 0:
    return CONSERVATIVE
  return UNCLEAR


def more_gold(runs: Runs, band: Band, than: Band) -> intervals.Interval:
  """Gold that a band's β have in the mean more than another band's.

  Student's 95 % interval; the variance is that between the seeds of each β.
  """
  pair = [runs.gold[list(of.places)] for of in (band, than)]
  difference = float(pair[0].mean() - pair[1].mean())
  variance = sum(float(x.var(axis=1, ddof=1).mean()) / x.size for x in pair)
  freedom = sum(x.shape[0] * (x.shape[1] - 1) for x in pair)
  half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(variance)
  return intervals.Interval(difference, difference - half, difference + half)


def agreements(
  words: Sequence[Sequence[str]],
  all_bands: Sequence[Band],
  useful: intervals.Interval,
) -> dict[str, list[bool]]:
  """Per band, whether each reward model's β are what the claim says.

  Args:
    words: For each reward model, the weakest first, those of `regimes`.
    all_bands: The claim's.
    useful: Gold that the conservative band has more than the standard one has
      under the weakest reward model, of which the claim says that it is useful.
  """
  found = {}
  for band in all_bands:
    found[band.name] = [
      all(of[place] == band.word for place in band.places) for of in words
    ]
    if band.word == CONSERVATIVE:
      found[band.name][0] = useful.low > 0
  return found


def verdict(agreed: dict[str, list[bool]]) -> str:
  """The rule: a band is right where it is so for every reward model."""
  conditions = {name: all(of) for name, of in agreed.items()}
  return study.verdict(conditions, "β is")
