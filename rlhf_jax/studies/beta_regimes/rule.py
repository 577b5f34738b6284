"""Regimes of β: what the study `beta_regimes` calls by which word.

Under one reward model every β has a gain in proxy and in gold, a value a seed.
With the best β the one of the highest mean gold, a β

- barely moves, where its proxy gains less than a little of the largest gain;
- is standard, where it has most of the best β's gain in gold;
- hacks, where gold lacks more, and the proxy is above the best β's;
- is conservative, where gold lacks more, and the proxy is below the best β's.

Less, above and the like are said of 95 % intervals over seeds, of differences
of pairs; what they leave open is unclear. The β of a band share their seeds,
the prompts and the SFT policy's figure, so that a band has no more observations
than a β has: one a seed. The best β is chosen by the same runs, which makes its
gain a little too large.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhf_jax.studies import intervals, study

BARELY, STANDARD = "barely moves", "standard"
HACKS, CONSERVATIVE = "hacks", "conservative"
AGREES, DIFFERS = "yes", "no"  # with the claim
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


def best(runs: Runs) -> int:
  """The place of the β with the most gold."""
  return int(runs.gold.mean(axis=1).argmax())


def regimes(runs: Runs, *, most: float, little: float) -> list[str]:
  """The word for each β, by what is seen."""
  most_gold, most_proxy = best(runs), int(runs.proxy.mean(axis=1).argmax())
  less = intervals.of_difference
  return [
    _word(
      moves=less(proxy, little * runs.proxy[most_proxy]),
      enough=less(gold, most * runs.gold[most_gold]),
      above=less(proxy, runs.proxy[most_gold]),
    )
    for proxy, gold in zip(runs.proxy, runs.gold)
  ]


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


def gold_of(runs: Runs, band: Band) -> np.ndarray:
  """The mean gold of a band's β, a value a seed."""
  return runs.gold[list(band.places)].mean(axis=0)


def more_gold(runs: Runs, band: Band, than: Band) -> intervals.Interval:
  """Gold that a band's β have in the mean more than another band's."""
  return intervals.of_difference(gold_of(runs, band), gold_of(runs, than))


def agreements(
  words: Sequence[Sequence[str]],
  all_bands: Sequence[Band],
  useful: intervals.Interval,
) -> dict[str, list[str]]:
  """Per band, whether each reward model's β are what the claim says.

  `AGREES` if all β of the band are; `UNCLEAR` if others are seen to be nothing
  else; otherwise `DIFFERS`.

  Args:
    words: For each reward model, the weakest first, those of `regimes`.
    all_bands: The claim's.
    useful: Gold that the conservative band has more than the standard one has
      under the weakest reward model, of which the claim says that it is useful.
  """
  found = {}
  for band in all_bands:
    found[band.name] = [
      _agreement(band.word, {of[place] for place in band.places})
      for of in words
    ]
    if band.word == CONSERVATIVE:
      found[band.name][0] = _usefulness(useful)
  return found


def _agreement(word: str, seen: set[str]) -> str:
  if seen == {word}:
    return AGREES
  return UNCLEAR if seen <= {word, UNCLEAR} else DIFFERS


def _usefulness(gold: intervals.Interval) -> str:
  if gold.low > 0:
    return AGREES
  return DIFFERS if gold.high < 0 else UNCLEAR


def verdict(agreed: dict[str, list[str]]) -> str:
  """The rule: a band is right where it is so for every reward model."""
  conditions = {name: {*of} == {AGREES} for name, of in agreed.items()}
  return study.verdict(conditions, "β is")
