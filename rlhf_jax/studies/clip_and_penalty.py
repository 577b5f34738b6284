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

from rlhf_jax.studies import drawing, intervals, limits, study, toy_runs

ON, OFF = "on", "off"


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
  """Refuses fields that make no sense."""
  rising = f"rising numbers in (0, no_clip={config.no_clip})"
  within = lambda xs: limits.is_rising(xs, above=0, below=config.no_clip)
  unclipped = "at least 2: the first update of a step is at ratio 1 and clips"
  limits.check(
    config,
    {
      "no_clip": limits.inside(0, 1),
      "clips": limits.Limit(rising, within),
      "seeds": limits.SEEDS,
      "last": limits.steps_of(config),
      "margin": limits.at_least(0),
      "training.kl.beta": limits.ABOVE_0,
      "training.ppo.epochs": limits.Limit(
        f"{unclipped} nothing", lambda x: x >= 2
      ),
    },
  )
  toy_runs.check(config, _sweeps(config), toy_runs.SWEPT)


def run(lab: study.Lab) -> study.Outcome:
  """Does a sweep for each clip range, in a sub-workdir."""
  config, begun = lab.config, toy_runs.start(lab)
  arms = {}
  for clip, (name, sweep) in zip(_clips(config), _sweeps(config).items()):
    members = toy_runs.swept(lab, name, sweep, begun)
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
    figure=_draw(arms, begun.gold),
  )


def _clips(config: ConfigDict) -> tuple[float, ...]:
  return *config.clips, config.no_clip


def _sweeps(config: ConfigDict) -> dict[str, ConfigDict]:
  """By name, one for each clip range."""
  betas = 0.0, config.training.kl.beta
  return {
    f"clip={clip:g}": toy_runs.sweep(config, betas, ppo__clip_epsilon=clip)
    for clip in _clips(config)
  }


def of_members(
  clip: float, members: list[toy_runs.Member], *, last: int
) -> dict[tuple[float, str], Runs]:
  """What a sweep's members say, with and without the penalty."""
  arms = {}
  for beta, mine in toy_runs.by_beta(members).items():
    moves = toy_runs.curves(mine, "kl/to_old_policy")
    arms[clip, ON if beta else OFF] = Runs(
      gold=toy_runs.ends(mine, "reward/gold", last=last),
      kl=toy_runs.ends(mine, "kl/reverse_exact", last=last),
      step=np.median(moves, axis=1),
      largest=moves.max(axis=1),
      clipped=toy_runs.curves(mine, "ppo/clip_fraction").mean(axis=1),
    )
  return {name: arms[name] for name in ((clip, ON), (clip, OFF))}


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
    if figure in ("step", "largest"):
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
  true = {}
  for row in rows:
    name = f"{row.clip:g}"
    true[name] = true.get(name, True) and (not row.wanted or bool(row.true))
  return study.verdict(true, "the clip range is")


def _tables(
  config: ConfigDict, arms: Arms, rows: list[Difference]
) -> dict[str, study.Table]:
  steps = config.training.train.steps
  names = "gold", "gold_sd", "kl", "step", "largest", "clipped"
  return {
    "arms": study.Table(
      f"Means over {config.seeds} seeds: gold reward, its spread over seeds"
      f" (sd), and KL(π‖π_ref) over the last {config.last} of {steps} steps;"
      " step: a run's median of KL(π_old‖π_new), and its largest; nats per"
      " response; clipped: share of tokens",
      ("clip", "penalty", *names),
      [
        (*arm, gold.mean(), gold.std(ddof=1), *(x.mean() for x in rest))
        for arm, (gold, *rest) in arms.items()
      ],
    ),
    "differences": study.table_of(
      "What clipping, or the penalty, changes: mean of the seeds' differences"
      " (nats per response, or gold reward), of steps the mean ratio; and its"
      " 95 % interval",
      rows,
    ),
    "runs": toy_runs.every_run(
      config, "Every run", ("clip", "penalty", "seed", *Runs._fields), arms
    ),
  }


def _paragraph(config: ConfigDict, arms: Arms, rows: list[Difference]) -> str:
  of = {
    (r.clip, r.figure, r.of, r.at): intervals.Interval(r.mean, r.low, r.high)
    for r in rows
  }

  def times(clip, figure, what, at):
    mean, low, high = of[clip, figure, what, at]
    return f"{mean:.2f} times ({low:.2f} to {high:.2f})"

  def change(clip, figure, what, at):
    return f"{of[clip, figure, what, at]:+.2f}"

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


def _draw(arms: Arms, start: float) -> drawing.Figure:
  """Step and distance of every arm; gold by clip range."""
  figure, (left, right) = drawing.panels((11, 4.4), 2)
  clips = list(dict.fromkeys(clip for clip, _ in arms))
  names = [*(f"{clip:g}" for clip in clips[:-1]), "off"]
  for shift, penalty, colour, marker, label in (
    (-0.1, ON, "tab:blue", "o", "with the penalty"),
    (0.1, OFF, "tab:orange", "s", "without"),
  ):
    mine = [arms[clip, penalty] for clip in clips]
    style = {"color": colour, "marker": marker}
    for runs, name in zip(mine, names):
      drawing.cloud(left, runs.step, runs.kl, **style)
      drawing.name_at(left, name, (runs.step.mean(), runs.kl.mean()), (4, 6))
    left.plot(
      *np.mean([(r.step, r.kl) for r in mine], axis=2).T, label=label, **style
    )
    places = np.arange(len(clips)) + shift
    golds = [intervals.of_mean(runs.gold) for runs in mine]
    drawing.bars(right, places, golds, **style)
    for place, runs in zip(places, mine):
      right.plot(
        [place + 0.06] * len(runs.gold), runs.gold, ".", color="0.6", zorder=0
      )
  drawing.log_scale(left, "x")
  drawing.log_scale(left, "y")
  drawing.say(
    left,
    "Clipping (the number) and the penalty",
    "a step: KL(π_old‖π_new), nats per response",
    "distance at the end: KL(π‖π_ref), nats per response",
  )
  right.axhline(start, color="0.6", linestyle="--", linewidth=0.8)
  right.annotate("SFT policy", (-0.45, start), va="bottom", fontsize=8)
  right.set_xlim(-0.5, len(clips) - 0.5)
  right.set_xticks(range(len(clips)), names)
  drawing.say(
    right,
    "Gold at the end: mean, 95 % interval, seeds",
    "clip range",
    "gold reward",
  )
  drawing.legend(figure, left, columns=2)
  return figure
