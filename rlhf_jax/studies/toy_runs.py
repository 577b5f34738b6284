"""Training runs on the built-in language: many PPOs from one beginning.

A study's `config.training` is a complete config of stage `ppo`, with the SFT
and the reward model that come before it (`start`). The study names its runs and
sets in each the fields that it varies. Each run is a sub-workdir, and one that
has ended is not done again (`made`). Runs that differ in β and seed alone are
one sweep, whose members are trained in one compiled program (`swept`).
"""

from collections.abc import Iterable, Mapping, Sequence
import json
import pathlib
from typing import Any, NamedTuple

from ml_collections import ConfigDict
import numpy as np
from rich import text as rich_text

from rlhf_jax import errors
from rlhf_jax.settings import devices, validate
from rlhf_jax.stages import pipeline
from rlhf_jax.storage import workdir as workdir_lib
from rlhf_jax.studies import limits, study

Rows = Sequence[Mapping[str, int | float]]


class Start(NamedTuple):
  """What the runs begin with: two workdirs, and the policy's own gold."""

  policy: pathlib.Path
  reward: pathlib.Path
  gold: float


class Member(NamedTuple):
  """A member of a sweep; `rows` are its metrics, a row a step."""

  beta: float
  seed: int
  path: pathlib.Path
  rows: Rows


# What a study of this kind stands on; a fixed field is no choice of its user.
_FIXED = {
  "stage": "ppo",
  "policy.path": "",
  "reward.kind": "model",
  "reward.path": "",
  "data.path": "",
  "sweep.betas": (),
}
# Of a study whose sweeps have all seeds, and whose β are constants.
SWEPT = {"sweep.seeds": (), "kl.controller": "fixed"}


def varied(training: ConfigDict, fields: Mapping[str, Any]) -> ConfigDict:
  """A run's config: `training` with other values in some fields."""
  config = training.copy_and_resolve_references()
  config.update_from_flattened_dict(fields)
  return config


def seeds(config: ConfigDict) -> tuple[int, ...]:
  """A study's: as many as it has, from its first one on."""
  return tuple(range(config.seed, config.seed + config.seeds))


def sweep(
  config: ConfigDict, betas: Iterable[float], **fields: Any
) -> ConfigDict:
  """A sweep of a study's training over the β and all seeds.

  Args:
    config: The study's.
    betas: Those of the sweep.
    **fields: Others that are set; `__` stands for a dot.
  """
  dotted = {name.replace("__", "."): value for name, value in fields.items()}
  both = {"sweep.betas": tuple(betas), "sweep.seeds": seeds(config)}
  return varied(config.training, both | dotted)


def check(
  config: ConfigDict,
  runs: Mapping[str, ConfigDict],
  fixed: Mapping[str, Any],
) -> None:
  """Refuses what the runs would refuse later, or ignore.

  Args:
    config: The study's.
    runs: The runs' configs, by name.
    fixed: Fields of `config.training` that the study varies, and the values
      that they must have there.

  Raises:
    UserError: With the field, its value and what is wanted.
  """
  wanted = _FIXED | {"seed": config.seed} | dict(fixed)
  limits.check(
    config,
    {f"training.{name}": limits.equal(x) for name, x in wanted.items()},
  )
  for name, run_config in runs.items():
    check_one(run_config, "training", f" (run {name})")


def check_one(config: ConfigDict, field: str, note: str = "") -> None:
  """Refuses what a run would: a study's config, or one made from it.

  Args:
    config: The run's.
    field: Of the study, whose fields the message is about.
    note: Ends the message.

  Raises:
    UserError: With the field, its value and what is wanted.
  """
  try:
    validate.validate(config, device_count=devices.count())
  except errors.UserError as error:
    line = str(error).replace("config.", f"config.{field}.", 1)
    raise errors.UserError(f"{line}{note}") from error


def start(lab: study.Lab) -> Start:
  """The SFT policy and its reward model, made where they do not exist yet."""
  before = lab.config.training.pipeline
  policy = made(lab, "sft", before.sft)
  reward_model = varied(before.reward_model, {"policy.path": str(policy)})
  reward = made(lab, "reward_model", reward_model)
  return Start(policy, reward, summary(policy)["metrics"]["reward/gold"])


def run(
  lab: study.Lab, runs: Mapping[str, ConfigDict], begun: Start
) -> dict[str, Member]:
  """Single runs from the start, by name; does what has not been done yet."""
  found = {}
  for number, (name, config) in enumerate(runs.items(), start=1):
    note = f" ({number} of {len(runs)})"
    path = made(lab, name, from_start(config, begun), note)
    rows = workdir_lib.read_metrics(path)
    found[name] = Member(config.kl.beta, config.seed, path, rows)
  return found


def from_start(config: ConfigDict, begun: Start) -> ConfigDict:
  """A run's config that begins at the policy and has the reward model."""
  return varied(
    config,
    {"policy.path": str(begun.policy), "reward.path": str(begun.reward)},
  )


def made(
  lab: study.Lab, name: str, config: ConfigDict, note: str = ""
) -> pathlib.Path:
  """The sub-workdir of a run, after running it where it has not ended.

  Args:
    lab: The study's.
    name: Of the sub-workdir; may have slashes.
    config: Of any stage but `pipeline`, the paths of its models set.
    note: Shown after the name.
  """
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.pipeline = ConfigDict()
    config.sweep.frontier = False  # A study judges by figures of its own.
  with lab.workdir.sub(name, config.to_dict(), resume=True) as opened:
    if not (opened.path / "summary.json").exists():
      lab.console.print(rich_text.Text(f"{name}{note}"))
      pipeline.run_stage(config, opened, resume=True, console=lab.console)
    # Absolute: a resumed study may be called from elsewhere.
    return opened.path.absolute()


def summary(path: pathlib.Path) -> dict[str, Any]:
  """What a run that has ended says of itself."""
  return json.loads((path / "summary.json").read_text())


def members(path: pathlib.Path) -> list[Member]:
  """The members of a sweep that has ended, in its order."""
  return [
    Member(
      member["beta"],
      member["seed"],
      path / member["workdir"],
      workdir_lib.read_metrics(path / member["workdir"]),
    )
    for member in summary(path)["members"]
  ]


def swept(
  lab: study.Lab, name: str, config: ConfigDict, begun: Start
) -> list[Member]:
  """The members of a sweep that begins at the start."""
  return members(made(lab, name, from_start(config, begun)))


def by_beta(found: Sequence[Member]) -> dict[float, list[Member]]:
  """The members under each β, in the sweep's order."""
  return {
    beta: [member for member in found if member.beta == beta]
    for beta in dict.fromkeys(member.beta for member in found)
  }


def column(rows: Rows, name: str) -> np.ndarray:
  """A figure of every step."""
  return np.array([row[name] for row in rows], np.float64)


def curves(found: Sequence[Member], name: str) -> np.ndarray:
  """A figure of many runs, `[run, step]`."""
  return np.array([column(member.rows, name) for member in found])


def ends(found: Sequence[Member], name: str, *, last: int) -> np.ndarray:
  """The mean of a figure over the last steps, one a run."""
  return curves(found, name)[:, -last:].mean(axis=1)


def every_run(
  config: ConfigDict,
  caption: str,
  columns: Sequence[str],
  arms: Mapping[Any, Sequence[np.ndarray]],
) -> study.Table:
  """A table that is not shown: each arm's cells, the seed and its figures."""
  rows = [
    (*arm, *row)
    for arm, figures in arms.items()
    for row in zip(seeds(config), *figures, strict=True)
  ]
  return study.Table(caption, tuple(columns), rows, shown=False)


def trailing_mean(values: np.ndarray, window: int) -> np.ndarray:
  """Means over the last `window` of each row; NaN where there are fewer."""
  sums = np.cumsum(np.insert(values, 0, 0.0, axis=-1), axis=-1)
  means = (sums[..., window:] - sums[..., :-window]) / window
  missing = min(window - 1, values.shape[-1])
  return np.insert(means, [0] * missing, np.nan, axis=-1)
