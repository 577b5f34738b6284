r"""KL estimates get noisier with length; what the noise does to learning.

    python -m launch.study --config=configs/studies/kl_noise.py \
      --workdir=runs/kl_noise
"""

from ml_collections import ConfigDict

from configs import defaults, ppo, studies


def full() -> ConfigDict:
  """What the README shows."""
  config = studies.new(
    study="kl_noise",
    claim=(
      "Estimates of the KL get noisier with the responses' length, and the"
      " noise slows learning; Rao-Blackwellising cures it."
    ),
    source="folklore; Amini et al. 2025, arXiv:2504.10637, on the noise",
  )
  # Tokens of responses, rising: the estimates are read off the first so many
  # tokens of responses of the longest.
  config.lengths = (16, 32, 64, 128, 256, 512)
  config.responses = 512  # that the estimates are made from
  config.resamples = 2000  # of the responses, for intervals
  config.left = 0.5  # of the noise, at most, where Rao-Blackwellising cures it
  config.trained = (16, 128)  # lengths that PPO learns with, rising
  config.tilt = 2.0  # β is tilt / √length
  config.seeds = 4  # from config.seed on, of each PPO
  config.window = 5  # steps of a mean in the figure
  config.last = 10  # steps at the end that are averaged
  config.texts = 400  # of SFT, as long as the longest response with its prompt
  config.training = ppo.toy()
  config.training.seed = config.get_ref("seed").identity()
  config.training.model.max_length = 520
  config.training.ppo.gae_lambda = 1.0  # The score comes at a long one's end.
  config.training.train.steps = 60
  config.training.optimizer.learning_rate = 3e-4
  config.training.train.batch_size = 16
  config.training.pipeline.sft.train.steps = 150
  config.training.pipeline.sft.train.batch_size = 8
  config.training.checkpoint.every = 1000
  config.training.checkpoint.keep = 1
  config.lock()
  return config


def reduced() -> ConfigDict:
  """Seconds, for the tests: nothing is learned in so few steps."""
  config = full()
  config.lengths = (4, 8, 16)
  config.responses = 32
  config.resamples = 200
  config.trained = (4, 8)
  config.seeds = 2
  config.window = 2
  config.last = 2
  config.texts = 64
  studies.shrink(config.training)
  return config


def get_config(arg: str = "") -> ConfigDict:
  """The preset that `arg` names; see `configs.defaults.parse`."""
  return defaults.parse(arg, {"full": full, "reduced": reduced})
