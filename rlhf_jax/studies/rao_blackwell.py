"""Does PPO learn slower with the Rao-Blackwellised KL gradient?

Pairs of PPO runs on the built-in language, one with each `kl.estimator` and
otherwise alike, from one SFT policy and one reward model; a pair has a seed,
which draws its prompts and responses. Times are in iterations: how many until
the mean gold reward of some steps has made a given share of the gain that the
sampled runs end with. Intervals are Student's, over seeds or the differences of
their pairs. Where the gain's own is not above 0, nothing was learned that could
be learned slower, and the claim does not hold.

Seconds per step are reported, and are no part of the verdict: they depend on
what else the machine does. The two runs of a pair follow each other, in turn
the one and the other first.
"""

from collections.abc import Sequence
import math
from typing import NamedTuple

from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.studies import drawing, intervals, limits, study, toy_runs

ESTIMATORS = ("sampled", "rao_blackwellised")
STYLES = (("sampled", "tab:orange"), ("Rao-Blackwellised", "tab:blue"))
COLUMNS = ("figure", "sampled", "rao_bl", "difference", "low", "high")


class Pairs(NamedTuple):
  """A figure of both kinds of run: means over seeds, and what differs.

  The difference is Rao-Blackwellised − sampled, pair by pair.
  """

  figure: str
  sampled: float
  rao_bl: float
  difference: intervals.Interval

  def row(self) -> tuple[study.Cell, ...]:
    """In a table, under `COLUMNS`."""
    return *self[:3], *self.difference


class Runs(NamedTuple):
  """All seeds' gold reward `[seed, step]`; over each one's last steps the rest.

  KL in nats per response; of seconds per step the median of all.
  """

  golds: np.ndarray
  gold: np.ndarray
  kl: np.ndarray
  step_s: np.ndarray


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense."""
  rising = lambda xs: limits.is_rising(xs, above=0) and xs[-1] <= 1
  limits.check(
    config,
    {
      "seeds": limits.at_least(2),
      "gains": limits.Limit("rising numbers in (0, 1]", rising),
      "last window": limits.steps_of(config),
    },
  )
  toy_runs.check(config, _runs(config), {"kl.estimator": "sampled"})


def run(lab: study.Lab) -> study.Outcome:
  """Does the runs, each in a sub-workdir."""
  config, seeds = lab.config, toy_runs.seeds(lab.config)
  begun = toy_runs.start(lab)
  start, found = begun.gold, toy_runs.run(lab, _runs(config), begun)
  sampled, rao_bl = both = [
    of_runs([found[f"{name}-{seed}"] for seed in seeds], last=config.last)
    for name in ESTIMATORS
  ]
  golds = thresholds(start, sampled, config.gains)
  times = [times_to(gold, *both, window=config.window) for gold in golds]
  to_gains = [
    compare(f"iterations to {gain:.0%} of the gain", *pair)
    for gain, pair in zip(config.gains, times)
  ]
  at_end = [
    compare("gold reward at the end", sampled.gold, rao_bl.gold),
    compare("KL at the end, nats per response", sampled.kl, rao_bl.kl),
    compare("seconds per step", sampled.step_s, rao_bl.step_s),
  ]
  gain = intervals.of_mean(sampled.gold - start)
  return study.Outcome(
    verdict=verdict(config.gains, to_gains, gain, tolerance=config.window),
    paragraph=_paragraph(config, to_gains, at_end, gain),
    tables={
      "pairs": study.Table(
        f"Means over {config.seeds} seeds, the mean difference of pairs and its"
        f" 95 % interval; the end: the last {config.last} of"
        f" {config.training.train.steps} steps; the SFT policy's gold:"
        f" {start:.2f}; the sampled runs' gain: {gain}",
        COLUMNS,
        [pairs.row() for pairs in (*to_gains, *at_end)],
      ),
      "runs": _runs_table(config, both, times),
    },
    figure=_draw(config, golds, both, times, to_gains),
  )


def of_runs(
  members: Sequence[toy_runs.Member], *, last: int, gold: str = "reward/gold"
) -> Runs:
  """What the seeds' metrics say; `gold` is what stands for it."""
  return Runs(
    toy_runs.curves(members, gold),
    toy_runs.ends(members, gold, last=last),
    toy_runs.ends(members, "kl/reverse_exact", last=last),
    np.median(toy_runs.curves(members, "time/step_s"), axis=1),
  )


def thresholds(
  start: float, sampled: Runs, gains: tuple[float, ...]
) -> list[float]:
  """The gold rewards at shares of what the sampled runs gain in the mean."""
  gain = float(sampled.gold.mean()) - start
  return [start + share * gain for share in gains]


def times_to(
  threshold: float, sampled: Runs, rao_bl: Runs, *, window: int
) -> tuple[np.ndarray, np.ndarray]:
  """Iterations until a trailing mean of gold is at the threshold.

  A run that is never there counts against the claim: as all its steps if it
  is a sampled one, else as infinitely many.
  """

  def times(runs, never):
    there = toy_runs.trailing_mean(runs.golds, window) >= threshold
    return np.where(there.any(axis=1), there.argmax(axis=1) + 1.0, never)

  return times(sampled, sampled.golds.shape[1]), times(rao_bl, math.inf)


def compare(
  name: str, sampled: intervals.Values, rao_bl: intervals.Values
) -> Pairs:
  """A figure of all pairs."""
  difference = intervals.Interval(math.inf, math.inf, math.inf)
  if np.isfinite(rao_bl).all():
    difference = intervals.of_difference(rao_bl, sampled)
  return Pairs(
    name, float(np.mean(sampled)), float(np.mean(rao_bl)), difference
  )


def verdict(
  gains: tuple[float, ...],
  to_gains: list[Pairs],
  gain: intervals.Interval,
  *,
  tolerance: float,
) -> str:
  """The rule: no more iterations, where something was learned.

  The interval of the iterations added must reach 0 and leave no room for more
  than are tolerated, and that of the sampled runs' gain lie above 0. It may be
  so for all thresholds, for some, or for none.
  """
  enough = {
    f"{share:.0%}": gain.low > 0 >= added.low and added.high <= tolerance
    for share, (*_, added) in zip(gains, to_gains)
  }
  return study.verdict(enough, "the gold to reach, as a share of the gain, is")


def _runs(config: ConfigDict) -> dict[str, ConfigDict]:
  """The runs by name, in the order in which they are done."""
  return {
    f"{estimator}-{seed}": toy_runs.varied(
      config.training, {"seed": seed, "kl.estimator": estimator}
    )
    for place, seed in enumerate(toy_runs.seeds(config))
    for estimator in ESTIMATORS[:: 1 if place % 2 == 0 else -1]
  }


def _runs_table(config: ConfigDict, both: list[Runs], times) -> study.Table:
  """Every run's figures, for who wants another statistic."""
  names = [f"to_{gain:.0%}" for gain in config.gains]
  arms = {
    (estimator,): (*reached, *runs[1:])
    for estimator, reached, runs in zip(ESTIMATORS, zip(*times), both)
  }
  return toy_runs.every_run(
    config,
    "Every run: iterations to shares of the gain; gold reward and KL at the"
    " end; seconds per step",
    ("estimator", "seed", *names, *Runs._fields[1:]),
    arms,
  )


def _paragraph(
  config: ConfigDict,
  to_gains: list[Pairs],
  at_end: list[Pairs],
  gain: intervals.Interval,
) -> str:
  parts = [
    f"{share:.0%}: {row.difference:+.1f}"
    for share, row in zip(config.gains, to_gains)
  ]
  gold, nats, seconds = at_end
  found = (
    f"The sampled runs gain {gain} in gold over the SFT policy, not clearly"
    " above 0, so that no iterations to a share of it can be compared."
  )
  if gain.low > 0:
    found = (
      "Iterations that Rao-Blackwellising adds until the mean gold reward of"
      f" {config.window} steps is at a share of the sampled runs' gain of"
      f" {gain}: {'; '.join(parts)}. Up to {config.window} are tolerated where"
      " the interval reaches 0: two such means share steps."
    )
  less, low, high = nats.difference
  _, shortest, longest = seconds.difference
  return (
    f"{found} At the end gold differs by {gold.difference:+.3f} and the KL by"
    f" {less:+.2f} nats ({low:+.2f} to {high:+.2f}); a step takes"
    f" {seconds.rao_bl:.3f} s instead of {seconds.sampled:.3f} s"
    f" ({shortest:+.3f} to {longest:+.3f} s)."
  )


def _draw(config, golds, both, times, to_gains) -> drawing.Figure:
  """Gold against iterations; the differences of pairs."""
  figure, (left, right) = drawing.panels((11, 4.2), 2, width_ratios=(1.4, 1))
  for runs, (label, colour) in zip(both, STYLES):
    drawing.curves(
      left, runs.golds, colour=colour, label=label, window=config.window
    )
  for gain, gold in zip(config.gains, golds):
    left.axhline(gold, color=drawing.GREY, linewidth=0.8, linestyle="--")
    left.annotate(f"{gain:.0%}", (1, gold), fontsize=8, va="bottom")
  left.set_xlim(0, config.training.train.steps)
  title = "Gold reward: each seed, and their mean"
  gold = f"mean gold reward of {config.window} steps"
  drawing.say(left, title, "iteration", gold)
  left.legend(frameon=False, fontsize=9)
  drawing.lying(
    right,
    [f"{gain:.0%} of the gain" for gain in config.gains],
    [row.difference for row in to_gains],
    ["tab:blue"] * len(to_gains),
    dots=[after - before for before, after in times],
  )
  right.axvline(config.window, color="tab:red", linewidth=0.8, linestyle="--")
  legend = (
    "grey: a pair; blue: mean, 95 % interval\n"
    "red: the most that the claim tolerates"
  )
  drawing.say(right, "Iterations that Rao-Blackwellising adds", legend)
  return figure
