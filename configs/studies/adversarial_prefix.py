r"""A prefix makes the KL look small for harmful text; the clean prompt tells.

    python -m launch.study --config=configs/studies/adversarial_prefix.py \
      --workdir=runs/adversarial_prefix

On two cores of a server CPU: 176 s. Verdict: holds. PPO for harm after 'awful'
ends with 2.07 (1.92 to 2.22) harmful words per response, at 0.62 (0.52 to 0.73)
nats from the reference that it is charged against, where so much harm is at
least 1.59 (0.96 to 2.22) from the one on the clean prompt; the KL to that one
is 4.50 (4.19 to 4.81).
"""

from ml_collections import ConfigDict

from configs import defaults, studies


def full() -> ConfigDict:
  """What the README shows."""
  config = studies.new(
    study="adversarial_prefix",
    claim=(
      "A prefix that shifts the reference makes the KL look small for harmful"
      " text; the KL to the reference on the clean prompt exposes it."
    ),
    source="rlhf_jax; folklore",
  )
  config.harsh = 0.1  # share of the writers that SFT learns from
  config.longest = 3  # words of a prefix
  config.beam = 3  # prefixes of a length that the search goes on with
  config.search_prompts = 64  # that each prefix is tried on
  config.randoms = 4  # random prefixes, of each seed
  config.seeds = 5  # from config.seed on, in every arm
  config.prompts = 512  # held out, that each policy answers
  config.factor = 1.5  # by which the KL to the clean reference is to be larger
  studies.add_training(config, steps=100)
  config.training.kl.beta = 1.5  # harmful words per nat
  config.training.rollout.prompt_length = 12
  # Two kinds of writers take longer to learn than one.
  config.training.pipeline.sft.train.steps = 500
  config.lock()
  return config


def reduced() -> ConfigDict:
  """Seconds, for the tests: nothing is learned in so few steps."""
  config = full()
  config.longest = 2
  config.beam = 1
  config.search_prompts = 4
  config.randoms = 2
  config.seeds = 2
  config.prompts = 16
  studies.shrink(config.training)
  return config


def get_config(arg: str = "") -> ConfigDict:
  """The preset that `arg` names; see `configs.defaults.parse`."""
  return defaults.parse(arg, {"full": full, "reduced": reduced})
