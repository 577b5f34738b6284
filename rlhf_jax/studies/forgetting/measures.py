"""Asks a policy of the study `forgetting` what it still knows, and what it won.

Each policy is asked with the held-out prompts, the texts and the random numbers
of its own seed, so that arms can be compared seed by seed. The forward KL is
that of whole responses, KL(π_ref‖π): the reference writes and the two change
places; at the states that the policy visits it would be another figure.
"""

from collections.abc import Sequence
import pathlib

from ml_collections import ConfigDict
import numpy as np
from rich import console as rich_console

from rlhf_jax.data import sampling
from rlhf_jax.measures import evaluation, retention
from rlhf_jax.settings import roles
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.studies import toy_runs
from rlhf_jax.studies.forgetting import rule
from rlhf_jax.text import toy_language


def measure(
  training: ConfigDict,
  begun: toy_runs.Start,
  policies: Sequence[tuple[pathlib.Path, int]],
  console: rich_console.Console,
  *,
  off: Sequence[str],
  prompts: int,
) -> list[rule.Figures]:
  """The figures of each policy, in their order.

  Args:
    training: Of stage `ppo`; its prompts' opening is the task's.
    begun: The reference and the reward model.
    policies: Workdirs with seeds.
    console: Where remarks go.
    off: Openings of the other prompts and texts; each counts alike.
    prompts: How many of each opening, and as many texts.
  """
  config = toy_runs.from_start(training, begun)
  reference = pretrained_lib.load_policy(config)
  reward = roles.reward(config, reference)
  measured = []
  for path, seed in policies:
    policy = pretrained_lib.load(str(path), config)
    asked = [
      toy_runs.varied(
        config,
        {"seed": seed, "data.opening": opening, "evaluate.prompts": prompts},
      )
      for opening in (config.data.opening, *off)
    ]
    on, *others = (_responses(c, policy, reference, reward) for c in asked)
    gold, reverse, forward = np.mean(others, axis=0)
    rises = [_rise(c, policy, reference, console) for c in asked[1:]]
    measured.append(
      rule.Figures(
        gold=on[0],
        off_gold=float(gold),
        rise=float(np.mean(rises)),
        reverse=on[1],
        forward=on[2],
        off_reverse=float(reverse),
        off_forward=float(forward),
      )
    )
  return measured


def _responses(config, policy, reference, reward) -> tuple[float, ...]:
  """Mean gold, reverse and forward KL on held-out prompts of an opening."""
  texts = toy_language.of(config).sample_prompts(
    evaluation.HELD_OUT + config.seed,
    config.evaluate.prompts,
    config.data.opening,
  )
  asked, _ = sampling.prompts_array(texts, config, policy, "held out")
  writes = lambda writer, other: evaluation.evaluate(
    config, writer, other, reward, asked, seed=config.seed
  )
  mine, references = writes(policy, reference), writes(reference, policy)
  figures = (mine.gold, mine.reverse_exact, references.reverse_exact)
  return tuple(float(np.asarray(x, np.float64).mean()) for x in figures)


def _rise(config, policy, reference, console) -> float:
  """How much worse the policy models the language's texts, nats per token."""
  losses = retention.losses(config, policy, reference, console)
  name = f"retention/{retention.BUILT_IN}"
  return losses[f"{name}/nll"] - losses[f"{name}/reference_nll"]
