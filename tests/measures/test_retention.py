"""The loss on other texts, against the likelihood token by token."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich import console as rich_console

from configs import defaults
from rlhf_jax import errors
from rlhf_jax.measures import retention
from rlhf_jax.models import transformer
from rlhf_jax.storage import pretrained
from rlhf_jax.text import toy_language
from tests import tiny_network

SIZE = 32


def tiny(*overrides):
  config = defaults.get_config()
  sizes = [
    "stage=evaluate",
    *tiny_network.SIZES,
    f"data.sequence_length={SIZE}",
    "train.batch_size=4",
    "evaluate.prompts=12",
    "mesh.data=1",
  ]
  defaults.apply_overrides(config, [*sizes, *overrides])
  return config


@pytest.fixture(scope="module")
def models():
  return [pretrained.load_policy(tiny(f"seed={seed}")) for seed in (0, 1)]


def losses(config, models):
  policy, reference = models
  printed = io.StringIO()
  console = rich_console.Console(file=printed, width=200)
  return retention.losses(config, policy, reference, console), printed


def by_token(model, texts):
  """−log p of every response token given all before it, over their number."""

  @jax.jit
  def logprobs_of(ids):
    hidden, _ = transformer.apply(
      model.params["transformer"],
      ids[None],
      config=model.model,
      positions=jnp.arange(SIZE)[None],
      mask=jnp.tril(jnp.ones((1, SIZE, SIZE), bool)),
    )
    head = transformer.head_kernel(model.params["transformer"])
    return jax.nn.log_softmax(hidden[0] @ head.T)

  total, count = 0.0, 0
  for prompt, response in texts:
    ids = np.array(prompt + response)
    # What follows a text is not seen from it.
    logprobs = np.array(logprobs_of(jnp.resize(ids, (SIZE,))))
    places = np.arange(max(len(prompt), 1), len(ids))  # Not the first token.
    total -= logprobs[places - 1, ids[places]].sum()
    count += len(places)
  return total / count


def test_the_built_in_language(models):
  found, _ = losses(tiny(), models)
  texts = toy_language.sample_texts(2**33, 12)
  name = "retention/built-in language"
  for figure, model in zip(("nll", "reference_nll"), models):
    wanted = by_token(model, texts)
    assert found[f"{name}/{figure}"] == pytest.approx(wanted, rel=1e-5)
    assert 0 < found[f"{name}/{figure}_se"] < 1
  assert len(found) == 4


def test_files(models, tmp_path):
  """Whole texts from their second token on, responses given their prompts."""
  documents = ["it was lovely .", "we liked its ending and it was modern ."]
  whole = tmp_path / "whole.txt"
  whole.write_text("\n<|endoftext|>\n".join(documents * 5))
  pairs = tmp_path / "pairs.jsonl"
  pairs.write_text('{"prompt": "it was", "response": " lovely ."}\n' * 12)
  config = tiny(f"evaluate.corpora='{whole}','{pairs}'", f"data.path={whole}")
  found, printed = losses(config, models)
  # No built-in language beside a data.path; names have no ending.
  names = {key.split("/")[1] for key in found}
  assert names == {"whole", "pairs"}
  assert f"{whole}: 10 texts" in printed.getvalue()
  ids = models[0].tokenizer(documents, add_special_tokens=False)["input_ids"]
  start = [toy_language.START_ID]
  wanted = by_token(models[0], [(start, text) for text in ids])
  assert found["retention/whole/nll"] == pytest.approx(wanted, rel=1e-5)
  wanted = by_token(models[1], [(start + ids[0][:2], ids[0][2:])])
  assert found["retention/pairs/reference_nll"] == pytest.approx(wanted)


def test_a_long_text_is_cut_and_said(models, tmp_path):
  path = tmp_path / "long.txt"
  path.write_text("lovely " * 50 + "\n<|endoftext|>\n" + "lovely " * 10)
  config = tiny(f"evaluate.corpora='{path}'", f"data.path={path}")
  _, printed = losses(config, models)
  assert (
    "long: 1 texts are longer than data.sequence_length=32"
    in printed.getvalue()
  )


def test_a_word_that_is_not_one(models, tmp_path):
  path = tmp_path / "odd.txt"
  path.write_text("it was zyzzyva")
  config = tiny(f"evaluate.corpora='{path}'", f"data.path={path}")
  with pytest.raises(errors.UserError, match="zyzzyva"):
    losses(config, models)
