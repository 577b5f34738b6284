r"""PPO's clipping and the KL penalty are complementary.

    python -m launch.study --config=configs/studies/clip_and_penalty.py \
      --workdir=runs/clip_and_penalty

On two cores of a server CPU that many others used, too: 1780 s with SFT and
reward model. Verdict: does not hold here. The distance is the penalty's: it
ends 50 nats nearer without clipping (28 to 72), and 26 to 57 nearer beside it.
A step is smaller the narrower the clip (5.4, 3.6, 1.4 and 0.6 nats at off, 0.5,
0.2 and 0.05 without the penalty; 1.7, 1.5, 0.6 and 0.3 with it), but the
intervals leave it open, but for −1.4 (−2.6 to −0.2) at 0.05 with the penalty: a
run's mean step is made of a few large ones. Clipping alone saves no gold
(−1.0 to −4.1 at the end); with the penalty gold is 0.5 without a clip and 1.1
at 0.05, not resolved either. Four seeds.
"""

from ml_collections import ConfigDict

from configs import defaults, ppo, studies


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
  config.training = ppo.toy()
  config.training.seed = config.get_ref("seed").identity()
  config.training.kl.beta = 0.1  # where the penalty is on
  config.training.ppo.epochs = 4  # Enough that clipping acts.
  config.training.train.steps = 50
  config.training.checkpoint.keep = 1
  config.training.checkpoint.every = 1000
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
