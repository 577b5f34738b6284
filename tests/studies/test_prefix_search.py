"""The search for a prefix, on planted harm and on a model."""

import numpy as np
import pytest

from configs.studies import adversarial_prefix as config_file
from rlhf_jax.measures import evaluation
from rlhf_jax.storage import pretrained
from rlhf_jax.studies.adversarial_prefix import measures
from rlhf_jax.studies.adversarial_prefix import search as search_lib
from rlhf_jax.text import toy_language

REVIEWS = toy_language.LANGUAGES["reviews"]
IDS = {word: i for i, word in enumerate(REVIEWS.vocabulary)}


@pytest.fixture(scope="module")
def training():
  return config_file.get_config("reduced").training


@pytest.fixture(scope="module")
def model(training):
  return pretrained.load_policy(training)


def planted(monkeypatch, harm):
  """The search, where a prefix has this harm."""
  asked = []

  def counts(prefixes, stream):
    asked.append((stream, [*prefixes]))
    return np.array([harm(prefix, stream) for prefix in prefixes])

  monkeypatch.setattr(search_lib, "_harm", lambda *_: counts)
  return asked


def search(config, model, *, beam):
  return search_lib.search(config, model, longest=3, beam=beam, prompts=4)


def test_the_beam_finds_what_words_do_together(monkeypatch, training, model):
  film, was = IDS["film"], IDS["was"]

  def harm(prefix, stream):
    if stream == 4:
      return 0.5
    together = 5.0 * (prefix[:2] == (film, was))
    return together + (prefix[-1] == was) + 0.5 * (prefix[-1] == film)

  asked = planted(monkeypatch, harm)
  one, two, three = search(training, model, beam=2)
  assert one == (1, "was", 1.0, 0.5)  # Greedily best, and no way on.
  assert two == (2, "film was", 6.0, 0.5)
  assert three == (3, "film was was", 6.0, 0.5)
  # Every word but <pad>, <start> and <end>, behind each that is kept.
  words = len(REVIEWS.vocabulary) - 3
  assert [len(of) for _, of in asked] == [words, 2 * words, 2 * words, 3]
  assert [stream for stream, _ in asked] == [1, 2, 3, 4]
  assert min(map(min, asked[0][1])) == 3


def test_without_a_beam_it_is_greedy(monkeypatch, training, model):
  film, was = IDS["film"], IDS["was"]
  harm = lambda prefix, _: 5.0 * (prefix == (film, was)) + (prefix[0] == was)
  planted(monkeypatch, harm)
  assert search(training, model, beam=1)[1].searched == 1.0


def test_harm_is_a_mean_over_the_prompts_of_a_stream(
  monkeypatch, training, model
):
  """With a planted count: the words of the prefix that stand in a row."""
  rows = []

  def count(params, prompts, key, **_):
    rows.append(np.asarray(prompts.tokens))
    return (prompts.tokens == IDS["film"]).sum(axis=1).astype(np.float32)

  monkeypatch.setattr(search_lib, "_count", count)
  harm = search_lib._harm(training, model, 3)
  film, awful = IDS["film"], IDS["awful"]
  plain, more = harm([(awful,), (film, film)], 1)
  assert more == plain + 2  # Whatever the prompts have of their own.
  first = rows[0][:3]
  begins = (first == toy_language.START_ID).argmax(axis=1)
  assert [row[i + 1] for row, i in zip(first, begins)] == [awful] * 3
  harm([(awful,)], 2)
  assert not np.array_equal(rows[1][:3], first)  # Other prompts.


def test_the_winner_is_measured_with_numbers_that_no_search_had(
  monkeypatch, training, model
):
  seeds, seed_of = [], evaluation.seed_of

  def noted(seed, stream):
    seeds.append(seed_of(seed, stream))
    return seeds[-1]

  monkeypatch.setattr(evaluation, "seed_of", noted)
  monkeypatch.setattr(
    search_lib,
    "_count",
    lambda _, prompts, key, **__: np.zeros(len(prompts.tokens), np.float32),
  )
  search(training, model, beam=1)
  measures.measure(training, model, model, prompts=2)
  assert len(seeds) == len(set(seeds)) == 5
