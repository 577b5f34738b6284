r"""Runs a study: a claim, its experiment, its figure, its verdict.

    python -m launch.study --config=configs/studies/kl_gradients.py \
      --workdir=runs/kl_gradients

Fields are set by `--config.seed=1`. `--resume` goes on with a study, or shows
what it found if it has ended. All of them, each in a sub-directory, and a
table of what they found:

    python -m launch.study --all --workdir=runs/studies
"""

from collections.abc import Iterator
import importlib
import pathlib
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from configs import studies
from launch import app
from rlhf_jax import errors
from rlhf_jax.settings import validate

_ALL = flags.DEFINE_bool("all", False, "Every study, instead of --config.")
_PRESET = flags.DEFINE_string("preset", "full", "With --all: full or reduced.")


def main(values: flags.FlagValues) -> None:
  """Runs the study that the config names, or all of them."""
  if not values.all and not values["config"].present:
    raise errors.UserError(
      "--config: missing; wanted --config=configs/studies/NAME.py, or --all"
    )
  if values.all and values["config"].present:
    raise errors.UserError("--config: beside --all; wanted one of the two")
  if values.preset not in ("full", "reduced"):
    raise errors.UserError(
      f"--preset: {values.preset!r}; wanted full or reduced"
    )

  from rlhf_jax.settings import devices
  from rlhf_jax.studies import collection, study

  devices.divide_cores()
  if not values.all:
    study.run(values.config, values.workdir, resume=values.resume)
    return
  configs = {name: _config(name).get_config(values.preset) for name in _names()}
  collection.run(configs, values.workdir, resume=values.resume)


def check(config: ConfigDict) -> None:
  """Checks that a config has the fields of the study that it names.

  Raises:
    ValueError: There is no such study; a field is missing, unknown or of
      another type.
  """
  if "study" not in config:
    raise ValueError(
      "config.study: missing; start from a file in configs/studies"
    )
  names = _names()
  if config.study not in names:
    raise ValueError(
      f"config.study: {config.study!r}; wanted {' or '.join(names)}"
    )
  wanted = dict(_fields(_config(config.study).get_config()))
  given = dict(_fields(config))
  for field in given:
    if field not in wanted:
      hint = validate.suggest(field, wanted)
      raise ValueError(f"config.{field}: no such field{hint}")
  for field, value in wanted.items():
    if field not in given:
      raise ValueError(
        f"config.{field}: missing; start from configs.studies.{config.study}"
      )
    if type(given[field]) is not type(value):
      raise ValueError(
        f"config.{field}: {given[field]!r}; wanted {type(value).__name__}, such"
        f" as {value!r}"
      )


def _names() -> list[str]:
  directory = pathlib.Path(studies.__path__[0])
  return sorted(p.stem for p in directory.glob("[!_]*.py"))


def _config(name: str) -> Any:
  return importlib.import_module(f"configs.studies.{name}")


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
  """Dotted names and values."""
  for name, value in config.items():
    if isinstance(value, ConfigDict):
      yield from _fields(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


if __name__ == "__main__":
  app.run(main, required=("workdir",), check=check)
