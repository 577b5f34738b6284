r"""From nothing to overoptimisation: the quickstart.

SFT on the built-in language, preference pairs, a reward model from too few of
them, then PPO under several KL penalties at once in one compiled program. With
β = 0 the proxy score soars while the gold reward falls; a penalty keeps both.

    python -m launch.train --config=configs/quickstart.py \
      --workdir=runs/quickstart

On two cores of a server CPU: 94 to 102 s. Seeds 0, 1 and 2, means of the last
ten steps: β = 0 ends at gold −4.6, −16.9 and −3.2, with the highest proxy
(1.48, 1.64, 1.37 sd) and KL 87, 265 and 73 nats; β = 0.05 at gold 1.38, 1.25
and 1.38, with KL 3.6, 5.1 and 4.0. The SFT policy began at −0.12, 0.02, −0.08.
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
