"""Does a β, or a KL target, that is best on one task serve another?

Tasks are the built-in languages, each with an SFT policy, a judge and a reward
model of its own: they differ in vocabulary, in length and in how much noise
their rewards have. On each, PPO under the same β and seeds, in one sweep. The
best β of every other task is among them; its KL at the end, in nats per
response, is the target that the PI controller then seeks on this task. Such a
run begins at that same β: what it gains over β alone is the target's doing.

How a target in nats per token would have done is read off the sweep: gold
where its KL is that of the target. The same reading for the targets that were
held shows how good it is. `arms` has the figures and the rule.
"""

from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.settings import rules
from rlhf_jax.studies import intervals, limits, study, toy_runs
from rlhf_jax.studies.beta_transfer import arms
from rlhf_jax.studies.beta_transfer import figure as figure_lib

_PLACES = "judges pairs response_lengths sft_steps reward_steps"
_FIXED = {
  "data.language": "reviews",
  "data.judge_temperature": 1.0,
  "kl.controller": "fixed",
  "kl.beta": 0.05,
  "kl.target": 0.0,
  "sweep.seeds": (),
}


def check(config: ConfigDict) -> None:
  """Refuses fields that make no sense."""
  known = rules.CHOICES["data.language"]
  count = len(config.languages)
  limits.check(
    config,
    {
      "languages": limits.Limit(
        f"at least two different ones of {', '.join(known)}",
        lambda xs: len(xs) == len({*xs}) > 1 and {*xs} <= {*known},
      ),
      _PLACES: limits.Limit(
        f"{count} numbers above 0, one for each of languages",
        lambda xs: (
          len(xs) == count and all(rules.is_number(x) and x > 0 for x in xs)
        ),
      ),
      "betas": limits.Limit(
        "at least two rising numbers above 0",
        lambda xs: limits.is_rising(xs, count=2, above=0),
      ),
      "seeds": limits.SEEDS,
      "last": limits.steps_of(config),
      "fails": limits.Limit("in [0, 1)", lambda x: 0 <= x < 1),
      "held": limits.inside(0, 1),
    },
  )
  runs = {}
  for name, training in _trainings(config).items():
    runs[name] = _sweep(config, training)
    for beta in (config.betas[0], config.betas[-1]):
      runs[f"{name} to a target from β = {beta:g}"] = _towards(
        config, training, beta, 1.0
      )
  toy_runs.check(config, runs, _FIXED)


def run(lab: study.Lab) -> study.Outcome:
  """A sweep on each task; then each pair's target, each in a sub-workdir."""
  config, trainings = lab.config, _trainings(lab.config)
  starts, tasks = {}, []
  for name, training in trainings.items():
    with lab.workdir.sub(name, training.to_dict(), resume=True) as own:
      starts[name] = toy_runs.start(lab._replace(workdir=own), training)
    sweep = _sweep(config, training)
    members = toy_runs.swept(lab, f"{name}/sweep", sweep, starts[name])
    tasks.append(task_of(config, name, starts[name].gold, members))
  transfers = []
  for task in tasks:
    for source in (other for other in tasks if other.name != task.name):
      training = _towards(
        config, trainings[task.name], source.best_beta, source.target
      )
      path = toy_runs.made(
        lab,
        f"{task.name}/target-of-{source.name}",
        toy_runs.from_start(training, starts[task.name]),
        f" ({source.target:g} nats per response)",
      )
      gold, kl, _ = ends_of(config, toy_runs.members(path))
      transfers.append(arms.transfer_of(source, task, gold[0], kl[0]))
  regrets = arms.regrets_of(transfers)
  return study.Outcome(
    verdict=arms.verdict(
      transfers, regrets, fails=config.fails, held=config.held
    ),
    paragraph=paragraph(config, tasks, transfers, regrets),
    tables=_tables(config, tasks, transfers),
    figure=figure_lib.draw(config, tasks, transfers, regrets),
  )


def task_of(
  config: ConfigDict, name: str, start: float, members: list[toy_runs.Member]
) -> arms.Task:
  """What the members of a task's sweep say."""
  return arms.Task(name, tuple(config.betas), start, *ends_of(config, members))


def ends_of(
  config: ConfigDict, members: list[toy_runs.Member]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """`[β, seed]` over the last steps: gold, KL and tokens, per response."""
  names = "reward/gold", "kl/reverse_exact", "rollout/response_tokens"
  gold, kl, tokens = (
    np.array(
      [toy_runs.column(m.rows, name)[-config.last :].mean() for m in members]
    ).reshape(-1, config.seeds)
    for name in names
  )
  return gold, kl, tokens


def _trainings(config: ConfigDict) -> dict[str, ConfigDict]:
  """A config of stage `ppo` for each task, by its language."""
  columns = (config[name] for name in _PLACES.split())
  trainings = {}
  for language, judge, pairs, length, sft, reward in zip(
    config.languages, *columns
  ):
    fields = {
      "pipeline.sft.train.steps": sft,
      "pipeline.reward_model.data.size": pairs,
      "pipeline.reward_model.train.steps": reward,
    }
    for part in ("", "pipeline.sft.", "pipeline.reward_model."):
      fields[f"{part}data.language"] = language
      fields[f"{part}data.judge_temperature"] = float(judge)
      fields[f"{part}rollout.response_length"] = length
    trainings[language] = toy_runs.varied(config.training, fields)
  return trainings


def _sweep(config: ConfigDict, training: ConfigDict) -> ConfigDict:
  fields = {"sweep.betas": config.betas, "sweep.seeds": _seeds(config)}
  return toy_runs.varied(training, fields)


def _towards(
  config: ConfigDict, training: ConfigDict, beta: float, target: float
) -> ConfigDict:
  """A run for each seed, from a β to a KL in nats per response."""
  fields = {
    "kl.beta": beta,
    "kl.controller": "pi",
    "kl.target": target,
    "sweep.seeds": _seeds(config),
  }
  return toy_runs.varied(training, fields)


def _seeds(config: ConfigDict) -> tuple[int, ...]:
  return tuple(range(config.seed, config.seed + config.seeds))


def _tables(
  config: ConfigDict, tasks: list[arms.Task], transfers: list[arms.Transfer]
) -> dict[str, study.Table]:
  """The tasks, the pairs, and every run."""
  over = f"means over {config.seeds} seeds and the last {config.last} steps"
  mean = lambda values: float(np.mean(values))
  return {
    "tasks": study.Table(
      "Each task's best β, reward units per nat, and under it gold, tokens and"
      f" KL per response and KL per token: {over}",
      ("task", "SFT gold", "best β", "gold", "tokens", "nats", "nats/token"),
      [
        (
          task.name,
          task.start,
          task.best_beta,
          mean(task.gold[task.best]),
          mean(task.tokens[task.best]),
          mean(task.kl[task.best]),
          task.per_token,
        )
        for task in tasks
      ],
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
          *(t.source, t.task, t.beta, t.target, mean(t.kl)),
          *map(mean, (t.of_beta, t.of_target, t.of_front, t.of_tokens)),
        )
        for t in transfers
      ],
    ),
    "runs": study.Table(
      f"Every run of the sweeps: means over the last {config.last} steps",
      ("task", "β", "seed", "gold", "nats", "tokens"),
      [
        (
          *(task.name, beta, config.seed + i),
          *(float(x[place, i]) for x in (task.gold, task.kl, task.tokens)),
        )
        for task in tasks
        for place, beta in enumerate(task.betas)
        for i in range(config.seeds)
      ],
      shown=False,
    ),
  }


def paragraph(
  config: ConfigDict,
  tasks: list[arms.Task],
  transfers: list[arms.Transfer],
  regrets: arms.Regrets,
) -> str:
  """The regrets, or which task has no gain to lose; how targets were held."""
  bests = ", ".join(
    f"{task.best_beta:g} on {task.name} ({task.target:.3g} nats per"
    f" response, {task.per_token:.2g} per token)"
    for task in tasks
  )
  reached = [t.reached for t in transfers]
  share = f"{config.held:.0%}"
  held = (
    f"the KLs reached are {min(reached):.2f} to {max(reached):.2f} of the"
    " targets, "
    + (
      f"all within {share}"
      if arms.are_held(transfers, config.held)
      else f"not all within {share}, and so no test of them"
    )
  )
  without = [task for task in tasks if not task.has_gain]
  if without:
    gains = ", ".join(
      f"{intervals.of_mean(task.gains)} on {task.name}" for task in without
    )
    return (
      "The claim has no test, for the seeds do not show that there is gold to"
      f" be lost: PPO under a task's own β gains {gains}. The best β are"
      f" {bests}. {held[0].upper()}{held[1:]}."
    )
  worst = max(transfers, key=lambda t: float(t.of_beta.mean()))
  off = max(abs(float((t.of_target - t.of_front).mean())) for t in transfers)
  return (
    f"A β from another task loses {regrets.beta} of a task's gain in gold, a"
    f" KL target in nats per response {regrets.target}, which is"
    f" {regrets.saved} less; {held}. The best β are {bests}. Worst is"
    f" β = {worst.beta:g} of {worst.source} on {worst.task}:"
    f" {worst.of_beta.mean():.2f}, its target {worst.of_target.mean():.2f}."
    " Read off the sweeps, a target in nats per token would lose"
    f" {regrets.tokens}, which is {regrets.saved_by_tokens} less than a β; so"
    " read, the targets that were sought are off by at most"
    f" {off:.2f}. Shares of the gain, means over {len(transfers)} pairs of"
    f" tasks with 95 % intervals over {config.seeds} seeds; KLs reached are"
    " means over the seeds."
  )
