"""The texts of a mix: those that SFT has seen, and no others."""

import io
import json

import numpy as np
import pytest
from rich import console as rich_console

from configs import ppo
from rlhf_jax import errors
from rlhf_jax.data import arrays, batches
from rlhf_jax.data import mix as mix_texts
from rlhf_jax.storage import pretrained
from rlhf_jax.text import toy_language


@pytest.fixture(scope="module")
def policy():
  return pretrained.load_policy(ppo.get_config("toy"))


def load(policy, overrides):
  config = ppo.get_config(f"toy,mix.kind=nll,mix.batch_size=1,{overrides}")
  printed = io.StringIO()
  console = rich_console.Console(file=printed, width=200)
  return mix_texts.load(config, policy, console), printed.getvalue()


def texts_of(rows):
  """Every packed text's ids, in no order."""
  return sorted(
    rows.tokens[row][rows.segments[row] == segment].tolist()
    for row in range(len(rows.tokens))
    for segment in range(1, rows.segments[row].max() + 1)
  )


def test_they_are_the_texts_of_sft_without_those_held_out(policy):
  rows, _ = load(policy, "data.size=60,seed=3,data.sequence_length=40")
  texts = toy_language.sample_texts(3, 60)
  seen, held = batches.split_heldout(texts, 0.1, 3)
  assert held
  assert texts_of(rows) == sorted(a + b for a, b in seen)


def test_they_open_as_asked(policy):
  """Whatever the prompts open with."""
  rows, _ = load(
    policy, "data.size=40,mix.opening=person,data.opening=determiner"
  )
  other, _ = load(policy, "data.size=40,mix.opening=determiner")
  first = [{text[1] for text in texts_of(x)} for x in (rows, other)]
  assert first[0] and first[1] and not first[0] & first[1]


def test_a_file_is_read_as_sft_reads_it(policy, tmp_path):
  path = tmp_path / "texts.jsonl"
  pairs = [("it was", " so boring ."), ("we liked", " the film .")]
  lines = [json.dumps({"prompt": a, "response": b}) for a, b in pairs]
  path.write_text("\n".join(lines))
  overrides = f"mix.path={path},data.heldout_fraction=0.4"
  rows, printed = load(policy, overrides)
  assert str(path) in printed
  (text,) = texts_of(rows)
  # One of the two is held out; the prompt is read and not predicted.
  words = policy.tokenizer.convert_ids_to_tokens(text)
  whole = [
    "<start> it was so boring . <end>",
    "<start> we liked the film . <end>",
  ]
  assert " ".join(words) in whole
  size = len(text)
  np.testing.assert_array_equal(rows.loss_mask[0, :size], np.arange(size) >= 3)


def test_too_few_texts_for_a_batch(policy):
  found = (
    r"^config\.mix\.batch_size: 512, and the built-in language fills \d+ rows"
    r" of data\.sequence_length=64 tokens; lower it or bring more texts$"
  )
  with pytest.raises(errors.UserError, match=found):
    load(policy, "data.size=40,mix.batch_size=512")


def test_another_language_than_the_policy_speaks(policy):
  with pytest.raises(errors.UserError, match=r"data\.language: 'notes'"):
    load(policy, "data.language=notes")


def test_packing_is_that_of_sft(policy):
  """Rows, masks and positions, to the last number."""
  rows, _ = load(policy, "data.size=30")
  seen, _ = batches.split_heldout(toy_language.sample_texts(0, 30), 0.1, 0)
  wanted, _ = arrays.pack(
    seen, sequence_length=64, pad_id=0, vocab_size=96, where=""
  )
  for name in ("tokens", "segments", "positions", "loss_mask"):
    np.testing.assert_array_equal(getattr(rows, name), getattr(wanted, name))
