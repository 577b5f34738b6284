"""Texts to train on: a file's or the built-in language's, and its prompts."""

import pathlib

from ml_collections import ConfigDict
from rich import console as rich_console

from rlhf_jax import types
from rlhf_jax.data import arrays, batches, readers
from rlhf_jax.settings import static
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.text import tokenizer as tokenizer_lib
from rlhf_jax.text import toy_language

Pairs = list[tuple[list[int], list[int]]]


def read(
  config: ConfigDict,
  policy: pretrained_lib.Pretrained,
  console: rich_console.Console,
  *,
  stage: str,
  path: str,
  opening: str,
) -> tuple[Pairs, Pairs]:
  """Ids of prompts and responses: to train on, and held out.

  The same seed, size and share hold out the same texts in every stage.

  Args:
    config: The stage's; its `data` says how many texts, and which share of
      them is held out.
    policy: Who reads them.
    console: Where the counts go.
    stage: The name of who asks, for the console.
    path: A file, or '' for the built-in language.
    opening: How the built-in language's texts begin; see `data.opening`.

  Raises:
    UserError: The file cannot be used, or the policy has another language.
  """
  if path:
    texts, counts = readers.read_texts(path)
    console.print(f"{stage}: {path}: {counts}", markup=False, highlight=False)
    # A response ends with the first stop id, or the policy never learns to.
    stop = list(static.rollout_config(config, policy).stop_ids[:1])
    pairs = (tokenizer_lib.encode_pair(policy.tokenizer, *t) for t in texts)
    found = [(prompt, response + stop) for prompt, response in pairs]
  else:
    pretrained_lib.check_speaks_the_built_in_language(policy, config)
    found = toy_language.of(config).sample_texts(
      config.seed, config.data.size, opening
    )
  return batches.split_heldout(found, config.data.heldout_fraction, config.seed)


def pack(
  config: ConfigDict,
  policy: pretrained_lib.Pretrained,
  console: rich_console.Console,
  side: Pairs,
  *,
  stage: str,
  path: str,
) -> types.PackedTexts:
  """One side of `read`, several texts to a row of `data.sequence_length`."""
  rows, cut = arrays.pack(
    side,
    sequence_length=config.data.sequence_length,
    pad_id=policy.pad_id,
    vocab_size=policy.model.vocab_size,
    where=path or "the built-in language",
  )
  if cut.rows:
    console.print(
      f"{stage}: {cut.rows} texts are longer than data.sequence_length="
      f"{config.data.sequence_length} and lost {cut.tokens} tokens",
      highlight=False,
    )
  return rows


def split_prompts(
  path: str, fraction: float
) -> tuple[
  list[tokenizer_lib.Prompt], list[tokenizer_lib.Prompt], readers.Counts
]:
  """Prompts of a file to train on, those held out, and what was read.

  The same rows are held out whatever the seed, so that all members of a sweep
  can be asked them. Of a single prompt none is.
  """
  texts, counts = readers.read_prompts(pathlib.Path(path))
  if len(set(texts)) == 1:
    return texts, [], counts
  return *batches.split_heldout(texts, fraction, seed=0), counts
