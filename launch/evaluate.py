r"""Measures a trained policy on held-out prompts.

    python -m launch.evaluate --config=configs/evaluate.py \
      --config.policy.path=runs/ppo --workdir=runs/ppo-evaluated

Fields are set by `--config.evaluate.best_of=16`; configs/evaluate.py has more.
"""

from ml_collections import ConfigDict

from configs import defaults
from launch import app, train


def check(config: ConfigDict) -> None:
  """Checks that a config is complete and one of an evaluation.

  Raises:
    ValueError: A field is missing, unknown or of another type; the stage is
      another.
  """
  defaults.check_complete(config)
  if config.stage != "evaluate":
    raise ValueError(
      f"config.stage: {config.stage!r}; wanted 'evaluate'; start from"
      " configs/evaluate.py, or run the stage with launch.train"
    )


if __name__ == "__main__":
  app.run(train.main, check=check)
