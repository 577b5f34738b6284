"""A random policy speaks the language that the config names, and no other."""

import pytest

from configs import sft
from rlhf_jax import errors
from rlhf_jax.storage import pretrained
from rlhf_jax.text import toy_language

SMALL = "model.width=8,model.layers=1,model.heads=1,model.kv_heads=1"


def started(language):
  config = sft.get_config(f"{SMALL},data.language={language}")
  return pretrained.load_policy(config), config


@pytest.mark.parametrize("name", toy_language.LANGUAGES)
def test_a_random_policy_speaks_the_language_of_its_config(name):
  policy, config = started(name)
  vocabulary = toy_language.LANGUAGES[name].vocabulary
  assert policy.model.vocab_size == len(vocabulary)
  embedding = policy.params["transformer"]["embedding"]["tokens"]
  assert embedding.shape == (len(vocabulary), 8)
  assert policy.stop_ids == (vocabulary.index("<end>"),)
  pretrained.check_speaks_the_built_in_language(policy, config)


def test_a_policy_of_another_language_is_refused():
  """Bad inputs 29: its ids would be read as other words."""
  policy, _ = started("notes")
  _, config = started("essays")
  with pytest.raises(errors.UserError) as caught:
    pretrained.check_speaks_the_built_in_language(policy, config)
  assert str(caught.value) == (
    "config.data.language: 'essays'; wanted 'notes', the language of a random"
    " start"
  )
