r"""A Bradley–Terry reward model from preference pairs.

`hh` learns from pairs of your own (JSONL of `prompt`, `chosen`, `rejected`) on
top of a Hugging Face model or an SFT workdir:

    python -m launch.train --config=configs/reward_model.py:hh \
      --config.policy.path=DIR --config.data.path=PAIRS.jsonl \
      --workdir=runs/reward_model

`toy` (default) has 2,048 pairs of the built-in language, too few of them on
purpose: what the reward model gets wrong is what a policy without a penalty
finds.

    python -m launch.train --config=configs/reward_model.py \
      --config.policy.path=runs/sft --workdir=runs/reward_model
"""

from ml_collections import ConfigDict

from configs import defaults, sft


def standalone() -> ConfigDict:
  """`toy`, which first makes its SFT policy where `policy.path` is empty."""
  config = toy()
  defaults.add_stage(config, "sft", sft.toy())
  return config


def toy() -> ConfigDict:
  """The built-in language, on top of an SFT policy of it."""
  config = defaults.get_config()
  config.stage = "reward_model"
  config.data.size = 2048
  config.train.steps = 150
  config.train.batch_size = 64
  config.optimizer.learning_rate = 1e-3
  return config


def hh() -> ConfigDict:
  """Dialogue pairs and a pretrained model, given on the command line."""
  config = defaults.get_config()
  config.stage = "reward_model"
  config.model.max_length = 1024
  config.rollout.prompt_length = 256
  config.rollout.response_length = 256
  config.train.steps = 1000
  config.train.batch_size = 64
  config.optimizer.learning_rate = 1e-5
  config.optimizer.schedule = "linear"
  config.optimizer.warmup_steps = 50
  return config


def get_config(arg: str = "") -> ConfigDict:
  """The preset that `arg` names; see `configs.defaults.parse`."""
  return defaults.parse(arg, {"toy": standalone, "hh": hh})
