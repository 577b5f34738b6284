"""Does the step end at π*(y) ∝ π_ref(y) exp(r(y)/β), and who does not?

On a transformer whose responses are all listed, the algorithms of
`ppo.make_step` start at the reference and are measured by the share of
J* − J(π_ref) that they reach. What they should reach is known: all of it with
the sequence's reverse KL; with another penalty as much as the same optimiser
does on its exact expected gradient; with normalised groups, what the optimum
at the effective β is worth. Each arm is judged by the 95 % interval of its
share over seeds, which draw the samples.

What is covered: one task, chosen to be without plateaus (the table `plateaus`
says what the exact gradient reaches on others); the sequence's KL with every
algorithm at every β; the other penalties with RLOO alone, at
`config.wrong_betas`.
"""

from typing import Any

import jax
from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure
from matplotlib import ticker
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.stages import progress as progress_lib
from rlhf_jax.studies import drawing, enumerable, intervals, limits, study
from rlhf_jax.studies.closed_form import arms as arms_lib
from rlhf_jax.studies.closed_form import runs

_BY = {"sampled": "sampled", "rao_blackwellised": "rao-bl.", "pairs": "pairs"}


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense."""
  batch, steps, top = config.batch_size, config.steps, config.evaluations
  several = limits.some_of(arms_lib.RIGHT)
  limits.check(
    config,
    {
      "betas wrong_betas": limits.different(limits.FINITE_ABOVE_0),
      "algorithms": limits.Limit(
        f"{several.wanted}, RLOO among them",
        lambda xs: several.holds(xs) and "RLOO" in xs,
      ),
      "wrong": limits.some_of(arms_lib.WRONG),
      "vocab_size": limits.between(2, 8),
      "response_length": limits.between(2, 5),
      "width": limits.Limit("a multiple of 4", lambda x: x > 0 and x % 4 == 0),
      "task_seed": limits.between(0, 2**32 - 1, "2**32 − 1"),
      "batch_size": limits.Limit("even", lambda x: x >= 2 and x % 2 == 0),
      "steps epochs prediction_steps other_tasks": limits.at_least(1),
      "seeds": limits.at_least(2),
      "evaluations": limits.divisor(steps, f"steps={steps}"),
      "last": limits.between(1, top, f"evaluations={top}"),
      "minibatches": limits.divisor(batch // 2, f"half of batch_size={batch}"),
      "group_size": limits.Limit(
        f"at least 2, and a divisor of batch_size={batch}",
        lambda x: x >= 2 and batch % x == 0,
      ),
      "learning_rate": limits.FINITE_ABOVE_0,
      "b2": limits.Limit("in [0, 1)", lambda x: 0 <= x < 1),
      "gamma gae_lambda": limits.between(0, 1),
    },
  )


def run(lab: study.Lab) -> study.Outcome:
  """Trains all arms; minutes, of which nothing is kept."""
  config = lab.config
  task = enumerable.make(config, seed=config.task_seed)
  others = [enumerable.make(config, seed=i) for i in range(config.other_tasks)]
  trained = _train(lab, task)
  with jax.enable_x64(True):
    ways = arms_lib.ways(task, config, trained)
    normalised = [
      row
      for program, of in trained
      if program.algorithm == arms_lib.NORMALISED
      for row in arms_lib.normalised(task, config, of)
    ]
    noise = arms_lib.noise(task, config)
    plateaus = arms_lib.plateaus(others, config)
  arms = [way.arm for way in ways]
  return study.Outcome(
    verdict=verdict(arms),
    paragraph=_paragraph(arms, normalised, noise, plateaus),
    tables=_tables(config, ways, normalised, noise, plateaus),
    figure=_draw(ways, samples=config.steps * config.batch_size),
  )


def _train(lab, task):
  """Every program with its policies."""
  programs = arms_lib.programs(lab.config)
  steps = len(programs) * lab.config.evaluations
  done, trained = iter(range(1, steps + 1)), []
  with progress_lib.show(
    lab.console, "closed_form", done=0, steps=steps
  ) as progress:
    tell = lambda: progress.update(next(done), {})
    for program in programs:
      progress.note(program.algorithm)
      trained.append(
        (program, runs.train(task, lab.config, program, tell=tell))
      )
  return trained


def verdict(arms: list[arms_lib.Arm]) -> str:
  """The rule.

  It holds if every arm is where the claim says, at the βs where it was trained.
  Where some are not, it holds for the others: for the βs at which all right
  arms are at the optimum, and for the wrong penalties that are where they were
  predicted. Without any of either it does not hold.
  """
  right, wrong = {}, {}
  for arm in arms:
    name, of = (arm.penalty, wrong) if arm.is_wrong else (arm.beta, right)
    if arm.is_wrong or arm.is_right:
      of[name] = of.get(name, True) and arm.as_claimed
  if not any(right.values()) or not any(wrong.values()):
    return study.DOES_NOT_HOLD
  conditions = [
    f"{what} {' or '.join(f'{name:{form}}' for name in of if of[name])}"
    for what, of, form in (
      ("the β of the sequence's KL is", right, "g"),
      ("the other penalty is", wrong, ""),
    )
    if not all(of.values())
  ]
  if not conditions:
    return study.HOLDS
  return study.holds_when(" and ".join(conditions))


def _tables(config, ways, normalised, noise, plateaus):
  samples = config.steps * config.batch_size
  counted = f"{config.seeds} seeds, {samples:,} responses each"
  arms = [way.arm._replace(estimator=_BY[way.arm.estimator]) for way in ways]
  tables = {
    "arms": study.Table(
      "Share of J* − J(π_ref) that is reached, the mean and its 95 % interval"
      f" over {counted}; predicted by the exact expected gradient; KL(π‖π*) and"
      " KL(π‖π_ref) at the end, nats, medians",
      (
        *("algorithm", "penalty", "by", "beta", "share", "low", "high"),
        *("pred.", "to π*", "to π_ref"),
      ),
      arms,
    ),
    "runs": study.Table(
      "Share of J* − J(π_ref) that each seed reaches",
      ("algorithm", "penalty", "by", "beta", "seed", "share"),
      [
        (*arm[:4], seed, share)
        for arm, way in zip(arms, ways)
        for seed, share in enumerate(way.shares)
      ],
      shown=False,
    ),
    "noise": study.Table(
      "Variance of a response's gradient of J with a perfect critic, in all"
      " logits together, at π_ref (start) and at π* (end)",
      ("beta", "start", "start, rao-bl.", "end", "end, rao-bl."),
      noise,
    ),
    "plateaus": study.table_of(
      f"The exact gradient of J on {config.other_tasks} other random tasks:"
      f" share of them where it reaches {arms_lib.ENOUGH:.0%}, and the least"
      " that it reaches",
      plateaus,
    ),
  }
  if normalised:
    tables["normalised"] = study.Table(
      "GRPO with normalised groups: its effective β, the share that it reaches"
      " and that which the optimum at the effective β is worth (pred.), KL to"
      " π*, and to that optimum, nats",
      ("beta", "effective", "share", "pred.", "to π*", "to π* at effective"),
      normalised,
    )
  return tables


def _paragraph(arms, normalised, noise, plateaus) -> str:
  right = [arm for arm in arms if arm.is_right]
  wrong = [arm for arm in arms if arm.is_wrong]
  dpo = [arm for arm in right if arm.algorithm == runs.DPO]
  there = sum(arm.as_claimed for arm in right)
  worst = min(right, key=lambda arm: arm.low)
  apart = max(wrong, key=lambda arm: arm.apart)
  nearest = max(wrong, key=lambda arm: arm.reached)
  farthest = min(wrong, key=lambda arm: arm.reached)
  algorithms = " or ".join(dict.fromkeys(arm.algorithm for arm in wrong))
  betas = " or ".join(dict.fromkeys(f"{arm.beta:g}" for arm in wrong))
  text = (
    f"With the sequence's reverse KL {there} of {len(right)} arms reach"
    f" {arms_lib.ENOUGH:.0%} of J* − J(π_ref) with all of their interval, the"
    f" least being {worst.algorithm}, {_BY[worst.estimator]}, at"
    f" β = {worst.beta:g} with {_share(worst)}; {algorithms} with other"
    f" penalties at β = {betas} ends between {_share(farthest)} with"
    f" {farthest.penalty} and {_share(nearest)} with {nearest.penalty},"
    f" intervals going up to {apart.apart:.1%} from where the expected gradient"
    f" leads ({apart.penalty})."
  )
  if dpo:
    each = ", ".join(f"{_share(arm)} at β = {arm.beta:g}" for arm in dpo)
    text += f" DPO on pairs of as many of π_ref's responses reaches {each}."
  if normalised:
    furthest = min(normalised, key=lambda row: row.reached)
    text += (
      f" GRPO with normalised groups at β = {furthest.beta:g} has an effective"
      f" β of {furthest.beta_effective:.2g}, whose optimum is worth"
      f" {furthest.predicted:.1%}, and reaches {furthest.reached:.1%}; KL(π‖·)"
      f" is {furthest.to_effective:.2g} nats to that optimum and"
      f" {furthest.to_optimum:.2g} to π*."
    )
  last = noise[-1]
  hard = min(plateaus, key=lambda row: row.enough)
  return text + (
    f" At π* of β = {last.beta:g} the variance of a response's gradient is"
    f" {last.end_sampled:.1g} with the sampled penalty, for r − β log π/π_ref"
    f" is the same for all responses, and {last.end_rao_bl:.2g} with the"
    f" Rao-Blackwellised one. At β = {hard.beta:g} the exact gradient itself"
    f" reaches {arms_lib.ENOUGH:.0%} on {hard.enough:.0%} of other random"
    f" tasks, and {hard.lowest:.0%} on the worst of them."
  )


def _share(arm: arms_lib.Arm) -> str:
  return f"{intervals.Interval(arm.reached, arm.low, arm.high):.2%}"


_COLOURS = ("tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:brown")
_REACHED, _WRONG, _OTHER = "tab:blue", "tab:red", "0.45"
_LINES = {
  "sampled": ("-", "sampled"),
  "rao_blackwellised": (":", "Rao-Blackwellised"),
  "pairs": ("--", "DPO"),
}


def _draw(
  ways: list[arms_lib.Way], *, samples: int
) -> matplotlib_figure.Figure:
  """J, KL(π‖π*) and the ends of the wrong targets, side by side."""
  figure, (left, middle, right) = drawing.panels(
    (14.5, 4.8), 3, width_ratios=(1, 1, 1.2)
  )
  learnt = [way for way in ways if way.arm.is_right]
  betas = sorted({way.arm.beta for way in learnt})
  colours = dict(zip(betas, _COLOURS * len(betas)))
  for way in learnt:
    colour, evaluations = colours[way.arm.beta], len(way.value)
    x = samples * np.arange(1, evaluations + 1) / evaluations
    left.plot(x, way.value, color=colour, alpha=0.6, lw=1)
    left.axhline(way.best, ls="--", color=colour, lw=1)
    line = {"color": colour, "alpha": 0.8, "lw": 1.2}
    middle.plot(x, way.to_optimum, _LINES[way.arm.estimator][0], **line)
  for beta, colour in colours.items():
    left.plot([], [], color=colour, label=f"β = {beta:g}")
  left.plot([], [], "--", color="0.4", label="J*")
  for estimator in dict.fromkeys(way.arm.estimator for way in learnt):
    style, label = _LINES[estimator]
    middle.plot([], [], style, color="0.4", label=label)
  left.set_xscale("log")
  left.xaxis.set_minor_formatter(ticker.NullFormatter())
  middle.set_yscale("log")
  seen = "responses seen"
  drawing.say(left, "J(π) of the right arms", seen, "reward units")
  drawing.say(middle, "How far from π*?", seen, "KL(π‖π*), nats per response")
  for axis in (left, middle):
    axis.xaxis.set_major_formatter(ticker.EngFormatter())
    axis.legend(frameon=False, fontsize=9)
  _ends(right, [way.arm for way in ways])
  return figure


def _ends(axis: matplotlib_axes.Axes, arms: list[arms_lib.Arm]) -> None:
  """What is lacking at the end, a row for each penalty and algorithm."""
  rows: dict[tuple[str, str], list[arms_lib.Arm]] = {}
  for arm in arms:
    name, colour = arm.algorithm, _OTHER
    if arm.is_wrong:
      name, colour = arm.penalty, _WRONG
    elif arm.is_right:
      name, colour = f"{name}, {_BY[arm.estimator]}", _REACHED
    rows.setdefault((name, colour), []).append(arm)
  lacking = lambda share: max(1 - share, 1e-5)
  predicted: dict[str, Any] = {
    "marker": "d",
    "mfc": "none",
    "mec": "black",
    "linestyle": "",
  }
  for place, ((_, colour), of) in enumerate(rows.items()):
    for arm in of:
      ends = lacking(arm.high), lacking(arm.low)
      axis.plot(ends, [place] * 2, color=colour, lw=2, alpha=0.4)
      axis.plot(lacking(arm.reached), place, "o", color=colour, ms=6)
      if arm.is_wrong:
        axis.plot(lacking(arm.predicted), place, ms=11, **predicted)
  axis.axvline(1 - arms_lib.ENOUGH, ls="--", color="0.4", lw=1)
  axis.plot([], [], "o", color="0.4", label="reached, a dot a β")
  axis.plot([], [], ms=9, label="predicted", **predicted)
  enough = f"{1 - arms_lib.ENOUGH:.0%}"
  axis.plot([], [], "--", color="0.4", lw=1, label=enough)
  axis.set_xscale("log")
  drawing.name_rows(axis, [*rows])
  drawing.say(axis, "What is lacking at the end?", "(J* − J) / (J* − J(π_ref))")
  # Below the rows, which leave no place free.
  axis.set_ylim(len(rows) + 0.6, -0.7)
  axis.legend(frameon=False, fontsize=9, loc="lower center", ncols=3)
