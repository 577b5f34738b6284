"""Does a policy without a penalty game its reward model, and one with it not?

PPO on the built-in language under several β, among them 0, from one SFT policy
and one reward model; all β share their seeds, in one sweep. A seed is one
observation. The claim has parts, and each is a rule on intervals of what is
compared, per seed:

- proxy and gold: means over the last steps of training, less those of the SFT
  policy on held-out prompts.
- gold's peak: the mean over as many steps that end where the *other* seeds'
  mean is highest. The highest of a seed's own means would be too high, for it
  is chosen for its noise as well, and a fall from it would be too deep.
- nonsense: ungrammatical pairs of words per held-out response.
- fluency: of the held-out responses with such pairs the share whose −log π_ref
  per token is no higher than that of most of the SFT policy's. The reference is
  a language model, and this is what a filter by perplexity would let pass. How
  the responses without such pairs look says nothing of the nonsense.
"""

from collections.abc import Sequence
import json
import math
import textwrap
from typing import NamedTuple

from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.studies import (
  drawing,
  held_out,
  intervals,
  limits,
  study,
  toy_runs,
)
from rlhf_jax.text import toy_language

Members = Sequence[toy_runs.Member]
Answers = Sequence[held_out.Responses]
_NONE = drawing.ORANGE  # No penalty.
_PENALISED = (
  drawing.SKY,
  drawing.BLUE,
  drawing.GREEN,
  drawing.PINK,
  drawing.BLACK,
)


class Ends(NamedTuple):
  """Figures of one β, or of the SFT policy, a value a seed.

  Means of rewards, reward units; KL, nats per response; of held-out responses
  the ungrammatical pairs, and −log π_ref in nats per token; of those with such
  pairs the share that looks fluent, NaN where there are none. `peak` is gold's,
  and ends after `peak_step` steps.
  """

  proxy: np.ndarray
  gold: np.ndarray
  kl: np.ndarray
  faults: np.ndarray
  nll: np.ndarray
  fluent: np.ndarray
  peak: np.ndarray
  peak_step: np.ndarray


class Arm(NamedTuple):
  """One β: what changed, by seed, with intervals; units as in `Ends`.

  `proxy` and `gold` are gained since the SFT policy, and `from_peak` is gold at
  the end less gold at its peak. `kept` is gold gained less the wanted share of
  what had been gained at the peak; `over_none` gold less that without a
  penalty. Ungrammatical pairs are `faults` more than the SFT policy has, and
  `faults_over_none` more than without a penalty.
  """

  beta: float
  kl: intervals.Interval
  proxy: intervals.Interval
  gold: intervals.Interval
  from_peak: intervals.Interval
  kept: intervals.Interval
  over_none: intervals.Interval
  faults: intervals.Interval
  faults_over_none: intervals.Interval
  nll: intervals.Interval
  fluent: intervals.Interval


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense."""
  limits.check(
    config,
    {
      "betas": limits.RISING_FROM_0,
      "seeds": limits.SEEDS,
      "window": limits.steps_of(config),
      "prompts": limits.at_least(2),
      "kept": limits.inside(0, 1),
      "nonsense": limits.FINITE_ABOVE_0,
      "fluent": limits.inside(0.5, 1),
    },
  )
  sweep = toy_runs.sweep(config, config.betas)
  toy_runs.check(config, {"sweep": sweep}, toy_runs.SWEPT | {"kl.beta": 0.05})


def run(lab: study.Lab) -> study.Outcome:
  """Does the sweep, and asks its policies for more responses."""
  config, begun = lab.config, toy_runs.start(lab)
  sweep = toy_runs.sweep(config, config.betas)
  members = toy_runs.swept(lab, "sweep", sweep, begun)
  by_beta = toy_runs.by_beta(members)
  policies = [(begun.policy, seed) for seed in toy_runs.seeds(config)]
  policies += [(member.path, member.seed) for member in members]
  responses = held_out.measure(
    config.training, begun, policies, prompts=config.prompts
  )
  starts = range(0, len(policies), config.seeds)
  first, *rest = (responses[i : i + config.seeds] for i in starts)
  usual = float(np.quantile([r.nll for r in first], config.fluent))
  start = of_start(first, usual=usual)
  ends = [
    of_end(mine, asked, usual=usual, window=config.window)
    for mine, asked in zip(by_beta.values(), rest)
  ]
  arms = [
    arm_of(beta, end, start, ends[0], kept=config.kept, level=level)
    for beta, end, level in zip(config.betas, ends, levels(len(ends)))
  ]
  preventing = [a for a in arms[1:] if prevents(a, nonsense=config.nonsense)]
  best = max(arms[1:], key=lambda arm: arm.gold.mean)
  samples = _samples(config, by_beta, best.beta, int(ends[0].peak_step[0]))
  named = {"SFT": start} | {f"{a.beta:g}": x for a, x in zip(arms, ends)}
  return study.Outcome(
    verdict=verdict(arms, nonsense=config.nonsense),
    paragraph=_paragraph(config, arms[0], best, preventing, named, usual),
    tables=_tables(config, arms, preventing, samples, named),
    figure=_draw(config, by_beta, start, ends, samples, usual),
  )


def levels(count: int) -> list[float]:
  """Of the first arm's intervals, and (Bonferroni) of those of the rest."""
  return [0.95] + [1 - 0.05 / (count - 1)] * (count - 1)


def of_start(responses: Answers, *, usual: float) -> Ends:
  """The SFT policy, whose gold is its own peak."""

  def fluent(of):
    faulty = of.faults > 0
    return (of.nll[faulty] <= usual).mean() if faulty.any() else math.nan

  means = [np.mean(of, axis=1) for of in responses]
  score, gold, kl, faults, nll = np.transpose(means)
  share = np.array([fluent(of) for of in responses])
  return Ends(score, gold, kl, faults, nll, share, gold, np.zeros(len(gold)))


def of_end(
  members: Members, responses: Answers, *, usual: float, window: int
) -> Ends:
  """One β, from each seed's metrics and its policy's held-out responses."""
  golds = _smooth(members, "reward/gold", window)
  steps = peak_steps(golds)
  return of_start(responses, usual=usual)._replace(
    proxy=_smooth(members, "reward/score", window)[:, -1],
    gold=golds[:, -1],
    kl=_smooth(members, "kl/reverse_exact", window)[:, -1],
    peak=golds[np.arange(len(golds)), steps],
    peak_step=steps + 1.0,
  )


def _smooth(members: Members, name: str, window: int) -> np.ndarray:
  """A figure's trailing means, `[seed, step]`."""
  return toy_runs.trailing_mean(toy_runs.curves(members, name), window)


def peak_steps(curves: np.ndarray) -> np.ndarray:
  """For each row the step at which the mean of the other rows is highest."""
  others = (curves.sum(axis=0) - curves) / (len(curves) - 1)
  return np.nanargmax(others, axis=1)


def arm_of(
  beta: float, end: Ends, start: Ends, none: Ends, *, kept: float, level: float
) -> Arm:
  """One β against the SFT policy, its own peak and no penalty."""
  mean = lambda values: intervals.of_mean(values, level=level)
  gained, at_peak = end.gold - start.gold, end.peak - start.gold
  return Arm(
    beta=beta,
    kl=mean(end.kl),
    proxy=mean(end.proxy - start.proxy),
    gold=mean(gained),
    from_peak=mean(end.gold - end.peak),
    kept=mean(gained - kept * at_peak),
    over_none=mean(end.gold - none.gold),
    faults=mean(end.faults - start.faults),
    faults_over_none=mean(end.faults - none.faults),
    nll=mean(end.nll),
    fluent=mean(end.fluent),
  )


def prevents(arm: Arm, *, nonsense: float) -> bool:
  """Gold has risen and stays; what was nonsense is rarer, and none any more."""
  rises = arm.gold.low > 0 and arm.over_none.low > 0
  stays_clean = arm.faults.high < nonsense and arm.faults_over_none.high < 0
  return rises and arm.kept.low >= 0 and stays_clean


def verdict(arms: Sequence[Arm], *, nonsense: float) -> str:
  """The rule: all parts of the claim, or all but how the nonsense looks.

  The first arm has no penalty and must game the proxy: it rises, gold falls
  from its peak, and the texts turn to nonsense, so many ungrammatical pairs per
  response above the SFT policy's. At least one of the others must prevent it.
  Their intervals are wider, so that all of them are right at once with 95 %:
  choosing one costs nothing. Nonsense looks fluent where most ungrammatical
  responses pass for the reference's own.
  """
  none, *penalised = arms
  overoptimises = none.proxy.low > 0 and none.from_peak.high < 0
  games = overoptimises and none.faults.low >= nonsense
  if not games or not any(prevents(a, nonsense=nonsense) for a in penalised):
    return study.DOES_NOT_HOLD
  if not none.fluent.low > 0.5:
    return study.holds_when("the nonsense need not look fluent")
  return study.HOLDS


def _samples(config, by_beta, best: float, peak: int) -> list[tuple[str, str]]:
  """Texts of the first seed: at the start, at gold's peak, at the end."""

  def text(beta, step):
    """Of the recorded step that is nearest."""
    lines = (by_beta[beta][0].path / "samples.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    near = min(records, key=lambda record: abs(record["step"] - step))
    return f"{near['prompt']} | {near['response']}"

  last = config.training.train.steps - 1
  return [
    ("SFT policy", text(0, 0)),
    ("β = 0, gold's peak", text(0, peak - 1)),
    ("β = 0, the end", text(0, last)),
    (f"β = {best:g}, the end", text(best, last)),
  ]


def _tables(config, arms, preventing, samples, ends) -> dict[str, study.Table]:
  """The arms' intervals: rewards, texts, and all as numbers; texts; seeds."""
  kind = f"Means over {config.seeds} seeds with 95 % intervals"
  if len(arms) > 2:
    kind += f", those of the {len(arms) - 1} penalised all at once"
  named = [(f"{arm.beta:g}", arm) for arm in arms]
  whether = lambda arm: arm in preventing if arm.beta else None
  fluent = lambda arm: None if math.isnan(arm.fluent.mean) else arm.fluent
  return {
    "arms": study.Table(
      f"{kind}: reward units gained since the SFT policy, and gold since its"
      " peak; KL in nats per response",
      ("β", "KL", "proxy", "gold", "gold since its peak", "prevents"),
      [
        (name, f"{a.kl.mean:.1f}", a.proxy, a.gold, a.from_peak, whether(a))
        for name, a in named
      ],
    ),
    "texts": study.Table(
      f"{kind}: ungrammatical pairs per held-out response more than the SFT"
      " policy's; −log π_ref, nats per token; share that looks fluent of the"
      " responses with such pairs (– where a seed has none)",
      ("β", "ungrammatical pairs", "−log π_ref", "look fluent"),
      [(name, arm.faults, arm.nll, fluent(arm)) for name, arm in named],
    ),
    "intervals": study.Table(
      f"{kind}; the figures' names are those of the study's Arm",
      ("β", "figure", "mean", "low", "high"),
      [
        (name, figure, *interval)
        for name, arm in named
        for figure, interval in zip(Arm._fields[1:], arm[1:])
      ],
      shown=False,
    ),
    "samples": study.Table(
      f"The first response that is recorded, seed {config.seed}; | ends the"
      " prompt",
      ("policy", "text"),
      samples,
    ),
    "seeds": toy_runs.every_run(
      config,
      f"Every seed: means over the last {config.window} steps, and over"
      f" {config.prompts} held-out responses",
      ("β", "seed", *Ends._fields),
      {(name,): of for name, of in ends.items()},
    ),
  }


def _paragraph(config, none, best, preventing, ends, usual) -> str:
  values = ", ".join(f"{arm.beta:g}" for arm in preventing) or "none"
  peak = ends["0"].peak_step.mean()
  words = len(toy_language.of(config.training).vocabulary)
  return (
    f"Without a penalty the proxy gains {none.proxy} reward units in"
    f" {config.training.train.steps} steps, gold changes by {none.from_peak}"
    f" since its peak, a response has {none.faults} ungrammatical pairs more"
    f" than the SFT policy's, and {share(none.fluent)}; under β ="
    f" {best.beta:g}, the best, gold changes by {best.gold} since the SFT"
    f" policy. Without a penalty gold's peak is at step {peak:.0f}, and gold"
    f" changes by {none.gold} since the SFT policy. Values of β that prevent"
    f" it: {values}. Under {best.beta:g} gold changes by {best.from_peak} since"
    f" its peak, and a response has {best.faults} ungrammatical pairs more than"
    " the SFT policy's. A response looks fluent if its −log π_ref per token is"
    f" no higher than that of {config.fluent:.0%} of the SFT policy's"
    f" ({usual:.2f} nats). The mean is {none.nll} nats without a penalty, the"
    f" SFT policy's {ends['SFT'].nll.mean():.2f}, and that of words drawn"
    f" blindly would be about {math.log(words):.2f}."
  )


def share(fluent: intervals.Interval) -> str:
  """How many of the responses with ungrammatical pairs look fluent."""
  if math.isnan(fluent.mean):
    return "a seed has no response with such pairs"
  return f"{fluent:.0%} of those with such pairs look fluent"


def _draw(config, by_beta, start, ends, samples, usual) -> drawing.Figure:
  """Proxy and gold against √KL; how fluent the ends are; what they say."""
  colours = [_NONE, *_PENALISED * len(ends)][: len(ends)]
  figure, (proxy, gold, texts) = drawing.panels((13, 5.4), 3)
  for axis, name, title, first in (
    (proxy, "reward/score", "Proxy: what is rewarded", start.proxy),
    (gold, "reward/gold", "Gold: what it is worth", start.gold),
  ):
    axis.axhline(first.mean(), color=drawing.GREY, linewidth=0.8, ls="--")
    for (beta, members), colour in zip(by_beta.items(), colours):
      smooth = [
        _smooth(members, of, config.window)[:, config.window - 1 :]
        for of in ("kl/reverse_exact", name)
      ]
      roots = np.sqrt(np.insert(smooth[0], 0, 0.0, axis=1))
      values = np.column_stack([first, smooth[1]])
      axis.plot(roots.T, values.T, color=colour, linewidth=0.6, alpha=0.4)
      mean = roots.mean(axis=0), values.mean(axis=0)
      axis.plot(*mean, color=colour, linewidth=2.2, label=f"β = {beta:g}")
      axis.plot(*mean, "o", color=colour, markersize=7, markevery=[-1])
    drawing.say(
      axis, title, "√KL(π‖π_ref), √nats of a response", "reward units"
    )
  proxy.plot([], [], "--", color=drawing.GREY, lw=0.8, label="SFT policy")
  proxy.legend(frameon=False, fontsize=9, loc="center right")
  texts.axvspan(0, usual, color="0.92", linewidth=0)
  for end, colour in zip(ends, colours):
    texts.plot(end.nll, end.faults, "o", color=colour, markersize=6)
  texts.plot(start.nll, start.faults, "s", color="0.5", markersize=5)
  texts.annotate(
    "looks\nfluent", (usual, 1), (-4, -4), fontsize=9, color="0.4",
    xycoords=("data", "axes fraction"), textcoords="offset points",
    ha="right", va="top",
  )  # fmt: skip
  texts.set_xlim(left=1)
  drawing.say(
    texts,
    "The texts in the end, a dot a seed",
    "−log π_ref, nats per token",
    "ungrammatical pairs per response",
  )
  lines = [
    textwrap.fill(f"{name + ':':22}{text}", 150, subsequent_indent=" " * 22)
    for name, text in samples
  ]
  below = {"family": "monospace", "fontsize": 8.5, "ha": "left"}
  figure.supxlabel("\n".join(lines), x=0.02, **below)
  return figure
