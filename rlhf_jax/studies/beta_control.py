"""Do controllers of β hold the KL at its target, on the built-in language?

Every controller with a target (`ziegler`, `pi`, `dual`) at every target, from
the same β; beside them `schedule` and `trust`, which have none and begin at a
conservative β. Each is a sweep over seeds. Where the KL of a run is at the end
is its mean over the last steps; the intervals are Student's, over seeds.
"""

from collections.abc import Mapping, Sequence
import itertools
import math
from typing import NamedTuple

from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.studies import drawing, intervals, limits, study, toy_runs

CONTROLLERS = ("ziegler", "pi", "dual")
FREE = ("schedule", "trust")  # They look at no KL.
_KL, _BETA, _GOLD = "kl/reverse_exact", "kl/beta", "reward/gold"
_PAIRS = "reward/pair_accuracy"

Runs = Sequence[toy_runs.Member]  # A controller's, one a seed.


class Held(NamedTuple):
  """A controller at a target; KLs in nats per response.

  Means over seeds and the last steps; `off` is KL / target − 1, from `low` to
  `high` by its 95 % interval. `settled` is the median over seeds of the first
  step whose mean over as many steps is within the tolerance, as all later ones
  are; infinite where half of the seeds have no such step.
  """

  controller: str
  target: float
  kl: float
  off: float
  low: float
  high: float
  settled: float
  beta: float
  gold: float


class Free(NamedTuple):
  """A controller without a target; means over seeds.

  β at the first step, at its lowest and over the last steps; KL, nats per
  response, and the share of pairs in order, over the first and the last.
  """

  controller: str
  beta_first: float
  beta_lowest: float
  beta: float
  kl_first: float
  kl: intervals.Interval
  pairs_first: float
  pairs: float
  gold: intervals.Interval


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense."""
  training = config.training
  steps, relaxed = training.train.steps, training.kl.trust.beta_min
  differ = lambda xs: limits.is_rising(sorted(xs), above=0, below=math.inf)
  limits.check(
    config,
    {
      "controllers": limits.some_of(CONTROLLERS),
      "targets": limits.Limit("different numbers above 0", differ),
      "last": limits.between(2, steps, f"training.train.steps={steps}"),
      "tolerance": limits.inside(0, 1),
      "seeds": limits.SEEDS,
      "conservative_beta": limits.Limit(
        f"above training.kl.trust.beta_min={relaxed}",
        lambda x: relaxed < x < math.inf,
      ),
    },
  )
  fixed = toy_runs.SWEPT | {"kl.target": 0.0}
  toy_runs.check(config, _sweeps(config), fixed)


def run(lab: study.Lab) -> study.Outcome:
  """Does a sweep over seeds of each controller and target."""
  config, begun = lab.config, toy_runs.start(lab)
  runs = {
    name: toy_runs.swept(lab, name, sweep, begun)
    for name, sweep in _sweeps(config).items()
  }
  last, tolerance = config.last, config.tolerance
  held = [
    of_target(*of, runs[name], last=last, tolerance=tolerance)
    for name, of in _names(config).items()
  ]
  free = [of_free(name, runs[name], last=last) for name in FREE]
  return study.Outcome(
    verdict=verdict(held, tolerance=tolerance),
    paragraph=_paragraph(held, free, config),
    tables=_tables(config, held, free, runs, begun.gold),
    figure=_draw(config, runs),
  )


def of_target(
  controller: str, target: float, runs: Runs, *, last: int, tolerance: float
) -> Held:
  """What the metrics of a controller's runs say of it."""
  nats = toy_runs.ends(runs, _KL, last=last)
  means = toy_runs.trailing_mean(toy_runs.curves(runs, _KL), last)
  outside = ~(abs(means / target - 1) <= tolerance)
  # The step after the last one outside; the first means are NaN, and so there.
  settled = outside.shape[1] - outside[:, ::-1].argmax(axis=1).astype(float)
  settled[outside[:, -1]] = math.inf
  return Held(
    controller,
    target,
    nats.mean(),
    *intervals.of_mean(nats / target - 1),
    settled=np.median(settled),
    beta=toy_runs.ends(runs, _BETA, last=last).mean(),
    gold=toy_runs.ends(runs, _GOLD, last=last).mean(),
  )


def of_free(controller: str, runs: Runs, *, last: int) -> Free:
  """What the metrics of a controller without a target say of it."""
  betas, nats, pairs = (
    toy_runs.curves(runs, name) for name in (_BETA, _KL, _PAIRS)
  )
  return Free(
    controller=controller,
    beta_first=betas[:, 0].mean(),
    beta_lowest=betas.min(axis=1).mean(),
    beta=betas[:, -last:].mean(),
    kl_first=nats[:, :last].mean(),
    kl=intervals.of_mean(nats[:, -last:].mean(axis=1)),
    pairs_first=pairs[:, :last].mean(),
    pairs=pairs[:, -last:].mean(),
    gold=intervals.of_mean(toy_runs.ends(runs, _GOLD, last=last)),
  )


def verdict(held: list[Held], *, tolerance: float) -> str:
  """The rule: the interval is within the tolerance of every target.

  It may be so for all controllers, for some, or for none.
  """
  within = {}
  for row in held:
    near = _reach(row) <= tolerance
    within[row.controller] = within.get(row.controller, True) and near
  return study.verdict(within, "the controller is")


def _reach(row: Held) -> float:
  """How far from the target the interval reaches."""
  return max(-row.low, row.high)


def _sweeps(config: ConfigDict) -> dict[str, ConfigDict]:
  """The sweeps by name."""
  sweep = lambda **fields: toy_runs.sweep(config, (), **fields)
  first = config.conservative_beta
  return {
    name: sweep(kl__controller=controller, kl__target=target)
    for name, (controller, target) in _names(config).items()
  } | {name: sweep(kl__controller=name, kl__beta=first) for name in FREE}


def _names(config: ConfigDict) -> dict[str, tuple[str, float]]:
  """Each controller and target by their sweep's name."""
  pairs = itertools.product(config.controllers, config.targets)
  return {f"{name}-{target:g}": (name, target) for name, target in pairs}


def _tables(
  config: ConfigDict,
  held: list[Held],
  free: list[Free],
  runs: Mapping[str, Runs],
  start: float,
) -> dict[str, study.Table]:
  steps, last = config.training.train.steps, config.last
  ends = {
    (run,): [toy_runs.ends(of, x, last=last) for x in (_KL, _BETA, _GOLD)]
    for run, of in runs.items()
  }
  return {
    "held": study.table_of(
      f"Means over {config.seeds} seeds and the last {last} of {steps} steps:"
      " KL(π‖π_ref), nats per response; off: KL / target − 1, with its 95 %"
      f" interval over seeds; β; gold reward (the SFT policy's: {start:.2f})."
      " settled: the first step that, as all later ones, has a mean of"
      f" {last} steps within {config.tolerance:.0%}, median over seeds; –: half"
      " of them never do",
      held,
    ),
    "free": study.Table(
      "Controllers without a target, means over seeds: β at first, at its"
      f" lowest and at the end; KL over the first and the last {last} steps;"
      " pairs: the share of response pairs that the reward model orders as"
      " gold does; gold at the end. With 95 % intervals over seeds",
      (
        *("controller", "first", "lowest", "beta", "kl_first"),
        *("kl", "low", "high", "pairs_first", "pairs", "gold", "low", "high"),
      ),
      [
        (*row[:5], *row.kl, row.pairs_first, row.pairs, *row.gold)
        for row in free
      ],
    ),
    "runs": toy_runs.every_run(
      config,
      f"Every run: means over the last {last} steps",
      ("run", "seed", "kl", "beta", "gold"),
      ends,
    ),
  }


def _paragraph(held: list[Held], free: list[Free], config: ConfigDict) -> str:
  within = [row for row in held if _reach(row) <= config.tolerance]
  worst = max(held, key=_reach)
  off = intervals.Interval(worst.off, worst.low, worst.high)
  text = (
    f"In {len(within)} of {len(held)} pairs of controller and target the KL at"
    f" the end is within {config.tolerance:.0%} of the target, with all of its"
    f" interval over {config.seeds} seeds; the farthest, {worst.controller} at"
    f" {worst.target:g} nats, is off by {off:+.0%}."
  )
  settled = []
  for name in config.controllers:
    steps = [row.settled for row in held if row.controller == name]
    known = [step for step in steps if math.isfinite(step)]
    settled.append(name + (f" by step {max(known):.0f}" if known else ""))
    if len(known) < len(steps):
      settled[-1] += f" at {len(known)} of {len(steps)} targets"
  text += f" The median seed settles: {'; '.join(settled)}."
  for row in free:
    text += (
      f" {row.controller} moves β from {row.beta_first:.2g} to"
      f" {row.beta:.2g} (lowest {row.beta_lowest:.2g}): the KL goes from"
      f" {row.kl_first:.2f} to {row.kl} nats, gold ends at {row.gold},"
      f" and the reward model orders {row.pairs:.0%} of the pairs as gold does,"
      f" at first {row.pairs_first:.0%}."
    )
  return text


def _draw(config: ConfigDict, runs: Mapping[str, Runs]) -> drawing.Figure:
  """A row of panels a controller: the KL on the left, β on the right."""
  count = len(config.controllers) + 1
  figure, axes = drawing.panels(
    (10, 2.2 * count + 0.4), 2, rows=count, sharex=True
  )
  lefts, rights = axes[::2], axes[1::2]
  colours = [f"C{i}" for i in range(len(config.targets))]

  def draw(row, name, colour, label):
    for axis, figure in ((lefts[row], _KL), (rights[row], _BETA)):
      curves = toy_runs.curves(runs[name], figure)
      axis.plot(curves.T, color=colour, linewidth=0.5, alpha=0.6)
      axis.plot(curves.mean(axis=0), color=colour, linewidth=1.4, label=label)

  for row, name in enumerate(config.controllers):
    for target, colour in zip(config.targets, colours):
      ends = target * (1 - config.tolerance), target * (1 + config.tolerance)
      lefts[row].axhspan(*ends, color=colour, alpha=0.15, linewidth=0)
      draw(row, f"{name}-{target:g}", colour, f"target {target:g}")
    lefts[row].set_ylim(0, 1.7 * max(config.targets))
  for name, colour in zip(FREE, ("tab:purple", "tab:brown")):
    draw(-1, name, colour, name)
  lefts[-1].set_ylim(bottom=0)
  # What `trust` looks at, the mean of seeds, on an axis of its own.
  pairs = toy_runs.curves(runs["trust"], _PAIRS).mean(axis=0)
  beside, mean = rights[-1].twinx(), toy_runs.trailing_mean(pairs, config.last)
  beside.plot(mean, color=drawing.GREY, linewidth=1.2, linestyle="--")
  beside.set_ylim(0.4, 0.9)
  beside.set_ylabel("pairs in order (dashed)", color="0.5")
  beside.spines["top"].set_visible(False)
  for axis, name in zip(lefts, (*config.controllers, " and ".join(FREE))):
    axis.set_title(name, fontsize=10, loc="left", fontweight="bold")
    axis.set_ylabel("nats per response")
  most = 2 * config.conservative_beta
  for axis in rights:
    axis.set(ylabel="β", yscale="log", ylim=(1e-3, most))
    axis.yaxis.set_major_formatter("{x:g}")
  rights[0].legend(frameon=False, fontsize=9, ncols=3, loc="upper right")
  lefts[-1].legend(frameon=False, fontsize=9, ncols=3, loc="lower right")
  title = f"KL(π‖π_ref), targets ± {config.tolerance:.0%}"
  lefts[0].set_title(title, fontsize=10)
  rights[0].set_title("β; thin: a seed, thick: their mean", fontsize=10)
  for axis in (lefts[-1], rights[-1]):
    axis.set_xlabel("step")
  return figure
