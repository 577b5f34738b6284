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

  Attributes:
    score: Of the reward model, reward units.
    gold: The true reward, reward units.
    kl: KL(π‖π_ref), nats per response.
    faults: Ungrammatical pairs.
    nll: −log π_ref, nats per token.
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
    texts = toy_language.of(config).sample_prompts(
      evaluation.HELD_OUT + seed, prompts, config.data.opening
    )
    asked, _ = sampling.prompts_array(texts, config, policy, "held out")
    found = evaluation.evaluate(
      config, policy, reference, reward, asked, seed=seed
    )
    measured.append(_responses(found, toy_language.of(config)))
  return measured


def _responses(
  found: evaluate_lib.Evaluation, language: toy_language.Language
) -> Responses:
  sequences = found.rollout.sequences
  float64 = lambda x: np.asarray(x, np.float64)
  nll = float64(found.reference_nll) / float64(sequences.response_lengths)
  return Responses(
    score=float64(found.score),
    gold=float64(found.gold),
    kl=float64(found.reverse_exact),
    faults=float64(jax.jit(language.ungrammatical_pairs)(sequences)),
    nll=nll,
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
