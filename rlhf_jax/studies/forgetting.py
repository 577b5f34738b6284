"""Does the KL penalty keep what a policy knew beside its task?

PPO on prompts that begin with a person alone, from an SFT policy and a reward
model of the whole language: without a penalty, under several β, and under the
best of these with the language's texts in the loss (`steps.text_mix`), which
are general: they begin with anything. The β beside the texts is the one whose
gold on the task is highest. That of another β with as little forgetting is in
the figure, and in the table.

Forgetting is the rise of the NLL of the language's own texts, policy less
reference, where the texts begin as no prompt of PPO did. Its predictors are
KLs of whole responses, in both directions, on PPO's own prompts and on others.
The forward KL is KL(π_ref‖π): the reference writes and the two change places;
at the states that the policy visits it would be another figure.

Each policy is asked with the held-out prompts, the texts and the random numbers
of its own seed. A seed is one observation, and arms are compared seed by seed.
"""

from collections.abc import Mapping, Sequence
import pathlib
from typing import NamedTuple

from ml_collections import ConfigDict
import numpy as np
from rich import console as rich_console
from scipy import stats

from rlhf_jax.measures import retention
from rlhf_jax.settings import roles
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.studies import (
  drawing,
  held_out,
  intervals,
  limits,
  study,
  toy_runs,
)

KINDS = {
  "nll": "their likelihood",
  "forward_kl": "the forward KL",
  "reverse_kl": "the reverse KL",
}
PREDICTORS = {
  "reverse": "reverse KL, on-task",
  "forward": "forward KL, on-task",
  "off_reverse": "reverse KL, off-task",
  "off_forward": "forward KL, off-task",
}
DIFFERENCE = "on-task: forward − reverse"
_OPENINGS = ("determiner", "pronoun", "person")
_START, _NONE = "SFT policy", "no penalty"


class Figures(NamedTuple):
  """An arm, a value a seed. On: prompts that begin as PPO's; off: others.

  Gold in reward units; `rise`, off, is what the NLL of the language's texts
  rose by, nats per token; KL(π‖π_ref), and over the reference's responses
  KL(π_ref‖π), nats per response.
  """

  gold: np.ndarray
  off_gold: np.ndarray
  rise: np.ndarray
  reverse: np.ndarray
  forward: np.ndarray
  off_reverse: np.ndarray
  off_forward: np.ndarray


Policies = Sequence[tuple[pathlib.Path, int]]  # Workdirs with seeds.
Arms = Mapping[str, Figures]


class Finding(NamedTuple):
  """What the rule reads; nats per token, but for gold, in reward units.

  Forgetting without a penalty; under the `best` β that less, how much is left,
  and what is `beyond` the wanted share of that without. With each mix, the same
  β: how much less is forgotten, and how much more gold there is on the task.
  """

  best: float
  none: intervals.Interval
  prevented: intervals.Interval
  left: intervals.Interval
  beyond: intervals.Interval
  further: Mapping[str, intervals.Interval]
  gold: Mapping[str, intervals.Interval]


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense."""
  task = config.training.data.opening
  limits.check(
    config,
    {
      "betas": limits.RISING_FROM_0,
      "mixes": limits.some_of(KINDS),
      "seeds": limits.SEEDS,
      "training.data.opening": limits.Limit(
        f"one of {', '.join(_OPENINGS)}", _OPENINGS.__contains__
      ),
      "off": limits.some_of([name for name in _OPENINGS if name != task]),
      "prompts": limits.at_least(2),
      "partly": limits.inside(0, 1),
    },
  )
  fixed = toy_runs.SWEPT | {"kl.beta": 0.05, "mix.kind": "none"}
  toy_runs.check(config, _sweeps(config, config.betas[-1]), fixed)


def run(lab: study.Lab) -> study.Outcome:
  """Does the sweeps, and asks their policies."""
  config, begun = lab.config, toy_runs.start(lab)

  def trained(name: str, best: float) -> list[Policies]:
    sweep = _sweeps(config, best)[name]
    arms = toy_runs.by_beta(toy_runs.swept(lab, name, sweep, begun))
    return [[(m.path, m.seed) for m in mine] for mine in arms.values()]

  asked = lambda policies: measure(config, begun, policies, lab.console)
  before = [(begun.policy, seed) for seed in toy_runs.seeds(config)]
  start, none, *rest = asked([before, *trained("penalty", 0.0)])
  penalised = dict(zip(config.betas[1:], rest))
  best = best_beta(penalised)
  mixes = {kind: asked(trained(kind, best))[0] for kind in config.mixes}
  arms = {_START: start, _NONE: none}
  arms |= {f"β = {beta:g}": of for beta, of in penalised.items()}
  arms |= {f"+ texts: {KINDS[kind]}": of for kind, of in mixes.items()}
  found = finding(none, penalised, mixes, partly=config.partly)
  told = predictors([none, *penalised.values(), *mixes.values()])
  return study.Outcome(
    verdict=verdict(found),
    paragraph=paragraph(config, found, arms, told),
    tables=_tables(config, arms, best, told),
    figure=_draw(arms, best, told),
  )


def _sweeps(config: ConfigDict, best: float) -> dict[str, ConfigDict]:
  """The penalty under every β; each mix beside one of them."""
  return {"penalty": toy_runs.sweep(config, config.betas)} | {
    kind: toy_runs.sweep(config, (best,), mix__kind=kind)
    for kind in config.mixes
  }


def measure(
  config: ConfigDict,
  begun: toy_runs.Start,
  arms: Sequence[Policies],
  console: rich_console.Console,
) -> list[Figures]:
  """What the policies of each arm still know, and what they won.

  Of each opening there are `config.prompts` prompts, and as many texts; each of
  those off counts alike.
  """
  training = toy_runs.from_start(config.training, begun)
  reference = pretrained_lib.load_policy(training)
  reward = roles.reward(training, reference)

  def responses(asked, policy):
    """Mean gold, reverse and forward KL."""
    mine, references = (
      held_out.answers(
        asked, *pair, reward, seed=asked.seed, prompts=config.prompts
      )
      for pair in ((policy, reference), (reference, policy))
    )
    figures = mine.gold, mine.reverse_exact, references.reverse_exact
    return [np.asarray(x, np.float64).mean() for x in figures]

  def rise(asked, policy):
    """How much worse the policy models the language's texts."""
    losses = retention.losses(asked, policy, reference, console)
    name = f"retention/{retention.BUILT_IN}"
    return losses[f"{name}/nll"] - losses[f"{name}/reference_nll"]

  def figures(path, seed):
    policy = pretrained_lib.load(str(path), training)
    fields = {"seed": seed, "evaluate.prompts": config.prompts}
    task, *others = (
      toy_runs.varied(training, fields | {"data.opening": opening})
      for opening in (training.data.opening, *config.off)
    )
    gold, *on = responses(task, policy)
    off_gold, *off = np.mean([responses(c, policy) for c in others], axis=0)
    rises = np.mean([rise(c, policy) for c in others])
    return gold, off_gold, rises, *on, *off

  rows = [[figures(*policy) for policy in policies] for policies in arms]
  return [Figures(*np.transpose(of)) for of in rows]


def best_beta(penalised: Mapping[float, Figures]) -> float:
  """The β of the highest mean gold on-task."""
  return max(penalised, key=lambda beta: penalised[beta].gold.mean())


def finding(
  none: Figures,
  penalised: Mapping[float, Figures],
  mixes: Mapping[str, Figures],
  *,
  partly: float,
) -> Finding:
  """What the rule reads off the arms, which have the same seeds.

  The mixes' intervals of a figure are right all at once with 95 % (Bonferroni).
  What is left must be more than `partly` of forgetting without a penalty.
  """
  best = best_beta(penalised)
  chosen = penalised[best]
  more = lambda first, second: intervals.of_difference(
    first, second, level=1 - 0.05 / len(mixes)
  )
  return Finding(
    best=best,
    none=intervals.of_mean(none.rise),
    prevented=intervals.of_difference(none.rise, chosen.rise),
    left=intervals.of_mean(chosen.rise),
    beyond=intervals.of_mean(chosen.rise - partly * none.rise),
    further={k: more(chosen.rise, mix.rise) for k, mix in mixes.items()},
    gold={k: more(mix.gold, chosen.gold) for k, mix in mixes.items()},
  )


def verdict(found: Finding) -> str:
  """The rule: some is prevented, a share is left, and texts prevent more."""
  if not (found.prevented.low > 0 and found.beyond.low > 0):
    return study.DOES_NOT_HOLD
  helps = {KINDS[k]: more.low > 0 for k, more in found.further.items()}
  if not any(helps.values()):
    return study.holds_when("texts in the loss need not prevent more")
  return study.verdict(helps, "the texts are held by")


def predictors(arms: Sequence[Figures]) -> dict[str, intervals.Interval]:
  """Rank correlations of forgetting with each KL, over the arms of a seed.

  The arms of a seed share its prompts and its random numbers, so that a seed is
  one observation here as well: means over seeds, with Student's intervals. The
  last is the difference of two correlations, seed by seed.
  """
  by_seed = lambda name: np.stack([of._asdict()[name] for of in arms], axis=1)
  rises = by_seed("rise")
  of = {name: spearman(by_seed(name), rises) for name in PREDICTORS}
  found = {PREDICTORS[name]: rho for name, rho in of.items()}
  found[DIFFERENCE] = of["forward"] - of["reverse"]
  return {name: intervals.of_mean(rho) for name, rho in found.items()}


def spearman(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Row by row; NaN where all of a row are equal."""
  ranks = [stats.rankdata(values, axis=1) for values in (x, y)]
  a, b = (r - r.mean(axis=1, keepdims=True) for r in ranks)
  spread = np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1))
  unknown = np.full(len(spread), np.nan)
  return np.divide((a * b).sum(axis=1), spread, out=unknown, where=spread > 0)


def _tables(config, arms: Arms, best: float, told) -> dict[str, study.Table]:
  """What each arm won and forgot; its KLs; what predicts; every policy."""
  kind = f"Means over {config.seeds} seeds with 95 % intervals"
  less = lambda of: intervals.of_difference(arms[_NONE].rise, of.rise)
  return {
    "arms": study.Table(
      f"{kind}: gold on the task, reward units; forgetting, that is the rise of"
      " the NLL of other texts, nats per token, and how much less it is than"
      f" without a penalty. + is beside β = {best:g}",
      ("arm", "gold", "forgetting", "less"),
      [
        (
          *(name, intervals.of_mean(of.gold)),
          f"{intervals.of_mean(of.rise):.3f}",
          f"{less(of):.3f}",
        )
        for name, of in arms.items()
      ],
    ),
    "kls": study.Table(
      f"Means over {config.seeds} seeds: gold off the task; KL, nats per"
      " response, reverse and forward, on the task and off it",
      ("arm", "gold off", "reverse", "forward", "reverse off", "forward off"),
      [
        (name, of.off_gold.mean(), *(nats.mean() for nats in of[3:]))
        for name, of in arms.items()
      ],
    ),
    "predictors": study.Table(
      "What predicts forgetting: Spearman's correlation over the"
      f" {len(arms) - 1} arms of a seed; means over {config.seeds} seeds with"
      " 95 % intervals",
      ("figure", "spearman", "low", "high"),
      [(name, *interval) for name, interval in told.items()],
    ),
    "runs": toy_runs.every_run(
      config,
      f"Every policy: over {config.prompts} held-out prompts and texts of each"
      " opening",
      ("arm", "seed", *Figures._fields),
      {(name,): of for name, of in arms.items()},
    ),
  }


def paragraph(
  config: ConfigDict,
  found: Finding,
  arms: Arms,
  told: Mapping[str, intervals.Interval],
) -> str:
  """The finding in words; no conclusion but what the figures say."""
  share = ""
  if found.none.low > 0:
    share = f", {found.left.mean / found.none.mean:.0%} of that,"
  further = ", ".join(
    f"{KINDS[kind]} {less:.3f}" for kind, less in found.further.items()
  )
  gold = ", ".join(map(str, found.gold.values()))
  off = ", ".join(
    str(intervals.of_difference(of.off_gold, arms[_START].off_gold))
    for name, of in arms.items()
    if name.startswith("+") or name == f"β = {found.best:g}"
  )
  ranks = "; ".join(f"{name} {told[name]}" for name in list(told)[:2])
  return (
    f"The NLL of texts that PPO does not see rises by {found.none:.3f} nats"
    f" per token without a penalty and by {found.left:.3f}"
    f"{share} under β = {found.best:g}, the best on the task; of this, general"
    f" texts in the loss take away (all at once): {further}. PPO's prompts"
    f" begin with a {config.training.data.opening}. What the penalty leaves is"
    f" {found.beyond:.3f} more than {config.partly:.0%} of the rise without it;"
    f" it prevents {found.prevented:.3f}. With the texts, in this order,"
    f" gold on the task changes by (all at once) {gold}. Gold off the task"
    " changes from the SFT policy's, under that penalty alone and with each"
    f" kind of texts, by {off}. Spearman's correlation with forgetting over the"
    f" {len(arms) - 1} arms of a seed, mean over {config.seeds} seeds: {ranks};"
    f" the second less the first: {told[DIFFERENCE]:+.2f}."
  )


def _draw(
  arms: Arms, best: float, told: Mapping[str, intervals.Interval]
) -> drawing.Figure:
  """What each arm won and forgot; what tells it; how well."""
  figure, (won, tells, ranks) = drawing.panels(
    (14, 4.6), 3, width_ratios=(1.3, 1, 0.8)
  )
  betas = [name for name in arms if name.startswith("β")]
  styles = [("0.5", "X"), (drawing.ORANGE, "o")]
  styles += [(drawing.BLUE, "o")] * len(betas)
  styles += [(drawing.GREEN, "s"), (drawing.PINK, "^"), (drawing.YELLOW, "D")]
  line = [(arms[n].gold.mean(), arms[n].rise.mean()) for n in (_NONE, *betas)]
  won.plot(*np.transpose(line), color=drawing.BLUE, linewidth=1, alpha=0.5)
  for place, (name, of) in enumerate(arms.items()):
    style = dict(zip(("color", "marker"), styles[place]))
    label = f"{name} (β = {best:g})" if name.startswith("+") else name
    if name in betas:
      label = "penalty alone" if name == betas[0] else ""
      middle = of.gold.mean(), of.rise.mean()
      drawing.name_at(won, name, middle, (8, 4 - 14 * (place % 2)), fontsize=8)
    drawing.cloud(won, of.gold, of.rise, label=label, **style)
    if name != _START:
      tells.plot(of.forward, of.rise, ls="", markersize=5, alpha=0.8, **style)
  rise = "rise of other texts' NLL, nats per token"
  title = "Won on the task, forgotten beside it"
  drawing.say(won, title, "gold reward on the task", rise)
  won.legend(frameon=False, fontsize=8)
  title = "Forgetting against the forward KL, a dot a run"
  drawing.say(tells, title, "KL(π_ref‖π) on the task, nats per response", rise)
  names = [name.replace(", ", ",\n") for name in told]
  drawing.lying(ranks, names, [*told.values()], [drawing.BLUE] * len(told))
  title = "Spearman with forgetting"
  drawing.say(ranks, title, "rank correlation, 95 % interval")
  return figure
