"""One file a study: its claim, where that is from, and the experiment's size.

Each docstring is a lab record: the command, the machine, the seconds, and what
it found.
"""

from ml_collections import ConfigDict

from configs import ppo


def new(*, study: str, claim: str, source: str) -> ConfigDict:
  """The fields that every study has.

  Args:
    study: Its module in rlhf_jax/studies and its file here.
    claim: One sentence, which the verdict is about.
    source: Who says so.
  """
  return ConfigDict(
    {"study": study, "claim": claim, "source": source, "seed": 0}
  )


def add_training(config: ConfigDict, *, steps: int) -> None:
  """PPO on the built-in language, of as many steps, as `config.training`.

  It has the study's seed, and saves its state at the end alone.
  """
  config.training = ppo.toy()
  config.training.seed = config.get_ref("seed").identity()
  config.training.train.steps = steps
  config.training.checkpoint.every = 1000
  config.training.checkpoint.keep = 1


def shrink(training: ConfigDict) -> None:
  """Makes PPO, and what comes before it, a matter of seconds."""
  for stage in (training, *training.pipeline.values()):
    stage.model.width = 16
    stage.model.layers = 1
    stage.model.heads = stage.model.kv_heads = 2
    stage.model.head_size = 8
    stage.model.mlp_width = 16
    stage.rollout.response_length = 8
    stage.data.size = 64
    stage.train.batch_size = 16
    stage.train.steps = 4
