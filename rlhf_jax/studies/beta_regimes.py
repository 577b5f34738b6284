"""Which regimes does β have, for this reward scale and these reward models?

PPO on the built-in language under twelve β at once, with reward models that
were made from few, medium and many pairs; each is normalised on responses of
the SFT policy, so that β has the same unit for all: their standard deviation
per nat of a response. The claim names a word for each of four bands of β.

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

Left out: reward models of several seeds. Each size has one, and what is seen
of it is no statement on all of its size.
"""

from collections.abc import Iterable, Mapping, Sequence
import math
import pathlib
from typing import Any, NamedTuple

from matplotlib import figure as matplotlib_figure
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.studies import (
  drawing,
  held_out,
  intervals,
  limits,
  study,
  toy_runs,
)

BARELY, STANDARD = "barely moves", "standard"
HACKS, CONSERVATIVE = "hacks", "conservative"
AGREES, DIFFERS = "yes", "no"  # with the claim
UNCLEAR = "unclear"
# The claim's words, in the order of β, by the config's fields.
_BANDS = {
  "hacks": HACKS,
  "standard": STANDARD,
  "conservative": CONSERVATIVE,
  "barely_moves": BARELY,
}
_FIXED = toy_runs.SWEPT | {
  "kl.beta": 0.05,
  "pipeline.reward_model.data.size": 2048,
  "pipeline.reward_model.train.steps": 150,
}
_COLOURS = {
  HACKS: drawing.ORANGE,
  STANDARD: drawing.GREEN,
  CONSERVATIVE: drawing.SKY,
  BARELY: drawing.GREY,
  UNCLEAR: "white",
}
_DOT: dict[str, Any] = {
  "marker": "o",
  "linestyle": "",
  "markeredgecolor": "black",
  "markersize": 8,
}


class Runs(NamedTuple):
  """Runs under one reward model, `[β, seed]`.

  Gains of rewards since the SFT policy, reward units; KL, nats per response.
  """

  proxy: np.ndarray
  gold: np.ndarray
  kl: np.ndarray

  @property
  def best(self) -> int:
    """The place of the β with the most gold."""
    return int(self.gold.mean(axis=1).argmax())


class Model(NamedTuple):
  """A reward model, and what PPO makes of it.

  `correlation` is of score and gold, over responses of the SFT policy; `spread`
  the standard deviation of its raw scores, raw units: β in raw units per nat is
  β times this. It has a word, as seen, for each β.
  """

  pairs: int
  steps: int
  correlation: float
  spread: float
  runs: Runs
  words: list[str]


class Band(NamedTuple):
  """Neighbouring β, by their places, of which the claim says one word."""

  name: str
  word: str
  places: range


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
      "pairs": limits.rising(2),
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
  policy = toy_runs.made(lab, "sft", config.training.pipeline.sft)
  models = [
    _model(lab, policy, pairs, steps)
    for pairs, steps in zip(config.pairs, config.reward_steps)
  ]
  bands = bands_of((word, config[name]) for name, word in _BANDS.items())
  _, standard, conservative, _ = bands
  useful = [more_gold(m.runs, conservative, standard) for m in models]
  agreed = agreements([m.words for m in models], bands, useful[0])
  betas = _sweep(config).sweep.betas
  return study.Outcome(
    verdict=verdict(agreed),
    paragraph=paragraph(config, betas, bands, models, agreed, useful),
    tables=_tables(config, betas, bands, models, agreed, useful),
    figure=_draw(betas, bands, models),
  )


def _model(
  lab: study.Lab, policy: pathlib.Path, pairs: int, steps: int
) -> Model:
  """Makes a reward model and the runs with it."""
  config = lab.config
  fields = {"data.size": pairs, "train.steps": steps}
  fields |= {"policy.path": str(policy)}
  training = toy_runs.varied(config.training.pipeline.reward_model, fields)
  reward = toy_runs.made(lab, f"reward_model-{pairs}", training)
  gold = toy_runs.summary(policy)["metrics"]["reward/gold"]
  begun = toy_runs.Start(policy, reward, gold)
  members = toy_runs.swept(lab, f"sweep-{pairs}", _sweep(config), begun)
  policies = [(policy, seed) for seed in toy_runs.seeds(config)]
  start = held_out.measure(
    config.training, begun, policies, prompts=config.prompts
  )
  runs = runs_of(members, start, window=config.window)
  scores, golds = (np.concatenate([r[i] for r in start]) for i in (0, 1))
  return Model(
    pairs,
    steps,
    float(np.corrcoef(scores, golds)[0, 1]),
    toy_runs.summary(reward)["metrics"]["reward_model/raw_std"],
    runs,
    regimes(runs, most=config.most, little=config.little),
  )


def runs_of(
  members: Sequence[toy_runs.Member],
  start: Sequence[held_out.Responses],
  *,
  window: int,
) -> Runs:
  """Means over the last steps, of rewards less the SFT policy's of the seed.

  Members are all seeds of the first β, then those of the next; `start` has the
  SFT policy's responses for each seed.
  """
  names = "reward/score", "reward/gold", "kl/reverse_exact"
  proxy, gold, kl = (
    toy_runs.ends(members, name, last=window).reshape(-1, len(start))
    for name in names
  )
  proxy -= [responses.score.mean() for responses in start]
  gold -= [responses.gold.mean() for responses in start]
  return Runs(proxy, gold, kl)


def _sweep(config: ConfigDict) -> ConfigDict:
  return toy_runs.sweep(config, [b for name in _BANDS for b in config[name]])


def bands_of(betas: Iterable[tuple[str, Sequence[float]]]) -> list[Band]:
  """The bands of words with their β, one after the other."""
  found, first = [], 0
  for word, of in betas:
    places = range(first, first + len(of))
    name = " to ".join(f"{beta:g}" for beta in dict.fromkeys((of[0], of[-1])))
    found.append(Band(name, word, places))
    first = places.stop
  return found


def regimes(runs: Runs, *, most: float, little: float) -> list[str]:
  """The word for each β, by what is seen."""
  most_gold, most_proxy = runs.best, int(runs.proxy.mean(axis=1).argmax())
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
  bands: Sequence[Band],
  useful: intervals.Interval,
) -> dict[str, list[str]]:
  """Per band, whether each reward model's β, the weakest's first, are as said.

  `AGREES` if all β of the band are; `UNCLEAR` if others are seen to be nothing
  else; otherwise `DIFFERS`. Of the weakest reward model the claim says that the
  conservative band is useful: `useful` is the gold that this has there more
  than the standard one.
  """
  found = {b.name: [_agreement(b, of) for of in words] for b in bands}
  for band in bands:
    if band.word == CONSERVATIVE:
      found[band.name][0] = _usefulness(useful)
  return found


def _agreement(band: Band, words: Sequence[str]) -> str:
  seen = {words[place] for place in band.places}
  if seen == {band.word}:
    return AGREES
  return UNCLEAR if seen <= {band.word, UNCLEAR} else DIFFERS


def _usefulness(gold: intervals.Interval) -> str:
  if gold.low > 0:
    return AGREES
  return DIFFERS if gold.high < 0 else UNCLEAR


def verdict(agreed: Mapping[str, Sequence[str]]) -> str:
  """The rule: a band is right where it is so for every reward model."""
  conditions = {name: {*of} == {AGREES} for name, of in agreed.items()}
  return study.verdict(conditions, "β is")


def _tables(
  config: ConfigDict,
  betas: Sequence[float],
  bands: Sequence[Band],
  models: Sequence[Model],
  agreed: Mapping[str, Sequence[str]],
  useful: Sequence[intervals.Interval],
) -> dict[str, study.Table]:
  bests = [betas[m.runs.best] for m in models]
  return {
    "bands": _bands_table(bands, models, agreed),
    "models": study.Table(
      "Reward models: pairs; steps; correlation of score and gold on the SFT"
      " policy's responses; sd of raw scores; best β, and times the sd; the"
      " gold that it gains; gold of the conservative band less that of the"
      " standard one, with a 95 % interval",
      (
        *("pairs", "steps", "correlation", "sd", "best β", "β · sd", "gold"),
        "conservative − standard",
      ),
      [
        (*m[:4], beta, beta * m.spread, m.runs.gold.mean(axis=1).max(), more)
        for m, beta, more in zip(models, bests, useful)
      ],
    ),
    "betas": study.Table(
      f"Every β: means over {config.seeds} seeds and the last {config.window}"
      " steps; gains since the SFT policy, reward units, with 95 % intervals;"
      " KL, nats per response",
      ("pairs", "β", "proxy", "gold", "KL", "seen"),
      [
        (
          *(m.pairs, f"{beta:g}"),
          *(intervals.of_mean(proxy), intervals.of_mean(gold), kl.mean(), word),
        )
        for m in models
        for beta, proxy, gold, kl, word in zip(betas, *m.runs, m.words)
      ],
    ),
    "runs": toy_runs.every_run(
      config,
      "Every run, as the table of β",
      ("pairs", "β", "seed", "proxy", "gold", "KL"),
      {
        (m.pairs, f"{beta:g}"): of
        for m in models
        for beta, *of in zip(betas, *m.runs)
      },
    ),
  }


def _bands_table(
  bands: Sequence[Band],
  models: Sequence[Model],
  agreed: Mapping[str, Sequence[str]],
) -> study.Table:
  """What each band gains, and whether its β are what the claim says."""
  return study.Table(
    "For each band of β: the claim's word; pairs of the reward model; means"
    " of gold gained, reward units, with a 95 % interval over seeds, and of"
    " KL, nats per response; how many runs end with less gold than the SFT"
    " policy; whether all of its β are seen to do what the claim says. Under"
    " the fewest pairs the conservative band is to have more gold than the"
    " standard one",
    ("β", "claim", "pairs", "gold", "KL", "lost", "agrees"),
    [
      (
        *(band.name, band.word, m.pairs),
        intervals.of_mean(gold_of(m.runs, band)),
        m.runs.kl[list(band.places)].mean(),
        _lost(m.runs, band),
        agrees,
      )
      for band in bands
      for m, agrees in zip(models, agreed[band.name])
    ],
  )


def _lost(runs: Runs, band: Band) -> str:
  """Runs that end with less gold than the SFT policy."""
  gained = runs.gold[list(band.places)]
  return f"{np.sum(gained < 0)} of {gained.size}"


def _counted(words: Sequence[str]) -> str:
  return ", ".join(
    f"{word} {words.count(word)}" for word in dict.fromkeys(words)
  )


def paragraph(
  config: ConfigDict,
  betas: Sequence[float],
  bands: Sequence[Band],
  models: Sequence[Model],
  agreed: Mapping[str, Sequence[str]],
  useful: Sequence[intervals.Interval],
) -> str:
  """Which bands agree, what is seen in each of them, and the best β."""
  of_pairs = lambda of: "; ".join(
    f"{text} ({m.pairs} pairs)" for text, m in zip(of, models)
  )
  agreements = "; ".join(
    f"{band.name} ({band.word}) {_counted(agreed[band.name])}" for band in bands
  )
  seen = lambda band: of_pairs(
    f"{intervals.of_mean(gold_of(m.runs, band))}, {_lost(m.runs, band)},"
    f" {_counted([m.words[place] for place in band.places])}"
    for m in models
  )
  _, standard, conservative, _ = bands
  bests = [
    f"{betas[m.runs.best]:g}, correlation with gold {m.correlation:.2f}"
    for m in models
  ]
  return (
    f"With how many of {len(models)} reward models β is what the claim says"
    f" after {config.training.train.steps} steps: {agreements}. Gold gained in"
    " the mean of a band, how many runs lost some, and what its β are seen to"
    f" do: {'. '.join(f'{band.name}: {seen(band)}' for band in bands)}."
    f" The best β: {of_pairs(bests)}. Gold of {conservative.name} less that of"
    f" {standard.name}: {of_pairs(useful)}."
  )


def _draw(
  betas: Sequence[float], bands: Sequence[Band], models: Sequence[Model]
) -> matplotlib_figure.Figure:
  """A column a reward model: gains above, KL below, a place a β.

  Bands have the colour of the claim's word, dots that of the word which is
  seen: where they agree the dot is as its band.
  """
  figure = matplotlib_figure.Figure(figsize=(13.5, 6.4), layout="constrained")
  grid = {"sharex": True, "sharey": "row", "squeeze": False}
  axes = figure.subplots(2, len(models), height_ratios=(2, 1), **grid)
  places = np.arange(len(betas))
  for (top, low), model in zip(axes.T, models):
    for axis in (top, low):
      for band in bands:
        ends = band.places[0] - 0.5, band.places[-1] + 0.5
        axis.axvspan(*ends, color=_COLOURS[band.word], alpha=0.16, linewidth=0)
      axis.set_xlim(-0.5, len(betas) - 0.5)
      axis.spines[["top", "right"]].set_visible(False)
    _draw_gains(top, places, model)
    low.plot(places, model.runs.kl, "_", color="0.3")
    low.plot(places, model.runs.kl.mean(axis=1), color="0.3", linewidth=1.5)
    low.set_yscale("log")
    low.yaxis.set_major_formatter("{x:g}")
    low.set_xticks(places, [f"{beta:g}" for beta in betas], rotation=60)
    low.set_xlabel("β, sd of the score per nat")
  first, below = axes[:, 0]
  first.set_yscale("symlog", linthresh=2)  # A collapse is far below.
  first.yaxis.set_major_formatter("{x:g}")
  first.set_yticks([-10, -5, -2, -1, 0, 1, 2])
  first.set_ylabel("gain since the SFT policy, reward units")
  below.set_ylabel("KL(π‖π_ref),\nnats per response")
  for word, colour in _COLOURS.items():
    first.plot([], [], color=colour, label=word, **_DOT)
  title = "Bands: the claim's word.  Dots: what is seen."
  style = {"loc": "outside upper center", "fontsize": 10, "title": title}
  drawing.legend(figure, first, columns=7, **style)
  return figure


def _draw_gains(axis: drawing.Axes, places: np.ndarray, model: Model) -> None:
  """Proxy dashed; gold with a dot in the colour of what is seen."""
  axis.axhline(0, color="0.5", linewidth=0.8)
  proxy, gold, _ = (values.mean(axis=1) for values in model.runs)
  axis.plot(places, proxy, "--", color="0.4", linewidth=1.2, label="proxy")
  axis.plot(places, gold, color="black", linewidth=1.2, label="gold")
  axis.plot(places, model.runs.gold, "_", color="0.3")
  for place, word, mean in zip(places, model.words, gold):
    axis.plot(place, mean, color=_COLOURS[word], **_DOT)
  drawing.say(
    axis,
    f"{model.pairs:,} pairs (correlation with gold {model.correlation:.2f})",
    "",
    size=11,
  )
