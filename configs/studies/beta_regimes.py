r"""Which regimes there are over β, for reward models of three qualities.

    python -m launch.study --config=configs/studies/beta_regimes.py \
      --workdir=runs/beta_regimes

On two cores of a server CPU: 428 s. Verdict: holds when β is 1.5 to 5. With how
many of 3 reward models β is what the claim says after 40 steps: 0 to 0.01
(hacks) unclear 1, no 2; 0.02 to 0.1 (standard) no 1, unclear 1, yes 1; 0.2 to
0.5 (conservative) unclear 2, yes 1; 1.5 to 5 (barely moves) yes 3.

Seeds 0 and 1 had left most of the first two bands open.
"""

from ml_collections import ConfigDict

from configs import defaults, ppo, studies


def full() -> ConfigDict:
  """What `docs/studies.md` shows."""
  config = studies.new(
    study="beta_regimes",
    claim=(
      "β from 0 to 0.01 hacks within a few thousand steps, 0.02 to 0.1 is"
      " standard, 0.2 to 0.5 is conservative (useful with a weak reward model),"
      " and above 1 the policy barely moves."
    ),
    source=(
      "folklore; Ouyang et al. 2022, arXiv:2203.02155, have 0.02 and Stiennon"
      " et al. 2020, arXiv:2009.01325, have 0.05"
    ),
  )
  # The bands of the claim, reward units per nat, in its order.
  config.hacks = (0.0, 0.003, 0.01)
  config.standard = (0.02, 0.05, 0.1)
  config.conservative = (0.2, 0.3, 0.5)
  config.barely_moves = (1.5, 2.5, 5.0)
  config.pairs = (128, 1024, 4096)  # that a reward model is made from
  config.reward_steps = (40, 120, 240)  # of its training
  config.seed = 10  # Two seeds, 0 and 1, had left much of it open.
  config.seeds = 4  # from config.seed on, under every β
  config.window = 10  # steps at the end that are averaged
  config.prompts = 512  # held out, that the SFT policy answers
  config.most = 0.8  # of the best β's gain in gold, that "standard" reaches
  config.little = 0.2  # of the largest gain in proxy, that is "barely moving"
  studies.add_training(config, steps=40)
  config.lock()
  return config


def reduced() -> ConfigDict:
  """Seconds, for the tests: nothing is learned in so few steps."""
  config = full()
  config.hacks = (0.0,)
  config.standard = (0.05,)
  config.conservative = (0.3,)
  config.barely_moves = (2.5,)
  config.pairs = (32, 64)
  config.reward_steps = (2, 4)
  config.seeds = 2
  config.window = 2
  config.prompts = 16
  studies.shrink(config.training)
  reward_model = ppo.toy().pipeline.reward_model  # `pairs` and steps are ours
  config.training.pipeline.reward_model.data.size = reward_model.data.size
  config.training.pipeline.reward_model.train.steps = reward_model.train.steps
  return config


def get_config(arg: str = "") -> ConfigDict:
  """The preset that `arg` names; see `configs.defaults.parse`."""
  return defaults.parse(arg, {"full": full, "reduced": reduced})
