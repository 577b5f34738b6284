"""The search for a prefix, on planted harm and on a model."""

import numpy as np
import pytest

from configs.studies import adversarial_prefix as config_file
from rlhf_jax import types
from rlhf_jax.data import sampling
from rlhf_jax.measures import evaluation
from rlhf_jax.storage import pretrained
from rlhf_jax.studies import adversarial_prefix as adversarial
from rlhf_jax.studies.adversarial_prefix import search as search_lib
from rlhf_jax.studies.adversarial_prefix import writers
from rlhf_jax.text import toy_language

REVIEWS = toy_language.LANGUAGES["reviews"]
IDS = {word: i for i, word in enumerate(REVIEWS.vocabulary)}


@pytest.fixture
def config():
  found = config_file.get_config("reduced")
  found.longest = 3
  return found


@pytest.fixture(scope="module")
def model():
  return pretrained.load_policy(config_file.get_config("reduced").training)


def planted(monkeypatch, harm):
  """The search, where a prefix has this harm."""
  asked = []

  def counts(config, model, prefixes, stream):
    asked.append((stream, [*prefixes]))
    return np.array([harm(prefix, stream) for prefix in prefixes])

  monkeypatch.setattr(search_lib, "_harm", counts)
  return asked


def answered(monkeypatch, harm):
  """Answers of which none is drawn, with a harm for each of the prompts."""
  asked = []

  def sample(model, prompts, config, *, seed):
    asked.append(np.asarray(prompts.tokens))
    nothing = np.zeros_like(prompts.tokens)
    lengths = prompts.lengths
    return types.Sequences(prompts.tokens, lengths, nothing, 0 * lengths)

  monkeypatch.setattr(sampling, "sample", sample)
  monkeypatch.setattr(writers, "harmful_in", harm)
  return asked


def test_the_beam_finds_what_words_do_together(monkeypatch, config, model):
  film, was = IDS["film"], IDS["was"]

  def harm(prefix, stream):
    if stream == 4:
      return 0.5
    together = 5.0 * (prefix[:2] == (film, was))
    return together + (prefix[-1] == was) + 0.5 * (prefix[-1] == film)

  asked = planted(monkeypatch, harm)
  config.beam = 2
  one, two, three = search_lib.search(config, model)
  assert one == (1, "was", 1.0, 0.5)  # Greedily best, and no way on.
  assert two == (2, "film was", 6.0, 0.5)
  assert three == (3, "film was was", 6.0, 0.5)
  # Every word but <pad>, <start> and <end>, behind each that is kept.
  words = len(REVIEWS.vocabulary) - 3
  assert [len(of) for _, of in asked] == [words, 2 * words, 2 * words, 3]
  assert [stream for stream, _ in asked] == [1, 2, 3, 4]
  assert min(map(min, asked[0][1])) == 3


def test_without_a_beam_it_is_greedy(monkeypatch, config, model):
  film, was = IDS["film"], IDS["was"]
  harm = lambda prefix, _: 5.0 * (prefix == (film, was)) + (prefix[0] == was)
  planted(monkeypatch, harm)
  config.beam = 1
  assert search_lib.search(config, model)[1].searched == 1.0


def test_harm_is_a_mean_over_the_prompts_of_a_stream(
  monkeypatch, config, model
):
  """With a planted count: the words of the prefix that stand in a row."""
  film, awful = IDS["film"], IDS["awful"]
  count = lambda sequences: (sequences.prompt_tokens == film).sum(axis=1)
  rows = answered(monkeypatch, count)
  config.search_prompts = 3
  plain, more = search_lib._harm(config, model, [(awful,), (film, film)], 1)
  assert more == plain + 2  # Whatever the prompts have of their own.
  first = rows[0][:3]
  begins = (first == toy_language.START_ID).argmax(axis=1)
  assert [row[i + 1] for row, i in zip(first, begins)] == [awful] * 3
  search_lib._harm(config, model, [(awful,)], 2)
  assert not np.array_equal(rows[1][:3], first)  # Other prompts.


def test_the_winner_is_measured_with_numbers_that_no_search_had(
  monkeypatch, config, model
):
  seeds, seed_of = [], evaluation.seed_of

  def noted(seed, stream):
    seeds.append(seed_of(seed, stream))
    return seeds[-1]

  monkeypatch.setattr(evaluation, "seed_of", noted)
  with monkeypatch.context() as drawn:
    answered(drawn, lambda sequences: sequences.prompt_lengths)
    config.beam = 1
    search_lib.search(config, model)
  adversarial.measure(config.training, model, model, 2)
  assert len(seeds) == len(set(seeds)) == 5
