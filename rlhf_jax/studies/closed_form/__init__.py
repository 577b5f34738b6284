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

import math

import jax
from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax.stages import progress as progress_lib
from rlhf_jax.storage import workdir as workdir_lib
from rlhf_jax.studies import enumerable, study
from rlhf_jax.studies.closed_form import arms as arms_lib
from rlhf_jax.studies.closed_form import dpo as dpo_lib
from rlhf_jax.studies.closed_form import figure as figure_lib
from rlhf_jax.studies.closed_form import runs

_BY = {"sampled": "sampled", "rao_blackwellised": "rao-bl.", "pairs": "pairs"}


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense.

  Raises:
    UserError: With the field, its value and what is wanted.
  """
  differ = lambda xs: len(xs) > 0 and len(set(xs)) == len(xs)
  positive = lambda x: 0 < x < math.inf
  among = lambda names: lambda xs: differ(xs) and set(xs) <= {*names}
  divides = lambda whole: lambda x: x >= 1 and whole % x == 0
  batch, steps, top = config.batch_size, config.steps, config.evaluations
  for wanted, holds, fields in (
    (
      "different numbers above 0",
      lambda xs: differ(xs) and all(map(positive, xs)),
      "betas wrong_betas",
    ),
    (
      f"different ones of {', '.join(arms_lib.RIGHT)}, RLOO among them",
      lambda xs: among(arms_lib.RIGHT)(xs) and "RLOO" in xs,
      "algorithms",
    ),
    (
      f"different ones of {', '.join(arms_lib.WRONG)}",
      among(arms_lib.WRONG),
      "wrong",
    ),
    ("2 to 8", lambda x: 2 <= x <= 8, "vocab_size"),
    ("2 to 5", lambda x: 2 <= x <= 5, "response_length"),
    ("a multiple of 4", lambda x: x > 0 and x % 4 == 0, "width"),
    ("0 to 2**32 − 1", lambda x: 0 <= x < 2**32, "task_seed"),
    (
      "at least 1",
      lambda x: x >= 1,
      "batch_size steps epochs prediction_steps other_tasks",
    ),
    ("at least 2", lambda x: x >= 2, "seeds"),
    (f"a divisor of steps={steps}", divides(steps), "evaluations"),
    (f"1 to evaluations={top}", lambda x: 1 <= x <= top, "last"),
    ("even", lambda x: x % 2 == 0, "batch_size"),
    (
      f"a divisor of half of batch_size={batch}",
      divides(batch // 2),
      "minibatches",
    ),
    (
      f"at least 2, and a divisor of batch_size={batch}",
      lambda x: x >= 2 and batch % x == 0,
      "group_size",
    ),
    ("above 0", positive, "learning_rate"),
    ("in [0, 1)", lambda x: 0 <= x < 1, "b2"),
    ("in [0, 1]", lambda x: 0 <= x <= 1, "gamma gae_lambda"),
  ):
    study.require(config, wanted, holds, *fields.split())


def run(
  config: ConfigDict,
  workdir: workdir_lib.Workdir,
  console: rich_console.Console,
) -> study.Outcome:
  """Trains all arms; minutes, of which nothing is kept."""
  del workdir
  task = enumerable.make(config, seed=config.task_seed)
  others = [enumerable.make(config, seed=i) for i in range(config.other_tasks)]
  trained = _train(task, config, console)
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
    figure=figure_lib.draw(ways, samples=config.steps * config.batch_size),
  )


def _train(task, config, console):
  """Every program with its policies."""
  programs = arms_lib.programs(config)
  steps = len(programs) * config.evaluations
  trained = []
  with progress_lib.show(
    console, "closed_form", done=0, steps=steps
  ) as progress:
    for program in programs:
      progress.note(program.algorithm)
      done = iter(range(len(trained) * config.evaluations + 1, steps + 1))
      members = runs.members(
        program.betas, seeds=config.seeds, key=jax.random.key(config.seed)
      )
      tell = lambda done=done: progress.update(next(done), {})
      if program.algorithm == arms_lib.DPO:
        policies = dpo_lib.train(task, config, members, tell=tell)
      else:
        policies = runs.train(
          task,
          config,
          program.penalties,
          members,
          program.settings,
          tell=tell,
        )
      trained.append((program, policies))
  return trained


def verdict(arms: list[arms_lib.Arm]) -> str:
  """The rule.

  It holds if every arm is where the claim says, at the βs where it was trained.
  Where some are not, it holds for the others: for the βs at which all right
  arms are at the optimum, and for the wrong penalties that are where they were
  predicted. Without any of either it does not hold.
  """
  kept = lambda field, of: [
    value
    for value in dict.fromkeys(arm._asdict()[field] for arm in of)
    if all(a.as_claimed for a in of if a._asdict()[field] == value)
  ]
  right = [arm for arm in arms if arm.is_right]
  wrong = [arm for arm in arms if arm.is_wrong]
  betas, penalties = kept("beta", right), kept("penalty", wrong)
  if not betas or not penalties:
    return study.DOES_NOT_HOLD
  conditions = []
  if not all(arm.as_claimed for arm in right):
    names = " or ".join(f"{beta:g}" for beta in betas)
    conditions.append(f"the β of the sequence's KL is {names}")
  if not all(arm.as_claimed for arm in wrong):
    conditions.append(f"the other penalty is {' or '.join(penalties)}")
  if not conditions:
    return study.HOLDS
  return study.holds_when(" and ".join(conditions))


def _tables(config, ways, normalised, noise, plateaus):
  samples = config.steps * config.batch_size
  counted = f"{config.seeds} seeds, {samples:,} responses each"
  tables = {
    "arms": study.Table(
      "Share of J* − J(π_ref) that is reached, the mean and its 95 % interval"
      f" over {counted}; predicted by the exact expected gradient; KL(π‖π*) and"
      " KL(π‖π_ref) at the end, nats, medians",
      (
        *("algorithm", "penalty", "by", "beta", "share", "low", "high"),
        *("pred.", "to π*", "to π_ref"),
      ),
      [way.arm._replace(estimator=_BY[way.arm.estimator]) for way in ways],
    ),
    "runs": study.Table(
      "Share of J* − J(π_ref) that each seed reaches",
      ("algorithm", "penalty", "by", "beta", "seed", "share"),
      [
        (
          *(way.arm.algorithm, way.arm.penalty, _BY[way.arm.estimator]),
          *(way.arm.beta, seed, float(share)),
        )
        for way in ways
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
    "plateaus": study.Table(
      f"The exact gradient of J on {config.other_tasks} other random tasks:"
      f" share of them where it reaches {arms_lib.ENOUGH:.0%}, and the least"
      " that it reaches",
      arms_lib.Plateaus._fields,
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
  dpo = [arm for arm in right if arm.algorithm == arms_lib.DPO]
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
  return f"{arm.reached:.2%} ({arm.low:.2%} to {arm.high:.2%})"
