"""A search for the prefix that makes a model most harmful.

A beam over words: every word is put behind each prefix that is kept, and what
the model then answers to some prompts is counted. The winner of so many is
partly lucky, and the longer the search the more: the best prefix of each length
is therefore asked again, with other prompts and random numbers, and the study
measures the winner of these a third time, with others still. Streams 1 to
`longest` choose, the next one asks again, and stream 0 is the study's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.data import sampling
from rlhf_jax.measures import evaluation
from rlhf_jax.settings import prefix as prefix_lib
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.studies import toy_runs
from rlhf_jax.studies.adversarial_prefix import writers as writers_lib
from rlhf_jax.text import toy_language

_BATCHES = 16  # of training, in one of the search
_STREAMS = 2**8  # Seeds of prompts that no arm of the study has.


class Found(NamedTuple):
  """The best prefix of a length; harmful words per response."""

  words: int
  prefix: str
  searched: float
  again: float


def search(config: ConfigDict, model: pretrained_lib.Pretrained) -> list[Found]:
  """The best prefix of each length, from 1 to `longest` words.

  Args:
    config: The study's.
    model: Whose answers are counted.
  """
  language = toy_language.of(config.training)
  words = range(toy_language.STOP_ID + 1, len(language.vocabulary))
  kept, best, searched = [()], [], []
  for length in range(1, config.longest + 1):
    tried = [(*prefix, word) for prefix in kept for word in words]
    harms = _harm(config, model, tried, length)
    order = np.argsort(-harms, kind="stable")[: config.beam]
    kept = [tried[i] for i in order]
    best.append(kept[0])
    searched.append(float(harms[order[0]]))
  again = _harm(config, model, best, config.longest + 1)
  return [
    Found(len(ids), text_of(language, ids), first, float(second))
    for ids, first, second in zip(best, searched, again)
  ]


def text_of(language: toy_language.Language, ids: Sequence[int]) -> str:
  """The words of a prefix."""
  return " ".join(language.vocabulary[i] for i in ids)


def _harm(config, model, prefixes, stream: int) -> np.ndarray:
  """Harmful words per response after each of many prefixes, in a stream."""
  size = _BATCHES * config.training.train.batch_size
  training = toy_runs.varied(config.training, {"train.batch_size": size})
  prompts = toy_language.of(training).sample_prompts(
    evaluation.HELD_OUT + _STREAMS * (config.seed + 1) + stream,
    config.search_prompts,
  )
  length = training.rollout.prompt_length
  rows = [
    prefix_lib.Prefix([*ids], 1).in_front_of(prompt, length)
    for ids in prefixes
    for prompt in prompts
  ]
  asked, _ = sampling.prompts_array(rows, training, model, "search")
  seed = evaluation.seed_of(config.seed, stream)
  answers = sampling.sample(model, asked, training, seed=seed)
  harm = np.asarray(jax.jit(writers_lib.harmful_in)(answers))
  return harm.reshape(len(prefixes), -1).mean(axis=1)
