"""Does a β, or a KL target, that is best on one task serve another?

Tasks are the built-in languages, each with an SFT policy, a judge and a reward
model of its own: they differ in vocabulary, in length and in how much noise
their rewards have. On each, PPO under the same β and seeds, in one sweep. The
best β of every other task is among them; its KL at the end, in nats per
response, is the target that the PI controller then seeks on this task. Such a
run begins at that same β: what it gains over β alone is the target's doing.

How a target in nats per token would have done is read off the sweep, the
task's front: gold where its KL is that of the target. The same reading for the
targets that were held shows how good it is.

The regret of a pair is the gold that is lost on a task with what was best on
another, as a share of what the task's own best β gains over its SFT policy. The
β of the task itself is chosen, for each seed, by the *other* seeds' gold: the
one that happened to come out best would flatter it. What comes from another
task was chosen without a look at this one. Where the seeds do not show a gain,
there is nothing to lose a share of: regrets on that task are NaN, and so is
their mean over the pairs.

A seed is one observation, and so are the tasks together: an interval is of the
mean over all pairs of tasks, over the seeds. The tasks are those of the study,
and no sample of tasks.
"""

from collections.abc import Sequence
import itertools
import math
from typing import NamedTuple

from matplotlib import figure as matplotlib_figure
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.settings import rules
from rlhf_jax.studies import drawing, intervals, limits, study, toy_runs

_PLACES = "judges pairs response_lengths sft_steps reward_steps"
_FIXED = toy_runs.SWEPT | {
  "data.language": "reviews",
  "data.judge_temperature": 1.0,
  "kl.beta": 0.05,
  "kl.target": 0.0,
}
_COLOURS = "tab:blue", "tab:orange", "tab:green", "tab:purple"  # of tasks
# Regrets that are drawn: of a transfer, their mean, its colour and its name.
_DRAWN = (
  ("of_beta", "beta", "tab:red", "β"),
  ("of_target", "target", "tab:blue", "KL target, nats per response"),
  ("of_tokens", "tokens", "0.5", "the same per token, off the sweep"),
)


class Task(NamedTuple):
  """What a sweep over β says of a task.

  `betas` rise; `start` is the SFT policy's gold. At the end, `[β, seed]`: gold,
  KL in nats per response, and tokens per response.
  """

  name: str
  betas: tuple[float, ...]
  start: float
  gold: np.ndarray
  kl: np.ndarray
  tokens: np.ndarray

  @property
  def best(self) -> int:
    """Place of the β with the highest mean gold."""
    return int(self.gold.mean(axis=1).argmax())

  @property
  def best_beta(self) -> float:
    """What other tasks are given, and where the runs to its target begin."""
    return self.betas[self.best]

  @property
  def own(self) -> np.ndarray:
    """`[seed]`: gold under the β that is best by the other seeds."""
    others = self.gold.sum(axis=1, keepdims=True) - self.gold
    return self.gold[others.argmax(axis=0), np.arange(self.gold.shape[1])]

  @property
  def gain(self) -> intervals.Interval:
    """Gold that the task's own β gains; seeds show it where it is above 0."""
    return intervals.of_mean(self.own - self.start)

  @property
  def target(self) -> float:
    """KL under the best β, nats per response; what the task would hold."""
    return float(f"{self.kl[self.best].mean():.3g}")

  @property
  def per_token(self) -> float:
    """The same in nats per token."""
    return float((self.kl[self.best] / self.tokens[self.best]).mean())


class Transfer(NamedTuple):
  """What was best on one task, the source, on another; arrays are `[seed]`.

  `kl` is what the runs with the source's target reached, nats per response. The
  others are regrets, shares of the task's gain: of the source's β, of its KL
  target, of that target as the task's front has it, and of the source's KL in
  nats per token as the front has it.
  """

  source: Task
  task: Task
  kl: np.ndarray
  of_beta: np.ndarray
  of_target: np.ndarray
  of_front: np.ndarray
  of_tokens: np.ndarray

  @property
  def reached(self) -> float:
    """Of the target, the share that the KL has come to, mean over seeds."""
    return float(self.kl.mean()) / self.source.target


class Regrets(NamedTuple):
  """Means over pairs of tasks, shares of the gain.

  `saved` is the regret of β less that of the KL target; `saved_by_tokens` less
  what the fronts say of a target in nats per token.
  """

  beta: intervals.Interval
  target: intervals.Interval
  saved: intervals.Interval
  tokens: intervals.Interval
  saved_by_tokens: intervals.Interval


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense."""
  count = len(config.languages)
  limits.check(
    config,
    {
      "languages": limits.some_of(rules.CHOICES["data.language"], least=2),
      _PLACES: limits.Limit(
        f"{count} numbers above 0, one for each of languages",
        lambda xs: (
          len(xs) == count and all(rules.is_number(x) and x > 0 for x in xs)
        ),
      ),
      "betas": limits.rising(2, above=0),
      "seeds": limits.SEEDS,
      "last": limits.steps_of(config),
      "fails": limits.Limit("in [0, 1)", lambda x: 0 <= x < 1),
      "held": limits.inside(0, 1),
    },
  )
  runs = {}
  for name, here in _configs(config).items():
    runs[name] = toy_runs.sweep(here, here.betas)
    for beta in (here.betas[0], here.betas[-1]):
      to_target = f"{name} to a target from β = {beta:g}"
      runs[to_target] = _towards(here, beta, 1.0)
  toy_runs.check(config, runs, _FIXED)


def run(lab: study.Lab) -> study.Outcome:
  """A sweep on each task; then each pair's target, each in a sub-workdir."""
  config, configs = lab.config, _configs(lab.config)
  starts, tasks, transfers = {}, [], []
  for name, here in configs.items():
    with lab.workdir.sub(name, here.training.to_dict(), resume=True) as own:
      starts[name] = toy_runs.start(study.Lab(here, own, lab.console))
    sweep = toy_runs.sweep(here, here.betas)
    members = toy_runs.swept(lab, f"{name}/sweep", sweep, starts[name])
    ends = ends_of(config, members)
    tasks.append(Task(name, tuple(config.betas), starts[name].gold, *ends))
  for task, source in itertools.permutations(tasks, 2):
    target = _towards(configs[task.name], source.best_beta, source.target)
    members = toy_runs.swept(
      lab,
      f"{task.name}/target-of-{source.name}",
      target,
      starts[task.name],
      f" ({source.target:g} nats per response)",
    )
    gold, kl, _ = ends_of(config, members)
    transfers.append(transfer_of(source, task, gold[0], kl[0]))
  regrets = regrets_of(transfers)
  rule = {"fails": config.fails, "held": config.held}
  return study.Outcome(
    verdict=verdict(transfers, regrets, **rule),
    paragraph=paragraph(config, tasks, transfers, regrets),
    tables=_tables(config, tasks, transfers),
    figure=_draw(config, tasks, transfers, regrets),
  )


def ends_of(
  config: ConfigDict, members: Sequence[toy_runs.Member]
) -> list[np.ndarray]:
  """`[β, seed]` over the last steps: gold, KL and tokens, per response."""
  names = "reward/gold", "kl/reverse_exact", "rollout/response_tokens"
  ends = (toy_runs.ends(members, name, last=config.last) for name in names)
  return [end.reshape(-1, config.seeds) for end in ends]


def _configs(config: ConfigDict) -> dict[str, ConfigDict]:
  """The study's config with each task's training, by its language."""
  columns = (config[name] for name in _PLACES.split())
  found = {}
  for language, judge, pairs, length, sft, reward in zip(
    config.languages, *columns
  ):
    fields = {
      "training.pipeline.sft.train.steps": sft,
      "training.pipeline.reward_model.data.size": pairs,
      "training.pipeline.reward_model.train.steps": reward,
    }
    for part in ("", "pipeline.sft.", "pipeline.reward_model."):
      fields[f"training.{part}data.language"] = language
      fields[f"training.{part}data.judge_temperature"] = float(judge)
      fields[f"training.{part}rollout.response_length"] = length
    found[language] = toy_runs.varied(config, fields)
  return found


def _towards(config: ConfigDict, beta: float, target: float) -> ConfigDict:
  """A run for each seed, from a β to a KL in nats per response."""
  fields = {"kl__beta": beta, "kl__controller": "pi", "kl__target": target}
  return toy_runs.sweep(config, (), **fields)


def transfer_of(
  source: Task, task: Task, gold: np.ndarray, kl: np.ndarray
) -> Transfer:
  """One pair; `gold` and `kl`, `[seed]`, are of runs with source.target."""
  gain = task.gain.mean if task.gain.low > 0 else math.nan
  tokens = source.per_token * task.tokens[task.best].mean()
  reached = (
    task.gold[source.best],
    gold,
    on_front(task, source.target),
    on_front(task, tokens),
  )
  return Transfer(source, task, kl, *((task.own - x) / gain for x in reached))


def on_front(task: Task, nats: float) -> np.ndarray:
  """`[seed]`: gold where a seed's sweep, over its β, has this KL.

  Interpolated in log KL; beyond the sweep's ends, the end's.
  """
  golds = []
  for gold, kl in zip(task.gold.T, task.kl.T):
    order = kl.argsort()
    golds.append(np.interp(math.log(nats), np.log(kl[order]), gold[order]))
  return np.array(golds)


def regrets_of(transfers: Sequence[Transfer]) -> Regrets:
  """Means over the pairs of tasks for each seed, then over the seeds."""
  regrets = [(t.of_beta, t.of_target, t.of_tokens) for t in transfers]
  beta, target, tokens = np.mean(regrets, axis=0)
  return Regrets(
    beta=intervals.of_mean(beta),
    target=intervals.of_mean(target),
    saved=intervals.of_difference(beta, target),
    tokens=intervals.of_mean(tokens),
    saved_by_tokens=intervals.of_difference(beta, tokens),
  )


def are_held(transfers: Sequence[Transfer], held: float) -> bool:
  """Whether every KL that was reached is within a share of its target."""
  return all(abs(t.reached - 1) <= held for t in transfers)


def verdict(
  transfers: Sequence[Transfer], regrets: Regrets, *, fails: float, held: float
) -> str:
  """The rule: a part on β and a part on the target.

  A transferred β fails where its mean regret is above `fails`; the target
  transfers better where it saves some of that. A run that was not held within
  `held` of its target is a run at another KL: it may lose little because it
  stayed near the β that it began with. So one pair of tasks that was not held
  is enough for the part on targets not to hold. Regrets that are NaN, for want
  of a gain on some task, are no evidence for either.
  """
  parts = {
    "a β fails on other tasks": regrets.beta.low > fails,
    "a KL target transfers better": (
      regrets.saved.low > 0 and are_held(transfers, held)
    ),
  }
  return study.verdict(parts, "the question is whether")


def _tables(
  config: ConfigDict, tasks: list[Task], transfers: list[Transfer]
) -> dict[str, study.Table]:
  over = f"means over {config.seeds} seeds and the last {config.last} steps"
  best = lambda t: (x[t.best].mean() for x in (t.gold, t.tokens, t.kl))
  return {
    "tasks": study.Table(
      "Each task's best β, reward units per nat, and under it gold, tokens and"
      f" KL per response and KL per token: {over}",
      ("task", "SFT gold", "best β", "gold", "tokens", "nats", "nats/token"),
      [(t.name, t.start, t.best_beta, *best(t), t.per_token) for t in tasks],
    ),
    "transfers": study.Table(
      "What is best on one task, on another: the target and the KL that was"
      " reached, nats per response; regrets, shares of the task's gain, of β,"
      " of the target, of the target as the front has it, and of that in nats"
      f" per token: {over}; no regret where the seeds show no gain",
      (
        *("from", "to", "β", "target", "reached"),
        *("of β", "of target", "by front", "per token"),
      ),
      [
        (
          *(source.name, task.name, source.best_beta, source.target),
          *(values.mean() for values in figures),
        )
        for source, task, *figures in transfers
      ],
    ),
    "runs": toy_runs.every_run(
      config,
      f"Every run of the sweeps: means over the last {config.last} steps",
      ("task", "β", "seed", "gold", "nats", "tokens"),
      {
        (task.name, beta): of
        for task in tasks
        for beta, *of in zip(task.betas, task.gold, task.kl, task.tokens)
      },
    ),
  }


def paragraph(
  config: ConfigDict,
  tasks: list[Task],
  transfers: list[Transfer],
  regrets: Regrets,
) -> str:
  """The regrets, or which task has no gain to lose; how targets were held."""
  bests = ", ".join(
    f"{task.best_beta:g} on {task.name} ({task.target:.3g} nats per"
    f" response, {task.per_token:.2g} per token)"
    for task in tasks
  )
  reached = [t.reached for t in transfers]
  share = f"all within {config.held:.0%}"
  if not are_held(transfers, config.held):
    share = f"not {share}, and so no test of them"
  held = (
    f"KLs reached are {min(reached):.2f} to {max(reached):.2f} of the targets,"
    f" {share}"
  )
  without = [task for task in tasks if not task.gain.low > 0]
  if without:
    gains = ", ".join(f"{task.gain} on {task.name}" for task in without)
    return (
      "The claim has no test, for the seeds do not show that there is gold to"
      f" be lost: PPO under a task's own β gains {gains}. The best β are"
      f" {bests}. The {held}."
    )
  worst = max(transfers, key=lambda t: t.of_beta.mean())
  off = max(abs((t.of_target - t.of_front).mean()) for t in transfers)
  return (
    f"A β from another task loses {regrets.beta} of a task's gain in gold, a"
    f" KL target in nats per response {regrets.target}, which is"
    f" {regrets.saved} less; the {held}. The best β are {bests}. Worst is β ="
    f" {worst.source.best_beta:g} of {worst.source.name} on {worst.task.name}:"
    f" {worst.of_beta.mean():.2f}, its target {worst.of_target.mean():.2f}."
    " Read off the sweeps, a target in nats per token would lose"
    f" {regrets.tokens}, which is {regrets.saved_by_tokens} less than a β; so"
    " read, the targets that were sought are off by at most"
    f" {off:.2f}. Shares of the gain, means over {len(transfers)} pairs of"
    f" tasks with 95 % intervals over {config.seeds} seeds; KLs reached are"
    " means over the seeds."
  )


def _draw(
  config: ConfigDict,
  tasks: list[Task],
  transfers: list[Transfer],
  regrets: Regrets,
) -> matplotlib_figure.Figure:
  """Gold over β, a panel for each task; then all regrets."""
  count = len(tasks)
  figure, (*panels, last) = drawing.panels(
    (2.7 * count + 5, 4.2), count + 1, width_ratios=(*[1] * count, 1.6)
  )
  for axis, task in zip(panels, tasks):
    _draw_task(axis, task, tasks)
  panels[0].set_ylabel(f"gold reward, last {config.last} steps")
  _draw_regrets(last, config.fails, transfers, regrets)
  for axis in (panels[count // 2], last):
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.22)}
    axis.legend(frameon=False, fontsize=8, **place)
  return figure


def _draw_task(axis: drawing.Axes, task: Task, tasks: list[Task]) -> None:
  """Each seed and their mean, with every task's best β."""
  axis.plot(task.betas, task.gold, color="0.75", linewidth=0.8)
  axis.plot(task.betas, task.gold.mean(axis=1), "o-", color="0.2", markersize=4)
  axis.axhline(task.start, color="0.6", linewidth=0.8, linestyle=":")
  for place, (other, colour) in enumerate(zip(tasks, _COLOURS)):
    axis.plot(
      other.best_beta,
      0.03 + 0.06 * place,  # Of the height: tasks with one best β are stacked.
      "^",
      color=colour,
      markersize=10 if other is task else 6,
      label=f"best β of {other.name}",
      transform=axis.get_xaxis_transform(),
    )
  axis.set_xscale("log")
  axis.xaxis.set_major_formatter("{x:g}")
  drawing.say(axis, f"{task.name} (dotted: SFT)", "β, reward units per nat")


def _draw_regrets(
  axis: drawing.Axes, fails: float, transfers: list[Transfer], regrets: Regrets
) -> None:
  """A row a pair of tasks, and their mean."""
  count = len(transfers)
  for shift, (of, over, colour, name) in zip((-0.22, 0, 0.22), _DRAWN):
    for place, transfer in enumerate(transfers):
      dots = getattr(transfer, of)
      at = [place + shift] * len(dots)
      axis.plot(dots, at, "o", color=colour, markersize=3)
    mean, at = getattr(regrets, over), count + shift
    axis.plot(mean[1:], [at] * 2, color=colour, linewidth=1.5)
    axis.plot(mean.mean, at, "D", color=colour, markersize=6, label=name)
  axis.axvline(0, color="0.4", linewidth=0.8)
  axis.axvline(fails, color="0.4", linewidth=0.8, linestyle="--")
  axis.axhline(count - 0.5, color="0.8", linewidth=0.8)
  names = [f"{t.source.name} → {t.task.name}" for t in transfers]
  axis.set_yticks(range(count + 1), [*names, "mean, 95 %"])
  axis.set_ylim(count + 0.5, -0.5)
  drawing.say(
    axis,
    "Gold lost with another task's setting",
    "share of the task's gain; a dot a seed\ndashed: a failure",
  )
