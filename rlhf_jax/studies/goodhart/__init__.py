"""Does a policy without a penalty game its reward model, and one with it not?

PPO on the built-in language under several β, among them 0, from one SFT policy
and one reward model; all β share their seeds, in one sweep. `arms`
says what is measured; the claim has parts, and each is a rule on intervals.
"""

from collections.abc import Sequence
import json
import math

from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.studies import held_out, intervals, limits, study, toy_runs
from rlhf_jax.studies.goodhart import arms as arms_lib
from rlhf_jax.studies.goodhart import figure as figure_lib
from rlhf_jax.text import toy_language

_FIELDS = {"kl.controller": "fixed", "kl.beta": 0.05, "sweep.seeds": ()}


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense.

  Raises:
    UserError: With the field, its value and what is wanted.
  """
  steps = config.training.train.steps
  for wanted, holds, field in (
    (
      "0 and then rising numbers",
      lambda xs: len(xs) > 1 and xs[0] == 0 and list(xs) == sorted({*xs}),
      "betas",
    ),
    ("2 to 20", lambda x: 2 <= x <= 20, "seeds"),
    (
      f"1 to training.train.steps={steps}",
      lambda x: 1 <= x <= steps,
      "window",
    ),
    ("at least 2", lambda x: x >= 2, "prompts"),
    ("in (0, 1)", lambda x: 0 < x < 1, "kept"),
    ("finite and above 0", lambda x: 0 < x < math.inf, "nonsense"),
    ("in (0.5, 1)", lambda x: 0.5 < x < 1, "fluent"),
  ):
    limits.check(config, {field: limits.Limit(wanted, holds)})
  toy_runs.check(config, {"sweep": _sweep(config)}, _FIELDS)


def run(lab: study.Lab) -> study.Outcome:
  """Does the sweep, and asks its policies for more responses."""
  config = lab.config
  begun = toy_runs.start(lab)
  members = toy_runs.swept(lab, "sweep", _sweep(config), begun)
  seeds = _sweep(config).sweep.seeds
  policies = [(begun.policy, seed) for seed in seeds]
  policies += [(member.path, member.seed) for member in members]
  first, *rest = _by_seeds(
    held_out.measure(config.training, begun, policies, prompts=config.prompts),
    len(seeds),
  )
  usual = float(np.quantile([r.nll for r in first], config.fluent))
  start = arms_lib.of_start(first, usual=usual)
  by_beta = _by_seeds(members, len(seeds))
  ends = [
    arms_lib.of_end(
      [m.rows for m in of], responses, usual=usual, window=config.window
    )
    for of, responses in zip(by_beta, rest)
  ]
  arms = [
    arms_lib.arm_of(beta, end, start, ends[0], kept=config.kept, level=level)
    for beta, end, level in zip(config.betas, ends, _levels(len(ends)))
  ]
  samples = _samples(config, by_beta, arms, ends[0])
  return study.Outcome(
    verdict=arms_lib.verdict(arms, nonsense=config.nonsense),
    paragraph=_paragraph(config, arms, start, ends[0], usual),
    tables={
      **_tables(config, arms),
      "samples": study.Table(
        "The first response that is recorded, seed"
        f" {config.seed}; | ends the prompt",
        ("policy", "text"),
        samples,
      ),
      "seeds": _seeds_table(config, seeds, start, ends),
    },
    figure=figure_lib.draw(config, by_beta, start, ends, samples, usual=usual),
  )


def _sweep(config: ConfigDict) -> ConfigDict:
  seeds = tuple(range(config.seed, config.seed + config.seeds))
  fields = {"sweep.betas": config.betas, "sweep.seeds": seeds}
  return toy_runs.varied(config.training, fields)


def _by_seeds(values: list, count: int) -> list[list]:
  """A list a policy or β, in each a value a seed."""
  return [values[i : i + count] for i in range(0, len(values), count)]


def _levels(count: int) -> list[float]:
  """Of the first arm's intervals, and (Bonferroni) of those of the rest."""
  return [0.95] + [1 - 0.05 / (count - 1)] * (count - 1)


def _samples(config, by_beta, arms, none) -> list[tuple[str, str]]:
  """Texts of the first seed: at the start, at gold's peak, at the end."""
  best = int(np.argmax([arm.gold.mean for arm in arms[1:]])) + 1
  peak = int(none.peak_step[0]) - 1
  last = config.training.train.steps - 1
  return [
    (name, _first_text(by_beta[place][0], step))
    for name, place, step in (
      ("SFT policy", 0, 0),
      ("β = 0, gold's peak", 0, peak),
      ("β = 0, the end", 0, last),
      (f"β = {config.betas[best]:g}, the end", best, last),
    )
  ]


def _first_text(member: toy_runs.Member, step: int) -> str:
  """Of the recorded step that is nearest."""
  lines = (member.path / "samples.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  near = min(records, key=lambda record: abs(record["step"] - step))
  return f"{near['prompt']} | {near['response']}"


def _prevents(config: ConfigDict, arm: arms_lib.Arm) -> bool:
  return arms_lib.prevents(arm, nonsense=config.nonsense)


def _tables(
  config: ConfigDict, arms: Sequence[arms_lib.Arm]
) -> dict[str, study.Table]:
  """The arms' intervals: rewards, texts, and all as numbers."""
  kind = f"Means over {config.seeds} seeds with 95 % intervals"
  if len(arms) > 2:
    kind += f", those of the {len(arms) - 1} penalised all at once"
  return {
    "arms": study.Table(
      f"{kind}: reward units gained since the SFT policy, and gold since its"
      " peak; KL in nats per response",
      ("β", "KL", "proxy", "gold", "gold since its peak", "prevents"),
      [
        (
          f"{arm.beta:g}",
          f"{arm.kl.mean:.1f}",
          *map(str, (arm.proxy, arm.gold, arm.from_peak)),
          _prevents(config, arm) if arm.beta else None,
        )
        for arm in arms
      ],
    ),
    "texts": study.Table(
      f"{kind}: ungrammatical pairs per held-out response more than the SFT"
      " policy's; −log π_ref, nats per token; share that looks fluent of the"
      " responses with such pairs (– where a seed has none)",
      ("β", "ungrammatical pairs", "−log π_ref", "look fluent"),
      [
        (
          f"{arm.beta:g}",
          *map(str, (arm.faults, arm.nll)),
          None if math.isnan(arm.fluent.mean) else str(arm.fluent),
        )
        for arm in arms
      ],
    ),
    "intervals": study.Table(
      f"{kind}; the figures' names are those of the study's Arm",
      ("β", "figure", "mean", "low", "high"),
      [
        (f"{arm.beta:g}", name, *interval)
        for arm in arms
        for name, interval in list(arm._asdict().items())[1:]
      ],
      shown=False,
    ),
  }


def _seeds_table(config, seeds, start, ends) -> study.Table:
  """Every seed's figures, for who wants another statistic."""
  rows = [
    (name, seed, *(float(values[i]) for values in of))
    for name, of in zip(
      ("SFT", *(f"{beta:g}" for beta in config.betas)), (start, *ends)
    )
    for i, seed in enumerate(seeds)
  ]
  return study.Table(
    f"Every seed: means over the last {config.window} steps, and over"
    f" {config.prompts} held-out responses",
    ("β", "seed", *arms_lib.Ends._fields),
    rows,
    shown=False,
  )


def _paragraph(
  config: ConfigDict,
  arms: Sequence[arms_lib.Arm],
  start: arms_lib.Ends,
  none_end: arms_lib.Ends,
  usual: float,
) -> str:
  none, *penalised = arms
  best = max(penalised, key=lambda arm: arm.gold.mean)
  preventing = [f"{arm.beta:g}" for arm in penalised if _prevents(config, arm)]
  words = len(toy_language.of(config.training).vocabulary)
  return (
    f"Without a penalty the proxy gains {none.proxy} reward units in"
    f" {config.training.train.steps} steps, gold changes by {none.from_peak}"
    f" since its peak, a response has {none.faults} ungrammatical pairs more"
    f" than the SFT policy's, and {_share(none.fluent)}; under β ="
    f" {best.beta:g}, the best, gold changes by {best.gold} since the SFT"
    f" policy. Without a penalty gold's peak is at step"
    f" {none_end.peak_step.mean():.0f}, and gold changes by {none.gold} since"
    " the SFT policy. Values of β that prevent it:"
    f" {', '.join(preventing) or 'none'}. Under {best.beta:g} gold changes by"
    f" {best.from_peak} since its peak, and a response has {best.faults}"
    " ungrammatical pairs more than the SFT policy's. A response looks fluent"
    " if its −log π_ref per token is no higher than that of"
    f" {config.fluent:.0%} of the SFT policy's ({usual:.2f} nats). The mean is"
    f" {none.nll} nats without a penalty, the SFT policy's"
    f" {start.nll.mean():.2f}, and that of words drawn blindly would be about"
    f" {math.log(words):.2f}."
  )


def _share(fluent: intervals.Interval) -> str:
  """How many of the responses with ungrammatical pairs look fluent."""
  if math.isnan(fluent.mean):
    return "a seed has no response with such pairs"
  return (
    f"{fluent.mean:.0%} ({fluent.low:.0%} to {fluent.high:.0%}) of those with"
    " such pairs look fluent"
  )
