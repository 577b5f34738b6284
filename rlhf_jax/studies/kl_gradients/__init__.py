"""Which KL penalty has the gradient of which KL, and at what variance.

Three experiments on models whose responses can all be listed, in float64:

- every row of `kl.PENALTIES`: its expected gradient against that of the target
  which it names and that of the sequence's reverse KL, its variance, and the
  mean of sampled gradients against the expectation (`penalties`);
- the estimates of the KL itself (`estimates`);
- what PPO makes of a gradient that is right on the first minibatch
  (`under_ppo`).
"""

import jax
from matplotlib import figure as matplotlib_figure
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.objective import kl
from rlhf_jax.stages import progress as progress_lib
from rlhf_jax.studies import drawing, limits, study
from rlhf_jax.studies.kl_gradients import estimates as estimates_lib
from rlhf_jax.studies.kl_gradients import penalties as penalties_lib
from rlhf_jax.studies.kl_gradients import under_ppo as under_ppo_lib

EXACT = 1e-10  # largest relative error of a gradient that is its target's
BIASED = 0.01  # smallest relative error of one that clearly is another


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense."""
  top, most = config.estimates.vocab_size - 1, config.responses // 2
  positive = limits.FINITE_ABOVE_0
  limits.check(
    config,
    {
      "distances estimates.distances ppo.moves": limits.different(positive),
      "ppo.gae_lambdas ppo.gammas": limits.different(limits.between(0, 1)),
      "ppo.distance ppo.beta ppo.critic_error": positive,
      "ppo.clip_epsilon": limits.inside(0, 1),
      "estimates.vocab_size": limits.between(2, 8),
      "estimates.response_length ppo.response_length": limits.between(2, 6),
      "estimates.top_k": limits.between(1, top),
      "responses": limits.at_least(4),
      "batches": limits.between(2, most),
    },
  )


def run(lab: study.Lab) -> study.Outcome:
  """Does the three experiments; none takes long enough to be kept."""
  config = lab.config
  rng = np.random.default_rng(config.seed)
  models_rng, estimates_rng, ppo_rng = rng.spawn(3)
  steps = len(config.distances) + 5  # Models, and two more experiments.
  show = progress_lib.show(lab.console, "kl_gradients", done=0, steps=steps)
  rows = {}
  with jax.enable_x64(True), show as progress:
    for name, models in penalties_lib.models(config, models_rng):
      progress.note(name)
      rows |= penalties_lib.on_models(name, models, config, models_rng)
      progress.update(len(rows), {})
    progress.note("estimates of the KL")
    estimates = estimates_lib.table(config.estimates, estimates_rng)
    progress.update(steps - 1, {})
    progress.note("what PPO does")
    under_ppo = under_ppo_lib.measured(config.ppo, ppo_rng)
    progress.update(steps, {})
  models = [penalties_lib.of_model(name, of) for name, of in rows.items()]
  ppo = under_ppo_lib.table(config.ppo, under_ppo)
  return study.Outcome(
    verdict=verdict(models),
    paragraph=_paragraph(rows, models, estimates.rows[-1], under_ppo),
    tables=penalties_lib.tables(rows, models)
    | {"estimates": estimates, "ppo": ppo},
    figure=_draw(rows, models, estimates.rows),
  )


def verdict(models: list[penalties_lib.OfModel]) -> str:
  """The rule.

  A penalty of ours without its target's gradient refutes the claim. Where a
  published recipe comes close to the sequence's KL, or Rao-Blackwellising
  does not lower the variance, it is true of the other models only.
  """
  true = {
    row.model: row.published >= BIASED
    and row.rao_bl < row.sampled
    and row.rao_bl_v < row.sampled_v
    for row in models
  }
  if not all(row.ours <= EXACT for row in models):
    return study.DOES_NOT_HOLD
  return study.verdict(true, "the model is one of:")


def _paragraph(rows, models, far, under_ppo) -> str:
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


_OURS, _NAMED, _PUBLISHED = "tab:blue", "0.45", "tab:red"


def _draw(rows, models, estimates) -> matplotlib_figure.Figure:
  """Errors, deviations and variances side by side."""
  figure, (left, middle, right) = drawing.panels(
    (14.5, 4.8), 3, width_ratios=(1.25, 1, 1)
  )
  _errors(left, rows)
  distances = [row.kl for row in estimates]
  colours = "tab:orange", "0.6", _PUBLISHED, _OURS
  deviations = np.array([row[1:5] for row in estimates]).T
  for name, colour, sd in zip(("k1", "k2", "k3", "exact"), colours, deviations):
    middle.loglog(distances, sd, "o-", color=colour, markersize=4, label=name)
  middle.loglog(distances, distances, ":", color="0.5", label="the KL itself")
  drawing.say(
    middle,
    "How noisy is an estimate of the KL?",
    "KL(π‖π_ref), nats per response",
    "standard deviation per response, nats",
  )
  _variances(right, models)
  for axis in (middle, right):
    axis.legend(frameon=False, fontsize=9)
  return figure


def _errors(axis, rows) -> None:
  """A line of dots for each penalty, a dot for each model."""
  labels = []
  for place, of in enumerate(zip(*rows.values())):
    name, colour = of[0].penalty, _PUBLISHED
    if name in kl.TARGETS:
      colour = _OURS if name == "sequence_reverse" else _NAMED
      estimator = of[0].estimator.replace("rao_blackwellised", "rao-bl.")
      name = f"{name}, {estimator}"
    labels.append((name, colour))
    errors = [row.to_sequence for row in of]
    dots = {"color": colour, "alpha": 0.55, "clip_on": False}
    axis.plot(errors, [place] * len(of), "o", ms=7, mew=0, **dots)
  drawing.name_rows(axis, labels)
  axis.invert_yaxis()
  axis.set_xlim(left=0)
  drawing.say(
    axis,
    "Whose gradient is it? Error to that of KL(π‖π_ref)",
    "relative error, a dot a model\n"
    "blue: names this KL · grey: names another · red: published recipes",
  )


def _variances(axis, models) -> None:
  """A pair of dots for each model."""
  for place, row in enumerate(models):
    axis.plot([row.rao_bl, row.sampled], [place] * 2, color="0.75", zorder=1)
    for variance, colour in ((row.sampled, "tab:orange"), (row.rao_bl, _OURS)):
      axis.plot(variance, place, "o", color=colour, markersize=8)
    middle = (row.sampled * row.rao_bl) ** 0.5, place
    ratio = f"÷ {row.sampled / row.rao_bl:.1f}"
    drawing.name_at(axis, ratio, middle, (0, 5), ha="center", fontsize=8)
  axis.plot([], [], "o", color="tab:orange", label="sampled")
  axis.plot([], [], "o", color=_OURS, label="Rao-Blackwellised")
  axis.set_xscale("log")
  axis.set_yticks(range(len(models)), [row.model for row in models], fontsize=8)
  axis.set_ylim(len(models) - 0.5, -0.8)
  drawing.say(
    axis,
    "Variance of the sequence KL's gradient",
    "trace of the covariance, per response",
  )
