"""Is it the reference that holds DPO and RL, and which one?

Everything is trained from one SFT policy: DPO on pairs of its responses, PPO
against one reward model. The arms differ in the reference alone: the SFT policy
itself; a base; none, which is DPO's loss without the term (`dpo`)
and PPO at β = 0. All arms share their seeds, which draw pairs, prompts and
responses, and are compared pair by pair: gold and KL to the SFT policy of
responses to held-out prompts.

The base stands for a model that was pretrained and has not seen
demonstrations. In the built-in language SFT is the pretraining, and so it is
the same SFT, stopped after few steps: it knows the words, and much of which may
follow which, and writes several ungrammatical pairs a response.

DPO asks its reference about its pairs alone, which the SFT policy wrote, and
never meets what the base writes; PPO is drawn to it. So a base may cost DPO
less than PPO.

SFT is the better reference than another where the interval of what it is ahead
by in gold lies above 0. KL to SFT judges nothing: who is penalised towards SFT
is nearer to it by construction. The claim is two of the comparisons, DPO with
SFT against none and PPO with SFT against the base; the others are reported.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.studies import held_out, intervals, limits, study, toy_runs
from rlhf_jax.studies.load_bearing_reference import dpo as dpo_lib
from rlhf_jax.studies.load_bearing_reference import figure as figure_lib

SFT, BASE, NONE = "SFT", "base", "none"
DPO, PPO = "DPO", "PPO"
# What the claim says is worse than SFT.
_CLAIMED = {DPO: NONE, PPO: BASE}


class Arm(NamedTuple):
  """Where the policies of an arm are; means of responses, one a seed.

  `kl` is to the SFT policy, nats per response; `errors` are ungrammatical pairs
  a response; `score` is the reward model's.
  """

  gold: np.ndarray
  kl: np.ndarray
  errors: np.ndarray
  score: np.ndarray


class Comparison(NamedTuple):
  """SFT as the reference − another one, with 95 % intervals over seeds."""

  method: str
  other: str
  gold: float
  gold_low: float
  gold_high: float
  kl: float
  kl_low: float
  kl_high: float
  sft_is_better: bool


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense.

  Raises:
    UserError: With the field, its value and what is wanted.
  """
  sft_steps = config.training.pipeline.sft.train.steps
  base_steps = limits.Limit(
    f"1 to below training.pipeline.sft.train.steps={sft_steps}",
    lambda x: 1 <= x < sft_steps,
  )
  limits.check(
    config,
    {
      "base_steps": base_steps,
      "seeds": limits.SEEDS,
      "prompts": limits.at_least(2),
      "dpo_steps": limits.at_least(1),
      "dpo_learning_rate training.kl.beta": limits.ABOVE_0,
    },
  )
  runs = {name: _sweep(config, betas) for name, betas in _betas(config).items()}
  fixed = {
    "sweep.seeds": (),
    "kl.controller": "fixed",
    "reference.path": "",
  }
  toy_runs.check(config, runs, fixed)


def run(lab: study.Lab) -> study.Outcome:
  """Trains the arms, in sub-workdirs, and asks their policies for responses."""
  config, begun = lab.config, toy_runs.start(lab)
  base_sft = toy_runs.varied(
    config.training.pipeline.sft, {"train.steps": config.base_steps}
  )
  base = toy_runs.made(lab, "base", base_sft)
  dpo_config = _dpo(config, begun)
  references = {
    SFT: pretrained_lib.load(str(begun.policy), dpo_config),
    BASE: pretrained_lib.load(str(base), dpo_config),
    NONE: None,
  }
  seeds = _seeds(config)
  found = dpo_lib.made(lab, dpo_config, references, seeds)
  paths = {(DPO, reference): of for reference, of in found.items()}
  for reference, path in ((SFT, ""), (BASE, str(base))):
    sweep = _sweep(config, _betas(config)[reference])
    sweep = toy_runs.varied(sweep, {"reference.path": path})
    for member in toy_runs.swept(lab, f"ppo-{reference}", sweep, begun):
      held = reference if member.beta else NONE
      paths.setdefault((PPO, held), []).append(member.path)
  starts = {("start", SFT): [begun.policy], ("start", BASE): [base]}
  starts = {name: of * len(seeds) for name, of in starts.items()}
  order = [(method, r) for method in (DPO, PPO) for r in (SFT, BASE, NONE)]
  paths = starts | {name: paths[name] for name in order}
  arms = _measured(config, begun, paths, seeds)
  comparisons = [
    compare(arms, method, other)
    for method in (DPO, PPO)
    for other in (BASE, NONE)
  ]
  return study.Outcome(
    verdict=verdict(comparisons),
    paragraph=_paragraph(config, arms, comparisons),
    tables=_tables(config, arms, comparisons),
    figure=figure_lib.draw(arms),
  )


def verdict(comparisons: Sequence[Comparison]) -> str:
  """The rule: SFT is better than none in DPO, and than the base in PPO."""
  return study.verdict(
    {
      f"{c.method}, {SFT} against {c.other}": c.sft_is_better
      for c in comparisons
      if c.other == _CLAIMED[c.method]
    },
    "the comparison is",
  )


def compare(
  arms: Mapping[tuple[str, str], Arm], method: str, other: str
) -> Comparison:
  """Whether SFT is the better reference than another, by pairs of seeds."""
  first, second = arms[method, SFT], arms[method, other]
  gold = intervals.of_difference(first.gold, second.gold)
  nats = intervals.of_difference(first.kl, second.kl)
  return Comparison(method, other, *gold, *nats, gold.low > 0)


def _seeds(config: ConfigDict) -> tuple[int, ...]:
  return tuple(range(config.seed, config.seed + config.seeds))


def _betas(config: ConfigDict) -> dict[str, tuple[float, ...]]:
  """PPO's, by the reference; at 0 it has none."""
  beta = config.training.kl.beta
  return {SFT: (0.0, beta), BASE: (beta,)}


def _sweep(config: ConfigDict, betas: tuple[float, ...]) -> ConfigDict:
  fields = {"sweep.betas": betas, "sweep.seeds": _seeds(config)}
  return toy_runs.varied(config.training, fields)


def _dpo(config: ConfigDict, begun: toy_runs.Start) -> ConfigDict:
  """DPO on pairs as the reward model has them, at the β of PPO."""
  return toy_runs.varied(
    config.training.pipeline.reward_model,
    {
      "stage": "dpo",
      "policy.path": str(begun.policy),
      "kl.beta": config.training.kl.beta,
      "train.steps": config.dpo_steps,
      "optimizer.learning_rate": config.dpo_learning_rate,
    },
  )


def _measured(config, begun, paths, seeds) -> dict[tuple[str, str], Arm]:
  """Every arm, on the prompts of its seeds."""
  policies = [pair for of in paths.values() for pair in zip(of, seeds)]
  responses = iter(
    held_out.measure(config.training, begun, policies, prompts=config.prompts)
  )
  arms = {}
  for name, of in paths.items():
    mine = [next(responses) for _ in of]
    means = lambda field, mine=mine: np.array(
      [r._asdict()[field].mean() for r in mine]
    )
    arms[name] = Arm(*map(means, ("gold", "kl", "faults", "score")))
  return arms


def _tables(config, arms, comparisons) -> dict[str, study.Table]:
  rows = []
  for (method, reference), arm in arms.items():
    gold, nats = intervals.of_mean(arm.gold), intervals.of_mean(arm.kl)
    errors, score = float(arm.errors.mean()), float(arm.score.mean())
    rows.append((method, reference, *gold, *nats, errors, score))
  return {
    "arms": study.Table(
      f"Means over {config.seeds} seeds, {config.prompts} held-out prompts"
      " each, with 95 % intervals over seeds: gold reward; KL to the SFT"
      " policy, nats per response; ungrammatical pairs a response; the reward"
      " model's score. start: the SFT policy and the base themselves",
      (
        *("method", "reference", "gold", "low", "high", "kl", "low", "high"),
        *("errors", "score"),
      ),
      rows,
    ),
    "comparisons": study.Table(
      "SFT as the reference − another one: mean difference of pairs of seeds in"
      " gold and in KL to the SFT policy, with 95 % intervals; better: the"
      " interval of gold lies above 0. Judged: DPO against none, PPO against"
      " base",
      (
        *("method", "other", "gold", "low", "high", "kl", "low", "high"),
        "better",
      ),
      comparisons,
    ),
    "seeds": study.Table(
      "Every policy: means of its responses",
      ("method", "reference", "seed", *Arm._fields),
      [
        (method, reference, seed, *map(float, figures))
        for (method, reference), arm in arms.items()
        for seed, *figures in zip(_seeds(config), *arm)
      ],
      shown=False,
    ),
  }


def _paragraph(config, arms, comparisons) -> str:
  references = SFT, BASE, NONE
  each = lambda method, field, digits: ", ".join(
    f"{arms[method, r]._asdict()[field].mean():.{digits}f}" for r in references
  )
  ahead = {
    (c.method, c.other): (
      f"{c.gold:+.2f} ({c.gold_low:+.2f} to {c.gold_high:+.2f})"
    )
    for c in comparisons
  }
  differences = "; ".join(
    f"{c.method} against {c.other}: {ahead[c.method, c.other]} and"
    f" {c.kl:+.1f} nats ({c.kl_low:+.1f} to {c.kl_high:+.1f})"
    for c in comparisons
  )
  start, base = arms["start", SFT], arms["start", BASE]
  return (
    f"Over {config.seeds} seeds the gold of DPO with its reference less that"
    f" without is {ahead[DPO, NONE]}, and the gold of PPO with SFT as its"
    f" reference less that with the base is {ahead[PPO, BASE]}."
    " With SFT, the base and nothing as the reference DPO ends at a gold of"
    f" {each(DPO, 'gold', 2)} and PPO at {each(PPO, 'gold', 2)}, under"
    f" β = {config.training.kl.beta:g}. Their KL to the SFT policy is"
    f" {each(DPO, 'kl', 1)} and {each(PPO, 'kl', 1)} nats, their ungrammatical"
    f" pairs a response {each(DPO, 'errors', 2)} and {each(PPO, 'errors', 2)}."
    f" The SFT policy itself has a gold of {start.gold.mean():.2f} and"
    f" {start.errors.mean():.2f} such pairs; the base, its SFT after"
    f" {config.base_steps} steps, {base.gold.mean():.2f} and"
    f" {base.errors.mean():.2f}. SFT as the reference less another, gold and"
    f" KL: {differences}."
  )
