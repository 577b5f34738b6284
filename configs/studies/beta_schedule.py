r"""Starting conservative and relaxing beats a constant β.

    python -m launch.study --config=configs/studies/beta_schedule.py \
      --workdir=runs/beta_schedule

On two cores of a server CPU: 256 s. Verdict: does not hold here. 0 of 5 ways to
move β are ahead of a constant β at the same KL by more gold than interpolating
may add (+0.04); the best is cosine with +0.05 (-0.20 to +0.30).
"""

from ml_collections import ConfigDict

from configs import defaults, studies


def full() -> ConfigDict:
  """What `docs/studies.md` shows."""
  config = studies.new(
    study="beta_schedule",
    claim="Starting conservative and relaxing beats a constant β.",
    source="folklore; measured as gold reward at equal KL",
  )
  config.constants = (0.02, 0.05, 0.1, 0.2, 0.5)  # β, reward units per nat
  config.arms = ("linear", "cosine", "ziegler", "dual", "trust")
  config.conservative_beta = 0.5  # where these begin
  config.target = 4.0  # of ziegler and dual, nats per response
  config.seeds = 4  # from config.seed on; each is a run of every arm
  config.last = 15  # steps that are the end of a run
  studies.add_training(config, steps=60)
  config.lock()
  return config


def reduced() -> ConfigDict:
  """Seconds, for the tests: nothing is learned in so few steps."""
  config = full()
  config.constants = (0.02, 0.1, 0.5)
  config.arms = ("linear", "dual")
  config.seeds = 2
  config.last = 2
  studies.shrink(config.training)
  return config


def get_config(arg: str = "") -> ConfigDict:
  """The preset that `arg` names; see `configs.defaults.parse`."""
  return defaults.parse(arg, {"full": full, "reduced": reduced})
