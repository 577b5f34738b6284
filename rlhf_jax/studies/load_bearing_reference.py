"""Is it the reference that holds DPO and RL, and which one?

Everything is trained from one SFT policy: DPO on pairs of its responses, PPO
against one reward model. The arms differ in the reference alone: the SFT policy
itself; a base; none, which is DPO's loss without the term and PPO at β = 0. All
arms share their seeds, which draw pairs, prompts and responses, and are
compared pair by pair: gold and KL to the SFT policy of responses to held-out
prompts.

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

Without a reference DPO's loss is −log σ(β log π(y_c|x) − β log π(y_r|x)). Stage
`dpo` cannot be asked for that: it has SimPO, which differs from DPO in more.
Here all members of DPO are one compiled program, the stage's step under `vmap`.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
from matplotlib import figure as matplotlib_figure
from ml_collections import ConfigDict
import numpy as np
from rich import text as rich_text

from rlhf_jax.data import batches
from rlhf_jax.data import preferences as preference_data
from rlhf_jax.settings import static
from rlhf_jax.stages import progress as progress_lib
from rlhf_jax.steps import dpo
from rlhf_jax.steps import optimizer as optimizer_lib
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.studies import (
  drawing,
  held_out,
  intervals,
  limits,
  study,
  toy_runs,
)

START, DPO, PPO = "start", "DPO", "PPO"
SFT, BASE, NONE = "SFT", "base", "none"
REFERENCES: tuple[str, ...] = SFT, BASE, NONE
_CLAIMED = {DPO: NONE, PPO: BASE}  # What the claim says is worse than SFT.


class Arm(NamedTuple):
  """Where the policies of an arm are; means of responses, one a seed.

  `kl` is to the SFT policy, nats per response; `errors` are ungrammatical pairs
  a response; `score` is the reward model's.
  """

  gold: np.ndarray
  kl: np.ndarray
  errors: np.ndarray
  score: np.ndarray


Arms = Mapping[tuple[str, str], Arm]  # By method and reference.


class Comparison(NamedTuple):
  """SFT as the reference − another one, with 95 % intervals over seeds."""

  method: str
  other: str
  gold: intervals.Interval
  kl: intervals.Interval
  sft_is_better: bool


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense."""
  sft_steps = config.training.pipeline.sft.train.steps
  below = f"below training.pipeline.sft.train.steps={sft_steps}"
  limits.check(
    config,
    {
      "base_steps": limits.between(1, sft_steps - 1, below),
      "seeds": limits.SEEDS,
      "prompts": limits.at_least(2),
      "dpo_steps": limits.at_least(1),
      "dpo_learning_rate training.kl.beta": limits.ABOVE_0,
    },
  )
  fixed = toy_runs.SWEPT | {"reference.path": ""}
  toy_runs.check(config, _sweeps(config), fixed)


def run(lab: study.Lab) -> study.Outcome:
  """Trains the arms, in sub-workdirs, and asks their policies for responses."""
  config, begun = lab.config, toy_runs.start(lab)
  sft = config.training.pipeline.sft
  base_sft = toy_runs.varied(sft, {"train.steps": config.base_steps})
  base = toy_runs.made(lab, "base", base_sft)
  starts = {SFT: [begun.policy], BASE: [base]}
  paths = {(START, r): path * config.seeds for r, path in starts.items()}
  for method, found in (
    (DPO, _with_dpo(lab, _dpo(config, begun), base)),
    (PPO, _with_ppo(lab, begun, base)),
  ):
    paths |= {(method, reference): found[reference] for reference in REFERENCES}
  arms = _measured(config, begun, paths)
  comparisons = [
    compare(arms, method, other)
    for method in (DPO, PPO)
    for other in (BASE, NONE)
  ]
  return study.Outcome(
    verdict=verdict(comparisons),
    paragraph=_paragraph(config, arms, comparisons),
    tables=_tables(config, arms, comparisons),
    figure=_draw(arms),
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


def compare(arms: Arms, method: str, other: str) -> Comparison:
  """Whether SFT is the better reference than another, by pairs of seeds."""
  first, second = arms[method, SFT], arms[method, other]
  gold = intervals.of_difference(first.gold, second.gold)
  nats = intervals.of_difference(first.kl, second.kl)
  return Comparison(method, other, gold, nats, gold.low > 0)


def _sweeps(config: ConfigDict, base: str = "") -> dict[str, ConfigDict]:
  """PPO's, by the reference; at β = 0 it has none."""
  beta = config.training.kl.beta
  return {
    SFT: toy_runs.sweep(config, (0.0, beta)),
    BASE: toy_runs.sweep(config, (beta,), reference__path=base),
  }


def _with_ppo(lab, begun, base) -> dict[str, list[pathlib.Path]]:
  """PPO's policies by their reference, one a seed."""
  paths = {}
  for reference, sweep in _sweeps(lab.config, str(base)).items():
    for member in toy_runs.swept(lab, f"ppo-{reference}", sweep, begun):
      held = reference if member.beta else NONE
      paths.setdefault(held, []).append(member.path)
  return paths


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


def _with_dpo(lab, config, base) -> dict[str, list[pathlib.Path]]:
  """DPO's policies by their reference, one a seed."""
  seeds = toy_runs.seeds(lab.config)
  members = [(reference, seed) for reference in REFERENCES for seed in seeds]
  names = [f"dpo/reference={r},seed={seed}" for r, seed in members]
  paths = [lab.workdir.path.absolute() / name for name in names]
  if not all((path / "summary.json").exists() for path in paths):
    lab.console.print(rich_text.Text(f"dpo: {len(members)} members"))
    policy = pretrained_lib.load_policy(config)
    held = {SFT: policy, BASE: pretrained_lib.load(str(base), config)}
    params = _train(lab, config, policy, held | {NONE: None})
    for place, (reference, seed) in enumerate(members):
      mine = jax.tree.map(lambda x, place=place: x[place], params)
      of = toy_runs.varied(config, {"seed": seed}).to_dict()
      summary = {"stage": "dpo", "seed": seed, "steps": config.train.steps}
      with lab.workdir.sub(names[place], of, resume=True) as opened:
        trained = dataclasses.replace(policy, params=mine)
        pretrained_lib.save(opened, trained)
        opened.write_summary(summary | {"reference": reference})
  found = iter(paths)
  return {r: [next(found) for _ in seeds] for r in REFERENCES}


def _train(lab, config, policy, references):
  """The parameters of every member of DPO, stacked."""
  members = len(references) * lab.config.seeds
  step_config = dpo.DPOConfig(
    policy.model,
    "dpo",
    temperature=config.rollout.temperature,
    logits_per_chunk=static.logits_per_chunk(config, members=members),
  )
  seeds = toy_runs.seeds(lab.config)
  rows = _rows(config, policy, references, seeds, step_config)
  optimizer = optimizer_lib.make(static.optimizer_config(config))
  start = dpo.init_state(
    {"transformer": jax.tree.map(jnp.asarray, policy.params["transformer"])},
    beta=config.kl.beta,
    optimizer=optimizer,
  )
  state = jax.tree.map(lambda x: jnp.stack([x] * members), start)
  step = jax.jit(jax.vmap(dpo.make_step(step_config, optimizer)))
  steps, size = config.train.steps, config.train.batch_size
  with progress_lib.show(lab.console, "dpo", done=0, steps=steps) as progress:
    for index in range(steps):
      each = [
        batches.batch_at(of, seed=seed, step=index, batch_size=size)
        for (_, seed), of in rows.items()
      ]
      state, scalars = step(state, jax.tree.map(lambda *x: np.stack(x), *each))
      loss = float(scalars["dpo/loss"].mean())
      progress.update(index + 1, {"": {"loss": loss}})
  return jax.device_get(state.params)


def _rows(config, policy, references, seeds, step_config):
  """What each member learns from: its seed's pairs, and what it subtracts."""
  score = jax.jit(dpo.pair_logprobs, static_argnums=2)
  mesh, pairs = static.mesh(config), {}
  for seed in seeds:
    mine = toy_runs.varied(config, {"seed": seed})
    drawn = preference_data.sampled(mine, policy)
    pairs[seed], _ = preference_data.split(mine, drawn)

  def subtracted(reference, of):
    if reference is None:
      nothing = jnp.zeros(len(of.chosen.response_lengths))
      return jax.device_get((nothing, nothing))
    return batches.map_rows(
      lambda batch, _: score(reference.params, batch, step_config),
      of,
      mesh=mesh,
      batch_size=config.train.batch_size,
    )

  return {
    (name, seed): dpo.Batch(of, subtracted(reference, of))
    for name, reference in references.items()
    for seed, of in pairs.items()
  }


def _measured(config, begun, paths) -> Arms:
  """Every arm, on the prompts of its seeds."""
  seeds = toy_runs.seeds(config)
  policies = [pair for of in paths.values() for pair in zip(of, seeds)]
  responses = iter(
    held_out.measure(config.training, begun, policies, prompts=config.prompts)
  )
  arms = {}
  for name, of in paths.items():
    means = [[x.mean() for x in next(responses)] for _ in of]
    score, gold, kl, faults, _ = np.transpose(means)
    arms[name] = Arm(gold, kl, faults, score)
  return arms


def _tables(config, arms, comparisons) -> dict[str, study.Table]:
  mean = intervals.of_mean
  both = "gold", "low", "high", "kl", "low", "high"
  return {
    "arms": study.Table(
      f"Means over {config.seeds} seeds, {config.prompts} held-out prompts"
      " each, with 95 % intervals over seeds: gold reward; KL to the SFT"
      " policy, nats per response; ungrammatical pairs a response; the reward"
      " model's score. start: the SFT policy and the base themselves",
      ("method", "reference", *both, "errors", "score"),
      [
        (*name, *mean(arm.gold), *mean(arm.kl), *map(np.mean, arm[2:]))
        for name, arm in arms.items()
      ],
    ),
    "comparisons": study.Table(
      "SFT as the reference − another one: mean difference of pairs of seeds in"
      " gold and in KL to the SFT policy, with 95 % intervals; better: the"
      " interval of gold lies above 0. Judged: DPO against none, PPO against"
      " base",
      ("method", "other", *both, "better"),
      [(*of, *gold, *nats, is_) for *of, gold, nats, is_ in comparisons],
    ),
    "seeds": study.table_of_seeds(
      "Every policy: means of its responses",
      ("method", "reference"),
      arms,
      toy_runs.seeds(config),
    ),
  }


def _paragraph(config, arms, comparisons) -> str:
  each = lambda method, field, digits: ", ".join(
    f"{arms[method, r]._asdict()[field].mean():.{digits}f}" for r in REFERENCES
  )
  ahead = {(c.method, c.other): f"{c.gold:+.2f}" for c in comparisons}
  differences = "; ".join(
    f"{c.method} against {c.other}: {c.gold:+.2f} and"
    f" {c.kl.mean:+.1f} nats ({c.kl.low:+.1f} to {c.kl.high:+.1f})"
    for c in comparisons
  )
  start, base = arms[START, SFT], arms[START, BASE]
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


def _draw(arms: Arms) -> matplotlib_figure.Figure:
  """Gold against the distance from SFT, a panel a method, a point a seed."""
  figure, axes = drawing.panels((11, 4.4), 2, sharex=True, sharey=True)
  colours = dict(zip(REFERENCES, ("tab:blue", "tab:orange", "0.35")))
  height = arms[START, SFT].gold.mean()
  for axis, method in zip(axes, (DPO, PPO)):
    axis.axhline(height, color=colours[SFT], linestyle=":", linewidth=1)
    for reference, name in ((SFT, "the SFT policy"), (BASE, "the base")):
      start = arms[START, reference]
      style = {"color": colours[reference], "markersize": 13, "label": name}
      axis.plot(start.kl.mean(), start.gold.mean(), "*", **style)
    for reference, marker in zip(REFERENCES, "osX"):
      arm = arms[method, reference]
      style = {"color": colours[reference], "markersize": 7, "alpha": 0.8}
      name = f"reference: {reference}"
      axis.plot(arm.kl, arm.gold, marker, label=name, **style)
    axis.set_xscale("symlog", linthresh=1)  # Both scales reach far.
    axis.xaxis.set_major_formatter("{x:.3g}")
    title = f"{method}: where it ends, a point a seed"
    drawing.say(axis, title, "KL to the SFT policy, nats per response")
  axes[0].set_xlim(left=-0.1)  # Of both, which now have all their points.
  axes[0].set_ylabel("gold reward, mean of held-out prompts")
  drawing.legend(figure, axes[0], columns=5)
  return figure
