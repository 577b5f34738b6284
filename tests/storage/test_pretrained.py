"""Models that a config names: their language, their tokens, their formats."""

import dataclasses

import pytest

from configs import ppo, sft
from rlhf_jax import errors
from rlhf_jax.models import convert
from rlhf_jax.storage import pretrained
from rlhf_jax.text import toy_language
from tests.steps import tiny
from tests.storage import test_export

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


def saved(directory, rows):
  """A Hugging Face directory with so many rows for 13 tokens."""
  model = dataclasses.replace(tiny.MODEL, vocab_size=rows)
  params = tiny.network(0, model)
  ids = {"stop_ids": (2,), "pad_id": 0, "bos_id": 1}
  convert.save(directory, params, model, **ids)
  test_export.make_tokenizer().save_pretrained(directory)
  return pretrained.load(str(directory), ppo.get_config())


def test_rows_without_text_are_no_tokens(tmp_path):
  """44 of 512 ids that were drawn had no text."""
  assert saved(tmp_path / "wide", 16).model.tokens == 13
  assert saved(tmp_path / "exact", 13).model.tokens is None


def test_an_architecture_of_format_1_is_read():
  """One bias for all of attention, and one kind of stretched rope."""
  fields = dataclasses.asdict(tiny.MODEL)
  del fields["qkv_bias"], fields["out_bias"]
  scaling = {
    "factor": 8.0,
    "low_frequency_factor": 1.0,
    "high_frequency_factor": 4.0,
    "original_max_length": 16,
  }
  found = pretrained._architecture(
    fields | {"attention_bias": True, "rope_scaling": scaling}
  )
  assert found.qkv_bias and found.out_bias
  assert found.rope_scaling is not None
  assert found.rope_scaling.kind == "llama3"
  assert found.rope_scaling.factor == 8.0
