r"""The KL penalty only partly prevents forgetting off the RL distribution.

    python -m launch.study --config=configs/studies/forgetting.py \
      --workdir=runs/forgetting

On two cores of a server CPU: 357 s. Verdict: does not hold here. The NLL of
texts that PPO does not see rises by 4.834 (3.764 to 5.904) nats per token
without a penalty and by 0.233 (0.204 to 0.261), 5% of that, under β = 0.3, the
best on the task; of this, general texts in the loss take away (all at once):
their likelihood 0.230 (0.179 to 0.281), the forward KL 0.225 (0.182 to 0.268),
the reverse KL 0.224 (0.179 to 0.269).

Which β is best on the task is a close choice: the same seeds in a program that
rounds otherwise had chosen 0.1, under which 13 % of the rise is left, and that
is more than the 5 % that the rule asks for.
"""

from ml_collections import ConfigDict

from configs import defaults, studies


def full() -> ConfigDict:
  """What the README shows."""
  config = studies.new(
    study="forgetting",
    claim=(
      "The KL penalty only partly prevents forgetting off the RL distribution;"
      " general texts in the loss prevent more of it."
    ),
    source=(
      "Ouyang et al. 2022, arXiv:2203.02155, section 4.2; the predictors:"
      " Shenfeld, Pari & Agrawal 2025, arXiv:2509.04259"
    ),
  )
  config.betas = (0.0, 0.02, 0.05, 0.1, 0.3)  # no penalty, then several
  # Each beside the penalty of the best β; see config.mix.kind.
  config.mixes = ("nll", "forward_kl", "reverse_kl")
  config.seeds = 4  # from config.seed on, in every arm
  config.off = ("determiner", "pronoun")  # openings that PPO does not see
  config.prompts = 256  # held out, of each opening; and as many texts
  # Of forgetting without a penalty: what is more than that is left "partly".
  config.partly = 0.05
  studies.add_training(config, steps=100)
  config.training.data.opening = "person"  # All that PPO sees.
  config.training.mix.coefficient = 0.5  # reward units per nat
  config.lock()
  return config


def reduced() -> ConfigDict:
  """Seconds, for the tests: nothing is learned in so few steps."""
  config = full()
  config.betas = (0.0, 0.1)
  config.mixes = ("nll",)
  config.seeds = 2
  config.prompts = 16
  config.training.mix.batch_size = 16
  config.training.data.sequence_length = 32  # The fewer texts fill more rows.
  studies.shrink(config.training)
  return config


def get_config(arg: str = "") -> ConfigDict:
  """The preset that `arg` names; see `configs.defaults.parse`."""
  return defaults.parse(arg, {"full": full, "reduced": reduced})
