"""Does the KL penalty keep what a policy knew beside its task?

PPO on prompts that begin with a person alone, from an SFT policy and a reward
model of the whole language: without a penalty, under several β, and under the
best of these with the language's texts in the loss (`steps.text_mix`), which
are general: they begin with anything. `measures` asks the policies,
on prompts and texts that begin otherwise; `rule` has the rule.

The β beside the texts is the one whose gold on the task is highest. That of
another β with as little forgetting is in the figure, and in the table.
"""

from collections.abc import Mapping, Sequence
import pathlib

from ml_collections import ConfigDict

from rlhf_jax.studies import intervals, limits, study, toy_runs
from rlhf_jax.studies.forgetting import figure as figure_lib
from rlhf_jax.studies.forgetting import measures as measures_lib
from rlhf_jax.studies.forgetting import rule

KINDS = {
  "nll": "their likelihood",
  "forward_kl": "the forward KL",
  "reverse_kl": "the reverse KL",
}
_OPENINGS = ("determiner", "pronoun", "person")
_FIELDS = {
  "kl.controller": "fixed",
  "kl.beta": 0.05,
  "sweep.seeds": (),
  "mix.kind": "none",
}
Arms = Mapping[str, Sequence[rule.Figures]]


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense.

  Raises:
    UserError: With the field, its value and what is wanted.
  """
  task = config.training.data.opening
  others = tuple(opening for opening in _OPENINGS if opening != task)
  for wanted, holds, field in (
    (
      "0 and then rising numbers",
      lambda xs: len(xs) > 1 and xs[0] == 0 and list(xs) == sorted({*xs}),
      "betas",
    ),
    (f"different ones of {', '.join(KINDS)}", _some_of(KINDS), "mixes"),
    ("2 to 20", lambda x: 2 <= x <= 20, "seeds"),
    (f"one of {', '.join(_OPENINGS)}", _OPENINGS.__contains__, _TASK),
    (f"different ones of {', '.join(others)}", _some_of(others), "off"),
    ("at least 2", lambda x: x >= 2, "prompts"),
    ("above 0 and below 1", lambda x: 0 < x < 1, "partly"),
  ):
    limits.check(config, {field: limits.Limit(wanted, holds)})
  toy_runs.check(config, _sweeps(config, config.betas[-1]), _FIELDS)


def run(lab: study.Lab) -> study.Outcome:
  """Does the sweeps, and asks their policies."""
  config = lab.config
  begun = toy_runs.start(lab)

  def of(name, best):
    sweep = _sweeps(config, best)[name]
    members = toy_runs.swept(lab, name, sweep, begun)
    return [(member.path, member.seed) for member in members]

  def asked(policies: Sequence[tuple[pathlib.Path, int]]):
    found = measures_lib.measure(
      config.training, begun, policies, lab.console,
      off=config.off, prompts=config.prompts,
    )  # fmt: skip
    return [
      found[i : i + config.seeds] for i in range(0, len(found), config.seeds)
    ]

  seeds = _seeds(config)
  start, none, *rest = asked(
    [(begun.policy, seed) for seed in seeds] + of(_PENALTY, 0.0)
  )
  penalised = dict(zip(config.betas[1:], rest))
  best = rule.best_beta(penalised)
  mixes = {kind: asked(of(kind, best))[0] for kind in config.mixes}
  arms = {"SFT policy": start, "no penalty": none}
  arms |= {_beta_arm(beta): runs for beta, runs in penalised.items()}
  arms |= {_mix_arm(kind): runs for kind, runs in mixes.items()}
  trained = [none, *penalised.values(), *mixes.values()]
  found = rule.finding(none, penalised, mixes, partly=config.partly)
  predictors = rule.predictors(trained)
  return study.Outcome(
    verdict=rule.verdict(found, KINDS),
    paragraph=paragraph(config, found, arms, predictors),
    tables={
      **_means_tables(config, arms, none, best),
      "predictors": study.Table(
        "What predicts forgetting: Spearman's correlation over the"
        f" {len(trained)} arms of a seed; means over {config.seeds} seeds with"
        " 95 % intervals",
        rule.Predictor._fields,
        predictors,
      ),
      "runs": _runs_table(config, arms),
    },
    figure=figure_lib.draw(arms, len(penalised), best, predictors),
  )


_TASK, _PENALTY = "training.data.opening", "penalty"


def _beta_arm(beta: float) -> str:
  return f"β = {beta:g}"


def _mix_arm(kind: str) -> str:
  return f"+ texts: {KINDS[kind]}"


def _some_of(names):
  return lambda xs: len(xs) > 0 and len({*xs}) == len(xs) and {*xs} <= {*names}


def _seeds(config: ConfigDict) -> tuple[int, ...]:
  return tuple(range(config.seed, config.seed + config.seeds))


def _sweeps(config: ConfigDict, best: float) -> dict[str, ConfigDict]:
  """The penalty under every β; each mix beside one of them."""
  seeds = {"sweep.seeds": _seeds(config)}
  sweeps = {_PENALTY: {"sweep.betas": config.betas}}
  sweeps |= {
    kind: {"sweep.betas": (best,), "mix.kind": kind} for kind in config.mixes
  }
  return {
    name: toy_runs.varied(config.training, fields | seeds)
    for name, fields in sweeps.items()
  }


def _means_tables(config, arms: Arms, none, best: float):
  """What each arm won and forgot; its KLs."""
  kind = f"Means over {config.seeds} seeds with 95 % intervals"
  of = lambda runs, figure: intervals.of_mean(rule.column(runs, figure))
  less = lambda runs: intervals.of_difference(
    rule.column(none, "rise"), rule.column(runs, "rise")
  )
  return {
    "arms": study.Table(
      f"{kind}: gold on the task, reward units; forgetting, that is the rise of"
      " the NLL of other texts, nats per token, and how much less it is than"
      f" without a penalty. + is beside β = {best:g}",
      ("arm", "gold", "forgetting", "less"),
      [
        (
          name,
          str(of(runs, "gold")),
          _fine(of(runs, "rise")),
          _fine(less(runs)),
        )
        for name, runs in arms.items()
      ],
    ),
    "kls": study.Table(
      f"Means over {config.seeds} seeds: gold off the task; KL, nats per"
      " response, reverse and forward, on the task and off it",
      ("arm", "gold off", "reverse", "forward", "reverse off", "forward off"),
      [
        (name, *(of(runs, x).mean for x in ("off_gold", *rule.PREDICTORS)))
        for name, runs in arms.items()
      ],
    ),
  }


def _fine(interval: intervals.Interval) -> str:
  return f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"


def _runs_table(config, arms: Arms) -> study.Table:
  """Every policy's figures, for who wants another statistic."""
  return study.Table(
    f"Every policy: over {config.prompts} held-out prompts and texts of each"
    " opening",
    ("arm", "seed", *rule.Figures._fields),
    [
      (name, seed, *run)
      for name, runs in arms.items()
      for seed, run in zip(_seeds(config), runs)
    ],
    shown=False,
  )


def paragraph(
  config: ConfigDict,
  found: rule.Finding,
  arms: Arms,
  predictors: Sequence[rule.Predictor],
) -> str:
  """The finding in words; no conclusion but what the figures say."""
  share = (
    f", {found.left.mean / found.none.mean:.0%} of that,"
    if found.none.low > 0
    else ""
  )
  further = ", ".join(
    f"{KINDS[kind]} {_fine(less)}" for kind, less in found.further.items()
  )
  gold = ", ".join(str(more) for more in found.gold.values())
  off_gold = lambda name: rule.column(arms[name], "off_gold")
  off = ", ".join(
    str(intervals.of_difference(off_gold(name), off_gold("SFT policy")))
    for name in (_beta_arm(found.best), *map(_mix_arm, found.further))
  )
  reverse, forward, *_, difference = predictors
  ranks = "; ".join(
    f"{p.figure} {p.spearman:.2f} ({p.low:.2f} to {p.high:.2f})"
    for p in (reverse, forward)
  )
  return (
    f"The NLL of texts that PPO does not see rises by {_fine(found.none)} nats"
    f" per token without a penalty and by {_fine(found.left)}{share} under"
    f" β = {found.best:g}, the best on the task; of this, general texts in the"
    f" loss take away (all at once): {further}. PPO's prompts begin with a"
    f" {config.training.data.opening}. What the penalty leaves is"
    f" {_fine(found.beyond)} more than {config.partly:.0%} of the rise without"
    f" it; it prevents {_fine(found.prevented)}. With the texts, in this order,"
    f" gold on the task changes by (all at once) {gold}. Gold off the task"
    " changes from the SFT policy's, under that penalty alone and with each"
    f" kind of texts, by {off}. Spearman's correlation with forgetting over the"
    f" {len(arms) - 1} arms of a seed, mean over {config.seeds} seeds: {ranks};"
    f" the second less the first: {difference.spearman:+.2f}"
    f" ({difference.low:+.2f} to {difference.high:+.2f})."
  )
