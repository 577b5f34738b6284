"""Do controllers of β hold the KL at its target, on the built-in language?

Every controller with a target (`ziegler`, `pi`, `dual`) at every target, from
the same β; beside them `schedule` and `trust`, which have none and begin at a
conservative β. Where the KL is at the end is its mean over the last steps, the
interval that of the responses which it was measured on.
"""

import math
from typing import NamedTuple

from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure
from ml_collections import ConfigDict
import numpy as np
from rich import console as rich_console

from rlhf_jax.host import workdir as workdir_lib
from rlhf_jax.studies import study, toy_runs

CONTROLLERS = ("ziegler", "pi", "dual")
FREE = ("schedule", "trust")  # They look at no KL.


class Held(NamedTuple):
  """A controller at a target; KLs in nats per response.

  Means over the last steps, but `settled`: the first step whose mean over as
  many steps is within the tolerance, as all later ones are.
  """

  controller: str
  target: float
  kl: float
  ci95: float
  off: float
  settled: int | None
  beta: float
  gold: float


class Free(NamedTuple):
  """A controller without a target.

  β at the first step, at its lowest and over the last steps; KL, nats per
  response, and the share of pairs in order, over the first and the last.
  """

  controller: str
  beta_first: float
  beta_lowest: float
  beta: float
  kl_first: float
  kl: float
  pairs_first: float
  pairs: float
  gold: float


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
    (
      f"above training.kl.trust.beta_min={relaxed}",
      lambda x: relaxed < x < math.inf,
      "conservative_beta",
    ),
  ):
    study.require(config, wanted, holds, field)
  fixed = {"kl.controller": "fixed", "kl.target": 0.0}
  toy_runs.check(config, _runs(config), fixed)


def run(
  config: ConfigDict,
  workdir: workdir_lib.Workdir,
  console: rich_console.Console,
) -> study.Outcome:
  """Does the runs, each in a sub-workdir."""
  start, metrics = toy_runs.run(
    config.training, _runs(config), workdir, console
  )
  held = [
    of_target(
      controller,
      target,
      metrics[_name(controller, target)],
      last=config.last,
      tolerance=config.tolerance,
    )
    for controller in config.controllers
    for target in config.targets
  ]
  free = [of_free(name, metrics[name], last=config.last) for name in FREE]
  steps, last = config.training.train.steps, config.last
  tables = {
    "held": study.Table(
      f"Means over the last {last} of {steps} steps: KL(π‖π_ref), nats per"
      " response, with its 95 % interval; (KL − target) / target; β; gold"
      f" reward (the SFT policy's: {start:.2f}). settled: the first step that,"
      f" as all later ones, has a mean of {last} steps within"
      f" {config.tolerance:.0%}",
      Held._fields,
      [row._replace(off=round(row.off, 3)) for row in held],
    ),
    "free": study.Table(
      "Controllers without a target: β at first, at its lowest and at the end;"
      f" means over the first and the last {last} steps; pairs: the share of"
      " response pairs that the reward model orders as gold does",
      Free._fields,
      free,
    ),
  }
  return study.Outcome(
    verdict=verdict(held, tolerance=config.tolerance),
    paragraph=_paragraph(held, free, config),
    tables=tables,
    figure=_draw(config, metrics),
  )


def of_target(
  controller: str,
  target: float,
  rows: toy_runs.Rows,
  *,
  last: int,
  tolerance: float,
) -> Held:
  """What a run's metrics say of its controller.

  The interval is that of the mean KL of the last policies: their responses are
  independent, the policies are what they are.
  """
  nats = toy_runs.column(rows, "kl/reverse_exact")
  errors = toy_runs.column(rows, "kl/reverse_exact_se")[-last:]
  means = toy_runs.trailing_mean(nats, last)
  outside = np.flatnonzero(~(abs(means / target - 1) <= tolerance))
  settled = int(outside[-1]) + 1 if outside.size else 0
  return Held(
    controller=controller,
    target=target,
    kl=float(means[-1]),
    ci95=float(1.96 * np.sqrt(np.square(errors).sum()) / last),
    off=float(means[-1] / target - 1),
    settled=settled if settled < len(rows) else None,
    beta=_mean(rows[-last:], "kl/beta"),
    gold=_mean(rows[-last:], "reward/gold"),
  )


def of_free(controller: str, rows: toy_runs.Rows, *, last: int) -> Free:
  """What a run's metrics say of a controller without a target."""
  first, rest = rows[:last], rows[-last:]
  return Free(
    controller=controller,
    beta_first=rows[0]["kl/beta"],
    beta_lowest=float(toy_runs.column(rows, "kl/beta").min()),
    beta=_mean(rest, "kl/beta"),
    kl_first=_mean(first, "kl/reverse_exact"),
    kl=_mean(rest, "kl/reverse_exact"),
    pairs_first=_mean(first, "reward/pair_accuracy"),
    pairs=_mean(rest, "reward/pair_accuracy"),
    gold=_mean(rest, "reward/gold"),
  )


def verdict(held: list[Held], *, tolerance: float) -> str:
  """The rule: within the tolerance of every target, for all or for some."""
  names = dict.fromkeys(row.controller for row in held)
  within = {
    name: all(abs(r.off) <= tolerance for r in held if r.controller == name)
    for name in names
  }
  return study.verdict(within, "the controller is")


def _runs(config: ConfigDict) -> dict[str, ConfigDict]:
  """The runs by name."""
  runs = {
    _name(controller, target): toy_runs.varied(
      config.training, {"kl.controller": controller, "kl.target": target}
    )
    for controller in config.controllers
    for target in config.targets
  }
  for name in FREE:
    fields = {"kl.controller": name, "kl.beta": config.conservative_beta}
    runs[name] = toy_runs.varied(config.training, fields)
  return runs


def _name(controller: str, target: float) -> str:
  return f"{controller}-{target:g}"


def _mean(rows: toy_runs.Rows, name: str) -> float:
  return float(toy_runs.column(rows, name).mean())


def _paragraph(held: list[Held], free: list[Free], config: ConfigDict) -> str:
  within = [row for row in held if abs(row.off) <= config.tolerance]
  worst = max(held, key=lambda row: abs(row.off))
  text = (
    f"{len(within)} of {len(held)} runs end within {config.tolerance:.0%} of"
    f" their target; the farthest, {worst.controller} at {worst.target:g} nats,"
    f" ends at {worst.kl:.2f} ± {worst.ci95:.2f} ({worst.off:+.0%})."
  )
  settled = []
  for name in config.controllers:
    steps = [row.settled for row in held if row.controller == name]
    known = [step for step in steps if step is not None]
    late = f"by step {max(known)}" if known else ""
    if len(known) < len(steps):
      late += f" at {len(known)} of {len(steps)} targets"
    settled.append(f"{name} {late.strip()}")
  text += f" They settle: {'; '.join(settled)}."
  for row in free:
    text += (
      f" {row.controller} moves β from {row.beta_first:.2g} to"
      f" {row.beta:.2g} (lowest {row.beta_lowest:.2g}): the KL goes from"
      f" {row.kl_first:.1f} to {row.kl:.1f} nats, gold ends at {row.gold:.2f},"
      f" and the reward model orders {row.pairs:.0%} of the pairs as gold does,"
      f" at first {row.pairs_first:.0%}."
    )
  return text


def _draw(
  config: ConfigDict, metrics: dict[str, toy_runs.Rows]
) -> matplotlib_figure.Figure:
  """A row of panels a controller: the KL on the left, β on the right."""
  count = len(config.controllers) + 1
  figure = matplotlib_figure.Figure(
    figsize=(10, 2.2 * count + 0.4), layout="constrained"
  )
  axes = figure.subplots(count, 2, sharex=True, squeeze=False)
  for (left, right), name in zip(axes, config.controllers):
    for i, target in enumerate(config.targets):
      rows, colour = metrics[_name(name, target)], f"C{i}"
      span = target * config.tolerance
      left.axhspan(
        target - span, target + span, color=colour, alpha=0.15, linewidth=0
      )
      _line(left, rows, "kl/reverse_exact", colour, f"target {target:g}")
      _line(right, rows, "kl/beta", colour, f"target {target:g}")
    left.set_ylim(0, 1.7 * max(config.targets))
    left.set_title(name, fontsize=10, loc="left", fontweight="bold")
  left, right = axes[-1]
  for name, colour in zip(FREE, ("tab:purple", "tab:brown")):
    _line(left, metrics[name], "kl/reverse_exact", colour, name)
    _line(right, metrics[name], "kl/beta", colour, name)
  left.set_ylim(bottom=0)
  left.set_title(" and ".join(FREE), fontsize=10, loc="left", fontweight="bold")
  _pairs(right.twinx(), metrics["trust"], config.last)
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
    axes[0], (f"KL(π‖π_ref), targets ± {config.tolerance:.0%}", "β")
  ):
    axis.set_title(title, fontsize=10)
  for axis in axes[-1]:
    axis.set_xlabel("step")
  return figure


def _pairs(
  axis: matplotlib_axes.Axes, rows: toy_runs.Rows, window: int
) -> None:
  """What `trust` looks at, on an axis of its own."""
  pairs = toy_runs.column(rows, "reward/pair_accuracy")
  mean = toy_runs.trailing_mean(pairs, window)
  axis.plot(mean, color="0.6", linewidth=1.2, linestyle="--")
  axis.set_ylim(0.4, 0.9)
  axis.set_ylabel("pairs in order (dashed)", color="0.5")
  axis.spines["top"].set_visible(False)


def _line(
  axis: matplotlib_axes.Axes,
  rows: toy_runs.Rows,
  name: str,
  colour: str,
  label: str,
) -> None:
  values = toy_runs.column(rows, name)
  axis.plot(values, color=colour, linewidth=1.2, label=label)
