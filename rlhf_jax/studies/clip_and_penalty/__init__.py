"""Does clipping bound what the KL penalty does not, and the other way round?

PPO with several epochs a step, under every clip range and without one, each
with the penalty and without. A step's size is KL(π_old‖π_new), as the last
epoch finds it. A run has two: the median over its steps, the typical one, and
the largest, which a bound is about; a few steps, ten times as large as the
others, make the mean. The distance is KL(π‖π_ref) at the end.

"Without" is a clip_epsilon near 1: ratios above 1.99 are still clipped where
the advantage is positive, and how many tokens that are is in the table. The
critic's own clipping stays as it is in every arm.

Runs of one seed have the same prompts and the same beginning; differences are
taken seed by seed, and their intervals are Student's. Steps are compared by
their ratio, the difference of their logarithms.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict
import numpy as np
from rich import console as rich_console

from rlhf_jax.storage import workdir as workdir_lib
from rlhf_jax.studies import intervals, study, toy_runs
from rlhf_jax.studies.clip_and_penalty import figure as figure_lib

ON, OFF = "on", "off"
_RATIOS = ("step", "largest")


class Runs(NamedTuple):
  """An arm's figures, one of each seed.

  `gold` and `kl` (nats per response) at the end; `step`, the median of
  KL(π_old‖π_new) over all steps, and `largest`, its maximum, nats per response;
  the share of tokens that were `clipped`.
  """

  gold: np.ndarray
  kl: np.ndarray
  step: np.ndarray
  largest: np.ndarray
  clipped: np.ndarray


# By clip_epsilon and whether the penalty is on.
Arms = Mapping[tuple[float, str], Runs]


class Difference(NamedTuple):
  """What clipping, or the penalty, changes: mean and 95 % interval.

  A ratio, of steps; a difference otherwise. `wanted` is what the claim says of
  it, `true` whether the interval is there; of some figures it says nothing.
  """

  clip: float
  figure: str
  of: str
  at: str
  mean: float
  low: float
  high: float
  wanted: str
  true: bool | None


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense.

  Raises:
    UserError: With the field, its value and what is wanted.
  """
  steps = config.training.train.steps
  for wanted, holds, field in (
    ("in (0, 1)", lambda x: 0 < x < 1, "no_clip"),
    (
      f"rising numbers in (0, no_clip={config.no_clip})",
      lambda xs: (
        len(xs) > 0
        and list(xs) == sorted({*xs})
        and 0 < xs[0] <= xs[-1] < config.no_clip
      ),
      "clips",
    ),
    ("2 to 20", lambda x: 2 <= x <= 20, "seeds"),
    (f"1 to training.train.steps={steps}", lambda x: 1 <= x <= steps, "last"),
    ("at least 0", lambda x: x >= 0, "margin"),
    ("above 0", lambda x: x > 0, "training.kl.beta"),
    (
      "at least 2: the first update of a step is at ratio 1 and clips nothing",
      lambda x: x >= 2,
      "training.ppo.epochs",
    ),
  ):
    study.require(config, wanted, holds, field)
  fixed = {"sweep.seeds": (), "kl.controller": "fixed"}
  toy_runs.check(config, _sweeps(config), fixed)


def run(
  config: ConfigDict,
  workdir: workdir_lib.Workdir,
  console: rich_console.Console,
) -> study.Outcome:
  """Does a sweep for each clip range, in a sub-workdir."""
  begun = toy_runs.start(config.training, workdir, console)
  arms = {}
  for clip, (name, sweep) in zip(_clips(config), _sweeps(config).items()):
    members = toy_runs.swept(name, sweep, begun, workdir, console)
    arms |= of_members(clip, members, last=config.last)
  rows = [
    row
    for clip in config.clips
    for row in differences(arms, clip, config.no_clip, margin=config.margin)
  ]
  return study.Outcome(
    verdict=verdict(rows),
    paragraph=_paragraph(config, arms, rows),
    tables=_tables(config, arms, rows),
    figure=figure_lib.draw(arms, begun.gold),
  )


def of_members(
  clip: float, members: list[toy_runs.Member], *, last: int
) -> dict[tuple[float, str], Runs]:
  """What a sweep's members say, with and without the penalty."""

  def of(rows):
    column = lambda name: toy_runs.column(rows, name)
    moves = column("kl/to_old_policy")
    return (
      column("reward/gold")[-last:].mean(),
      column("kl/reverse_exact")[-last:].mean(),
      np.median(moves),
      moves.max(),
      column("ppo/clip_fraction").mean(),
    )

  by_penalty = {
    ON: [of(member.rows) for member in members if member.beta > 0],
    OFF: [of(member.rows) for member in members if member.beta == 0],
  }
  return {
    (clip, name): Runs(*np.array(runs).T) for name, runs in by_penalty.items()
  }


def differences(
  arms: Arms, clip: float, no_clip: float, *, margin: float
) -> list[Difference]:
  """All that the claim says of a clip range.

  Clipping makes the median step and the largest smaller, with the penalty and
  without; the penalty makes the distance smaller, with clipping and without;
  both together lose no gold to either alone. What each does to the other's
  figure is reported beside it.
  """

  def row(figure, of, at, first, second, wanted):
    pair = [arms[arm]._asdict()[figure] for arm in (first, second)]
    if figure in _RATIOS:
      logs = intervals.of_difference(*np.log(pair))
      interval = intervals.Interval(*map(float, np.exp(logs)))
    else:
      interval = intervals.of_difference(*pair)
    true = {
      "below 1": interval.high < 1,
      "below 0": interval.high < 0,
      f"at least {-margin:g}": interval.low >= -margin,
      "": None,
    }[wanted]
    return Difference(clip, figure, of, at, *interval, wanted, true)

  def clipping(figure, penalty, wanted):
    pair = (clip, penalty), (no_clip, penalty)
    return row(figure, "clipping", f"penalty {penalty}", *pair, wanted)

  def penalty(figure, epsilon, wanted):
    at = "clipping " + (OFF if epsilon == no_clip else ON)
    return row(figure, "penalty", at, (epsilon, ON), (epsilon, OFF), wanted)

  less, no_less = "below 0", f"at least {-margin:g}"
  return [
    clipping("step", OFF, "below 1"),
    clipping("step", ON, "below 1"),
    clipping("largest", OFF, "below 1"),
    clipping("largest", ON, "below 1"),
    penalty("kl", no_clip, less),
    penalty("kl", clip, less),
    clipping("gold", ON, no_less),
    penalty("gold", clip, no_less),
    clipping("kl", OFF, ""),
    penalty("step", no_clip, ""),
  ]


def verdict(rows: list[Difference]) -> str:
  """The rule: all that is wanted of a clip range, for all or for some."""
  clips = dict.fromkeys(row.clip for row in rows)
  true = {
    f"{clip:g}": all(
      row.true for row in rows if row.clip == clip and row.wanted
    )
    for clip in clips
  }
  return study.verdict(true, "the clip range is")


def _clips(config: ConfigDict) -> tuple[float, ...]:
  return *config.clips, config.no_clip


def _sweeps(config: ConfigDict) -> dict[str, ConfigDict]:
  """The sweeps by name, one for each clip range."""
  seeds = tuple(range(config.seed, config.seed + config.seeds))
  fields = {
    "sweep.betas": (0.0, config.training.kl.beta),
    "sweep.seeds": seeds,
  }
  return {
    f"clip={clip:g}": toy_runs.varied(
      config.training, fields | {"ppo.clip_epsilon": clip}
    )
    for clip in _clips(config)
  }


def _tables(
  config: ConfigDict, arms: Arms, rows: list[Difference]
) -> dict[str, study.Table]:
  return {
    "arms": study.Table(
      f"Means over {config.seeds} seeds: gold reward, its spread over seeds"
      " (sd), and KL(π‖π_ref) over the last"
      f" {config.last} of {config.training.train.steps} steps; step: a run's"
      " median of KL(π_old‖π_new), and its largest; nats per response; clipped:"
      " share of tokens",
      (
        "clip",
        "penalty",
        "gold",
        "gold_sd",
        "kl",
        "step",
        "largest",
        "clipped",
      ),
      [
        (
          clip,
          penalty,
          float(runs.gold.mean()),
          float(runs.gold.std(ddof=1)),
          *(float(x.mean()) for x in runs[1:]),
        )
        for (clip, penalty), runs in arms.items()
      ],
    ),
    "differences": study.Table(
      "What clipping, or the penalty, changes: mean of the seeds' differences"
      " (nats per response, or gold reward), of steps the mean ratio; and its"
      " 95 % interval",
      Difference._fields,
      rows,
    ),
    "runs": study.Table(
      "Every run",
      ("clip", "penalty", "seed", *Runs._fields),
      [
        (clip, penalty, config.seed + i, *map(float, figures))
        for (clip, penalty), runs in arms.items()
        for i, figures in enumerate(zip(*runs))
      ],
      shown=False,
    ),
  }


def _paragraph(config: ConfigDict, arms: Arms, rows: list[Difference]) -> str:
  of = {(r.clip, r.figure, r.of, r.at): r for r in rows}

  def times(clip, figure, what, at):
    row = of[clip, figure, what, at]
    return f"{row.mean:.2f} times ({row.low:.2f} to {row.high:.2f})"

  def change(clip, figure, what, at):
    row = of[clip, figure, what, at]
    return f"{row.mean:+.2f} ({row.low:+.2f} to {row.high:+.2f})"

  def part(clip):
    step = lambda penalty: (
      f"{times(clip, 'step', 'clipping', penalty)} as large and the largest"
      f" {times(clip, 'largest', 'clipping', penalty)}"
    )
    return (
      f"Clipping at {clip:g} makes the median step {step('penalty off')}"
      f" without the penalty, and {step('penalty on')} with it; it changes the"
      f" final KL without the penalty by"
      f" {change(clip, 'kl', 'clipping', 'penalty off')} nats, and beside it"
      " the penalty changes that KL by"
      f" {change(clip, 'kl', 'penalty', 'clipping on')}. Both together have"
      f" {change(clip, 'gold', 'clipping', 'penalty on')} gold over the penalty"
      f" alone and {change(clip, 'gold', 'penalty', 'clipping on')} over"
      " clipping alone."
    )

  middle = config.clips[len(config.clips) // 2]
  none, alone = arms[config.no_clip, OFF], arms[config.no_clip, ON]
  clipped = max(x.clipped.mean() for x in (none, alone))
  return (
    f"Each beside the other, clipping at {middle:g} makes a run's median step"
    f" {times(middle, 'step', 'clipping', 'penalty on')} and its largest"
    f" {times(middle, 'largest', 'clipping', 'penalty on')} as large, and the"
    " penalty changes the KL at the end by"
    f" {change(middle, 'kl', 'penalty', 'clipping on')} nats. With neither, the"
    f" median step is {none.step.mean():.2f} nats and the largest"
    f" {none.largest.mean():.2f}, the KL ends at {none.kl.mean():.1f} nats and"
    f" gold at {none.gold.mean():.2f}; the penalty alone (β ="
    f" {config.training.kl.beta:g}) changes the KL by"
    f" {change(middle, 'kl', 'penalty', 'clipping off')} and makes the median"
    f" step {times(middle, 'step', 'penalty', 'clipping off')} as large;"
    f" unclipped means that at most {clipped:.1%} of tokens are clipped."
    f" {' '.join(map(part, config.clips))} A loss of gold of {config.margin:g}"
    " is tolerated."
  )
