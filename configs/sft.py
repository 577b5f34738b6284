r"""Supervised fine-tuning: next-token loss on packed texts.

    python -m launch.train --config=configs/sft.py --workdir=runs/sft

`toy` (default) learns the built-in language from a random start. `stories`
continues a Hugging Face model on texts of your own, one JSON object a line or
one text a line:

    python -m launch.train --config=configs/sft.py:stories \
      --config.policy.path=DIR --config.data.path=TEXTS.jsonl \
      --workdir=runs/sft_stories
"""

from ml_collections import ConfigDict

from configs import defaults


def toy() -> ConfigDict:
  """The built-in language, from a random start."""
  config = defaults.get_config()
  config.stage = "sft"
  config.data.sequence_length = 64
  config.train.steps = 300
  config.train.batch_size = 32
  config.optimizer.learning_rate = 3e-3
  return config


def stories() -> ConfigDict:
  """A small pretrained model and texts, both given on the command line."""
  config = defaults.get_config()
  config.stage = "sft"
  config.model.max_length = 512
  config.data.sequence_length = 256
  config.train.steps = 200
  config.train.batch_size = 16
  config.optimizer.learning_rate = 1e-4
  config.optimizer.schedule = "cosine"
  config.optimizer.warmup_steps = 10
  return config


def get_config(arg: str = "") -> ConfigDict:
  """The preset that `arg` names; see `configs.defaults.parse`."""
  return defaults.parse(arg, {"toy": toy, "stories": stories})
