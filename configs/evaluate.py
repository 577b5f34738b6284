r"""A trained policy on held-out prompts: scores, KL, wins, best-of-n.

`toy` (default) has the built-in language's prompts. The reference and the
reward are those that the policy was trained with, unless they are set:

    python -m launch.evaluate --config=configs/evaluate.py \
      --config.policy.path=runs/ppo --workdir=runs/ppo-evaluated

Against another policy, with best-of-n of up to 16 samples a prompt:

    python -m launch.evaluate --config=configs/evaluate.py \
      --config.policy.path=runs/ppo --config.evaluate.against=runs/other \
      --config.evaluate.best_of=16 --workdir=runs/ppo-or-other

`stories` has prompts of your own that training did not have, and responses as
long as `configs/ppo.py:stories` draws them; its corpora are texts that the
policy should not forget:

    python -m launch.evaluate --config=configs/evaluate.py:stories \
      --config.policy.path=runs/stories --config.data.path=PROMPTS.txt \
      "--config.evaluate.corpora=('STORIES.txt',)" \
      --workdir=runs/stories-evaluated
"""

from ml_collections import ConfigDict

from configs import defaults, ppo


def toy() -> ConfigDict:
  """The built-in language."""
  config = defaults.get_config()
  config.stage = "evaluate"
  return config


def stories() -> ConfigDict:
  """Prompts and texts of your own, drawn as `configs/ppo.py:stories` does."""
  config = toy()
  config.rollout = ppo.stories().rollout
  config.data.sequence_length = 256
  return config


def get_config(arg: str = "") -> ConfigDict:
  """The preset that `arg` names; see `configs.defaults.parse`."""
  return defaults.parse(arg, {"toy": toy, "stories": stories})
