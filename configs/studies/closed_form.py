r"""Does the step end at π*(y) ∝ π_ref(y)·exp(r(y)/β)?

    python -m launch.study --config=configs/studies/closed_form.py \
      --workdir=runs/closed_form

On two cores of a server CPU: 252 s. Verdict: holds when the β of the sequence's
KL is 0.1 and the other penalty is token_reverse or token_forward or k3_in_loss
or k2_in_reward or k3_in_reward or exact_detached_reward. With the sequence's
reverse KL 23 of 28 arms reach 99% of J* − J(π_ref) with all of their interval,
the least being DPO, pairs, at β = 1 with 98.34% (94.87% to 101.82%); RLOO with
other penalties at β = 1 ends between -575.83% (-575.93% to -575.74%) with
exact_detached_reward and 93.32% (92.29% to 94.35%) with token_reverse,
intervals going up to 383.3% from where the expected gradient leads
(k1_in_loss).

What is covered: one task, on which the exact gradient meets no plateau; the
other penalties with RLOO alone, and at β = 1 alone. An arm is judged by the 95
% interval of its share of J* − J(π_ref) over 3 seeds, which is wide: t is 4.3.
"""

from ml_collections import ConfigDict

from configs import defaults, studies


def full() -> ConfigDict:
  """What `docs/studies.md` shows."""
  config = studies.new(
    study="closed_form",
    claim=(
      "DPO, and with the sequence's reverse KL PPO, RLOO, REINFORCE++ and GRPO"
      " without group normalisation, end at the optimum in closed form; with"
      " another penalty RLOO at β = 1 ends, visibly below it, where the"
      " expected gradient of the reward and that penalty leads."
    ),
    source=(
      "Rafailov et al. 2023 (arXiv:2305.18290), equation 4; the penalties of"
      " rlhf_jax/objective/kl.py"
    ),
  )
  # The task: a transformer that can write 40 responses, each with a reward.
  config.task_seed = 37  # a task without plateaus; see the table of others
  config.other_tasks = 12  # of that table
  config.vocab_size = 4  # the token 0 stops, and is the prompt
  config.response_length = 3  # tokens
  config.width = 16

  # Who learns it: RLOO also with wrong penalties, then what else PPO can do.
  config.algorithms = ("PPO", "RLOO", "REINFORCE++", "GRPO", "DPO")
  config.betas = (0.05, 0.1, 0.5, 1.0)  # reward units per nat; rewards: sd 1
  config.wrong = (
    "token_reverse",
    "token_forward",
    "k3_in_loss",
    "k1_in_loss",
    "k2_in_reward",
    "k3_in_reward",
    "exact_detached_reward",
  )
  config.wrong_betas = (1.0,)  # where each of them can be told from π*
  config.others = True  # GRPO with normalised groups, and the two below
  config.gae_lambda = 0.0  # PPO's critic in place of what follows
  config.gamma = 0.9  # PPO with a discount
  config.seeds = 3  # of the samples; at least 2, for intervals

  # How. Two epochs, so that ratios move and are clipped. A learning rate that
  # falls to 0: the Rao-Blackwellised gradient is noisy even at the optimum. A
  # short memory of its size: the gradient shrinks as the policy settles.
  config.batch_size = 256  # responses per step
  config.group_size = 16  # of them, in RLOO and GRPO
  config.steps = 400
  config.epochs = 2
  config.minibatches = 2
  config.learning_rate = 4e-3
  config.b2 = 0.95
  config.evaluations = 25
  config.last = 3  # evaluations that are averaged
  config.prediction_steps = 600  # updates along the exact gradient
  config.lock()
  return config


def reduced() -> ConfigDict:
  """For the tests: one algorithm, one β, fewer samples."""
  config = full()
  config.other_tasks = 2
  config.algorithms = ("RLOO", "DPO")
  config.betas = (1.0,)
  config.wrong = ("token_forward", "k3_in_reward")
  config.others = False
  config.seeds = 2
  config.batch_size = 128
  config.steps = 200
  config.evaluations = 10
  config.prediction_steps = 300
  return config


def get_config(arg: str = "") -> ConfigDict:
  """The preset that `arg` names; see `configs.defaults.parse`."""
  return defaults.parse(arg, {"full": full, "reduced": reduced})
