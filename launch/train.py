r"""Runs the stage that a config names, in a workdir.

    python -m launch.train --config=configs/quickstart.py --workdir=runs/q

Fields are set by `--config.kl.beta=0.1`; `--resume` continues the run in the
workdir, or begins it where there is none.
"""

from absl import flags

from launch import app
from rlhf_jax.settings import rules, validate


def main(values: flags.FlagValues) -> None:
  """Checks the config, first without JAX, then with its devices; runs it."""
  validate.validate_fields(values.config)

  from rlhf_jax.settings import devices
  from rlhf_jax.stages import pipeline

  if rules.is_sweep(values.config):
    devices.divide_cores()
  validate.validate_mesh(values.config, device_count=devices.count())
  pipeline.run(values.config, values.workdir, resume=values.resume)


if __name__ == "__main__":
  app.run(main)
