"""Hugging Face directories ⇄ our parameter tree, through safetensors alone.

    params, config = load(directory, unroll=0, remat=False, compute_dtype=…)
    save(directory, params, config, stop_ids=(2,), pad_id=0, bos_id=1)

A language model's tree is that of `transformer.init`; a reward model's is
`{"transformer": …, "score_head": {"kernel": [D]}}`. `families` and `layouts`
say what is called what, `hf_files` reads and writes the files.
"""

import dataclasses
import os
import pathlib
from typing import Literal
import warnings

import jax
import numpy as np

from rlhf_jax import types
from rlhf_jax.models import families, hf_files, layouts, transformer


def load(
  directory: str | os.PathLike[str],
  *,
  unroll: int,
  remat: bool,
  compute_dtype: Literal["float32", "bfloat16"],
) -> tuple[types.Params, transformer.TransformerConfig]:
  """Reads a language model or a reward model.

  The parameters are float32 numpy arrays: where they go is for the caller's
  mesh to say. Needs memory for them and one tensor more.

  Args:
    directory: With `config.json` and `*.safetensors`.
    unroll: Layers per scan step; 0 unrolls all of them.
    remat: As in `TransformerConfig`.
    compute_dtype: As in `TransformerConfig`.

  Raises:
    UserError: For an architecture that we do not have, and for weights that
      are not exactly its own; one message lists all that is wrong.
  """
  directory = pathlib.Path(directory)
  hf_files.check_directory(directory)
  where = directory / "config.json"
  hf = hf_files.read_json(where)
  family, reward_model = families.family_of(hf, where=str(where))
  config = families.config_from_hf(
    hf,
    where=str(where),
    unroll=unroll,
    remat=remat,
    compute_dtype=compute_dtype,
  )
  with hf_files.open_tensors(directory, prefix=family.prefix) as tensors:
    if not reward_model:
      config = _untied_if_so(config, family, tensors, where)
    template = _template(config, reward_model)
    to_hf = lambda tree: layouts.to_hf(tree, family.weights)
    wanted = jax.eval_shape(to_hf, template)
    shapes = {name: tensor.shape for name, tensor in wanted.items()}
    (head,) = family.weights["lm_head/kernel"].names
    ignored = family.ignored + f"|{head}" * config.tie_embeddings
    hf_files.check_tensors(
      tensors, shapes, ignored=ignored, where=str(directory)
    )
    read = lambda name: tensors[name].read()
    params = layouts.from_hf(template, family.weights, read)
    dtype = hf_files.dtype_of(tensors)
  config = dataclasses.replace(config, stored_dtype=dtype)
  if reward_model:
    score_head = params.pop("score_head")
    return {"transformer": params, "score_head": score_head}, config
  return params, config


def save(
  directory: str | os.PathLike[str],
  params: types.Params,
  config: transformer.TransformerConfig,
  *,
  stop_ids: tuple[int, ...],
  pad_id: int | None,
  bos_id: int | None,
  dtype: hf_files.DType = "float32",
  max_shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a directory that `transformers` loads.

  Args:
    directory: New, or without a model in it.
    params: A language model's or a reward model's tree.
    config: Its architecture.
    stop_ids: Ids that end a response; `eos_token_id` there.
    pad_id: `pad_token_id` there; a reward model needs one to score batches.
    bos_id: `bos_token_id` there.
    dtype: Of the weights.
    max_shard_bytes: A larger model is divided over several files.

  Raises:
    UserError: If the directory holds a model, or `transformers` has no such
      architecture.
  """
  directory = pathlib.Path(directory)
  reward_model = "score_head" in params
  hf = families.config_to_hf(
    config,
    reward_model=reward_model,
    stop_ids=stop_ids,
    pad_id=pad_id,
    bos_id=bos_id,
    dtype=dtype,
  )
  family, _ = families.family_of(hf, where=str(directory))
  if reward_model:
    params = params["transformer"] | {"score_head": params["score_head"]}
  params = jax.tree.map(
    lambda leaf: np.asarray(leaf, hf_files.DTYPES[dtype]), params
  )
  tensors = layouts.to_hf(params, family.weights)
  hf_files.make_directory(directory)
  hf_files.write_tensors(directory, tensors, max_shard_bytes=max_shard_bytes)
  if not reward_model:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    generation = {name: hf[name] for name in names}
    hf_files.write_json(directory / "generation_config.json", generation)
  hf_files.write_json(directory / "config.json", hf)  # Last: now it is a model.


def _untied_if_so(config, family, tensors, where):
  """As `transformers` reads a head that is not the embedding: it counts."""
  (head,) = family.weights["lm_head/kernel"].names
  (embedding,) = family.weights["embedding/tokens"].names
  pair = [tensors[name] for name in (embedding, head) if name in tensors]
  if not config.tie_embeddings or len(pair) < 2:
    return config
  if np.array_equal(*(tensor.read() for tensor in pair)):
    return config
  warnings.warn(
    f"{where}: tie_word_embeddings: True, and {head} is not {embedding}; the "
    "two are kept apart, as transformers does",
    stacklevel=3,
  )
  return dataclasses.replace(config, tie_embeddings=False)


def _template(config, reward_model):
  """Shapes of our tree, a score head beside the layers."""

  def init():
    key = jax.random.key(0)
    params = transformer.init(key, config, lm_head=not reward_model)
    if reward_model:
      score_head = transformer.init_scalar_head(config.width, use_bias=False)
      params["score_head"] = score_head
    return params

  return jax.eval_shape(init)
