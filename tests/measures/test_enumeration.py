"""The transformer as a prefix tree, against plain forwards and listed sums.

Its float32 is held to 1e−5 (logits of order 1); what follows is float64.

Mutants tried, each of which fails here: prefixes spelt with the last token
most significant; the first V**t rows taken for level t; states one column
late; response tokens masked out; the temperature left out; the first chunk's
prefixes in every chunk; no gradient; rewards one level late, or all in row 0;
chunks of responses filled up with empty ones.
"""

import dataclasses
import functools
import itertools
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import types
from rlhf_jax.measures import enumeration
from rlhf_jax.models import transformer
from rlhf_jax.objective import exact, masking
from rlhf_jax.objective import logprobs as logprobs_lib
from rlhf_jax.steps import rollout

TOLERANCE = 1e-5  # float32
V, R, STOPS = 3, 4, (0,)
BETA, TEMPERATURE = 0.4, 0.7
PROMPT = np.array([2, 1, 2], np.int32)

LLAMA = transformer.TransformerConfig(
  vocab_size=V,
  width=8,
  layers=1,
  heads=2,
  kv_heads=1,
  head_size=4,
  mlp_width=16,
  max_length=len(PROMPT) + R,
)
GPT2 = dataclasses.replace(
  LLAMA,
  layers=2,
  kv_heads=2,
  norm="layer",
  positions="learned",
  activation="gelu",
  qkv_bias=True,
  out_bias=True,
  mlp_bias=True,
  tie_embeddings=False,
)


def make_params(model, seed=0):
  """Random everywhere, and far from uniform logits."""
  shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), model))
  rng = np.random.default_rng(seed)
  normal = lambda leaf: 0.7 * rng.normal(size=leaf.shape)
  return jax.tree.map(lambda leaf: jnp.float32(normal(leaf)), shapes)


@functools.partial(jax.jit, static_argnames=("model", "rows_per_chunk"))
def prefix_logits(params, model=LLAMA, rows_per_chunk=4096):
  return enumeration.prefix_logits(
    params,
    jnp.asarray(PROMPT),
    model=model,
    response_length=R,
    temperature=TEMPERATURE,
    rows_per_chunk=rows_per_chunk,
  )


def all_responses(length=R, stop_ids=STOPS):
  """Every response, by leaving out what goes on after a stop token."""
  for n in range(1, length + 1):
    for tokens in itertools.product(range(V), repeat=n):
      if not set(tokens[:-1]) & set(stop_ids) and (
        n == length or tokens[-1] in stop_ids
      ):
        yield tokens


def as_sequences(responses):
  """Padded with a token that is neither 0 nor a stop."""
  tokens = np.full((len(responses), R), 1, np.int32)
  for i, response in enumerate(responses):
    tokens[i, : len(response)] = response
  return types.Sequences(
    prompt_tokens=jnp.asarray(np.tile(PROMPT, (len(responses), 1))),
    prompt_lengths=jnp.full(len(responses), len(PROMPT)),
    response_tokens=jnp.asarray(tokens),
    response_lengths=jnp.array([len(response) for response in responses]),
  )


@functools.partial(jax.jit, static_argnames="model")
def scored(params, sequences, model=LLAMA):
  """Logprobs of the responses' tokens, as the PPO step scores them."""
  hidden = rollout.teacher_forced(params, sequences, model=model)
  logprobs = logprobs_lib.token_logprobs(
    masking.response_states(hidden, R),
    transformer.head(params, model),
    sequences.response_tokens,
    temperature=TEMPERATURE,
    logits_per_chunk=10**6,
  )
  mask = masking.response_mask(sequences.response_lengths, R)
  return jnp.where(mask, logprobs, 0.0)


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_levels_are_those_of_a_plain_forward(model):
  """One prefix at a time: no padding, no response after it."""
  params = make_params(model)
  levels = jax.device_get(
    jax.jit(prefix_logits, static_argnums=1)(params, model)
  )
  assert [level.shape for level in levels] == [(V**t, V) for t in range(R)]

  @jax.jit
  def plain(tokens):
    size = len(tokens)
    hidden, _ = transformer.apply(
      params,
      tokens[None],
      config=model,
      positions=jnp.arange(size)[None],
      mask=jnp.tril(jnp.ones((1, size, size), bool)),
    )
    return hidden[0, -1] @ transformer.head_kernel(params).T / TEMPERATURE

  for t in range(R):
    for row, prefix in enumerate(itertools.product(range(V), repeat=t)):
      tokens = jnp.array([*PROMPT, *prefix], jnp.int32)
      np.testing.assert_allclose(levels[t][row], plain(tokens), atol=TOLERANCE)
  assert np.ptp(levels[3], axis=0).min() > 0.1  # The prefix matters.


@pytest.mark.parametrize("rows_per_chunk", [1, 10, 26])
def test_chunks_change_nothing(rows_per_chunk):
  """10 and 26 do not divide the 27 prefixes."""
  params = make_params(LLAMA)
  whole = prefix_logits(params)
  chunked = prefix_logits(params, rows_per_chunk=rows_per_chunk)
  for found, wanted in zip(chunked, whole, strict=True):
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


def test_levels_hold_what_the_step_scores():
  """Listed by the oracle or teacher-forced in a batch, with stop tokens."""
  params = make_params(LLAMA)
  listing = exact.sequences(vocab_size=V, response_length=R, stop_ids=STOPS)
  found = exact.token_logprobs(prefix_logits(params), listing)
  responses = [
    tuple(tokens[:length])
    for tokens, length in zip(listing.tokens.tolist(), listing.lengths.tolist())
  ]
  assert sorted(responses) == sorted(all_responses())
  wanted = scored(params, as_sequences(responses))
  np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


def length_and_words(sequences):
  """A reward that depends on prompt, length, order and each token."""
  mask = masking.response_mask(sequences.response_lengths, R)
  weights = jnp.array([1.0, 0.3, -0.5, 0.25])
  words = jnp.where(mask, weights * sequences.response_tokens, 0.0).sum(1)
  prompt = sequences.prompt_tokens[:, 0] + 0.1 * sequences.prompt_lengths
  return words + 0.01 * sequences.response_lengths + prompt


def reward_of(response):
  words = sum(w * y for w, y in zip([1.0, 0.3, -0.5, 0.25], response))
  return words + 0.01 * len(response) + 2 + 0.1 * 3


@functools.partial(
  jax.jit, static_argnames=("score", "stop_ids", "rows_per_chunk")
)
def reward_table(score=length_and_words, stop_ids=STOPS, rows_per_chunk=4096):
  return enumeration.table_of(
    score,
    jnp.asarray(PROMPT),
    vocab_size=V,
    response_length=R,
    stop_ids=stop_ids,
    rows_per_chunk=rows_per_chunk,
  )


@pytest.mark.parametrize("stop_ids", [(), (0,), (2, 0)])
@pytest.mark.parametrize("rows_per_chunk", [1, 7, 4096])
def test_the_table_holds_each_responses_reward(stop_ids, rows_per_chunk):
  """7 divides no number of responses here; the rest of the table is 0."""
  found = reward_table(length_and_words, stop_ids, rows_per_chunk)
  wanted = [np.zeros((V,) * (t + 1)) for t in range(R)]
  for response in all_responses(stop_ids=stop_ids):
    wanted[len(response) - 1][response] = reward_of(response)
  for t in range(R):
    level = wanted[t].reshape(V**t, V)
    np.testing.assert_allclose(found[t], level, atol=TOLERANCE)


def test_only_whole_responses_are_scored():
  """A host function may fail on anything else."""
  seen = []

  def record(sequences):
    tokens = np.asarray(sequences.response_tokens)
    lengths = np.asarray(sequences.response_lengths)
    seen.extend(tuple(y[:n].tolist()) for y, n in zip(tokens, lengths))
    assert np.array_equal(sequences.prompt_tokens[0], PROMPT)
    return np.zeros(len(lengths), np.float32)

  def score(sequences):
    shape = jax.ShapeDtypeStruct(sequences.response_lengths.shape, jnp.float32)
    return jax.pure_callback(record, shape, sequences)

  jax.block_until_ready(reward_table(score, rows_per_chunk=7))
  assert set(seen) == set(all_responses())
  assert len(seen) - len(set(seen)) < 7  # The last chunk's filling.


def test_the_gradient_in_the_parameters():
  """Σ_y π(y) (r − β log π/π_ref) ∇ log π(y), each term teacher-forced."""
  params, reference = make_params(LLAMA), make_params(LLAMA, seed=1)
  sequences = as_sequences(list(all_responses()))
  rewards = jnp.array([reward_of(y) for y in all_responses()])
  reference_levels, table = prefix_logits(reference), reward_table()

  def value(params):
    policy = prefix_logits(params, rows_per_chunk=9)
    return exact.objective(
      policy, reference_levels, table, beta=BETA, stop_ids=STOPS
    )

  def surrogate(params):
    log_p = scored(params, sequences).sum(1)
    log_q = scored(reference, sequences).sum(1)
    p = jnp.exp(log_p)
    total = rewards - BETA * (log_p - log_q)
    weight = jax.lax.stop_gradient(p * total)
    return (weight * log_p).sum(), ((p * total).sum(), p.sum())

  wanted, (j, mass) = jax.jit(jax.grad(surrogate, has_aux=True))(params)
  found_j, found = jax.jit(jax.value_and_grad(value))(params)
  np.testing.assert_allclose(mass, 1.0, atol=TOLERANCE)
  np.testing.assert_allclose(found_j, j, atol=TOLERANCE)
  close = functools.partial(
    np.testing.assert_allclose, rtol=1e-4, atol=10 * TOLERANCE
  )
  jax.tree.map(close, found, wanted)
  largest = max(abs(leaf).max() for leaf in jax.tree.leaves(wanted))
  assert largest > 100 * 10 * TOLERANCE


def test_after_float32_logits_all_is_float64():
  """KL(π‖π*) = (J* − J)/β to 1e−12 with x64, whatever the logits' rounding."""

  @jax.jit
  def lack_and_gap(p, q, rewards):
    args = {"beta": BETA, "stop_ids": STOPS}
    log_z, best = exact.optimum(q, rewards, **args)
    lack = log_z - exact.objective(p, q, rewards, **args) / BETA
    return lack, exact.sequence_kl(p, best, stop_ids=STOPS)

  with jax.enable_x64(True):
    p, q = (prefix_logits(make_params(LLAMA, seed)) for seed in (0, 1))
    rewards = reward_table()
    for level in (*p, *q, *rewards):
      assert level.dtype == jnp.float64
    np.testing.assert_allclose(*lack_and_gap(p, q, rewards), rtol=1e-12)


def test_a_quarter_of_a_million_responses():
  """V = 8, R = 6: a real transformer's 262,144 responses in less than 10 s.

  Both KLs, J and its gradient in the parameters, log Z, π* and KL(π‖π*);
  compilation is included where the cache is cold.
  """
  model = transformer.TransformerConfig(
    vocab_size=8,
    width=16,
    layers=1,
    heads=2,
    kv_heads=1,
    head_size=8,
    mlp_width=32,
    max_length=16,
  )

  def levels(params):
    return enumeration.prefix_logits(
      params,
      jnp.array([1, 2, 3]),
      model=model,
      response_length=6,
      temperature=1.0,
    )

  def rewards():
    return enumeration.table_of(
      lambda sequences: jnp.sin(1.0 * sequences.response_tokens).sum(1),
      jnp.array([1, 2, 3]),
      vocab_size=8,
      response_length=6,
      stop_ids=(),
    )

  @jax.jit
  def everything(params, reference):
    q, r = levels(reference), rewards()

    def value(params):
      p = levels(params)
      return exact.objective(p, q, r, beta=BETA, stop_ids=()), p

    (j, p), gradient = jax.value_and_grad(value, has_aux=True)(params)
    log_z, best = exact.optimum(q, r, beta=BETA, stop_ids=())
    kl = functools.partial(exact.sequence_kl, stop_ids=())
    return j, gradient, log_z, best, kl(p, q), kl(q, p), kl(p, best)

  with jax.enable_x64(True):
    models = make_params(model), make_params(model, seed=1)
    wall, busy = time.perf_counter(), time.process_time()
    found = jax.block_until_ready(everything(*models))
    # The smaller: neighbours on the machine add to the wall time alone.
    took = time.perf_counter() - wall, time.process_time() - busy
    assert min(took) < 10.0
    j, gradient, log_z, _, reverse, forward, gap = found
    np.testing.assert_allclose(gap, log_z - j / BETA, atol=1e-10)
    assert reverse > 0 and forward > 0 and j.dtype == jnp.float64
    slope = sum(jnp.vdot(x, x) for x in jax.tree.leaves(gradient))
    assert slope > 0
