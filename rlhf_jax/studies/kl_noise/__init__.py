"""Do estimates of the KL get noisier with length, and does that slow PPO?

Two parts. The estimates: one policy writes responses of the longest length,
and each estimator is read off their first so many tokens; intervals are of a
bootstrap over responses. Learning: PPO from the same SFT policy, at a short and
at a long length, with the sampled and with the Rao-Blackwellised gradient, all
seeds of one kind in one sweep. Its objective, score less β · KL, is measured
with the exact KL in both; intervals are Student's over the pairs of a seed.

`task` says what is written and paid. The advantages are Monte Carlo
returns (λ = 1), so that all of the noise of a response's sampled penalty
reaches each of its tokens.
"""

from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.studies import limits, rao_blackwell, study, toy_runs
from rlhf_jax.studies.kl_noise import arms
from rlhf_jax.studies.kl_noise import figure as figure_lib
from rlhf_jax.studies.kl_noise import task as task_lib

_ESTIMATES = task_lib.ESTIMATES


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense.

  Raises:
    UserError: With the field, its value and what is wanted.
  """
  steps = config.training.train.steps
  rise = lambda xs: len(xs) > 1 and xs[0] >= 1 and list(xs) == sorted({*xs})
  for wanted, holds, fields in (
    ("at least two rising lengths", rise, "lengths trained"),
    ("at least 8", lambda x: x >= 8, "responses"),
    ("at least 100", lambda x: x >= 100, "resamples"),
    ("at least 10", lambda x: x >= 10, "texts"),
    ("in (0, 1)", lambda x: 0 < x < 1, "left"),
    ("above 0", lambda x: 0 < x < np.inf, "tilt"),
    ("2 to 20", lambda x: 2 <= x <= 20, "seeds"),
    (
      f"1 to training.train.steps={steps}",
      lambda x: 1 <= x <= steps,
      "window last",
    ),
  ):
    limits.check(config, {fields: limits.Limit(wanted, holds)})
  longest = max(config.lengths)
  known = f"none above the longest of lengths={config.lengths}, which SFT knows"
  limits.check(
    config, {"trained": limits.Limit(known, lambda xs: max(xs) <= longest)}
  )
  runs = {
    _name(estimator, length): _sweep(config, estimator, length)
    for length in config.trained
    for estimator in rao_blackwell.ESTIMATORS
  }
  runs["estimates"] = task_lib.of_length(config, longest)
  fixed = {
    "kl.controller": "fixed",
    "kl.estimator": "sampled",
    "kl.beta": 0.05,
    "reward.function": "",
    "sweep.seeds": (),
  }
  toy_runs.check(config, runs, fixed)


def run(lab: study.Lab) -> study.Outcome:
  """Does the sweeps, then estimates the KL of a policy of the last."""
  config = lab.config
  reference = task_lib.policy(lab)
  paces, writer = [], reference
  for length in config.trained:
    runs = []
    for estimator in rao_blackwell.ESTIMATORS:
      fields = {
        "policy.path": str(reference),
        "data.path": str(task_lib.texts_path(lab)),
      }
      sweep = toy_runs.varied(_sweep(config, estimator, length), fields)
      path = toy_runs.made(lab, _name(estimator, length), sweep)
      members = toy_runs.members(path)
      writer = members[0].path
      runs.append([arms.of_run(m.rows, last=config.last) for m in members])
    paces.append(arms.pace_of(config, length, *runs))
  estimates = task_lib.estimates(config, writer, reference)
  noise = arms.noise_of(
    config.lengths,
    estimates,
    np.random.default_rng(config.seed),
    resamples=config.resamples,
  )
  return study.Outcome(
    verdict=arms.verdict(noise, paces, left=config.left),
    paragraph=_paragraph(config, noise, paces),
    tables=_tables(config, noise, paces),
    figure=figure_lib.draw(config, noise, paces),
  )


def _sweep(config: ConfigDict, estimator: str, length: int) -> ConfigDict:
  """All seeds of one kind of run, but for the paths."""
  seeds = tuple(range(config.seed, config.seed + config.seeds))
  return toy_runs.varied(
    task_lib.of_length(config, length),
    {"kl.estimator": estimator, "sweep.seeds": seeds},
  )


def _name(estimator: str, length: int) -> str:
  return f"{estimator}-{length}"


def _tables(
  config: ConfigDict, noise: arms.Noise, paces: list[arms.Pace]
) -> dict[str, study.Table]:
  """Deviations by length, how they grow, learning by length, every run."""
  return {
    "deviations": study.Table(
      "Standard deviation of estimates of a response's KL(π‖π_ref), nats per"
      f" response, with 95 % intervals, over {config.responses} responses; KL:"
      " their exact mean",
      ("tokens", "KL", *_ESTIMATES),
      [
        (length, nats, *(str(noise.deviations[n][i]) for n in _ESTIMATES))
        for i, (length, nats) in enumerate(zip(config.lengths, noise.kl))
      ],
    ),
    "exponents": study.Table(
      "The deviation grows as this power of the length, with 95 % intervals",
      ("estimator", "exponent", "low", "high"),
      [(name, *noise.exponents[name]) for name in _ESTIMATES],
    ),
    "learning": study.Table(
      f"Means over {config.seeds} seeds, the mean difference of pairs and its"
      f" 95 % interval; the end: the last {config.last} of"
      f" {config.training.train.steps} steps",
      ("tokens", *rao_blackwell.Pairs._fields),
      [
        (pace.length, *row)
        for pace in paces
        for row in (pace.learning, pace.end, pace.kl)
      ],
    ),
    "runs": study.Table(
      "Every run at its end: score − β · KL; KL, nats per response",
      ("tokens", "estimator", "seed", "objective", "kl"),
      [
        (pace.length, estimator, config.seed + i, run.gold, run.kl)
        for pace in paces
        for estimator, runs in zip(
          rao_blackwell.ESTIMATORS, (pace.sampled, pace.rao_bl)
        )
        for i, run in enumerate(runs)
      ],
      shown=False,
    ),
  }


def _paragraph(
  config: ConfigDict, noise: arms.Noise, paces: list[arms.Pace]
) -> str:
  first, last = config.lengths[0], config.lengths[-1]
  longest = paces[-1]
  k1, exact = noise.deviations["k1"], noise.deviations["exact"]
  beside = [sd.mean / nats for sd, nats in zip(k1, noise.kl)]
  text = (
    f"From {first} to {last} tokens k1's deviation goes as the length to the"
    f" power of {noise.exponents['k1']}, the exact estimate's is {noise.left}"
    f" of it at {last}, and with {longest.length} tokens Rao-Blackwellising"
    " changes score − β · KL in the mean of all iterations by"
    f" {_change(longest.learning)}. Over {config.responses} responses of one"
    f" policy k1's deviation is {k1[0]} nats at {first} tokens and {k1[-1]} at"
    f" {last}, {beside[0]:.1f} and {beside[-1]:.1f} times the KL; the exact"
    f" estimate's is {exact[0]} and {exact[-1]}, which goes as the power of"
    f" {noise.exponents['exact']}."
  )
  for pace in paces:
    text += (
      f" PPO with {pace.length} tokens, β = {pace.beta:.3g}: the change is"
      f" {_change(pace.learning)} in the mean of all iterations and"
      f" {_change(pace.end)} at the end."
    )
  return text


def _change(pairs: rao_blackwell.Pairs) -> str:
  """What Rao-Blackwellising changes, and from where."""
  return (
    f"{pairs.difference:+.3f} ({pairs.low:+.3f} to {pairs.high:+.3f}) from"
    f" {pairs.sampled:.3f}"
  )
