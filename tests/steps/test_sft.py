"""Supervised fine-tuning: the loss from its definition, and packing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.steps import sft
from tests.steps import tiny

T = 9
MODEL, V = tiny.SHALLOW, tiny.SHALLOW.vocab_size
CONFIG = sft.SFTConfig(MODEL)
# Tokens, and how many of them are prompt.
TEXTS = [([3, 1, 4, 1], 2), ([5, 9, 2], 1), ([6, 5, 3, 5, 8], 0)]


@pytest.fixture(scope="module")
def params():
  return {"transformer": tiny.network(0, MODEL)}


def pack(rows, pad=0) -> types.PackedTexts:
  """Rows of texts `(tokens, prompt length)`, one after the other."""
  shape = (len(rows), T)
  tokens, segments = np.full(shape, pad), np.zeros(shape, int)
  positions, loss_mask = np.zeros(shape, int), np.zeros(shape, bool)
  for row, texts in enumerate(rows):
    start = 0
    for number, (text, prompt) in enumerate(texts, 1):
      columns = slice(start, start + len(text))
      tokens[row, columns] = text
      segments[row, columns] = number
      positions[row, columns] = np.arange(len(text))
      loss_mask[row, start + max(prompt, 1) : start + len(text)] = True
      start += len(text)
  arrays = map(jnp.asarray, (tokens, segments, positions, loss_mask))
  return types.PackedTexts(*arrays)


APPLY = jax.jit(functools.partial(transformer.apply, config=MODEL))
LOSS = jax.jit(
  jax.value_and_grad(sft.negative_log_likelihood), static_argnums=2
)


def nll_sum(params, text, prompt):
  """−Σ log softmax(logits) of the tokens after the prompt, float64."""
  size = len(text)
  hidden, _ = APPLY(
    params["transformer"],
    jnp.array([text + [0] * (T - size)]),  # Nothing looks ahead.
    positions=jnp.arange(T)[None],
    mask=jnp.tril(jnp.ones((1, T, T), bool)),
  )
  head = np.asarray(transformer.head_kernel(params["transformer"]), np.float64)
  logits = np.asarray(hidden[0], np.float64) @ head.T
  logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  predicted = range(max(prompt, 1), size)
  return -sum(logprobs[t - 1, text[t]] for t in predicted), len(predicted)


def test_the_loss_is_the_mean_over_predicted_tokens(params):
  """Trap 18: one mean over all tokens, whatever the texts' lengths."""
  loss, _ = LOSS(params, pack([[text] for text in TEXTS]), CONFIG)
  sums, counts = zip(*(nll_sum(params, *text) for text in TEXTS))
  assert counts == (2, 2, 4)
  np.testing.assert_allclose(loss, sum(sums) / 8, rtol=1e-5)


def test_rows_are_summed_one_by_one(params):
  """What an evaluation adds up over batches: sums and counts by row."""
  row_logprobs = jax.jit(sft.row_logprobs, static_argnums=2)
  sums, counts = row_logprobs(params, pack([TEXTS[:2], TEXTS[2:]]), CONFIG)
  nlls = [nll_sum(params, *text)[0] for text in TEXTS]
  np.testing.assert_allclose(sums, [-nlls[0] - nlls[1], -nlls[2]], rtol=1e-5)
  np.testing.assert_array_equal(counts, [4, 4])


def test_packed_texts_do_not_see_each_other(params):
  """Two texts in a row are each as if alone; their order does not matter."""
  apart, apart_gradient = LOSS(params, pack([[t] for t in TEXTS]), CONFIG)
  for rows in ([TEXTS[:2], TEXTS[2:]], [TEXTS[2:], TEXTS[1::-1]]):
    loss, gradient = LOSS(params, pack(rows), CONFIG)
    np.testing.assert_allclose(loss, apart, rtol=1e-5)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, atol=1e-5),
      gradient,
      apart_gradient,
    )
  packed = pack([TEXTS[:2], TEXTS[2:]])
  leaking = dataclasses.replace(
    packed, segments=jnp.minimum(packed.segments, 1)
  )
  loss, _ = LOSS(params, leaking, CONFIG)
  assert abs(loss - apart) > 1e-3  # The test can see a leak.


def test_padding_changes_no_bit(params):
  one = LOSS(params, pack([TEXTS[:2], TEXTS[2:]], pad=0), CONFIG)
  other = LOSS(params, pack([TEXTS[:2], TEXTS[2:]], pad=7), CONFIG)
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_prompt_tokens_are_not_predicted(params):
  """With one token of response, the loss is that token's alone."""
  text = [3, 1, 4, 1, 5]
  loss, _ = LOSS(params, pack([[(text, 4)], []]), CONFIG)
  wanted, count = nll_sum(params, text, 4)
  assert count == 1
  np.testing.assert_allclose(loss, wanted, rtol=1e-5)


def test_chunking_changes_nothing(params):
  batch = pack([TEXTS[:2], TEXTS[2:]])
  whole = LOSS(params, batch, CONFIG)
  pieces = LOSS(params, batch, sft.SFTConfig(MODEL, logits_per_chunk=3 * 2 * V))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5), whole, pieces
  )


def test_a_step_descends(params):
  optimizer = optax.sgd(0.1)
  step = jax.jit(sft.make_step(CONFIG, optimizer))
  state = types.TrainState(jnp.int32(4), params, optimizer.init(params), {})
  batch = pack([TEXTS[:2], TEXTS[2:]])
  loss, gradient = LOSS(params, batch, CONFIG)
  state, scalars = step(state, batch)
  np.testing.assert_allclose(scalars["sft/loss"], loss, rtol=1e-6)
  np.testing.assert_allclose(
    scalars["sft/grad_norm"], optax.global_norm(gradient), rtol=1e-5
  )
  assert state.step == 5 and state.beta == {}
  _, after = step(state, batch)
  assert after["sft/loss"] < loss
