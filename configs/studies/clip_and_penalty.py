r"""PPO's clipping and the KL penalty are complementary.

    python -m launch.study --config=configs/studies/clip_and_penalty.py \
      --workdir=runs/clip_and_penalty

On two cores of a server CPU: 239 s. Verdict: holds when the clip range is 0.05
or 0.2. Each beside the other, clipping at 0.2 makes a run's median step 0.55
times (0.40 to 0.76) and its largest 0.20 times (0.09 to 0.47) as large, and the
penalty changes the KL at the end by -60.06 (-92.83 to -27.30) nats.

The rule was made on seeds 0 to 3: a few steps, ten times as large as the
others, make a run's mean, so it compares medians, by their ratio.
"""

from ml_collections import ConfigDict

from configs import defaults, studies


def full() -> ConfigDict:
  """What the README shows."""
  config = studies.new(
    study="clip_and_penalty",
    claim=(
      "PPO's clipping and the KL penalty are complementary: one bounds a step,"
      " the other the distance."
    ),
    source=(
      "folklore; Schulman et al. 2017, arXiv:1707.06347, section 3, for"
      " the step; Ziegler et al. 2019, arXiv:1909.08593, for the distance"
    ),
  )
  config.clips = (0.05, 0.2, 0.5)  # values of ppo.clip_epsilon that clip
  config.no_clip = 0.99  # one that does not, up to ratios of 1.99
  config.seed = 10  # The rule was made on 0 to 3.
  config.seeds = 6  # from config.seed on; each is a run of every arm
  config.last = 15  # steps that are the end of a run
  config.margin = 0.2  # gold reward that both together may lose to one alone
  studies.add_training(config, steps=50)
  config.training.kl.beta = 0.1  # where the penalty is on
  config.training.ppo.epochs = 4  # Enough that clipping acts.
  config.lock()
  return config


def reduced() -> ConfigDict:
  """Seconds, for the tests: nothing is learned in so few steps."""
  config = full()
  config.clips = (0.2,)
  config.seeds = 2
  config.last = 2
  studies.shrink(config.training)
  return config


def get_config(arg: str = "") -> ConfigDict:
  """The preset that `arg` names; see `configs.defaults.parse`."""
  return defaults.parse(arg, {"full": full, "reduced": reduced})
