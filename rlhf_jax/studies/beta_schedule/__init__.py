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

from collections.abc import Mapping
import math
from typing import NamedTuple

from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.studies import intervals, limits, study, toy_runs
from rlhf_jax.studies.beta_schedule import figure as figure_lib

_SCHEDULE = {"kl.controller": "schedule", "kl.schedule.shape": "linear"}
# What each arm sets; a target is the config's.
ARMS = {
  "linear": _SCHEDULE,
  "cosine": _SCHEDULE | {"kl.schedule.shape": "cosine"},
  "ziegler": {"kl.controller": "ziegler"},
  "dual": {"kl.controller": "dual"},
  "trust": {"kl.controller": "trust"},
}


class Runs(NamedTuple):
  """An arm's runs, a row a seed.

  `gold` and `kl`, nats per response, over the last steps; β `[seed, step]`.
  """

  gold: np.ndarray
  kl: np.ndarray
  betas: np.ndarray


class Arm(NamedTuple):
  """An arm's means over seeds; `ahead` of the constants, with its interval."""

  arm: str
  beta_first: float
  beta: float
  kl: float
  gold: float
  ahead: float
  low: float
  high: float
  compared: int


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense."""
  relaxed = config.training.kl.trust.beta_min
  limits.check(
    config,
    {
      "constants": limits.Limit(
        "three or more rising numbers above 0",
        lambda xs: limits.is_rising(xs, count=3, above=0),
      ),
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
  fixed = {"sweep.seeds": (), "kl.controller": "fixed", "kl.target": 0.0}
  toy_runs.check(config, sweeps(config), fixed)


def run(lab: study.Lab) -> study.Outcome:
  """Does a sweep of the constants and one for each way to move β."""
  config, begun = lab.config, toy_runs.start(lab)
  runs = {}
  for name, sweep in sweeps(config).items():
    members = toy_runs.swept(lab, name, sweep, begun)
    for beta in dict.fromkeys(member.beta for member in members):
      label = f"{name} {beta:g}" if name == "constant" else name
      mine = [member.rows for member in members if member.beta == beta]
      runs[label] = of_runs(mine, last=config.last)
  constants = {n: r for n, r in runs.items() if n.startswith("constant")}
  moved = {n: r for n, r in runs.items() if n not in constants}
  curves = curves_by_seed(constants)
  arms = of_arms(moved, curves)
  left_out = [
    of_arm(
      name,
      left,
      curves_by_seed({n: r for n, r in constants.items() if n != name}),
      level=_level(len(moved)),
    )
    for name, left in constants.items()
  ]
  return study.Outcome(
    verdict=verdict(arms, bias(left_out)),
    paragraph=paragraph(arms, left_out),
    tables=_tables(config, arms, left_out, runs, begun.gold),
    figure=figure_lib.draw(constants, moved, [*arms, *left_out]),
  )


def of_runs(metrics: list[toy_runs.Rows], *, last: int) -> Runs:
  """What the metrics of an arm's runs say."""
  column = lambda name: np.array(
    [toy_runs.column(rows, name) for rows in metrics]
  )
  end = lambda name: column(name)[:, -last:].mean(axis=1)
  return Runs(end("reward/gold"), end("kl/reverse_exact"), column("kl/beta"))


Curve = tuple[np.ndarray, np.ndarray]


def curves_by_seed(constants: Mapping[str, Runs]) -> list[Curve]:
  """Each seed's constants: KL, rising, and gold."""
  nats = np.stack([runs.kl for runs in constants.values()], axis=1)
  golds = np.stack([runs.gold for runs in constants.values()], axis=1)
  orders = np.argsort(nats, axis=1)
  return [(n[o], g[o]) for n, g, o in zip(nats, golds, orders)]


def ahead(runs: Runs, curves: list[Curve]) -> np.ndarray:
  """Gold over the constants' at the same KL; NaN beyond them."""
  at = [
    np.interp(np.sqrt(nats), np.sqrt(kls), golds, left=np.nan, right=np.nan)
    for nats, (kls, golds) in zip(runs.kl, curves, strict=True)
  ]
  return runs.gold - np.array(at)


def of_arms(moved: Mapping[str, Runs], curves: list[Curve]) -> list[Arm]:
  """The arms, with intervals that are right at once."""
  level = _level(len(moved))
  return [of_arm(n, runs, curves, level=level) for n, runs in moved.items()]


def of_arm(name: str, runs: Runs, curves: list[Curve], *, level: float) -> Arm:
  """An arm against the constants; all its seeds must be comparable."""
  by_seed = ahead(runs, curves)
  compared = int(np.isfinite(by_seed).sum())
  interval = intervals.Interval(math.nan, -math.inf, math.inf)
  if compared == len(by_seed):
    interval = intervals.of_mean(by_seed, level=level)
  return Arm(
    name,
    float(runs.betas[:, 0].mean()),
    float(runs.betas[:, -1].mean()),
    float(runs.kl.mean()),
    float(runs.gold.mean()),
    *interval,
    compared,
  )


def bias(left_out: list[Arm]) -> float:
  """What interpolating puts an arm ahead by; not below 0.

  NaN where no constant lies within the others in every seed.
  """
  inner = [arm.ahead for arm in left_out if math.isfinite(arm.ahead)]
  return max(0.0, float(np.mean(inner))) if inner else math.nan


def verdict(arms: list[Arm], bias: float) -> str:
  """The rule: the interval of what an arm is ahead by lies above the bias.

  Where the bias is not known, no arm's does.
  """
  return study.verdict({arm.arm: arm.low > bias for arm in arms}, "β follows")


def sweeps(config: ConfigDict) -> dict[str, ConfigDict]:
  """The sweeps by name."""
  seeds = tuple(range(config.seed, config.seed + config.seeds))
  fields = {"constant": {"sweep.betas": config.constants, "sweep.seeds": seeds}}
  for name in config.arms:
    start = {"kl.beta": config.conservative_beta, "sweep.seeds": seeds}
    if name in ("ziegler", "dual"):
      start["kl.target"] = config.target
    fields[name] = start | ARMS[name]
  return {
    name: toy_runs.varied(config.training, more)
    for name, more in fields.items()
  }


def _tables(
  config: ConfigDict,
  arms: list[Arm],
  left_out: list[Arm],
  runs: Mapping[str, Runs],
  start: float,
) -> dict[str, study.Table]:
  last, steps = config.last, config.training.train.steps
  return {
    "arms": study.Table(
      f"Means over {config.seeds} seeds: β at the first and at the last step;"
      f" KL, nats per response, and gold reward over the last {last} of {steps}"
      f" steps (the SFT policy's gold: {start:.2f}); gold ahead of constant β"
      " at the same KL, with its interval, 95 % for all arms at once; seeds"
      " that can be compared",
      Arm._fields,
      arms,
    ),
    "left_out": study.Table(
      "The constants, each against a curve without it: what interpolating is"
      " off by, with intervals of the same level; the first and the last have"
      " no curve",
      Arm._fields,
      left_out,
    ),
    "runs": study.Table(
      "Every run: gold reward and KL at the end",
      ("arm", "seed", "gold", "kl"),
      [
        (name, config.seed + i, float(gold), float(nats))
        for name, of in runs.items()
        for i, (gold, nats) in enumerate(zip(of.gold, of.kl))
      ],
      shown=False,
    ),
  }


def paragraph(arms: list[Arm], left_out: list[Arm]) -> str:
  """How many arms are ahead, the best one; then each, and the bias."""
  off = bias(left_out)
  is_ahead = lambda arm: arm.low > off
  comparable = [arm for arm in arms if math.isfinite(arm.ahead)]
  best = "none can be compared in every seed"
  if comparable:
    arm = max(comparable, key=lambda arm: (is_ahead(arm), arm.ahead))
    best = f"the best is {arm.arm} with {_ahead(arm)}"
  each = "; ".join(
    f"{arm.arm} (β from {arm.beta_first:.2g} to {arm.beta:.2g}) has"
    f" {arm.gold:.2f} at {arm.kl:.1f} nats, "
    + (
      _ahead(arm)
      if arm in comparable
      else f"in {arm.compared} seeds within the constants' KL"
    )
    for arm in arms
  )
  inner = ", ".join(
    f"{arm.arm} by {arm.ahead:+.2f}"
    for arm in left_out
    if math.isfinite(arm.ahead)
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


def _ahead(arm: Arm) -> str:
  return f"{arm.ahead:+.2f} ({arm.low:+.2f} to {arm.high:+.2f})"


def _level(arms: int) -> float:
  """Of each interval, for 95 % in all of them."""
  return 1 - 0.05 / arms
