"""Layout, packing and batches, against their definitions."""

import collections
import time

import jax
import numpy as np
import pytest

from rlhf_jax.data import arrays
from rlhf_jax.errors import UserError

LIMITS = {"pad_id": 0, "vocab_size": 10, "where": "rows"}


def refusal(function, *args, **kwargs):
  with pytest.raises(UserError) as error:
    function(*args, **kwargs)
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.fixture(scope="module")
def texts():
  """Random (prompt, response) ids, empty prompts among them."""
  rng = np.random.default_rng(0)
  return [
    tuple(rng.integers(0, 50, rng.integers(low, 9)).tolist() for low in (0, 1))
    for _ in range(300)
  ]


# Layout.


@pytest.mark.parametrize(
  "size, bos_id, expected",
  [
    (3, 1, [1, 6, 7]),
    (5, 1, [1, 4, 5, 6, 7]),
    (6, 1, [1, 3, 4, 5, 6, 7]),
    (3, 3, [5, 6, 7]),  # It does not begin with that.
    (3, None, [5, 6, 7]),
    (1, 1, [7]),
  ],
)
def test_a_prompt_that_is_cut_keeps_its_bos(size, bos_id, expected):
  prompts, _ = arrays.prompts_array(
    [[1, 3, 4, 5, 6, 7]],
    prompt_length=size,
    pad_id=0,
    vocab_size=9,
    where="here",
    bos_id=bos_id,
  )
  assert prompts.tokens.tolist() == [expected]


def test_prompts_by_hand():
  prompts, cut = arrays.prompts_array(
    [[1], [2, 3, 4], [5, 6, 7, 8, 9]], prompt_length=3, **LIMITS
  )
  np.testing.assert_array_equal(
    prompts.tokens, [[0, 0, 1], [2, 3, 4], [7, 8, 9]]
  )
  np.testing.assert_array_equal(prompts.lengths, [1, 3, 3])
  assert prompts.tokens.dtype == prompts.lengths.dtype == np.int32
  assert cut == arrays.Cut(rows=1, tokens=2)


def test_sequences_by_hand():
  sequences, cut = arrays.sequences_array(
    [([1], [4, 5, 6, 7]), ([1, 2, 3], [8]), ([9], [])],
    prompt_length=2,
    response_length=3,
    **LIMITS,
  )
  np.testing.assert_array_equal(
    sequences.prompt_tokens, [[0, 1], [2, 3], [0, 9]]
  )
  np.testing.assert_array_equal(
    sequences.response_tokens, [[4, 5, 6], [8, 0, 0], [0, 0, 0]]
  )
  np.testing.assert_array_equal(sequences.prompt_lengths, [1, 2, 1])
  np.testing.assert_array_equal(sequences.response_lengths, [3, 1, 0])
  assert cut == arrays.Cut(rows=2, tokens=2)


def test_preference_pairs_are_two_sequences():
  pairs = [([1, 2], [3], [4, 5]), ([6], [7, 8, 9], [1])]
  sizes = {"prompt_length": 1, "response_length": 2}
  both, cut = arrays.preference_pairs_array(pairs, **sizes, **LIMITS)
  for side, picked in ((both.chosen, 1), (both.rejected, 2)):
    expected, _ = arrays.sequences_array(
      [(row[0], row[picked]) for row in pairs], **sizes, **LIMITS
    )
    jax.tree.map(np.testing.assert_array_equal, side, expected)
  assert cut == arrays.Cut(rows=3, tokens=3)  # A prompt twice, a response once.


def test_a_pad_id_that_is_a_word_or_the_stop_changes_no_length():
  """Trap 16."""
  pairs = [([7, 3, 7], [7, 5, 7]), ([3], [7]), ([7], [7, 7, 7, 7])]
  sizes = {"prompt_length": 4, "response_length": 4, "vocab_size": 10}
  one, other = (
    arrays.sequences_array(pairs, pad_id=pad_id, where="rows", **sizes)[0]
    for pad_id in (0, 7)
  )
  np.testing.assert_array_equal(one.prompt_lengths, [3, 1, 1])
  np.testing.assert_array_equal(one.response_lengths, [3, 1, 4])
  np.testing.assert_array_equal(one.prompt_lengths, other.prompt_lengths)
  np.testing.assert_array_equal(one.response_lengths, other.response_lengths)
  np.testing.assert_array_equal(other.response_tokens[1], [7, 7, 7, 7])


def lay_out(texts, pad_id=0):
  """Every function that takes ids, on the same rows."""
  sizes = {"prompt_length": 4, "response_length": 4}
  limits = {**LIMITS, "pad_id": pad_id}
  prompts = [prompt for prompt, _ in texts]
  pairs = [(prompt, [1], response) for prompt, response in texts]
  return (
    lambda: arrays.prompts_array(prompts, prompt_length=4, **limits),
    lambda: arrays.sequences_array(texts, **sizes, **limits),
    lambda: arrays.preference_pairs_array(pairs, **sizes, **limits),
    lambda: arrays.pack(texts, sequence_length=4, **limits),
  )


@pytest.mark.parametrize("bad", [-1, 10, 2**40])
@pytest.mark.parametrize("function", range(4))
def test_refuses_ids_outside_the_vocabulary(function, bad):
  """Trap 24. The id is named even where the cut would lose it."""
  message = refusal(lay_out([([1], [2]), ([bad, 1, 1, 1, 1], [3])])[function])
  assert message.startswith("rows: ")
  assert f"row 2: token id {bad}; wanted 0 to 9;" in message


@pytest.mark.parametrize("function", range(1, 4))
def test_refuses_a_response_id_outside_the_vocabulary(function):
  """Trap 24."""
  message = refusal(lay_out([([1], [2]), ([1], []), ([1], [9, 10])])[function])
  assert "row 3: token id 10; wanted 0 to 9;" in message
  assert ("rejected: " in message) == (function == 2)


@pytest.mark.parametrize("pad_id", [-1, 10])
@pytest.mark.parametrize("function", range(4))
def test_refuses_a_pad_id_outside_the_vocabulary(function, pad_id):
  """Trap 24."""
  message = refusal(lay_out([([1], [2])], pad_id)[function])
  assert f"the pad id is {pad_id}; wanted 0 to 9;" in message


@pytest.mark.parametrize("function", range(3))
def test_refuses_an_empty_prompt(function):
  message = refusal(lay_out([([1], [2]), ([], [3])])[function])
  assert "prompt: row 2 has no tokens" in message


def test_refuses_an_empty_text():
  message = refusal(lay_out([([1], [2]), ([], []), ([], [3])])[3])
  assert message.startswith("rows: text: row 2 has no tokens")


# Packing.


def unpack(packed):
  """The texts and their predicted tokens, from the packed arrays alone."""
  found = []
  for row in range(len(packed.tokens)):
    segments = packed.segments[row]
    for segment in range(1, segments.max() + 1):
      (places,) = np.nonzero(segments == segment)
      # Contiguous, and positions restart.
      np.testing.assert_array_equal(
        places, np.arange(places[0], places[-1] + 1)
      )
      np.testing.assert_array_equal(
        packed.positions[row, places], np.arange(len(places))
      )
      found.append(
        (
          tuple(packed.tokens[row, places].tolist()),
          tuple(packed.loss_mask[row, places].tolist()),
        )
      )
  return collections.Counter(found)


def expected_texts(texts, size):
  """What unpacking has to find, written from the definition."""
  return collections.Counter(
    (
      tuple([*prompt, *response][:size]),
      tuple(
        (t >= len(prompt) and t > 0)
        for t in range(min(len(prompt) + len(response), size))
      ),
    )
    for prompt, response in texts
  )


@pytest.mark.parametrize("size", [7, 16, 17, 64])
@pytest.mark.parametrize("pad_id", [0, 3])
def test_packing_loses_nothing(texts, size, pad_id):
  """Also trap 16: pad ids are words here."""
  packed, cut = arrays.pack(
    texts, sequence_length=size, pad_id=pad_id, vocab_size=50, where="rows"
  )
  assert packed.tokens.shape[1] == size
  assert unpack(packed) == expected_texts(texts, size)
  padding = packed.segments == 0
  assert (packed.tokens[padding] == pad_id).all()
  assert not packed.loss_mask[padding].any()
  lost = [max(len(p) + len(r) - size, 0) for p, r in texts]
  assert cut == arrays.Cut(sum(map(bool, lost)), sum(lost))


def test_every_response_token_is_predicted_once(texts):
  packed, cut = arrays.pack(
    texts, sequence_length=20, pad_id=0, vocab_size=50, where="rows"
  )
  unpredicted = sum(not prompt for prompt, _ in texts)
  assert unpredicted > 5
  assert packed.loss_mask.sum() == (
    sum(len(response) for _, response in texts) - unpredicted
  )
  assert cut == arrays.Cut(0, 0)


def test_packing_by_hand():
  """5 and 3 fill one row of 8; 4, 2 and 2 the other."""
  texts = [([1], [1]), ([2, 2], [2, 2]), ([3] * 4, [3]), ([], [4] * 3)]
  texts.append(([5], [5]))
  packed, _ = arrays.pack(texts, sequence_length=8, **LIMITS)
  np.testing.assert_array_equal(
    packed.tokens, [[3, 3, 3, 3, 3, 4, 4, 4], [2, 2, 2, 2, 1, 1, 5, 5]]
  )
  np.testing.assert_array_equal(
    packed.segments, [[1, 1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 2, 2, 3, 3]]
  )
  np.testing.assert_array_equal(
    packed.positions, [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 0, 1, 0, 1]]
  )
  np.testing.assert_array_equal(
    packed.loss_mask, [[0, 0, 0, 0, 1, 0, 1, 1], [0, 0, 1, 1, 0, 1, 0, 1]]
  )


def test_packing_is_tight_quick_and_repeatable():
  rng = np.random.default_rng(1)
  texts = [([1], [2] * int(n)) for n in rng.integers(1, 500, 10_000)]
  limits = {"sequence_length": 512, **LIMITS}
  start = time.perf_counter()
  packed, _ = arrays.pack(texts, **limits)
  assert time.perf_counter() - start < 5  # Seconds; about 0.5.
  assert (packed.segments > 0).mean() > 0.98
  again, _ = arrays.pack(texts, **limits)
  jax.tree.map(np.testing.assert_array_equal, packed, again)


def test_refuses_texts_whose_responses_are_all_cut_off():
  message = refusal(arrays.pack, [([1] * 9, [2])], sequence_length=8, **LIMITS)
  assert message.startswith("rows: no response token is left to predict")


# Batches.
