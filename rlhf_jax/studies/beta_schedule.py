"""Has a relaxing β more gold than a constant one, at the same KL?

PPO under several constant β gives, for each seed, gold at the end as a
function of KL at the end. Every way to move β begins at a conservative value:
`linear` and `cosine` fall to a share of it by the last step, `ziegler` and
`dual` seek a KL, `trust` follows the reward model's reliability. What such a
run is ahead by is its gold less that of its seed's constants at its own KL.

Between constants the curve is a straight line in √KL: gold is nearly so where
little has been spent (Gao et al. 2022, arXiv:2210.10760), and a line in KL
would run below it. Straight pieces run below a curve that bends down all the
same. By how much is measured: each inner constant is compared with a curve that
leaves it out. What these are ahead by on average is charged to every arm, which
is strict, for that curve is coarser than the arms'.

A run whose KL is beyond its seed's constants is compared with nothing, and its
arm then counts as not ahead. Intervals are Student's, over seeds, and right for
all arms at once (Bonferroni), as one arm that is ahead is enough.
"""

from collections.abc import Iterable, Mapping
import math
from typing import NamedTuple

from matplotlib import figure as matplotlib_figure
from matplotlib import ticker
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.studies import drawing, intervals, limits, study, toy_runs

_SCHEDULE = {"kl__controller": "schedule"}
_SEEKING = "ziegler", "dual"  # a KL, the config's target
# What each arm sets.
ARMS = {
  "linear": _SCHEDULE | {"kl__schedule__shape": "linear"},
  "cosine": _SCHEDULE | {"kl__schedule__shape": "cosine"},
  "ziegler": {"kl__controller": "ziegler"},
  "dual": {"kl__controller": "dual"},
  "trust": {"kl__controller": "trust"},
}
_COLOURS = "tab:blue", "tab:cyan", "tab:orange", "tab:red", "tab:purple"
_MARKERS = "os^Dv"


class Runs(NamedTuple):
  """An arm's runs, a row a seed.

  `gold` and `kl`, nats per response, over the last steps; β `[seed, step]`.
  """

  gold: np.ndarray
  kl: np.ndarray
  betas: np.ndarray


class Arm(NamedTuple):
  """An arm's means over seeds; what it is `ahead` of the constants by.

  The β are those of the first step and of the last; `compared` is how many
  seeds have constants on both sides of their KL.
  """

  arm: str
  beta_first: float
  beta: float
  kl: float
  gold: float
  ahead: intervals.Interval
  compared: int

  @property
  def is_comparable(self) -> bool:
    """Whether every seed has constants around its KL."""
    return math.isfinite(self.ahead.mean)


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense."""
  relaxed = config.training.kl.trust.beta_min
  limits.check(
    config,
    {
      "constants": limits.rising(3, above=0),
      "arms": limits.some_of(ARMS),
      "conservative_beta": limits.Limit(
        f"above training.kl.trust.beta_min={relaxed}",
        lambda x: relaxed < x < math.inf,
      ),
      "target": limits.FINITE_ABOVE_0,
      "seeds": limits.SEEDS,
      "last": limits.steps_of(config),
      "training.kl.schedule.end": limits.Limit("below 1", lambda x: x < 1),
    },
  )
  toy_runs.check(config, sweeps(config), toy_runs.SWEPT | {"kl.target": 0.0})


def run(lab: study.Lab) -> study.Outcome:
  """Does a sweep of the constants and one for each way to move β."""
  config, begun = lab.config, toy_runs.start(lab)
  last = config.last
  found = {
    name: toy_runs.by_beta(toy_runs.swept(lab, name, sweep, begun))
    for name, sweep in sweeps(config).items()
  }
  constants = {
    f"constant {beta:g}": of_members(mine, last=last)
    for beta, mine in found["constant"].items()
  }
  moved = {n: of_members(*found[n].values(), last=last) for n in config.arms}
  arms, left_out = of_arms(moved, constants)
  return study.Outcome(
    verdict=verdict(arms, bias(left_out)),
    paragraph=paragraph(arms, left_out),
    tables={
      "arms": study.table_of(
        f"Means over {config.seeds} seeds: β at the first and at the last step;"
        f" KL, nats per response, and gold reward over the last {last} of"
        f" {config.training.train.steps} steps (the SFT policy's gold:"
        f" {begun.gold:.2f}); gold ahead of constant β at the same KL, with its"
        " interval, 95 % for all arms at once; seeds that can be compared",
        arms,
        split=True,
      ),
      "left_out": study.table_of(
        "The constants, each against a curve without it: what interpolating is"
        " off by, with intervals of the same level; the first and the last have"
        " no curve",
        left_out,
        split=True,
      ),
      "runs": toy_runs.every_run(
        config,
        "Every run: gold reward and KL at the end",
        ("arm", "seed", "gold", "kl"),
        {(name,): (of.gold, of.kl) for name, of in (constants | moved).items()},
      ),
    },
    figure=_draw(constants, moved, [*arms, *left_out]),
  )


def sweeps(config: ConfigDict) -> dict[str, ConfigDict]:
  """By name: of the constants, and of each way to move β."""
  found = {"constant": toy_runs.sweep(config, config.constants)}
  for name in config.arms:
    fields = ARMS[name] | {"kl__beta": config.conservative_beta}
    if name in _SEEKING:
      fields["kl__target"] = config.target
    found[name] = toy_runs.sweep(config, (), **fields)
  return found


def of_members(members: list[toy_runs.Member], *, last: int) -> Runs:
  """What an arm's members say."""
  return Runs(
    toy_runs.ends(members, "reward/gold", last=last),
    toy_runs.ends(members, "kl/reverse_exact", last=last),
    toy_runs.curves(members, "kl/beta"),
  )


def curves_by_seed(constants: Iterable[Runs]) -> list[np.ndarray]:
  """Each seed's constants: their KL, rising, and their gold."""
  pairs = np.stack([(runs.kl, runs.gold) for runs in constants], axis=-1)
  return [of[:, of[0].argsort()] for of in pairs.swapaxes(0, 1)]


def ahead(runs: Runs, constants: Iterable[Runs]) -> np.ndarray:
  """Gold over the constants' at the same KL, a seed each; NaN beyond them."""
  at = [
    np.interp(np.sqrt(nats), np.sqrt(kls), golds, left=np.nan, right=np.nan)
    for nats, (kls, golds) in zip(
      runs.kl, curves_by_seed(constants), strict=True
    )
  ]
  return runs.gold - np.array(at)


def of_arms(
  moved: Mapping[str, Runs], constants: Mapping[str, Runs]
) -> tuple[list[Arm], list[Arm]]:
  """The arms, and the constants; intervals are right for all arms at once."""
  level = 1 - 0.05 / len(moved)
  arms, left_out = (
    [of_arm(name, of[name], constants, level=level) for name in of]
    for of in (moved, constants)
  )
  return arms, left_out


def of_arm(
  name: str, runs: Runs, constants: Mapping[str, Runs], *, level: float
) -> Arm:
  """An arm against the other constants; all its seeds must be comparable."""
  by_seed = ahead(runs, [constants[n] for n in constants if n != name])
  compared = int(np.isfinite(by_seed).sum())
  lead = intervals.Interval(math.nan, -math.inf, math.inf)
  if compared == len(by_seed):
    lead = intervals.of_mean(by_seed, level=level)
  mean = lambda values: float(values.mean())
  betas = mean(runs.betas[:, 0]), mean(runs.betas[:, -1])
  return Arm(name, *betas, mean(runs.kl), mean(runs.gold), lead, compared)


def bias(left_out: list[Arm]) -> float:
  """What interpolating puts an arm ahead by; not below 0.

  NaN where no constant lies within the others in every seed.
  """
  inner = [arm.ahead.mean for arm in left_out if arm.is_comparable]
  return max(0.0, float(np.mean(inner))) if inner else math.nan


def verdict(arms: list[Arm], bias: float) -> str:
  """The rule: the interval of what an arm is ahead by lies above the bias.

  Where the bias is not known, no arm's does.
  """
  return study.verdict({a.arm: a.ahead.low > bias for a in arms}, "β follows")


def paragraph(arms: list[Arm], left_out: list[Arm]) -> str:
  """How many arms are ahead, the best one; then each, and the bias."""
  off = bias(left_out)
  is_ahead = lambda arm: arm.ahead.low > off
  best = "none can be compared in every seed"
  if comparable := [arm for arm in arms if arm.is_comparable]:
    arm = max(comparable, key=lambda arm: (is_ahead(arm), arm.ahead.mean))
    best = f"the best is {arm.arm} with {arm.ahead:+.2f}"
  lead = lambda arm: (
    f"{arm.ahead:+.2f}"
    if arm.is_comparable
    else f"in {arm.compared} seeds within the constants' KL"
  )
  each = "; ".join(
    f"{arm.arm} (β from {arm.beta_first:.2g} to {arm.beta:.2g}) has"
    f" {arm.gold:.2f} at {arm.kl:.1f} nats, {lead(arm)}"
    for arm in arms
  )
  inner = ", ".join(
    f"{arm.arm} by {arm.ahead.mean:+.2f}"
    for arm in left_out
    if arm.is_comparable
  )
  return (
    f"{sum(map(is_ahead, arms))} of {len(arms)} ways to move β are ahead of a"
    " constant β at the same KL by more gold than interpolating may add"
    f" ({'not known' if math.isnan(off) else f'{off:+.2f}'}); {best}. Gold, and"
    " what it is ahead by, with intervals that hold at 95 % for all at once:"
    f" {each}. Left out of the curve, constants are ahead of it:"
    f" {inner or 'none lies within the others in every seed'}; the mean of"
    " this, where it is above 0, is what interpolating may add."
  )


def _draw(
  constants: Mapping[str, Runs], moved: Mapping[str, Runs], arms: list[Arm]
) -> matplotlib_figure.Figure:
  """β over the run; gold against KL; what each arm is ahead by."""
  figure, (path, plane, lead) = drawing.panels((13, 4.4), 3)
  for curve in curves_by_seed(constants.values()):
    plane.plot(*curve, color="0.8", linewidth=0.8, zorder=0)
  means = [(r.kl.mean(), r.gold.mean()) for r in constants.values()]
  nats, golds = zip(*means)
  plane.plot(nats, golds, ".-", color="0.3", label="constant")
  for name, mean in zip(constants, means):
    beta = name.removeprefix("constant ")
    drawing.name_at(plane, beta, mean, (0, -12), fontsize=8, color="0.3")
  colours = dict(zip(moved, _COLOURS))
  for (name, runs), marker in zip(moved.items(), _MARKERS):
    colour = colours[name]
    path.plot(runs.betas.mean(axis=0), color=colour)
    style = {"marker": marker, "color": colour, "label": name}
    drawing.cloud(plane, runs.kl, runs.gold, **style)
  drawing.log_scale(path, "y")
  unit = "β, reward units per nat"
  drawing.say(path, "How β moves: mean over seeds", "step", unit)
  plane.set_xscale("function", functions=(np.sqrt, np.square))
  plane.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  drawing.say(
    plane,
    "At the end: seeds (small), means (large)",
    "KL(π‖π_ref), nats per response",
    "gold reward",
  )
  plane.legend(frameon=False, fontsize=8)
  shown = {arm.arm: arm.ahead for arm in arms if arm.is_comparable}
  in_colour = [colours.get(name, drawing.GREY) for name in shown]
  drawing.lying(lead, [*shown], [*shown.values()], in_colour, size=7)
  drawing.say(
    lead,
    "Gold ahead of constant β at the same KL",
    "gold reward, 95 % for all arms at once\ngrey: constants, left out",
  )
  return figure
