"""Texts in, responses out: a frozen policy on many prompts."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax import types
from rlhf_jax.host import data, settings
from rlhf_jax.host import pretrained as pretrained_lib
from rlhf_jax.host import tokenizer as tokenizer_lib
from rlhf_jax.steps import rollout, sharding


def prompts_array(
  prompts: Sequence[str] | Sequence[list[int]],
  config: ConfigDict,
  pretrained: pretrained_lib.Pretrained,
  where: str,
) -> tuple[types.Prompts, data.Cut]:
  """Prompts, as texts or as ids, in the layout that the rollout takes."""
  ids = [
    tokenizer_lib.encode_prompt(pretrained.tokenizer, prompt)
    if isinstance(prompt, str)
    else prompt
    for prompt in prompts
  ]
  return data.prompts_array(
    ids,
    prompt_length=config.rollout.prompt_length,
    pad_id=pretrained.pad_id,
    vocab_size=pretrained.model.vocab_size,
    where=where,
  )


def sample(
  pretrained: pretrained_lib.Pretrained,
  prompts: types.Prompts,
  config: ConfigDict,
  *,
  seed: int,
) -> types.Sequences:
  """One response to each prompt, as numpy arrays.

  Prompts go through in batches of `config.train.batch_size`; the last is
  filled up with the first prompts.
  """
  mesh = settings.mesh(config)
  rollout_config = settings.rollout_config(config, pretrained)
  params = pretrained.params["transformer"]
  params = jax.device_put(params, sharding.shardings(params, mesh))
  draw = jax.jit(
    functools.partial(
      rollout.rollout, model=pretrained.model, config=rollout_config
    )
  )
  count, size = len(prompts.lengths), config.train.batch_size
  batches: list[Any] = []
  with jax.set_mesh(mesh):
    for index, begin in enumerate(range(0, count, size)):
      rows = np.arange(begin, begin + size) % count
      batch = jax.tree.map(lambda x, rows=rows: x[rows], prompts)
      batch = sharding.place_batch(batch, mesh)
      key = jax.random.fold_in(jax.random.key(seed), index)
      batches.append(jax.device_get(draw(params, batch, key).sequences))
  return jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *batches)
