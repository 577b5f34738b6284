"""What leaves as a Hugging Face directory is what we have, to other readers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import transformers

from rlhf_jax import types
from rlhf_jax.models import hf_files
from rlhf_jax.steps import rewards
from rlhf_jax.storage import export, pretrained
from rlhf_jax.storage import workdir as workdir_lib
from tests.steps import tiny

WORDS = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(10))]
EOS = 2


def make_tokenizer(**special):
  vocabulary = {word: id_ for id_, word in enumerate(WORDS)}
  model = tokenizers.models.WordLevel(vocabulary, unk_token="<unk>")
  backend = tokenizers.Tokenizer(model)
  backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
  return transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, **(named | special)
  )


def left(directory, params, tokenizer, model=tiny.MODEL):
  """A workdir with this model in it."""
  with workdir_lib.Workdir.open(
    directory, {"stage": "reward_model"}, resume=False
  ) as opened:
    found = pretrained.Pretrained(params, model, tokenizer, (EOS,), "here")
    pretrained.save(opened, found)
  return str(directory)


@pytest.mark.parametrize("pad", ["</s>", "<unk>", None])
def test_transformers_scores_what_we_score(pad, tmp_path):
  """Texts that end with eos, padded, in a batch; whatever the pad was."""
  torch = pytest.importorskip("torch")
  tokenizer = make_tokenizer(pad_token=pad)
  params = tiny.reward_model(0, mean=0.0, std=2.0)
  workdir = left(tmp_path / "run", params, tokenizer)
  export.run(workdir, str(tmp_path / "exported"))
  responses = [[3, 4, EOS], [5, EOS], [6, 7, 8, 9, EOS], [3]]
  rows, size = len(responses), max(map(len, responses))
  tokens = np.zeros((rows, size), np.int32)
  for row, ids in enumerate(responses):
    tokens[row, : len(ids)] = ids
  ours = rewards.from_model(tiny.MODEL)(
    jax.tree.map(jnp.asarray, params),
    types.Sequences(
      prompt_tokens=jnp.full((rows, 2), 11),
      prompt_lengths=jnp.full(rows, 2),
      response_tokens=jnp.asarray(tokens),
      response_lengths=jnp.array([len(ids) for ids in responses]),
    ),
    jnp.int32(0),
  )
  model = transformers.AutoModelForSequenceClassification.from_pretrained(
    tmp_path / "exported"
  ).eval()
  theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
  assert theirs.pad_token_id == model.config.pad_token_id != EOS
  texts = [theirs.decode([11, 11, *ids]) for ids in responses]
  batch = theirs(texts, return_tensors="pt", padding=True)
  with torch.no_grad():
    found = model(batch["input_ids"], attention_mask=batch["attention_mask"])
  np.testing.assert_allclose(found.logits[:, 0].numpy(), ours, atol=1e-5)


def test_it_names_nothing_of_this_machine(tmp_path):
  """And a tokenizer class that transformers 4, and other readers, have."""
  make_tokenizer().save_pretrained(tmp_path / "mine")
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "mine")
  workdir = left(tmp_path / "run", tiny.reward_model(0), tokenizer)
  export.run(workdir, str(tmp_path / "exported"))
  for path in (tmp_path / "exported").iterdir():
    assert str(tmp_path).encode() not in path.read_bytes(), path.name
  config = hf_files.read_json(tmp_path / "exported" / "tokenizer_config.json")
  assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
  again = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
  assert again.get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_the_dtype_is_that_of_the_file_it_came_from(dtype, tmp_path):
  model = tiny.dataclasses.replace(tiny.MODEL, stored_dtype="bfloat16")
  workdir = left(
    tmp_path / "run", tiny.reward_model(0), make_tokenizer(), model
  )
  said = export.run(workdir, str(tmp_path / "exported"), dtype)
  wanted = dtype or "bfloat16"
  assert f" in {wanted};" in said
  config = json.loads((tmp_path / "exported" / "config.json").read_text())
  assert config["dtype"] == config["torch_dtype"] == wanted
