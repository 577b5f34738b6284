"""What a sweep's members are worth: `frontier.json`, its picture and table.

Final policies write to prompts that were held out of training, each under the
same random numbers; the reference answers with others, so that who wins is no
matter of a shared draw. The baseline is best-of-n of the reference.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np
from rich import console as rich_console

from rlhf_jax.measures import best_of_n, evaluation, frontier
from rlhf_jax.report import figures
from rlhf_jax.settings import roles
from rlhf_jax.stages import progress as progress_lib
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.storage import workdir as workdir_lib

FILE = "frontier.json"
_BEST_OF_PROMPTS = 128
# Streams of the responses.
_MEMBERS, _REFERENCE, _BEST_OF_N = range(3)


def write(
  config: ConfigDict,
  workdir: workdir_lib.Workdir,
  models: roles.Models,
  members: Sequence[dict[str, Any]],
  console: rich_console.Console,
) -> None:
  """Evaluates the members, writes the record, shows it.

  Args:
    config: The sweep's.
    workdir: The sweep's.
    models: What the members began with.
    members: As the sweep's summary has them.
    console: Where the table goes.
  """
  prompts = evaluation.heldout_prompts(
    config, models.policy, console, shared=True
  )
  measure = functools.partial(
    evaluation.evaluate,
    config,
    reference=models.reference,
    reward=models.reward,
    prompts=prompts,
  )
  start = measure(
    policy=models.reference, seed=evaluation.seed_of(config.seed, _REFERENCE)
  )
  judged = []
  with progress_lib.show(
    console, "held-out prompts", done=0, steps=len(members)
  ) as progress:
    for count, member in enumerate(members, start=1):
      path = workdir.path / member["workdir"]
      policy = dataclasses.replace(
        models.policy, params=pretrained_lib.load_workdir(path).params
      )
      mine = measure(
        policy=policy, seed=evaluation.seed_of(config.seed, _MEMBERS)
      )
      judged.append(_judged(member, mine, start))
      shown = {"KL": judged[-1].kl, "score": judged[-1].proxy}
      progress.update(count, {"": shown})
  trajectories = {
    (member["beta"], member["seed"]): _trajectory(
      workdir_lib.read_metrics(workdir.path / member["workdir"])
    )
    for member in members
  }
  record = frontier.record(
    judged,
    _best_of_n(config, models, prompts),
    _means(start),
    trajectories,
  )
  samples = [member["sample"] for member in members]
  record["members"] = [
    row | {"sample": sample}
    for row, sample in zip(record["members"], samples, strict=True)
  ]
  picture = figures.plot_frontier(record, trajectories)
  workdir.write_bytes("frontier.png", picture)
  workdir.write_json(FILE, record)
  figures.print_members(console, record)


def _judged(member, mine, start) -> frontier.Member:
  metrics = evaluation.summarise(mine)
  metrics |= evaluation.win_rate(
    evaluation.worth(mine), evaluation.worth(start)
  )
  names = {
    "proxy": "reward/score",
    "gold": "reward/gold",
    "win_rate": "win/rate",
    "kl": "kl/reverse_exact",
  }
  both = {}
  for name, metric in names.items():
    known = metric in metrics
    both[name] = metrics[metric] if known else None
    both[f"{name}_se"] = metrics[f"{metric}_se"] if known else None
  return frontier.Member(
    beta=member["beta"],
    seed=member["seed"],
    workdir=member["workdir"],
    **both,
  )


def _means(start) -> dict[str, float | None]:
  gold = None if start.gold is None else float(np.mean(start.gold))
  return {"proxy": float(np.mean(start.score)), "gold": gold}


def _trajectory(rows) -> list[tuple[float, float, float | None]]:
  """KL, proxy and gold along a training."""
  return [
    (
      row["kl/reverse_exact"],
      row["reward/score"],
      row.get("reward/gold"),
    )
    for row in rows
  ]


def _best_of_n(config, models, prompts) -> list[best_of_n.BestOfN]:
  if not config.sweep.best_of:
    return []
  return evaluation.best_of_n(
    config,
    models.reference,
    models.reward,
    jax.tree.map(lambda x: x[:_BEST_OF_PROMPTS], prompts),
    samples=config.sweep.best_of,
    seed=evaluation.seed_of(config.seed, _BEST_OF_N),
  )
