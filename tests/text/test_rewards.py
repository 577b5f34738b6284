"""Rewards that read text: what they are given, and what is refused."""

import sys
import types as python_types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers
import transformers

from rlhf_jax import errors, types
from rlhf_jax.steps import rewards
from rlhf_jax.text import rewards as text_rewards

WORDS = ["<unk>", "<s>", "</s>", "the", "cat", "was", "happy", "sad"]
PROMPTS = ["the cat", "cat"]
RESPONSES = ["was happy", "happy sad the"]


@pytest.fixture(scope="module")
def tokenizer():
  """A word an id."""
  vocabulary = {word: i for i, word in enumerate(WORDS)}
  backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, "<unk>"))
  backend.pre_tokenizer = pre_tokenizers.Whitespace()
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend,
    unk_token="<unk>",
    bos_token="<s>",
    eos_token="</s>",
  )


@pytest.fixture
def module():
  """An importable module that a test fills."""
  made = python_types.ModuleType("my_rewards")
  sys.modules["my_rewards"] = made
  yield made
  del sys.modules["my_rewards"]


def make_sequences() -> types.Sequences:
  """The texts above; garbage ids under both paddings."""
  return types.Sequences(
    prompt_tokens=jnp.array([[1, 3, 4], [7, 1, 4]]),
    prompt_lengths=jnp.array([3, 2]),
    response_tokens=jnp.array([[5, 6, 2, 7], [6, 7, 3, 0]]),
    response_lengths=jnp.array([3, 3]),
  )


def run(function, tokenizer, step=7, **options):
  """The reward after one compiled step that called it, and the scores."""
  reward = text_rewards.TextReward("my:reward", function, tokenizer, **options)
  score = jax.jit(rewards.from_host(reward))
  scores = jax.device_get(score({}, make_sequences(), jnp.int32(step)))
  return reward, scores


def test_the_function_reads_the_texts(tokenizer):
  """No padding and no special token; 0.7 and −1.9 come back. Trap 3."""
  seen = []

  def reward(prompts, responses):
    seen.append((prompts, responses))
    return [0.7, -1.9]

  made, scores = run(reward, tokenizer)
  made.raise_if_failed()
  assert seen == [(PROMPTS, RESPONSES)]
  np.testing.assert_array_equal(scores, np.array([0.7, -1.9], np.float32))


@pytest.mark.parametrize(
  "returned",
  [(2, 3), np.array([2, 3]), np.array([2.0, 3.0], np.float16), [2, np.int8(3)]],
  ids=str,
)
def test_numbers_of_any_kind_are_scores(returned, tokenizer):
  made, scores = run(lambda *_: returned, tokenizer)
  made.raise_if_failed()
  np.testing.assert_array_equal(scores, [2.0, 3.0])
  assert scores.dtype == np.float32


WANTED = "wanted a list of 2 finite numbers (float32), one per response"


@pytest.mark.parametrize(
  ("returned", "found"),
  [
    (None, "a NoneType"),
    (0.5, "a float"),
    ([], "0 scores"),
    ([1.0], "1 scores"),
    ([1.0, 2.0, 3.0], "3 scores"),
    ("ab", "a str for row 0 ('the cat')"),
    ([1.0, "2.0"], "a str for row 1 ('cat')"),
    ([True, 1.0], "a bool for row 0 ('the cat')"),
    (np.array([True, False]), "a bool for row 0 ('the cat')"),
    ([1.0, None], "a NoneType for row 1 ('cat')"),
    (np.ones((2, 1)), "a ndarray for row 0 ('the cat')"),
    ([1.0, 1j], "a complex for row 1 ('cat')"),
    ([1.0, float("nan")], "nan for row 1 ('cat')"),
    ([float("-inf"), 1.0], "-inf for row 0 ('the cat')"),
    ([1.0, np.complex64(1)], "a complex64 for row 1 ('cat')"),
    ([1.0, 1e300], "1e+300 for row 1 ('cat')"),
  ],
  ids=repr,
)
def test_what_is_wrong_with_a_return_is_said_after_the_step(
  returned, found, tokenizer
):
  """Bad inputs 42 and 43, trap 25: NaN, never 0, until the step has ended."""
  made, scores = run(lambda *_: returned, tokenizer)
  assert np.isnan(scores).all() and scores.shape == (2,)
  with pytest.raises(errors.UserError) as caught:
    made.raise_if_failed()
  message = str(caught.value)
  assert message.startswith("my:reward: ")
  assert f"returned {found}; {WANTED}" in message
  assert "\n" not in message


def test_an_exception_names_step_and_prompt(tokenizer):
  """Bad input 41."""

  def reward(prompts, responses):
    raise ValueError("no\nsuch word")

  made, scores = run(reward, tokenizer, step=7)
  assert np.isnan(scores).all()
  with pytest.raises(errors.UserError) as caught:
    made.raise_if_failed()
  assert str(caught.value) == (
    "my:reward: step 7: raised ValueError: no such word; the batch began with "
    "the prompt 'the cat'"
  )
  assert isinstance(caught.value.__cause__, ValueError)


def test_a_good_function_is_loaded(module):
  module.reward = lambda prompts, responses: [0.0] * len(prompts)
  function = text_rewards.load_function("my_rewards:reward")
  assert function is module.reward
  name = "rlhf_jax.text.rewards:happy_words"
  assert text_rewards.load_function(name) is text_rewards.happy_words


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("my_rewards:rewrad", "my_rewards has no function 'rewrad'; it has reward"),
    ("my_rewards:number", "has no function 'number'"),
    ("my_rewards", "has no function ''"),
    ("no_such_module:f", "importing 'no_such_module' failed: ModuleNotFound"),
    (":f", "importing '' failed: ValueError"),
    ("", "importing '' failed: ValueError"),
  ],
)
def test_a_function_that_is_not_there(name, said, module):
  """Bad input 49."""
  module.reward = lambda prompts, responses: []
  module.number = 3
  with pytest.raises(errors.UserError) as caught:
    text_rewards.load_function(name)
  assert f"config.reward.function: {name!r}: " in str(caught.value)
  assert said in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_module_that_raises_while_imported(tmp_path, monkeypatch):
  """Bad input 49."""
  (tmp_path / "broken_rewards.py").write_text("raise OSError('no disk')\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(errors.UserError, match="failed: OSError: no disk"):
    text_rewards.load_function("broken_rewards:reward")


def test_it_may_read_the_special_tokens(tokenizer):
  """A reward for a turn that ends, or a thought that is closed, needs them."""
  seen = {}

  def score(prompts, responses):
    seen.update(prompts=prompts, responses=responses)
    return [0.0] * len(prompts)

  run(score, tokenizer, special_tokens=True)
  assert seen["prompts"] == ["<s> the cat", "<s> cat"]
  assert seen["responses"][0] == "was happy </s>"
  run(score, tokenizer)
  assert (seen["prompts"], seen["responses"]) == (PROMPTS, RESPONSES)


def test_a_function_that_exits_has_failed(tokenizer, tmp_path, monkeypatch):
  """It would end the run without a word, and a thread with a traceback."""

  def score(prompts, responses):
    sys.exit("no key")

  reward, _ = run(score, tokenizer)
  with pytest.raises(errors.UserError, match="raised SystemExit: no key"):
    reward.raise_if_failed()
  (tmp_path / "leaving.py").write_text("import sys\nsys.exit(0)\n")
  monkeypatch.syspath_prepend(tmp_path)
  with pytest.raises(errors.UserError, match="'leaving' failed: SystemExit"):
    text_rewards.load_function("leaving:score")


def test_happy_words_by_hand():
  texts = [
    "Tom was happy. HAPPY! They laughed, and had fun.",  # 4
    "unhappy, funny, a friendly kindness",  # words, and not their parts
    "",
    "fun " * 30,  # never more than 10
    "it's a nice-good thing\nlove",  # 3
  ]
  scores = text_rewards.happy_words([""] * len(texts), texts)
  assert scores == [4.0, 0.0, 0.0, 10.0, 3.0]
