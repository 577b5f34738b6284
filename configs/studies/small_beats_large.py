r"""A small RLHF policy is preferred to a raw model 100 times its size.

    python -m launch.study --config=configs/studies/small_beats_large.py \
      --workdir=runs/small_beats_large

On two cores of a server CPU: 88 s. Verdict: holds. The RLHF policy of 4,144
parameters is preferred to the raw model of 415,584 (100.3 times as many) on
88.4% of held-out prompts (85.7% to 91.1% over 5 seeds).

With 1,432 against 143,680 parameters: 86.9 % (85.0 % to 88.8 %).
"""

from ml_collections import ConfigDict

from configs import defaults, sft, studies


def full() -> ConfigDict:
  """What the README shows."""
  config = studies.new(
    study="small_beats_large",
    claim=(
      "A small RLHF policy is preferred to a model 100 times its size that was"
      " only pretrained."
    ),
    source="Ouyang et al. 2022, arXiv:2203.02155, section 4.1 (1.3B and 175B)",
  )
  config.times = 100  # how much larger the large model is, at least
  config.seeds = 5  # from config.seed on; each is a run of PPO
  config.prompts = 512  # held out, a seed; each model answers once
  studies.add_training(config, steps=100)
  _shape(config.training.model, width=16, layers=1, heads=2, mlp_width=32)
  config.training.kl.beta = 0.1
  config.training.optimizer.learning_rate = 3e-3
  config.training.pipeline.sft.optimizer.learning_rate = 1e-2
  config.training.pipeline.reward_model.optimizer.learning_rate = 3e-3
  # The large model, on as many of the same texts as the small one's SFT.
  config.large = sft.toy()
  config.large.seed = config.get_ref("seed").identity()
  _shape(config.large.model, width=96, layers=4, heads=4, mlp_width=224)
  config.large.optimizer.schedule = "cosine"
  config.large.optimizer.learning_rate = 2e-3
  config.large.optimizer.warmup_steps = 20
  for stage in _stages(config):
    stage.checkpoint.every = 1000
    stage.checkpoint.keep = 1
  for stage in (config.training.pipeline.sft, config.large):
    stage.data.size = 16_384  # texts; few of them are seen twice
  config.lock()
  return config


def reduced() -> ConfigDict:
  """Seconds, for the tests: nothing is learned in so few steps."""
  config = full()
  config.times = 2
  config.seeds = 2
  config.prompts = 16
  studies.shrink(config.training)
  _shape(config.large.model, width=32, layers=1, heads=2, mlp_width=64)
  config.large.train.batch_size = 16
  config.large.train.steps = 4
  config.large.optimizer.warmup_steps = 0
  for stage in (config.training.pipeline.sft, config.large):
    stage.data.size = 64
  return config


def get_config(arg: str = "") -> ConfigDict:
  """The preset that `arg` names; see `configs.defaults.parse`."""
  return defaults.parse(arg, {"full": full, "reduced": reduced})


def _shape(model: ConfigDict, *, width, layers, heads, mlp_width) -> None:
  model.width = width
  model.layers = layers
  model.heads = model.kv_heads = heads
  model.head_size = width // heads
  model.mlp_width = mlp_width


def _stages(config: ConfigDict) -> list[ConfigDict]:
  """All that is trained."""
  return [config.training, *config.training.pipeline.values(), config.large]
