"""Texts in, responses out: a frozen policy on many prompts."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax import types
from rlhf_jax.data import arrays, batches
from rlhf_jax.settings import prefix as prefix_lib
from rlhf_jax.settings import static
from rlhf_jax.steps import rollout, sharding
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.text import tokenizer as tokenizer_lib

# Texts or conversations; or ids.
Prompts = Sequence[tokenizer_lib.Prompt] | Sequence[list[int]]

# Compiled once for all who ask with the same settings.
_rollout = jax.jit(rollout.rollout, static_argnames=("model", "config"))


def prompts_array(
  prompts: Prompts,
  config: ConfigDict,
  pretrained: pretrained_lib.Pretrained,
  where: str,
) -> tuple[types.Prompts, arrays.Cut]:
  """Prompts in the layout that the rollout takes.

  With `rollout.prefix` in front, if there is one.

  Raises:
    UserError: A prompt is empty, or the prefix cannot be put in front.
  """
  ids = [
    prompt
    if isinstance(prompt, list)
    else tokenizer_lib.encode_prompt(pretrained.tokenizer, prompt)
    for prompt in prompts
  ]
  lay_out = functools.partial(
    arrays.prompts_array,
    pad_id=pretrained.pad_id,
    vocab_size=pretrained.model.vocab_size,
    where=where,
    bos_id=pretrained.bos_id,
  )
  length = config.rollout.prompt_length
  prefix = prefix_lib.of(config, pretrained)
  if prefix is None:
    return lay_out(ids, prompt_length=length)
  _, cut = lay_out(ids, prompt_length=length - len(prefix.ids))
  whole = [prefix.in_front_of(row, length) for row in ids]
  return lay_out(whole, prompt_length=length)[0], cut


def sample(
  pretrained: pretrained_lib.Pretrained,
  prompts: types.Prompts,
  config: ConfigDict,
  *,
  seed: int,
) -> types.Sequences:
  """One response to each prompt, as numpy arrays."""
  mesh = static.mesh(config)
  rollout_config = static.rollout_config(config, pretrained)
  params = pretrained.params["transformer"]
  params = jax.device_put(params, sharding.shardings(params, mesh))
  draw = functools.partial(
    _rollout, model=pretrained.model, config=rollout_config
  )
  key = jax.random.key(seed)
  return batches.map_rows(
    lambda batch, index: (
      draw(params, batch, jax.random.fold_in(key, index)).sequences
    ),
    prompts,
    mesh=mesh,
    batch_size=config.train.batch_size,
  )


def score(
  pretrained: pretrained_lib.Pretrained,
  sequences: types.Sequences,
  config: ConfigDict,
  *,
  function: Callable[..., Any],
) -> np.ndarray:
  """`function(params, sequences)` of a reward model, one score a row."""
  mesh = static.mesh(config)
  params = pretrained.params
  params = jax.device_put(params, sharding.shardings(params, mesh))
  compiled = jax.jit(function)
  return batches.map_rows(
    lambda batch, _: compiled(params, batch),
    sequences,
    mesh=mesh,
    batch_size=config.train.batch_size,
  )
