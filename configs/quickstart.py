r"""From nothing to overoptimisation: the quickstart.

SFT on the built-in language, preference pairs, a reward model from too few of
them, then PPO under several KL penalties at once in one compiled program. With
β = 0 the proxy score soars while the gold reward falls; a penalty keeps both.

    python -m launch.train --config=configs/quickstart.py \
      --workdir=runs/quickstart
"""

from ml_collections import ConfigDict

from configs import defaults, ppo


def toy() -> ConfigDict:
  """The stages of `configs/ppo.py:toy`, and four penalties for the last."""
  config = ppo.toy()
  config.stage = "pipeline"
  config.sweep.betas = (0.0, 0.05, 0.2, 1.0)
  return config


def get_config(arg: str = "") -> ConfigDict:
  """The toy pipeline; see `configs.defaults.parse`."""
  return defaults.parse(arg, {"toy": toy})
