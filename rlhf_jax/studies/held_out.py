"""Policies of the built-in language on prompts that they were not trained on.

Each policy answers held-out prompts once, with the prompts and the random
numbers of its own seed: policies of one seed differ in their parameters alone,
and those of different seeds are independent observations.
"""

from collections.abc import Sequence
import pathlib
from typing import NamedTuple

import jax
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax import types
from rlhf_jax.data import sampling
from rlhf_jax.measures import evaluation
from rlhf_jax.settings import roles
from rlhf_jax.steps import evaluate as evaluate_lib
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.studies import toy_runs
from rlhf_jax.text import tokenizer as tokenizer_lib
from rlhf_jax.text import toy_language


class Responses(NamedTuple):
  """What a policy's responses are worth; arrays have one figure a response.

  `score`, of the reward model, and `gold`, the true reward, in reward units;
  KL(π‖π_ref), nats per response; `faults`, ungrammatical pairs; −log π_ref,
  nats per token.
  """

  score: np.ndarray
  gold: np.ndarray
  kl: np.ndarray
  faults: np.ndarray
  nll: np.ndarray


def measure(
  training: ConfigDict,
  begun: toy_runs.Start,
  policies: Sequence[tuple[pathlib.Path, int]],
  *,
  prompts: int,
) -> list[Responses]:
  """What each policy, with its seed, answers to as many prompts.

  Args:
    training: Of stage `ppo`; its rollout and its built-in language.
    begun: The reference and the reward model.
    policies: Workdirs with seeds.
    prompts: How many each of them answers.
  """
  config = toy_runs.from_start(training, begun)
  reference = pretrained_lib.load_policy(config)
  reward = roles.reward(config, reference)
  measured = []
  for path, seed in policies:
    policy = pretrained_lib.load(str(path), config)
    found = answers(
      config, policy, reference, reward, seed=seed, prompts=prompts
    )
    measured.append(_responses(found, toy_language.of(config)))
  return measured


def answers(
  config: ConfigDict,
  policy: pretrained_lib.Pretrained,
  reference: pretrained_lib.Pretrained,
  reward: roles.Reward,
  *,
  seed: int,
  prompts: int,
) -> evaluate_lib.Evaluation:
  """One answer of a policy to each of so many prompts of the language.

  The prompts have the config's opening; the seed is theirs and the responses'.
  """
  texts = toy_language.of(config).sample_prompts(
    evaluation.HELD_OUT + seed, prompts, config.data.opening
  )
  asked, _ = sampling.prompts_array(texts, config, policy, "held out")
  return evaluation.evaluate(
    config, policy, reference, reward, asked, seed=seed
  )


def _responses(
  found: evaluate_lib.Evaluation, language: toy_language.Language
) -> Responses:
  sequences = found.rollout.sequences
  float64 = lambda x: np.asarray(x, np.float64)
  nll = float64(found.reference_nll) / float64(sequences.response_lengths)
  faults = jax.jit(language.ungrammatical_pairs)(sequences)
  return Responses(
    *map(float64, (found.score, found.gold, found.reverse_exact, faults, nll))
  )


def text(
  policy: pretrained_lib.Pretrained, sequences: types.Sequences, row: int
) -> str:
  """A prompt, and after `|` what was answered."""
  prompt, size = sequences.prompt_tokens[row], sequences.prompt_lengths[row]
  response = sequences.response_tokens[row, : sequences.response_lengths[row]]
  return " | ".join(
    tokenizer_lib.decode(policy.tokenizer, ids.tolist())
    for ids in (prompt[len(prompt) - size :], response)
  )
