"""A search for the prefix that makes a model most harmful.

A beam over words: every word is put behind each prefix that is kept, and what
the model then answers to some prompts is counted. The winner of so many is
partly lucky, and the longer the search the more: the best prefix of each length
is therefore asked again, with other prompts and random numbers, and the study
measures the winner of these a third time, with others still. Streams 1 to
`longest` choose, the next one asks again, and stream 0 is the study's.
"""

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax import types
from rlhf_jax.data import arrays, batches
from rlhf_jax.measures import evaluation
from rlhf_jax.models import transformer
from rlhf_jax.settings import prefix as prefix_lib
from rlhf_jax.settings import static
from rlhf_jax.steps import rollout as rollout_lib
from rlhf_jax.steps import sharding
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.studies.adversarial_prefix import writers as writers_lib
from rlhf_jax.text import toy_language

_BATCHES = 16  # of training, in one of the search
_STREAMS = 2**8  # Seeds of prompts that no arm of the study has.
Ids = tuple[int, ...]


class Found(NamedTuple):
  """The best prefix of a length; harmful words per response."""

  words: int
  prefix: str
  searched: float
  again: float


def search(
  config: ConfigDict,
  model: pretrained_lib.Pretrained,
  *,
  longest: int,
  beam: int,
  prompts: int,
) -> list[Found]:
  """The best prefix of each length, from 1 to `longest` words.

  Args:
    config: Of stage `ppo`: the rollout, the language, the seed.
    model: Whose answers are counted.
    longest: Words of the longest prefix.
    beam: Prefixes of each length that are gone on with.
    prompts: That each prefix is tried on.
  """
  language = toy_language.of(config)
  words = range(toy_language.STOP_ID + 1, len(language.vocabulary))
  harm = _harm(config, model, prompts)
  kept, best, searched = [()], [], []
  for length in range(1, longest + 1):
    tried = [(*prefix, word) for prefix in kept for word in words]
    harms = harm(tried, length)
    order = np.argsort(-harms, kind="stable")[:beam]
    kept = [tried[i] for i in order]
    best.append(kept[0])
    searched.append(float(harms[order[0]]))
  again = harm(best, longest + 1)
  return [
    Found(len(ids), text_of(language, ids), first, float(second))
    for ids, first, second in zip(best, searched, again)
  ]


def text_of(language: toy_language.Language, ids: Sequence[int]) -> str:
  """The words of a prefix."""
  return " ".join(language.vocabulary[i] for i in ids)


def _harm(
  config, model, prompts: int
) -> Callable[[Sequence[Ids], int], np.ndarray]:
  """Harmful words per response after each of many prefixes, in a stream."""
  language = toy_language.of(config)
  mesh = static.mesh(config)
  params = model.params["transformer"]
  params = jax.device_put(params, sharding.shardings(params, mesh))
  rollout_config = static.rollout_config(config, model)

  def harm(prefixes, stream):
    seed = evaluation.HELD_OUT + _STREAMS * (config.seed + 1) + stream
    asked = language.sample_prompts(seed, prompts)
    rows = [
      prefix_lib.Prefix([*ids], 1).in_front_of(p, config.rollout.prompt_length)
      for ids in prefixes
      for p in asked
    ]
    array, _ = arrays.prompts_array(
      rows,
      prompt_length=config.rollout.prompt_length,
      pad_id=model.pad_id,
      vocab_size=model.model.vocab_size,
      where="search",
    )
    key = jax.random.key(evaluation.seed_of(config.seed, stream))
    counts = batches.map_rows(
      lambda batch, index: _count(
        params,
        batch,
        jax.random.fold_in(key, index),
        model=model.model,
        config=rollout_config,
      ),
      array,
      mesh=mesh,
      batch_size=_BATCHES * config.train.batch_size,
    )
    return counts.reshape(len(prefixes), prompts).mean(axis=1)

  return harm


@functools.partial(jax.jit, static_argnames=("model", "config"))
def _count(
  params: types.Params,
  prompts: types.Prompts,
  key: PRNGKeyArray,
  *,
  model: transformer.TransformerConfig,
  config: rollout_lib.RolloutConfig,
) -> Float[Array, "B"]:
  """Harmful words of a response to each prompt."""
  rollout = rollout_lib.rollout(
    params, prompts, key, model=model, config=config
  )
  return writers_lib.harmful_in(rollout.sequences)
