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

from ml_collections import ConfigDict

from rlhf_jax.studies import intervals, limits, study, toy_runs
from rlhf_jax.studies.reference_ceiling import arms as arms_lib
from rlhf_jax.studies.reference_ceiling import figure as figure_lib


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
      "betas": limits.Limit(
        "two or more rising numbers above 0",
        lambda xs: limits.is_rising(xs, count=2, above=0),
      ),
      "seeds": limits.SEEDS,
      "last": limits.between(1, half, f"half of training.train.steps, {half}"),
    },
  )
  fixed = {"sweep.seeds": (), "kl.controller": "fixed"}
  toy_runs.check(config, {"sweep": _sweep(config)}, fixed)


def run(lab: study.Lab) -> study.Outcome:
  """Makes the references and, from each, a sweep; all in sub-workdirs."""
  config, begun = lab.config, toy_runs.start(lab)
  references, curves = [], {}
  for steps in _sft_steps(config):
    reference = begun.policy
    if steps in config.shorter_sft:
      sft = {"train.steps": steps}
      sft = toy_runs.varied(config.training.pipeline.sft, sft)
      reference = toy_runs.made(lab, f"sft-{steps}", sft)
    from_here = begun._replace(policy=reference)
    sweep = toy_runs.from_start(_sweep(config), from_here)
    path = toy_runs.made(lab, f"from-{steps}", sweep)
    references.append(arms_lib.of_reference(steps, toy_runs.summary(reference)))
    curves |= arms_lib.of_members(steps, toy_runs.members(path))
  arms = [
    arms_lib.of_arm(
      reference, beta, curves[reference.sft_steps, beta], config.last
    )
    for beta in config.betas
    for reference in references
  ]
  slopes = [
    arms_lib.of_beta(beta, references, curves, last=config.last)
    for beta in config.betas
  ]
  loosening = arms_lib.of_loosening(
    references, curves, config.betas[-1], config.betas[0], last=config.last
  )
  return study.Outcome(
    verdict=verdict(slopes, loosening),
    paragraph=paragraph(config, references, arms, slopes, loosening),
    tables=_tables(config, references, arms, slopes),
    figure=figure_lib.draw(references, arms, curves),
  )


def verdict(slopes: list[arms_lib.Slope], loosening: intervals.Interval) -> str:
  """The rule: gold at the end rises with the reference's, now and later.

  And less so under the smallest β than under the largest: otherwise it is not
  the penalty that caps.
  """
  if not loosening.low > 0:
    return study.DOES_NOT_HOLD
  rises = {
    f"{s.beta:g}": all(
      low > 0 for low in (s.spearman_low, s.low, s.projected_low)
    )
    for s in slopes
  }
  return study.verdict(rises, "β is")


def _sft_steps(config: ConfigDict) -> tuple[int, ...]:
  return *config.shorter_sft, config.training.pipeline.sft.train.steps


def _sweep(config: ConfigDict) -> ConfigDict:
  """The runs that begin at one reference."""
  seeds = tuple(range(config.seed, config.seed + config.seeds))
  return toy_runs.varied(
    config.training, {"sweep.betas": config.betas, "sweep.seeds": seeds}
  )


def _tables(
  config: ConfigDict,
  references: list[arms_lib.Reference],
  arms: list[arms_lib.Arm],
  slopes: list[arms_lib.Slope],
) -> dict[str, study.Table]:
  last, steps = config.last, config.training.train.steps
  return {
    "references": study.Table(
      "The references: steps of SFT; held-out loss, nats per token; gold",
      arms_lib.Reference._fields,
      references,
    ),
    "arms": study.Table(
      f"Where PPO ends, means over {config.seeds} seeds and the last {last} of"
      f" {steps} steps: gold reward with its 95 % interval; its gain over the"
      f" reference's; late: what the {last} steps before had less, with its"
      " interval; KL, nats per response; the reward model's score",
      arms_lib.Arm._fields,
      arms,
    ),
    "slopes": study.Table(
      "Gold at the end against the reference's own: rank correlation; slope,"
      " the share of a difference that is left, with its 95 % interval; its"
      f" change over the last {last} steps; where it is after {steps} more, if"
      " it goes on changing so",
      arms_lib.Slope._fields,
      slopes,
    ),
  }


def paragraph(
  config: ConfigDict,
  references: list[arms_lib.Reference],
  arms: list[arms_lib.Arm],
  slopes: list[arms_lib.Slope],
  loosening: intervals.Interval,
) -> str:
  """What is left of the references' differences; then where PPO ended."""
  fewest, most = references[0], references[-1]
  of = {(arm.sft_steps, arm.beta): arm for arm in arms}
  pairs = {
    s.beta: (of[fewest.sft_steps, s.beta], of[most.sft_steps, s.beta])
    for s in slopes
  }
  left = ", ".join(
    f"{s.slope:.0%} ({s.low:.0%} to {s.high:.0%}) under β = {s.beta:g}"
    for s in slopes
  )
  more, low, high = (f"{100 * x:+.0f}" for x in loosening)
  ends = "; ".join(
    f"β = {beta:g}: {first.gold:.2f} and {last.gold:.2f}"
    for beta, (first, last) in pairs.items()
  )
  paid = "; ".join(
    f"β = {beta:g}: {first.score:.2f} and {last.score:.2f}"
    for beta, (first, last) in pairs.items()
  )
  later = ", ".join(
    f"{s.projected:.0%} (low end {s.projected_low:.0%})" for s in slopes
  )
  late = max(arms, key=lambda arm: arm.late)
  return (
    "Of a difference in gold between references"
    f" {config.training.train.steps} steps of PPO leave {left}: {more}"
    f" percentage points ({low} to {high}) from the smallest β to the largest."
    f" The references of fewest ({fewest.sft_steps}) and of most"
    f" ({most.sft_steps}) steps of SFT, of {len(references)}, have gold of"
    f" {fewest.gold:.2f} and {most.gold:.2f}; from these PPO ends at {ends}."
    " If the shares went on as they changed in the last"
    f" {config.last} steps for as many steps again as have been trained, they"
    f" would be {later}. Of the {len(arms)} arms' golds the one of"
    f" {late.sft_steps} steps of SFT under β = {late.beta:g} rose most in these"
    f" steps: {late.late:+.2f} ({late.late_low:+.2f} to {late.late_high:+.2f})."
    " The reward model's score, which is what is paid, ends from the same two"
    f" references at {paid}."
  )
