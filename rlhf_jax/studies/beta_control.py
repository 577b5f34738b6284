"""Do controllers of β hold the KL at its target, on the built-in language?

Every controller with a target (`ziegler`, `pi`, `dual`) at every target, from
the same β; beside them `schedule` and `trust`, which have none and begin at a
conservative β. Each is a sweep over seeds. Where the KL of a run is at the end
is its mean over the last steps; the intervals are Student's, over seeds.
"""

from collections.abc import Mapping, Sequence
import math
from typing import NamedTuple

from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.studies import intervals, limits, study, toy_runs

CONTROLLERS = ("ziegler", "pi", "dual")
FREE = ("schedule", "trust")  # They look at no KL.

# Metrics by the sweep's name, then by seed.
Runs = Mapping[str, Sequence[toy_runs.Rows]]


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
  """Refuses fields that make no sense.

  Raises:
    UserError: With the field, its value and what is wanted.
  """
  differ = lambda xs: len(xs) > 0 and len(set(xs)) == len(xs)
  steps = config.training.train.steps
  relaxed = config.training.kl.trust.beta_min
  for wanted, holds, field in (
    (
      f"different ones of {', '.join(CONTROLLERS)}",
      lambda xs: differ(xs) and set(xs) <= {*CONTROLLERS},
      "controllers",
    ),
    (
      "different numbers above 0",
      lambda xs: differ(xs) and all(0 < x < math.inf for x in xs),
      "targets",
    ),
    (f"2 to training.train.steps={steps}", lambda x: 2 <= x <= steps, "last"),
    ("in (0, 1)", lambda x: 0 < x < 1, "tolerance"),
    ("2 to 20", lambda x: 2 <= x <= 20, "seeds"),
    (
      f"above training.kl.trust.beta_min={relaxed}",
      lambda x: relaxed < x < math.inf,
      "conservative_beta",
    ),
  ):
    limits.check(config, {field: limits.Limit(wanted, holds)})
  fixed = {"sweep.seeds": (), "kl.controller": "fixed", "kl.target": 0.0}
  toy_runs.check(config, _sweeps(config), fixed)


def run(lab: study.Lab) -> study.Outcome:
  """Does a sweep over seeds of each controller and target."""
  config = lab.config
  begun = toy_runs.start(lab)
  runs = {}
  for name, sweep in _sweeps(config).items():
    members = toy_runs.swept(lab, name, sweep, begun)
    runs[name] = [member.rows for member in members]
  held = [
    of_target(
      controller,
      target,
      runs[_name(controller, target)],
      last=config.last,
      tolerance=config.tolerance,
    )
    for controller in config.controllers
    for target in config.targets
  ]
  free = [of_free(name, runs[name], last=config.last) for name in FREE]
  return study.Outcome(
    verdict=verdict(held, tolerance=config.tolerance),
    paragraph=_paragraph(held, free, config),
    tables=_tables(config, held, free, runs, begun.gold),
    figure=_draw(config, runs),
  )


def of_target(
  controller: str,
  target: float,
  runs: Sequence[toy_runs.Rows],
  *,
  last: int,
  tolerance: float,
) -> Held:
  """What the metrics of a controller's runs say of it."""
  nats = _ends(runs, "kl/reverse_exact", last)
  settled = [_settled(rows, target, last, tolerance) for rows in runs]
  return Held(
    controller,
    target,
    float(nats.mean()),
    *intervals.of_mean(nats / target - 1),
    settled=float(np.median(settled)),
    beta=float(_ends(runs, "kl/beta", last).mean()),
    gold=float(_ends(runs, "reward/gold", last).mean()),
  )


def of_free(
  controller: str, runs: Sequence[toy_runs.Rows], *, last: int
) -> Free:
  """What the metrics of a controller without a target say of it."""
  mean = lambda name, steps: float(_columns(runs, name)[:, steps].mean())
  first, end = slice(None, last), slice(-last, None)
  return Free(
    controller=controller,
    beta_first=mean("kl/beta", 0),
    beta_lowest=float(_columns(runs, "kl/beta").min(axis=1).mean()),
    beta=mean("kl/beta", end),
    kl_first=mean("kl/reverse_exact", first),
    kl=intervals.of_mean(_ends(runs, "kl/reverse_exact", last)),
    pairs_first=mean("reward/pair_accuracy", first),
    pairs=mean("reward/pair_accuracy", end),
    gold=intervals.of_mean(_ends(runs, "reward/gold", last)),
  )


def verdict(held: list[Held], *, tolerance: float) -> str:
  """The rule: the interval is within the tolerance of every target.

  It may be so for all controllers, for some, or for none.
  """
  names = dict.fromkeys(row.controller for row in held)
  within = {
    name: all(
      _reach(row) <= tolerance for row in held if row.controller == name
    )
    for name in names
  }
  return study.verdict(within, "the controller is")


def _sweeps(config: ConfigDict) -> dict[str, ConfigDict]:
  """The sweeps by name."""
  fields = {
    _name(controller, target): {
      "kl.controller": controller,
      "kl.target": target,
    }
    for controller in config.controllers
    for target in config.targets
  }
  for name in FREE:
    fields[name] = {"kl.controller": name, "kl.beta": config.conservative_beta}
  seeds = {"sweep.seeds": tuple(_seeds(config))}
  return {
    name: toy_runs.varied(config.training, own | seeds)
    for name, own in fields.items()
  }


def _seeds(config: ConfigDict) -> range:
  return range(config.seed, config.seed + config.seeds)


def _name(controller: str, target: float) -> str:
  return f"{controller}-{target:g}"


def _columns(runs: Sequence[toy_runs.Rows], name: str) -> np.ndarray:
  """A figure, `[seed, step]`."""
  return np.array([toy_runs.column(rows, name) for rows in runs])


def _ends(runs: Sequence[toy_runs.Rows], name: str, last: int) -> np.ndarray:
  """A figure's mean over the last steps, by seed."""
  return _columns(runs, name)[:, -last:].mean(axis=1)


def _settled(
  rows: toy_runs.Rows, target: float, last: int, tolerance: float
) -> float:
  nats = toy_runs.column(rows, "kl/reverse_exact")
  means = toy_runs.trailing_mean(nats, last)
  outside = np.flatnonzero(~(abs(means / target - 1) <= tolerance))
  settled = int(outside[-1]) + 1
  return settled if settled < len(rows) else math.inf


def _reach(row: Held) -> float:
  """How far from the target the interval reaches."""
  return max(-row.low, row.high)


def _tables(
  config: ConfigDict,
  held: list[Held],
  free: list[Free],
  runs: Runs,
  start: float,
) -> dict[str, study.Table]:
  steps, last = config.training.train.steps, config.last
  return {
    "held": study.Table(
      f"Means over {config.seeds} seeds and the last {last} of {steps} steps:"
      " KL(π‖π_ref), nats per response; off: KL / target − 1, with its 95 %"
      f" interval over seeds; β; gold reward (the SFT policy's: {start:.2f})."
      " settled: the first step that, as all later ones, has a mean of"
      f" {last} steps within {config.tolerance:.0%}, median over seeds; –: half"
      " of them never do",
      Held._fields,
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
    "runs": study.Table(
      f"Every run: means over the last {last} steps",
      ("run", "seed", "kl", "beta", "gold"),
      [
        (name, seed, *map(float, figures))
        for name, of in runs.items()
        for seed, *figures in zip(
          _seeds(config),
          _ends(of, "kl/reverse_exact", last),
          _ends(of, "kl/beta", last),
          _ends(of, "reward/gold", last),
        )
      ],
      shown=False,
    ),
  }


def _paragraph(held: list[Held], free: list[Free], config: ConfigDict) -> str:
  within = [row for row in held if _reach(row) <= config.tolerance]
  worst = max(held, key=_reach)
  text = (
    f"In {len(within)} of {len(held)} pairs of controller and target the KL at"
    f" the end is within {config.tolerance:.0%} of the target, with all of its"
    f" interval over {config.seeds} seeds; the farthest, {worst.controller} at"
    f" {worst.target:g} nats, is off by {worst.off:+.0%} ({worst.low:+.0%} to"
    f" {worst.high:+.0%})."
  )
  settled = []
  for name in config.controllers:
    steps = [row.settled for row in held if row.controller == name]
    known = [step for step in steps if math.isfinite(step)]
    late = f"by step {max(known):.0f}" if known else ""
    if len(known) < len(steps):
      late += f" at {len(known)} of {len(steps)} targets"
    settled.append(f"{name} {late.strip()}")
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


def _draw(config: ConfigDict, runs: Runs) -> matplotlib_figure.Figure:
  """A row of panels a controller: the KL on the left, β on the right.

  A thin line is a seed, a thick one their mean.
  """
  count = len(config.controllers) + 1
  figure = matplotlib_figure.Figure(
    figsize=(10, 2.2 * count + 0.4), layout="constrained"
  )
  axes = figure.subplots(count, 2, sharex=True, squeeze=False)
  for (left, right), name in zip(axes, config.controllers):
    for i, target in enumerate(config.targets):
      of, colour = runs[_name(name, target)], f"C{i}"
      span = target * config.tolerance
      left.axhspan(
        target - span, target + span, color=colour, alpha=0.15, linewidth=0
      )
      _lines(left, of, "kl/reverse_exact", colour, f"target {target:g}")
      _lines(right, of, "kl/beta", colour, f"target {target:g}")
    left.set_ylim(0, 1.7 * max(config.targets))
    left.set_title(name, fontsize=10, loc="left", fontweight="bold")
  left, right = axes[-1]
  for name, colour in zip(FREE, ("tab:purple", "tab:brown")):
    _lines(left, runs[name], "kl/reverse_exact", colour, name)
    _lines(right, runs[name], "kl/beta", colour, name)
  left.set_ylim(bottom=0)
  left.set_title(" and ".join(FREE), fontsize=10, loc="left", fontweight="bold")
  _pairs(right.twinx(), runs["trust"], config.last)
  for left, right in axes:
    left.set_ylabel("nats per response")
    right.set_ylabel("β")
    right.set_yscale("log")
    right.set_ylim(1e-3, 2 * config.conservative_beta)
    right.yaxis.set_major_formatter("{x:g}")
    left.spines[["top", "right"]].set_visible(False)
    right.spines[["top", "right"]].set_visible(False)
  for axis, place in ((axes[0, 1], "upper right"), (left, "lower right")):
    axis.legend(frameon=False, fontsize=9, ncols=3, loc=place)
  for axis, title in zip(
    axes[0],
    (
      f"KL(π‖π_ref), targets ± {config.tolerance:.0%}",
      "β; thin: a seed, thick: their mean",
    ),
  ):
    axis.set_title(title, fontsize=10)
  for axis in axes[-1]:
    axis.set_xlabel("step")
  return figure


def _pairs(
  axis: matplotlib_axes.Axes, runs: Sequence[toy_runs.Rows], window: int
) -> None:
  """What `trust` looks at, the mean of seeds, on an axis of its own."""
  pairs = _columns(runs, "reward/pair_accuracy").mean(axis=0)
  mean = toy_runs.trailing_mean(pairs, window)
  axis.plot(mean, color="0.6", linewidth=1.2, linestyle="--")
  axis.set_ylim(0.4, 0.9)
  axis.set_ylabel("pairs in order (dashed)", color="0.5")
  axis.spines["top"].set_visible(False)


def _lines(
  axis: matplotlib_axes.Axes,
  runs: Sequence[toy_runs.Rows],
  name: str,
  colour: str,
  label: str,
) -> None:
  values = _columns(runs, name)
  axis.plot(values.T, color=colour, linewidth=0.5, alpha=0.6)
  axis.plot(values.mean(axis=0), color=colour, linewidth=1.4, label=label)
