"""What a model is told of its tokenizer, and models of earlier formats."""

import dataclasses

from configs import ppo
from rlhf_jax.models import convert
from rlhf_jax.storage import pretrained
from tests.steps import tiny
from tests.storage import test_export


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
