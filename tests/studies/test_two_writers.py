"""Texts by two writers: whose words they are, and that all else is kept."""

import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import types
from rlhf_jax.data import readers
from rlhf_jax.studies.adversarial_prefix import writers as writers_lib
from rlhf_jax.text import toy_language

REVIEWS = toy_language.LANGUAGES["reviews"]
HARMFUL = {"boring", "awful", "dreadful", "hated"}


def words(text):
  return [REVIEWS.vocabulary[i] for i in text]


def is_harmful(text):
  return not HARMFUL.isdisjoint(words(text))


@pytest.fixture(scope="module")
def texts():
  return writers_lib.sample(REVIEWS, 3, 400, harsh=0.25)


def test_harmful_words_are_those_of_the_lowest_sentiment():
  ids = writers_lib.harmful_ids(REVIEWS)
  assert {REVIEWS.vocabulary[i] for i in ids} == HARMFUL


def test_texts_keep_their_grammar_and_length(texts):
  plain = REVIEWS.sample_texts(3, 400)
  for text, (prompt, response) in zip(texts, plain, strict=True):
    assert len(text) == len(prompt) + len(response)
    assert np.isfinite(REVIEWS.negative_log_likelihood(text[:1], text[1:]))


def test_a_text_is_harmful_wherever_it_can_be_or_nowhere(texts):
  harsh = 0
  for text in texts:
    places = [
      word in REVIEWS.words["verdict"] or word in REVIEWS.words["opinion"]
      for word in words(text)
    ]
    of = [word in HARMFUL for word in words(text)]
    assert of == places or not any(of)
    harsh += any(of)
  assert harsh / 400 == pytest.approx(0.25, abs=0.07)  # 3 standard errors.


def test_weights_are_the_language_s(texts):
  drawn = [w for text in texts for w in words(text) if w in HARMFUL]
  verdicts = [word for word in drawn if word != "hated"]
  share = verdicts.count("boring") / len(verdicts)  # 2 of 2 + 1 + 1.
  assert share == pytest.approx(0.5, abs=0.1)


def test_the_seed_says_all(texts):
  assert writers_lib.sample(REVIEWS, 3, 400, harsh=0.25) == texts
  assert writers_lib.sample(REVIEWS, 4, 400, harsh=0.25) != texts


@pytest.mark.parametrize("harsh", [0.0, 1.0])
def test_one_writer_alone(harsh):
  texts = writers_lib.sample(REVIEWS, 0, 50, harsh=harsh)
  found = [is_harmful(text) for text in texts]
  assert not any(found) if harsh == 0 else np.mean(found) > 0.9


def test_files_are_read_as_they_were_written(tmp_path, texts):
  writers_lib.write(tmp_path / "texts.jsonl", REVIEWS, texts)
  found, _ = readers.read_texts(tmp_path / "texts.jsonl")
  wanted = [("", " ".join(words(text)[1:-1])) for text in texts]
  assert found == wanted


def test_harm_by_hand():
  ids = {word: i for i, word in enumerate(REVIEWS.vocabulary)}
  row = [ids[word] for word in ("hated", "it", "was", "awful")]
  mask = jnp.array([[False, True, True, True], [True, True, True, False]])
  harm = writers_lib.harmful_words(jnp.array([row, row]), mask)
  assert harm.tolist() == [1.0, 1.0]
  sequences = types.Sequences(
    prompt_tokens=jnp.array([row]),
    prompt_lengths=jnp.array([4]),
    response_tokens=jnp.array([row]),
    response_lengths=jnp.array([3]),
  )
  assert writers_lib.harmful_in(sequences).tolist() == [1.0]
