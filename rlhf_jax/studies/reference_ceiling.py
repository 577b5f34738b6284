"""Does a better reference lead to more gold, and the more so the larger β is?

One SFT stopped after several numbers of steps gives references from nearly
random to converged. PPO begins at each of them, with the penalty towards it,
under every β and seed. One reward model pays them all: trained and normalised
on the responses of the one of most steps, so that a β is the same price
everywhere.

For each β and seed a line is fitted to gold at the end against the reference's
own gold. Its slope is the share of the references' differences that RL leaves:
1 where every policy gains alike, 0 where all arrive at the same. Intervals are
Student's, over seeds, which draw prompts and responses; the references and the
reward model are the same throughout.

"Caps" is about the optimum under the penalty, and a bad reference also needs
more steps. So the slope's change over the last steps is taken on for as many
steps as have been trained, and the slope must be above 0 even then.
"""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib import colormaps
from matplotlib import figure as matplotlib_figure
from ml_collections import ConfigDict
import numpy as np
from scipy import stats

from rlhf_jax.studies import drawing, intervals, limits, study, toy_runs


class Reference(NamedTuple):
  """An SFT policy; its loss is in nats per token."""

  sft_steps: int
  heldout_loss: float
  gold: float


class Curves(NamedTuple):
  """What the runs did, `[β, reference, seed, step]`."""

  gold: np.ndarray
  kl: np.ndarray
  score: np.ndarray


class Arm(NamedTuple):
  """A reference under a β, over the last steps: means over seeds.

  `gain` is over the reference's gold; `late` is what the last steps have more
  than as many before them; `score` is the reward model's.
  """

  sft_steps: int
  beta: float
  gold: intervals.Interval
  gain: float
  late: intervals.Interval
  kl: float
  score: float


class Slope(NamedTuple):
  """Gold at the end against the reference's own, at a β.

  `spearman` is the rank correlation and `late` the slope's change over the last
  steps, means over seeds; `projected` is the slope after as many steps again,
  if it goes on changing so.
  """

  beta: float
  spearman: float
  spearman_low: float
  slope: intervals.Interval
  late: float
  projected: float
  projected_low: float


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense."""
  longest = config.training.pipeline.sft.train.steps
  half = config.training.train.steps // 2
  limits.check(
    config,
    {
      "shorter_sft": limits.Limit(
        "rising numbers of steps, from 1 to below"
        f" training.pipeline.sft.train.steps={longest}",
        lambda xs: limits.is_rising(xs, above=0, below=longest),
      ),
      "betas": limits.rising(2, above=0),
      "seeds": limits.SEEDS,
      "last": limits.between(1, half, f"half of training.train.steps, {half}"),
    },
  )
  sweep = toy_runs.sweep(config, config.betas)
  toy_runs.check(config, {"sweep": sweep}, toy_runs.SWEPT)


def run(lab: study.Lab) -> study.Outcome:
  """Makes the references and, from each, a sweep; all in sub-workdirs."""
  config, begun = lab.config, toy_runs.start(lab)
  last, total = config.last, config.training.train.steps
  sft = config.training.pipeline.sft
  references, sweeps, sweep = [], [], toy_runs.sweep(config, config.betas)
  for steps in (*config.shorter_sft, sft.train.steps):
    path = begun.policy
    if steps in config.shorter_sft:
      shorter = toy_runs.varied(sft, {"train.steps": steps})
      path = toy_runs.made(lab, f"sft-{steps}", shorter)
    metrics = toy_runs.summary(path)["metrics"]
    figures = metrics["sft/heldout_loss"], metrics["reward/gold"]
    references.append(Reference(steps, *figures))
    here = begun._replace(policy=path)
    sweeps.append(toy_runs.swept(lab, f"from-{steps}", sweep, here))
  curves = of_sweeps(sweeps)
  arms = [
    of_arm(reference, beta, Curves(*runs), last=last)
    for beta, *by_reference in zip(config.betas, *curves)
    for reference, *runs in zip(references, *by_reference)
  ]
  slopes, loosening = of_betas(config.betas, references, curves.gold, last=last)
  return study.Outcome(
    verdict=verdict(slopes, loosening),
    paragraph=paragraph(config, references, arms, slopes, loosening),
    tables={
      "references": study.table_of(
        "The references: steps of SFT; held-out loss, nats per token; gold",
        references,
      ),
      "arms": study.table_of(
        f"Where PPO ends, means over {config.seeds} seeds and the last {last}"
        f" of {total} steps: gold reward with its 95 % interval; its gain over"
        f" the reference's; late: what the {last} steps before had less, with"
        " its interval; KL, nats per response; the reward model's score",
        arms,
        split=True,
      ),
      "slopes": study.table_of(
        "Gold at the end against the reference's own: rank correlation; slope,"
        " the share of a difference that is left, with its 95 % interval; its"
        f" change over the last {last} steps; where it is after {total} more,"
        " if it goes on changing so",
        slopes,
        split=True,
      ),
    },
    figure=draw(config.betas, references, arms, curves.gold),
  )


def of_sweeps(sweeps: Sequence[Sequence[toy_runs.Member]]) -> Curves:
  """The curves of a sweep from each reference."""
  arms = [toy_runs.by_beta(members).values() for members in sweeps]
  of = lambda name: np.array(
    [[toy_runs.curves(mine, name) for mine in row] for row in arms]
  ).swapaxes(0, 1)
  return Curves(of("reward/gold"), of("kl/reverse_exact"), of("reward/score"))


def of_arm(
  reference: Reference, beta: float, runs: Curves, *, last: int
) -> Arm:
  """Where an arm's runs, `[seed, step]`, ended, and whether they still rose."""
  (gold, before), (kl, _), (score, _) = (_late(x, last) for x in runs)
  ended, late = intervals.of_mean(gold), intervals.of_difference(gold, before)
  gain = ended.mean - reference.gold
  rest = float(kl.mean()), float(score.mean())
  return Arm(reference.sft_steps, beta, ended, gain, late, *rest)


def slopes_by_seed(own: np.ndarray, golds: np.ndarray) -> np.ndarray:
  """Least-squares slopes of golds, `[β, reference, seed]`, over `own`."""
  centred = own - own.mean()
  return centred @ golds / (centred @ centred)


def of_betas(
  betas: Sequence[float],
  references: list[Reference],
  gold: np.ndarray,
  *,
  last: int,
) -> tuple[list[Slope], intervals.Interval]:
  """The line's slope under each β, and where it leads if it goes on.

  And how much larger it is under the last β than under the first.
  """
  ends, before = _late(gold, last)
  own = np.array([reference.gold for reference in references])
  by_seed = slopes_by_seed(own, ends)
  late = by_seed - slopes_by_seed(own, before)
  projected = by_seed + gold.shape[-1] / last * late
  slopes = []
  for i, beta in enumerate(betas):
    ranks = [stats.spearmanr(own, of).statistic for of in ends[i].T]
    slopes.append(
      Slope(
        beta,
        *intervals.of_mean(ranks)[:2],
        intervals.of_mean(by_seed[i]),
        float(late[i].mean()),
        *intervals.of_mean(projected[i])[:2],
      )
    )
  return slopes, intervals.of_difference(by_seed[-1], by_seed[0])


def _late(values: np.ndarray, last: int) -> tuple[np.ndarray, np.ndarray]:
  """Means over the last steps, and over as many before them."""
  ends, before = values[..., -last:], values[..., -2 * last : -last]
  return ends.mean(axis=-1), before.mean(axis=-1)


def verdict(slopes: list[Slope], loosening: intervals.Interval) -> str:
  """The rule: gold at the end rises with the reference's, now and later.

  And less so under the smallest β than under the largest: otherwise it is not
  the penalty that caps.
  """
  if not loosening.low > 0:
    return study.DOES_NOT_HOLD
  rises = {
    f"{s.beta:g}": all(
      low > 0 for low in (s.spearman_low, s.slope.low, s.projected_low)
    )
    for s in slopes
  }
  return study.verdict(rises, "β is")


def paragraph(
  config: ConfigDict,
  references: list[Reference],
  arms: list[Arm],
  slopes: list[Slope],
  loosening: intervals.Interval,
) -> str:
  """What is left of the references' differences; then where PPO ended."""
  fewest, most = references[0], references[-1]
  of = {(arm.sft_steps, arm.beta): arm for arm in arms}
  both = lambda figure: "; ".join(
    f"β = {s.beta:g}: {figure(of[fewest.sft_steps, s.beta]):.2f} and"
    f" {figure(of[most.sft_steps, s.beta]):.2f}"
    for s in slopes
  )
  left = ", ".join(f"{s.slope:.0%} under β = {s.beta:g}" for s in slopes)
  more, low, high = (f"{100 * x:+.0f}" for x in loosening)
  later = ", ".join(
    f"{s.projected:.0%} (low end {s.projected_low:.0%})" for s in slopes
  )
  late = max(arms, key=lambda arm: arm.late.mean)
  return (
    "Of a difference in gold between references"
    f" {config.training.train.steps} steps of PPO leave {left}: {more}"
    f" percentage points ({low} to {high}) from the smallest β to the largest."
    f" The references of fewest ({fewest.sft_steps}) and of most"
    f" ({most.sft_steps}) steps of SFT, of {len(references)}, have gold of"
    f" {fewest.gold:.2f} and {most.gold:.2f}; from these PPO ends at"
    f" {both(lambda arm: arm.gold.mean)}. If the shares went on as they changed"
    f" in the last {config.last} steps for as many steps again as have been"
    f" trained, they would be {later}. Of the {len(arms)} arms' golds the one"
    f" of {late.sft_steps} steps of SFT under β = {late.beta:g} rose most in"
    f" these steps: {late.late:+.2f}. The reward model's score, which is what"
    " is paid, ends from the same two references at"
    f" {both(lambda arm: arm.score)}."
  )


def draw(
  betas: Sequence[float],
  references: list[Reference],
  arms: list[Arm],
  gold: np.ndarray,
) -> matplotlib_figure.Figure:
  """Gold at the end against the reference's; how two of them got there."""
  figure, (left, right) = drawing.panels((11, 4.4), 2)
  own = [reference.gold for reference in references]
  left.plot(own, own, color="0.6", linestyle="--", label="no gain")
  places = np.linspace(0.0, 0.9, len(betas))
  for beta, colour, runs in zip(betas, colormaps["viridis"](places), gold):
    ends = [arm.gold for arm in arms if arm.beta == beta]
    style = {"color": colour, "marker": "o", "linestyle": "-"}
    drawing.bars(left, own, ends, label=f"β = {beta:g}", **style)
    for of, dashes in ((runs[-1], "-"), (runs[0], "--")):
      mean = toy_runs.trailing_mean(of.mean(axis=0), 5)
      right.plot(mean, color=colour, linestyle=dashes)
  drawing.say(
    left,
    "Where PPO ends: mean and 95 % interval",
    "gold reward of the reference",
    "gold reward at the end",
  )
  left.legend(frameon=False, fontsize=9)
  drawing.say(
    right,
    "On the way: most steps of SFT (solid), fewest (dashed)",
    "step",
    "gold reward, mean of 5 steps and all seeds",
  )
  return figure
