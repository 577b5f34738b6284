"""Preference pairs as arrays: from a file, or from the policy itself.

For the built-in language the pairs are two responses of the policy to a
prompt, judged by the gold reward with a judge's noise; which they are depends
on policy, seed and size alone, so that the stages that learn from them learn
from the same.
"""

import dataclasses
import functools

import jax
from ml_collections import ConfigDict
import numpy as np
from rich import console as rich_console

from rlhf_jax import errors, types
from rlhf_jax.data import arrays, batches, readers, sampling
from rlhf_jax.settings import static
from rlhf_jax.storage import pretrained as pretrained_lib
from rlhf_jax.text import tokenizer as tokenizer_lib
from rlhf_jax.text import toy_language


def read(
  config: ConfigDict,
  policy: pretrained_lib.Pretrained,
  console: rich_console.Console,
  *,
  stage: str,
) -> types.PreferencePairs:
  """The pairs of `data.path`, or of the built-in language.

  `stage` begins the lines that say what was read and what was cut.

  Raises:
    UserError: The file or one of its rows cannot be used, or the policy does
      not speak the built-in language.
  """
  layout = {
    "prompt_length": config.rollout.prompt_length,
    "response_length": config.rollout.response_length,
    "pad_id": policy.pad_id,
    "vocab_size": policy.model.vocab_size,
    "bos_id": policy.bos_id,
  }
  if not (path := config.data.path):
    return sampled(config, policy)
  texts, counts = readers.read_pairs(path)
  console.print(f"{stage}: {path}: {counts}", markup=False)
  # The policy's responses will end so, and so must those that are judged.
  stop = list(static.rollout_config(config, policy).stop_ids[:1])
  rows = []
  for text in texts:
    (prompt, chosen), (_, rejected) = (
      tokenizer_lib.encode_pair(policy.tokenizer, text.prompt, response)
      for response in (text.chosen, text.rejected)
    )
    rows.append((prompt, chosen + stop, rejected + stop))
  pairs, cut = arrays.preference_pairs_array(rows, **layout, where=path)
  if cut.rows:
    console.print(
      f"{stage}: {cut.rows} prompts and responses are longer than "
      f"rollout.prompt_length={layout['prompt_length']} or "
      f"rollout.response_length={layout['response_length']} and lost "
      f"{cut.tokens} tokens",
      highlight=False,
    )
  return _told_apart(pairs, console, stage=stage, path=path)


def _told_apart(pairs, console, *, stage, path) -> types.PreferencePairs:
  """The pairs whose responses still differ now that they are cut.

  Others teach nothing: their loss is log 2, and its gradient 0.

  Raises:
    UserError: They are more than `readers.MAX_UNUSABLE_FRACTION`.
  """
  chosen, rejected = pairs.chosen, pairs.rejected
  same = chosen.response_lengths == rejected.response_lengths
  same &= (chosen.response_tokens == rejected.response_tokens).all(1)
  count, total = int(same.sum()), len(same)
  if count > readers.MAX_UNUSABLE_FRACTION * total:
    length = chosen.response_tokens.shape[1]
    raise errors.UserError(
      f"config.rollout.response_length: {length}; cut to that, chosen and "
      f"rejected are the same in {count} of {total} pairs of {path}; at most "
      f"{readers.MAX_UNUSABLE_FRACTION:.0%} may be so (they are left out): "
      "allow longer responses"
    )
  if count:
    console.print(
      f"{stage}: {count} pairs are the same once they are cut, and left out",
      highlight=False,
    )
  return jax.tree.map(lambda rows: rows[~same], pairs)


def sampled(
  config: ConfigDict, policy: pretrained_lib.Pretrained
) -> types.PreferencePairs:
  """Two responses of the policy to each prompt, judged by noisy gold."""
  pretrained_lib.check_speaks_the_built_in_language(policy, config)
  language = toy_language.of(config)
  ids = language.sample_prompts(
    config.seed + 2, config.data.size, config.data.opening
  )
  asked, _ = sampling.prompts_array(ids, config, policy, "prompts")
  first, second = (
    sampling.sample(policy, asked, config, seed=config.seed + offset)
    for offset in (2, 3)
  )
  key = jax.random.fold_in(jax.random.key(config.seed), config.data.size)
  gold = jax.jit(language.gold_reward)
  first_wins = np.asarray(
    toy_language.label_preferences(
      key,
      gold(first),
      gold(second),
      temperature=config.data.judge_temperature,
    )
  )

  def pick(condition):
    choose = lambda a, b: np.where(
      condition.reshape((-1,) + (1,) * (a.ndim - 1)), a, b
    )
    return jax.tree.map(choose, first, second)

  return types.PreferencePairs(pick(first_wins), pick(~first_wins))


def split(
  config: ConfigDict, pairs: types.PreferencePairs
) -> tuple[types.PreferencePairs, types.PreferencePairs]:
  """Pairs to train on and held-out ones, whose prompts are new as well."""
  return batches.split_heldout(
    pairs, config.data.heldout_fraction, config.seed, by=prompts_of(pairs)
  )


def prompts_of(pairs: types.PreferencePairs) -> types.Prompts:
  """The prompt of each pair."""
  return types.Prompts(pairs.chosen.prompt_tokens, pairs.chosen.prompt_lengths)


def mismatched(pairs: types.PreferencePairs) -> types.PreferencePairs:
  """Each prompt with the responses of the next pair; the last's are the first.

  They read like answers and answer something else, as the batch's neighbours
  do in KTO.
  """
  roll = functools.partial(np.roll, shift=-1, axis=0)

  def answer_another(side):
    return dataclasses.replace(
      side,
      response_tokens=roll(side.response_tokens),
      response_lengths=roll(side.response_lengths),
    )

  return types.PreferencePairs(
    answer_another(pairs.chosen), answer_another(pairs.rejected)
  )
