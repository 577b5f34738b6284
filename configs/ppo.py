r"""PPO against a reward, held near the reference by the KL penalty.

`toy` (default) needs nothing: where `policy.path` or `reward.path` is empty it
first makes the SFT policy and the reward model, as sub-workdirs.

    python -m launch.train --config=configs/ppo.py --workdir=runs/ppo

`stories` tunes a small pretrained story teller towards happy words, with a
Python function of the text as its reward and prompts of your own:

    python -m launch.train --config=configs/ppo.py:stories \
      --config.policy.path=DIR --config.data.path=PROMPTS.txt \
      --workdir=runs/stories

With a 260,000-parameter Llama of TinyStories: 73 s on two cores; 1.3 → 5.0
happy words (2.8 sd of the first scores), KL at most 17.7 nats, the reference's
NLL of the samples 1.40 → 1.51 nats per token.

`1b` and `8b` have the shapes of Llama-3.2-1B and Llama-3.1-8B, for 8 and for
64 devices (or a multiple of them):

    python -m launch.train --config=configs/ppo.py:1b \
      --config.policy.path=DIR --config.reward.path=REWARD_WORKDIR \
      --config.data.path=PROMPTS.jsonl --workdir=runs/1b
"""

from ml_collections import ConfigDict

from configs import defaults, reward_model, sft


def toy() -> ConfigDict:
  """The built-in language; the stages before PPO are part of the config."""
  config = defaults.get_config()
  defaults.add_stage(config, "sft", sft.toy())
  defaults.add_stage(config, "reward_model", reward_model.toy())
  return config


def stories() -> ConfigDict:
  """A small pretrained model and prompts, both given on the command line."""
  config = defaults.get_config()
  config.reward.kind = "python"
  config.reward.function = "rlhf_jax.text.rewards:happy_words"
  config.kl.beta = 0.2  # happy words per nat
  config.rollout.prompt_length = 32
  config.rollout.response_length = 64
  config.rollout.stop_ids = (1, 2)  # It ends a story with 1, its BOS.
  config.train.steps = 150
  config.train.batch_size = 32
  config.optimizer.learning_rate = 1e-4
  return config


def llama_1b() -> ConfigDict:
  """Llama-3.2-1B's shape, parameters divided over 8 devices."""
  config = _llama()
  config.model.width = 2048
  config.model.layers = 16
  config.model.head_size = 64
  config.model.mlp_width = 8192
  config.mesh.fsdp = 8
  return config


def llama_8b() -> ConfigDict:
  """Llama-3.1-8B's shape, parameters divided over 64 devices."""
  config = _llama()
  config.model.width = 4096
  config.model.layers = 32
  config.model.head_size = 128
  config.model.mlp_width = 14336
  config.model.tie_embeddings = False
  config.mesh.fsdp = 8
  config.mesh.tensor = 8
  return config


def get_config(arg: str = "") -> ConfigDict:
  """The preset that `arg` names; see `configs.defaults.parse`."""
  presets = {"toy": toy, "stories": stories, "1b": llama_1b, "8b": llama_8b}
  return defaults.parse(arg, presets)


def _llama() -> ConfigDict:
  """What the full-size presets share."""
  config = defaults.get_config()
  config.model.vocab_size = 128_256
  config.model.heads = 32
  config.model.kv_heads = 8
  config.model.max_length = 8192
  config.model.rope_theta = 500_000.0
  config.model.compute_dtype = "bfloat16"
  config.model.unroll = 1
  config.model.remat = True
  config.rollout.prompt_length = 256
  config.rollout.response_length = 512
  config.ppo.microbatches = 4
  config.optimizer.learning_rate = 1e-6
  config.optimizer.warmup_steps = 10
  config.train.steps = 500
  return config
