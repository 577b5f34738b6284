"""Which KL penalty has the gradient of which KL, and at what variance.

Three experiments on models whose responses can all be listed, in float64:

- every row of `kl.PENALTIES`: its expected gradient against that of the target
  which it names and that of the sequence's reverse KL, its variance, and the
  mean of sampled gradients against the expectation (`penalties`);
- the estimates of the KL itself (`estimates`);
- what PPO makes of a gradient that is right on the first minibatch
  (`under_ppo`).
"""

import math

import jax
from ml_collections import ConfigDict
import numpy as np
from rich import console as rich_console

from rlhf_jax.objective import kl
from rlhf_jax.stages import progress as progress_lib
from rlhf_jax.storage import workdir as workdir_lib
from rlhf_jax.studies import study
from rlhf_jax.studies.kl_gradients import estimates as estimates_lib
from rlhf_jax.studies.kl_gradients import figure as figure_lib
from rlhf_jax.studies.kl_gradients import penalties as penalties_lib
from rlhf_jax.studies.kl_gradients import under_ppo as under_ppo_lib

EXACT = 1e-10  # largest relative error of a gradient that is its target's
BIASED = 0.01  # smallest relative error of one that clearly is another


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense.

  Raises:
    UserError: With the field, its value and what is wanted.
  """
  positive = lambda x: 0 < x < math.inf
  top = config.estimates.vocab_size - 1
  most = config.responses // 2
  for wanted, holds, fields in (
    (
      "different numbers above 0",
      lambda xs: len(xs) > 0 and all(map(positive, xs)) and _differ(xs),
      "distances estimates.distances ppo.moves",
    ),
    (
      "different numbers in [0, 1]",
      lambda xs: len(xs) > 0 and all(0 <= x <= 1 for x in xs) and _differ(xs),
      "ppo.gae_lambdas ppo.gammas",
    ),
    ("above 0", positive, "ppo.distance ppo.beta ppo.critic_error"),
    ("in (0, 1)", lambda x: 0 < x < 1, "ppo.clip_epsilon"),
    (
      "2 to 8",
      lambda x: 2 <= x <= 8,
      "estimates.vocab_size",
    ),
    (
      "2 to 6",
      lambda x: 2 <= x <= 6,
      "estimates.response_length ppo.response_length",
    ),
    (f"1 to {top}", lambda x: 1 <= x <= top, "estimates.top_k"),
    ("at least 4", lambda x: x >= 4, "responses"),
    (f"2 to {most}", lambda x: 2 <= x <= most, "batches"),
  ):
    study.require(config, wanted, holds, *fields.split())


def _differ(values: tuple) -> bool:
  return len(set(values)) == len(values)


def run(
  config: ConfigDict,
  workdir: workdir_lib.Workdir,
  console: rich_console.Console,
) -> study.Outcome:
  """Does the three experiments; none takes long enough to be kept."""
  del workdir
  rng = np.random.default_rng(config.seed)
  models_rng, estimates_rng, ppo_rng = rng.spawn(3)
  steps = len(config.distances) + 5  # Models, and two more experiments.
  rows = {}
  with (
    jax.enable_x64(True),
    progress_lib.show(console, "kl_gradients", done=0, steps=steps) as progress,
  ):
    for name, models in penalties_lib.models(config, models_rng):
      progress.note(name)
      rows |= penalties_lib.on_models(name, models, config, models_rng)
      progress.update(len(rows), {})
    progress.note("estimates of the KL")
    estimates = estimates_lib.measured(config.estimates, estimates_rng)
    progress.update(steps - 1, {})
    progress.note("what PPO does")
    under_ppo = under_ppo_lib.measured(config.ppo, ppo_rng)
    progress.update(steps, {})
  models = [penalties_lib.of_model(name, of) for name, of in rows.items()]
  tables = penalties_lib.tables(rows, models)
  tables["estimates"] = estimates_lib.table(config.estimates, estimates)
  tables["ppo"] = under_ppo_lib.table(config.ppo, under_ppo)
  return study.Outcome(
    verdict=verdict(models),
    paragraph=_paragraph(rows, models, estimates, under_ppo),
    tables=tables,
    figure=figure_lib.draw(rows, models, estimates),
  )


def verdict(models: list[penalties_lib.OfModel]) -> str:
  """The rule.

  A penalty of ours without its target's gradient refutes the claim. Where a
  published recipe comes close to the sequence's KL, or Rao-Blackwellising
  does not lower the variance, it is true of the other models only.
  """
  true = [
    row.model
    for row in models
    if row.published >= BIASED
    and row.rao_bl < row.sampled
    and row.rao_bl_v < row.sampled_v
  ]
  if not true or not all(row.ours <= EXACT for row in models):
    return study.DOES_NOT_HOLD
  if len(true) == len(models):
    return study.HOLDS
  return study.holds_when(f"the model is one of: {'; '.join(true)}")


def _paragraph(rows, models, estimates, under_ppo) -> str:
  nearest_model, nearest = min(
    (
      (name, row)
      for name, of in rows.items()
      for row in of
      if row.penalty not in kl.TARGETS
    ),
    key=lambda pair: round(pair[1].to_sequence, 9),  # Some are equal.
  )
  alone = [row.sampled / row.rao_bl for row in models]
  with_critic = [row.sampled_v / row.rao_bl_v for row in models]
  inside = sum(row.inside for row in models)
  intervals = len(models) * len(kl.PENALTIES)
  far = estimates[-1]
  first, *altered = [row for row in under_ppo if row.moved == 0]
  worst = max(altered, key=lambda row: row.error)
  *_, unclipped, clipped = under_ppo
  return (
    f"On {len(models)} models the gradients that config.kl chooses are within"
    f" {max(row.ours for row in models):.0e} of their targets', the nearest"
    f" published recipe's ({nearest.penalty} on {nearest_model}) is off by"
    f" {nearest.to_sequence:.2g} of that of the sequence's reverse KL, and"
    f" Rao-Blackwellising divides the latter's variance by {min(alone):.1f} to"
    f" {max(alone):.1f}, with a perfect critic by {min(with_critic):.1f} to"
    f" {max(with_critic):.1f}. The expectation is inside {inside} of"
    f" {intervals} 95 % intervals of sampled gradients. At {far.kl:g} nats per"
    f" response the standard deviation of an estimate is {far.sd_k1:.2g} nats"
    f" for k1, {far.sd_k3:.3g} for k3 and {far.sd_exact:.2g} for the exact KL"
    " at the sampled states. PPO's gradient of J, sampled and"
    f" Rao-Blackwellised, is off by {first.error:.0e} and"
    f" {first.error_rb:.0e} on the first minibatch and there, with"
    f" {worst.setting}, by {worst.error:.2g} and {worst.error_rb:.2g}; where"
    f" the policy has moved by {unclipped.moved:g} nats by"
    f" {unclipped.error:.2g} and {unclipped.error_rb:.2g} and, clipped, by"
    f" {clipped.error:.2g} and {clipped.error_rb:.2g}."
  )
