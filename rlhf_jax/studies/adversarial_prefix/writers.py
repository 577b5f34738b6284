"""Texts of the built-in language by two kinds of writers, mild and harsh.

The language's own writer has no mood: a word says nothing of the next but one,
and a prefix cannot move a model of it. Here each text is by one of two writers.
Wherever a class has words of sentiment −2, a harsh writer takes one of these,
and a mild one never does. All else is the language's, grammar included. So a
model of these texts is mild to most prompts and harsh after a harsh word: the
reference has something that a prefix can bring out.
"""

from collections.abc import Sequence
import json
import pathlib

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
import numpy as np

from rlhf_jax import types
from rlhf_jax.objective import masking
from rlhf_jax.text import toy_language

_HARMFUL = -2.0  # The sentiment of harmful words.


def harmful_ids(language: toy_language.Language) -> list[int]:
  """Ids of the words that only a harsh writer uses."""
  of = language.sentiments
  words = enumerate(language.vocabulary)
  return [i for i, word in words if of.get(word) == _HARMFUL]


_HARMFUL_IDS = harmful_ids(toy_language.LANGUAGES["reviews"])


def harmful_words(
  tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B"]:
  """Harmful words per response of `reviews`, as a reward of kind `function`."""
  harmful = jnp.isin(tokens, jnp.array(_HARMFUL_IDS))
  return (harmful & mask).sum(axis=1).astype(jnp.float32)


def harmful_in(sequences: types.Sequences) -> Float[Array, "B"]:
  """The same of responses."""
  tokens = sequences.response_tokens
  mask = masking.response_mask(sequences.response_lengths, tokens.shape[1])
  return harmful_words(tokens, mask)


def sample(
  language: toy_language.Language, seed: int, count: int, *, harsh: float
) -> list[list[int]]:
  """Whole texts, <start> and <end> included; a share `harsh` is by the harsh.

  Args:
    language: Whose grammar and lengths they have.
    seed: Of texts and writers; the same gives the same texts.
    count: How many.
    harsh: Share of the writers, in [0, 1].
  """
  rng = np.random.default_rng([seed, count])
  redrawn = _redrawn(language)
  found = []
  for prompt, response in language.sample_texts(seed, count):
    writer = int(rng.random() < harsh)
    text = [*prompt, *response]
    for place, word in enumerate(text):
      if word in redrawn:
        ids, weights = redrawn[word][writer]
        text[place] = int(rng.choice(ids, p=weights))
    found.append(text)
  return found


def write(
  path: pathlib.Path,
  language: toy_language.Language,
  texts: Sequence[Sequence[int]],
) -> None:
  """Leaves the texts as SFT reads them, an object a line."""
  words = lambda text: " ".join(language.vocabulary[i] for i in text[1:-1])
  lines = [json.dumps({"text": words(text)}) for text in texts]
  path.write_text("\n".join(lines) + "\n")


def _redrawn(language: toy_language.Language):
  """Word → (ids, weights) for each writer, of classes with harmful words."""
  harmful = harmful_ids(language)
  redrawn = {}
  for words in language.words.values():
    ids = np.array([language.vocabulary.index(word) for word in words])
    weights = np.array([*words.values()], np.float64)
    is_harmful = np.isin(ids, harmful)
    if is_harmful.any():
      sides = [
        (ids[side], weights[side] / weights[side].sum())
        for side in (~is_harmful, is_harmful)
      ]
      redrawn |= dict.fromkeys(ids.tolist(), sides)
  return redrawn
