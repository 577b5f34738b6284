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

import math
from typing import NamedTuple

from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.studies import intervals, limits, study, toy_runs

ESTIMATORS = ("sampled", "rao_blackwellised")
_LABELS, _COLOURS = ("sampled", "Rao-Blackwellised"), ("tab:orange", "tab:blue")


class Pairs(NamedTuple):
  """A figure of both kinds of run: means over seeds, and what differs.

  `difference` is the mean of Rao-Blackwellised − sampled over the pairs, `low`
  and `high` are the ends of its 95 % interval.
  """

  figure: str
  sampled: float
  rao_bl: float
  difference: float
  low: float
  high: float


class Run(NamedTuple):
  """One run's gold reward and, over its last steps, the rest."""

  golds: np.ndarray
  gold: float
  kl: float
  step_s: float


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense.

  Raises:
    UserError: With the field, its value and what is wanted.
  """
  steps = config.training.train.steps
  span = f"1 to training.train.steps={steps}"
  for wanted, holds, fields in (
    ("at least 2", lambda x: x >= 2, "seeds"),
    (
      "rising numbers in (0, 1]",
      lambda xs: (
        len(xs) > 0 and list(xs) == sorted({*xs}) and 0 < xs[0] <= xs[-1] <= 1
      ),
      "gains",
    ),
    (span, lambda x: 1 <= x <= steps, "last window"),
  ):
    limits.check(config, {fields: limits.Limit(wanted, holds)})
  toy_runs.check(config, _runs(config), {"kl.estimator": "sampled"})


def run(lab: study.Lab) -> study.Outcome:
  """Does the runs, each in a sub-workdir."""
  config = lab.config
  start, metrics = toy_runs.run(lab, _runs(config))
  sampled, rao_bl = (
    [
      of_run(metrics[_name(estimator, seed)], last=config.last)
      for seed in _seeds(config)
    ]
    for estimator in ESTIMATORS
  )
  times = [
    times_to(threshold, sampled, rao_bl, window=config.window)
    for threshold in thresholds(start, sampled, config.gains)
  ]
  to_gains = [
    compare(f"iterations to {gain:.0%} of the gain", *pair)
    for gain, pair in zip(config.gains, times)
  ]
  at_end = [
    compare(name, [of(run) for run in sampled], [of(run) for run in rao_bl])
    for name, of in (
      ("gold reward at the end", lambda run: run.gold),
      ("KL at the end, nats per response", lambda run: run.kl),
      ("seconds per step", lambda run: run.step_s),
    )
  ]
  gain = intervals.of_mean([run.gold - start for run in sampled])
  tables = {
    "pairs": study.Table(
      f"Means over {config.seeds} seeds, the mean difference of pairs and its"
      f" 95 % interval; the end: the last {config.last} of"
      f" {config.training.train.steps} steps; the SFT policy's gold:"
      f" {start:.2f}; the sampled runs' gain: {gain}",
      Pairs._fields,
      [*to_gains, *at_end],
    ),
    "runs": _runs_table(config, sampled, rao_bl, times),
  }
  return study.Outcome(
    verdict=verdict(config.gains, to_gains, gain, tolerance=config.window),
    paragraph=_paragraph(config, to_gains, at_end, gain),
    tables=tables,
    figure=_draw(config, start, sampled, rao_bl, times, to_gains),
  )


def of_run(rows: toy_runs.Rows, *, last: int) -> Run:
  """What a run's metrics say; the time of a step is their median."""
  golds = toy_runs.column(rows, "reward/gold")
  return Run(
    golds=golds,
    gold=float(golds[-last:].mean()),
    kl=float(toy_runs.column(rows, "kl/reverse_exact")[-last:].mean()),
    step_s=float(np.median(toy_runs.column(rows, "time/step_s"))),
  )


def thresholds(
  start: float, sampled: list[Run], gains: tuple[float, ...]
) -> list[float]:
  """The gold rewards at shares of what the sampled runs gain in the mean."""
  gain = float(np.mean([run.gold for run in sampled])) - start
  return [start + share * gain for share in gains]


def times_to(
  threshold: float, sampled: list[Run], rao_bl: list[Run], *, window: int
) -> tuple[list[float], list[float]]:
  """Iterations until a trailing mean of gold is at the threshold.

  A run that is never there counts against the claim: as all its steps if it
  is a sampled one, else as infinitely many.
  """

  def time(run, never):
    there = toy_runs.trailing_mean(run.golds, window) >= threshold
    return float(np.argmax(there) + 1) if there.any() else never

  return (
    [time(run, float(len(run.golds))) for run in sampled],
    [time(run, math.inf) for run in rao_bl],
  )


def compare(name: str, sampled: list[float], rao_bl: list[float]) -> Pairs:
  """A figure of all pairs."""
  difference = intervals.Interval(math.inf, math.inf, math.inf)
  if all(map(math.isfinite, rao_bl)):
    difference = intervals.of_difference(rao_bl, sampled)
  means = float(np.mean(sampled)), float(np.mean(rao_bl))
  return Pairs(name, *means, *difference)


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
    f"{share:.0%}": gain.low > 0 and row.low <= 0 and row.high <= tolerance
    for share, row in zip(gains, to_gains)
  }
  return study.verdict(enough, "the gold to reach, as a share of the gain, is")


def _seeds(config: ConfigDict) -> range:
  return range(config.seed, config.seed + config.seeds)


def _runs(config: ConfigDict) -> dict[str, ConfigDict]:
  """The runs by name, in the order in which they are done."""
  return {
    _name(estimator, seed): toy_runs.varied(
      config.training, {"seed": seed, "kl.estimator": estimator}
    )
    for place, seed in enumerate(_seeds(config))
    for estimator in ESTIMATORS[:: 1 if place % 2 == 0 else -1]
  }


def _name(estimator: str, seed: int) -> str:
  return f"{estimator}-{seed}"


def _runs_table(config, sampled, rao_bl, times) -> study.Table:
  """Every run's figures, for who wants another statistic."""
  names = [f"to_{gain:.0%}" for gain in config.gains]
  rows = [
    (
      estimator,
      seed,
      *(pair[arm][i] for pair in times),
      *(run.gold, run.kl, run.step_s),
    )
    for arm, (estimator, runs) in enumerate(zip(ESTIMATORS, (sampled, rao_bl)))
    for i, (seed, run) in enumerate(zip(_seeds(config), runs))
  ]
  return study.Table(
    "Every run: iterations to shares of the gain; gold reward and KL at the"
    " end; seconds per step",
    ("estimator", "seed", *names, "gold", "kl", "step_s"),
    rows,
    shown=False,
  )


def _paragraph(
  config: ConfigDict,
  to_gains: list[Pairs],
  at_end: list[Pairs],
  gain: intervals.Interval,
) -> str:
  parts = [
    f"{share:.0%}: {row.difference:+.1f} ({row.low:+.1f} to {row.high:+.1f})"
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
  return (
    f"{found} At the end gold differs by"
    f" {gold.difference:+.3f} ({gold.low:+.3f} to {gold.high:+.3f}) and the KL"
    f" by {nats.difference:+.2f} nats ({nats.low:+.2f} to {nats.high:+.2f});"
    f" a step takes {seconds.rao_bl:.3f} s instead of {seconds.sampled:.3f} s"
    f" ({seconds.low:+.3f} to {seconds.high:+.3f} s)."
  )


def _draw(
  config, start, sampled, rao_bl, times, to_gains
) -> matplotlib_figure.Figure:
  """Gold against iterations; the differences of pairs."""
  figure = matplotlib_figure.Figure(figsize=(11, 4.2), layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=(1.4, 1))
  for name, runs, colour in zip(_LABELS, (sampled, rao_bl), _COLOURS):
    _curves(left, name, runs, colour, config)
  golds = thresholds(start, sampled, config.gains)
  for gain, gold in zip(config.gains, golds):
    left.axhline(gold, color="0.6", linewidth=0.8, linestyle="--")
    left.annotate(f"{gain:.0%}", (1, gold), fontsize=8, va="bottom")
  left.set_xlim(0, config.training.train.steps)
  left.set_title("Gold reward: each seed, and their mean", fontsize=10)
  left.set_xlabel("iteration")
  left.set_ylabel(f"mean gold reward of {config.window} steps")
  left.legend(frameon=False, fontsize=9)

  for place, ((before, after), row) in enumerate(zip(times, to_gains)):
    differences = np.subtract(after, before)
    right.plot(differences, [place + 0.15] * len(before), "o", color="0.6")
    right.plot([row.low, row.high], [place] * 2, color=_COLOURS[1])
    right.plot(row.difference, place, "o", color=_COLOURS[1], markersize=8)
  right.axvline(0, color="0.4", linewidth=0.8)
  right.axvline(config.window, color="tab:red", linewidth=0.8, linestyle="--")
  right.set_yticks(
    range(len(times)), [f"{gain:.0%} of the gain" for gain in config.gains]
  )
  right.set_ylim(len(times) - 0.5, -0.5)
  right.set_title("Iterations that Rao-Blackwellising adds", fontsize=10)
  right.set_xlabel(
    "grey: a pair; blue: mean, 95 % interval\n"
    "red: the most that the claim tolerates"
  )
  for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
  return figure


def _curves(
  axis: matplotlib_axes.Axes,
  name: str,
  runs: list[Run],
  colour: str,
  config: ConfigDict,
) -> None:
  """A thin line for each seed and a thick one for their mean."""
  curves = [toy_runs.trailing_mean(run.golds, config.window) for run in runs]
  iterations = np.arange(1, len(curves[0]) + 1)
  for curve in curves:
    axis.plot(iterations, curve, color=colour, linewidth=0.6, alpha=0.6)
  mean = np.mean(curves, axis=0)
  axis.plot(iterations, mean, color=colour, linewidth=2.2, label=name)
