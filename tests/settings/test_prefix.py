"""The prefix of every prompt, from its text to the arrays."""

import numpy as np
import pytest
import tokenizers
import transformers

from configs import ppo
from rlhf_jax import errors
from rlhf_jax.data import sampling
from rlhf_jax.settings import prefix, static
from rlhf_jax.steps import anchor
from rlhf_jax.storage import pretrained


@pytest.fixture(scope="module")
def policy():
  return pretrained.load_policy(config_of())


def config_of(text="", length=8):
  config = ppo.get_config(f"toy,rollout.prompt_length={length}")
  config.rollout.prefix = text
  return config


def ids_of(policy, text):
  return policy.tokenizer.convert_tokens_to_ids(text.split())


def test_the_prefix_follows_bos(policy):
  config = config_of("the film was")
  texts = ["it was so", "we"]
  prompts, cut = sampling.prompts_array(texts, config, policy, "prompts")
  start, film = ids_of(policy, "<start>"), ids_of(policy, "the film was")
  for row, text in enumerate(texts):
    wanted = start + film + ids_of(policy, text)
    assert prompts.lengths[row] == len(wanted)
    np.testing.assert_array_equal(prompts.tokens[row, -len(wanted) :], wanted)
  assert cut.rows == 0
  found = static.ppo_config(config, policy, policy).prefix
  assert found == anchor.Prefix(size=3, begin=1)


def test_without_one_the_prompts_are_as_ever(policy):
  config = config_of()
  assert prefix.of(config, policy) is None
  assert static.ppo_config(config, policy, policy).prefix is None
  prompts, _ = sampling.prompts_array(["it was"], config, policy, "prompts")
  np.testing.assert_array_equal(
    prompts.tokens[0, -3:], ids_of(policy, "<start> it was")
  )
  assert prompts.lengths[0] == 3


def test_what_is_cut_is_the_prompt(policy):
  """Not the prefix, by which the reference's prompt is found; it is counted."""
  config = config_of("the film was", length=6)
  texts = ["it was so very", "it was"]
  prompts, cut = sampling.prompts_array(texts, config, policy, "prompts")
  np.testing.assert_array_equal(
    prompts.tokens,
    [
      ids_of(policy, "<start> the film was so very"),
      ids_of(policy, "<start> the film was it was"),
    ],
  )
  assert (cut.rows, cut.tokens) == (1, 2)


def test_a_tokenizer_without_bos_puts_it_first(policy):
  backend = tokenizers.Tokenizer(
    tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2})
  )
  backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  bare = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
  other = policy.__class__(
    policy.params, policy.model, bare, (2,), "a directory"
  )
  config = config_of("c b")
  prompts, _ = sampling.prompts_array(["a b"], config, other, "prompts")
  np.testing.assert_array_equal(prompts.tokens[0, -4:], [2, 1, 0, 1])
  found = static.ppo_config(config, other, other).prefix
  assert found == anchor.Prefix(size=2, begin=0)


@pytest.mark.parametrize(
  "text, length, found",
  [
    ("the quantum", 8, r"^config\.rollout\.prefix: text 'the quantum'"),
    (" ", 8, r"^config\.rollout\.prefix: ' ' has no tokens; wanted"),
    ("the film", 3, r"^config\.rollout\.prompt_length: 3; wanted more than 3"),
  ],
)
def test_a_prefix_that_cannot_be_put_in_front(policy, text, length, found):
  with pytest.raises(errors.UserError, match=found) as caught:
    prefix.of(config_of(text, length), policy)
  assert "\n" not in str(caught.value)
