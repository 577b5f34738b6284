r"""Without the penalty the proxy rises while the gold falls.

    python -m launch.study --config=configs/studies/goodhart.py \
      --workdir=runs/goodhart

On two cores of a server CPU: 341 s. Verdict: holds when the nonsense need not
look fluent. Without a penalty the proxy gains 1.72 (1.70 to 1.73) reward units
in 100 steps, gold changes by -3.46 (-5.18 to -1.73) since its peak, a response
has 6.58 (3.87 to 9.30) ungrammatical pairs more than the SFT policy's, and 0%
(0% to 0%) of those with such pairs look fluent; under β = 0.1, the best, gold
changes by 1.03 (0.82 to 1.25) since the SFT policy.
"""

from ml_collections import ConfigDict

from configs import defaults, studies


def full() -> ConfigDict:
  """What the README shows."""
  config = studies.new(
    study="goodhart",
    claim=(
      "Without the penalty the proxy rises while the gold falls, and the policy"
      " turns to fluent-looking nonsense; a penalty prevents it."
    ),
    source="Gao, Schulman & Hilton 2022, arXiv:2210.10760, and folklore",
  )
  config.betas = (0.0, 0.02, 0.05, 0.1, 0.5)  # no penalty, then several
  config.seeds = 5  # from config.seed on, under every β
  config.window = 10  # steps of a mean: of the peak, and of the end
  config.prompts = 512  # held out, that each policy answers in the end
  config.kept = 0.8  # of the gain at gold's peak, where a penalty prevents it
  # Ungrammatical pairs per response more than the SFT policy's: nonsense.
  config.nonsense = 0.5
  # Of the SFT policy's responses, that look fluent by their NLL per token.
  config.fluent = 0.95
  studies.add_training(config, steps=100)
  config.lock()
  return config


def reduced() -> ConfigDict:
  """Seconds, for the tests: nothing is learned in so few steps."""
  config = full()
  config.betas = (0.0, 0.1)
  config.seeds = 2
  config.window = 2
  config.prompts = 16
  studies.shrink(config.training)
  return config


def get_config(arg: str = "") -> ConfigDict:
  """The preset that `arg` names; see `configs.defaults.parse`."""
  return defaults.parse(arg, {"full": full, "reduced": reduced})
