r"""Writes one self-contained HTML file about one or several workdirs.

    python -m launch.report --workdir=runs/quickstart
    python -m launch.report --workdir=runs/a,runs/b --output=both.html

A workdir may be a run, a pipeline, a sweep, a study, or a folder of these. The
file is report.html in the first of them, or where `--output` says.
"""

import importlib
import pathlib
from typing import Any

from absl import flags

from configs import defaults, studies
from launch import app


def main(values: flags.FlagValues) -> None:
  """Writes the report, and says where it is."""
  from rlhf_jax.report import writing

  workdirs = values.workdir.split(",")
  if pathlib.Path(values.workdir).is_dir():
    workdirs = [values.workdir]  # A sweep's members may have commas.
  print(writing.run(workdirs, values.output, defaults=default_config))


def default_config(config: dict[str, Any]) -> dict[str, Any]:
  """What a run's config started from; nothing for a study that is not here."""
  if "study" not in config:
    return defaults.get_config().to_dict()
  names = {p.stem for p in pathlib.Path(studies.__path__[0]).glob("[!_]*.py")}
  if config["study"] not in names:
    return {}
  module = importlib.import_module(f"configs.studies.{config['study']}")
  return module.get_config().to_dict()


if __name__ == "__main__":
  # Here, for launch.export has a flag of this name.
  flags.DEFINE_string("output", None, "The HTML file; else in the workdir.")
  app.run(main, required=("workdir",))
