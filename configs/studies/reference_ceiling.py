r"""The reference's quality caps what RL can reach under the penalty.

    python -m launch.study --config=configs/studies/reference_ceiling.py \
      --workdir=runs/reference_ceiling

On two cores of a server CPU: 215 s. Verdict: holds. Of a difference in gold
between references 60 steps of PPO leave 36% (26% to 47%) under β = 0.05, 43%
(33% to 53%) under β = 0.2, 77% (70% to 85%) under β = 1: +41 percentage points
(+38 to +45) from the smallest β to the largest.
"""

from ml_collections import ConfigDict

from configs import defaults, studies


def full() -> ConfigDict:
  """What `docs/studies.md` shows."""
  config = studies.new(
    study="reference_ceiling",
    claim="The reference's quality caps what RL can reach under the penalty.",
    source=(
      "folklore; the optimum π_ref·exp(r/β)/Z implies it, and Ouyang et al."
      " 2022, arXiv:2203.02155, begin RL at SFT"
    ),
  )
  # Steps of SFT that make the other references; that of most steps, which the
  # reward model stands on, is of training.pipeline.sft.
  config.shorter_sft = (10, 16, 25, 40)
  config.betas = (0.05, 0.2, 1.0)  # reward units per nat
  config.seeds = 3  # from config.seed on; each is a run of every arm
  config.last = 20  # steps that are the end of a run
  studies.add_training(config, steps=60)
  config.lock()
  return config


def reduced() -> ConfigDict:
  """Seconds, for the tests: nothing is learned in so few steps."""
  config = full()
  config.shorter_sft = (1,)
  config.betas = (0.05, 1.0)
  config.seeds = 2
  config.last = 2
  studies.shrink(config.training)
  return config


def get_config(arg: str = "") -> ConfigDict:
  """The preset that `arg` names; see `configs.defaults.parse`."""
  return defaults.parse(arg, {"full": full, "reduced": reduced})
