r"""From nothing to overoptimisation: the quickstart.

SFT on the built-in language, preference pairs, a reward model from too few of
them, then PPO under several KL penalties at once in one compiled program. With
β = 0 the proxy score soars while the gold reward falls; a penalty keeps both.

    python -m launch.train --config=configs/quickstart.py \
      --workdir=runs/quickstart

On two quiet cores of a server CPU: 110 s. Seed 0, final policies on held-out
prompts: β = 0 ends at gold −2.35 ± 0.07 (95 %) with the highest proxy, 1.66 sd,
and KL 49 nats; β = 0.05 at 0.96, 0.2 at 0.99, 1 at 0.38, with KL 4.9, 2.1 and
0.4 nats; the SFT policy is at −0.06. Seeds 1 and 2, means of the last ten
steps: β = 0 at −3.1 and −1.0, 0.05 at 1.58 and 1.39, 0.2 at 1.39 and 1.15.
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
