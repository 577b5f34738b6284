"""What the run that trained a policy stood on: reference, reward, prompts."""

import pathlib
from typing import Any

from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import errors
from rlhf_jax.data import readers
from rlhf_jax.measures import evaluation
from rlhf_jax.storage import workdir as workdir_lib

_TRAINING = ("ppo", "dpo")  # Stages whose configs name a reference.
Trained = dict[str, Any]


def read(config: ConfigDict) -> Trained | None:
  """The config of the run that trained the policy, if it was one of RLHF."""
  if not workdir_lib.is_workdir(config.policy.path):
    return None
  found = workdir_lib.read_config(config.policy.path)
  # A Hugging Face directory has a config.json, too.
  if "stage" not in found or found["stage"] not in _TRAINING:
    return None
  return found


def with_roles(
  config: ConfigDict, trained: Trained | None, console: rich_console.Console
) -> ConfigDict:
  """The config with the reference and the reward that it left out.

  Raises:
    UserError: There is no such run, or what it names is not there.
  """
  config = config.copy_and_resolve_references()
  if trained is None:
    if not config.reference.path:
      raise errors.UserError(
        f"config.reference.path: '', and {config.policy.path} is no workdir of"
        f" stage {' or '.join(_TRAINING)}, whose own would be taken; wanted the"
        " model that the KL is to"
      )
    return config
  taken = []
  if not config.reference.path:
    path = trained["reference"]["path"] or trained["policy"]["path"]
    config.reference.path = _found(config, path, "reference", "sft", trained)
    taken.append(f"reference {config.reference.path}")
  if config.reward.kind == "model" and not config.reward.path:
    reward = trained["reward"]
    config.reward.kind = reward["kind"]
    config.reward.function = reward["function"]
    config.reward.ensemble = tuple(reward["ensemble"])
    if reward["kind"] == "model":
      config.reward.path = _found(
        config, reward["path"], "reward", "reward_model", trained
      )
    taken.append(f"reward {config.reward.path or config.reward.function}")
  if taken:
    console.print(
      f"evaluate: {' and '.join(taken)}, as {config.policy.path} was trained",
      markup=False,
      highlight=False,
      soft_wrap=True,
    )
  _print_differences(config, trained, console)
  return config


def _found(config, path: str, field: str, stage: str, trained) -> str:
  """The directory of a model that a run stood on, or made itself."""
  run = config.policy.path
  if not path and stage in trained["pipeline"]:
    path = str(pathlib.Path(run) / stage)
  if not path or not pathlib.Path(path).is_dir():
    named = f"names {path!r}, which does not exist here" if path else "has none"
    raise errors.UserError(
      f"config.{field}.path: '', and {run}/config.json {named}; wanted its"
      f" directory: --config.{field}.path=DIR"
    )
  return path


def _print_differences(config, trained, console) -> None:
  """Says where responses are drawn otherwise than in training."""
  for name, before in trained["rollout"].items():
    value = config.rollout[name]
    value = list(value) if isinstance(value, tuple) else value
    if value != before:
      console.print(
        f"evaluate: rollout.{name} is {value}, and was {before} in training",
        style="yellow",
        markup=False,
        highlight=False,
        soft_wrap=True,
      )


def shares_prompts(config: ConfigDict, trained: Trained | None) -> bool:
  """Whether PPO read the very file, and held out the same rows of it."""
  if not config.data.path or trained is None or trained["stage"] != "ppo":
    return False
  theirs = trained["data"]
  same = theirs["heldout_fraction"] == config.data.heldout_fraction
  path = pathlib.Path(theirs["path"])
  return bool(theirs["path"] and same and path.exists()) and path.samefile(
    config.data.path
  )


def print_overlap(
  config: ConfigDict, trained: Trained | None, console: rich_console.Console
) -> None:
  """Counts the prompts of a file that the policy was trained on."""
  if not config.data.path or trained is None or not trained["data"]["path"]:
    return
  path = pathlib.Path(trained["data"]["path"])
  if path.is_file():
    if trained["stage"] == "dpo":
      seen = {pair.prompt for pair in readers.read_pairs(path)[0]}
    else:
      seen = set(readers.read_prompts(path)[0])
    texts, _ = evaluation.heldout_texts(config, shared=False)
    count = sum(text in seen for text in texts)
    line = f"{count} of {len(texts)} prompts are in {path}, read in training"
  else:
    line = f"{path}, read in training, is gone: common prompts not counted"
  console.print(
    f"evaluate: {line}", markup=False, highlight=False, soft_wrap=True
  )
