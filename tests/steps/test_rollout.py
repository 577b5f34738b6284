"""Decoding: what is drawn, what is recorded, and when it ends."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import masking
from rlhf_jax.steps import rollout
from tests.steps import tiny

P, R = 4, 6
LENGTHS = np.array([1, 4, 2, 3, 4, 1])
B = len(LENGTHS)

LLAMA, SMALL, V = tiny.MODEL, tiny.SHALLOW, tiny.MODEL.vocab_size
GPT2 = dataclasses.replace(
  LLAMA,
  kv_heads=4,
  norm="layer",
  positions="learned",
  activation="gelu",
  qkv_bias=True,
  out_bias=True,
  mlp_bias=True,
)
NETWORKS = {
  "llama": LLAMA,
  "scanned layers": dataclasses.replace(LLAMA, unroll=1),
  "one kv head": dataclasses.replace(SMALL, kv_heads=1, tie_embeddings=False),
  "gpt2": GPT2,
}
STOP = rollout.RolloutConfig(response_length=R, stop_ids=(2, 3), pad_id=9)


make_params = functools.cache(lambda model, seed=0: tiny.network(seed, model))


def make_prompts(size=P, pad=0, lengths=LENGTHS):
  """Left-padded to `size`; the real tokens do not depend on the padding."""
  rng = np.random.default_rng(0)
  rows = [rng.integers(V, size=length) for length in lengths]
  return tiny.left_padded(rows, size, pad)


@functools.cache
def compiled(model, config):
  return jax.jit(functools.partial(rollout.rollout, model=model, config=config))


def write(model=SMALL, config=STOP, *, prompts=None, seed=1):
  """A rollout as numpy."""
  prompts = make_prompts() if prompts is None else prompts
  run = compiled(model, config)
  return jax.device_get(run(make_params(model), prompts, jax.random.key(seed)))


@functools.cache
def _hidden_of(model):
  return jax.jit(functools.partial(rollout.teacher_forced, model=model))


def scored(written, model, temperature=1.0):
  """Float64 logprobs of all tokens [B, R, V], from one full forward pass."""
  params = make_params(model)
  hidden = _hidden_of(model)(params, jax.tree.map(jnp.asarray, written))
  states = masking.response_states(hidden, R)
  head = np.asarray(transformer.head_kernel(params), np.float64)
  logits = np.asarray(states, np.float64) @ head.T / temperature
  logits -= logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def assert_logprobs_are_scored(written, model, temperature=1.0):
  tokens = written.sequences.response_tokens
  wanted = scored(written.sequences, model, temperature)
  wanted = np.take_along_axis(wanted, tokens[..., None], -1)[..., 0]
  mask = np.arange(R) < written.sequences.response_lengths[:, None]
  wanted = np.where(mask, wanted, 0.0)
  np.testing.assert_allclose(written.logprobs, wanted, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_decoding_agrees_with_the_full_forward_pass(network):
  """Traps 7 and 8: cache, positions and masks, with unequal prompts."""
  written = write(NETWORKS[network])
  assert len(set(written.sequences.response_lengths.tolist())) > 1
  assert_logprobs_are_scored(written, NETWORKS[network])


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_each_row_is_scored_as_if_it_were_alone(model):
  """Traps 7 and 8: from position 0, no left padding, no batch, no cache."""
  written = write(model)
  params = make_params(model)
  head = np.asarray(transformer.head_kernel(params), np.float64)
  apply = jax.jit(functools.partial(transformer.apply, config=model))
  for row in (0, 1):
    prompt_length = LENGTHS[row]
    length = written.sequences.response_lengths[row]
    prompt = written.sequences.prompt_tokens[row, P - prompt_length :]
    response = written.sequences.response_tokens[row, :length]
    # Zeros to one size: nothing looks ahead, and it compiles once.
    text = np.concatenate([prompt, response])
    end = len(text) - 1
    hidden, _ = apply(
      params,
      jnp.asarray(np.pad(text, (0, P + R - len(text))))[None],
      positions=jnp.arange(P + R)[None],
      mask=jnp.tril(jnp.ones((1, P + R, P + R), bool)),
    )
    states = np.asarray(hidden[0, prompt_length - 1 : end], np.float64)
    logits = states @ head.T
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = logprobs[np.arange(length), response]
    np.testing.assert_allclose(
      written.logprobs[row, :length], wanted, atol=1e-5
    )


@pytest.mark.parametrize("model", [SMALL, GPT2], ids=["llama", "gpt2"])
def test_more_left_padding_changes_nothing(model):
  """Trap 8."""
  one = write(model)
  other = write(model, prompts=make_prompts(P + 3))
  np.testing.assert_array_equal(
    one.sequences.response_tokens, other.sequences.response_tokens
  )
  np.testing.assert_array_equal(
    one.sequences.response_lengths, other.sequences.response_lengths
  )
  np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_what_stands_under_the_padding_changes_no_bit():
  """Trap 8."""
  one, other = write(), write(prompts=make_prompts(pad=7))
  np.testing.assert_array_equal(one.logprobs, other.logprobs)
  np.testing.assert_array_equal(
    one.sequences.response_tokens, other.sequences.response_tokens
  )


@pytest.mark.parametrize("pad_id", [9, 2])
def test_a_response_ends_with_its_first_stop_token(pad_id):
  """Trap 16: a set of stop ids, of which one may be the pad."""
  config = dataclasses.replace(STOP, pad_id=pad_id)
  seen = []
  for seed in range(6):
    written = write(config=config, seed=seed)
    rows = zip(
      written.sequences.response_tokens,
      written.sequences.response_lengths,
      written.logprobs,
      written.truncated,
    )
    for tokens, length, logprobs, truncated in rows:
      stops = [t for t in range(length) if tokens[t] in config.stop_ids]
      assert stops == ([] if truncated else [length - 1])
      assert length == R if truncated else 1 <= length <= R
      assert (tokens[length:] == pad_id).all()
      assert (logprobs[:length] < 0).all() and not logprobs[length:].any()
      seen.append((int(length), bool(truncated)))
  # Both ends of the table occur: at once, late, never.
  assert (1, False) in seen and (R, True) in seen
  assert any(length > 1 and not truncated for length, truncated in seen)


def test_without_stop_ids_every_response_is_full():
  """A pad id is then a word like any other."""
  config = dataclasses.replace(STOP, stop_ids=())
  written = write(config=config)
  assert (written.sequences.response_lengths == R).all()
  assert written.truncated.all()
  assert_logprobs_are_scored(written, SMALL)


def test_one_token_responses():
  config = dataclasses.replace(STOP, response_length=1)
  written = write(config=config)
  assert written.sequences.response_tokens.shape == (B, 1)
  assert (written.sequences.response_lengths == 1).all()
  stopped = np.isin(written.sequences.response_tokens[:, 0], config.stop_ids)
  np.testing.assert_array_equal(written.truncated, ~stopped)


@pytest.mark.parametrize("stop_ids", [range(V), (0, 2, 5, 7, 8, 9)], ids=len)
def test_decoding_ends_when_every_row_has(stop_ids, monkeypatch):
  """As many tokens are drawn as the longest response has, and never more."""
  drawn = []
  sample = rollout.logprobs_lib.sample

  def counting(logits, uniform):
    jax.debug.callback(lambda: drawn.append(1))
    return sample(logits, uniform)

  monkeypatch.setattr(rollout.logprobs_lib, "sample", counting)
  config = dataclasses.replace(STOP, stop_ids=tuple(stop_ids))
  run = jax.jit(functools.partial(rollout.rollout, model=SMALL, config=config))
  written = run(make_params(SMALL), make_prompts(), jax.random.key(2))
  longest = int(written.sequences.response_lengths.max())
  jax.effects_barrier()
  assert len(drawn) == longest
  assert longest == 1 if len(stop_ids) == V else 1 < longest < R


def test_every_row_column_and_key_draws_its_own_number():
  """Trap 23: equal prompts in other rows, or with another key, go on apart."""
  lengths = np.full(8, 2)
  prompts = make_prompts(lengths=lengths)
  equal = types.Prompts(
    jnp.tile(prompts.tokens[:1], (8, 1)), jnp.asarray(lengths)
  )
  config = dataclasses.replace(STOP, stop_ids=(), temperature=3.0)
  one, again = (write(config=config, prompts=equal, seed=1) for _ in range(2))
  other = write(config=config, prompts=equal, seed=2)
  tokens = one.sequences.response_tokens
  np.testing.assert_array_equal(tokens, again.sequences.response_tokens)
  assert (tokens != other.sequences.response_tokens).any(1).all()
  assert len({tuple(row) for row in tokens}) == 8
  # One number for all columns would pick about the same quantile each time.
  assert all(len(set(row)) > 1 for row in tokens)


@pytest.mark.parametrize(
  ("temperature", "top_k", "top_p"),
  [
    (0.5, 0, 1.0),
    (1.3, 3, 1.0),
    (1.3, 4, 0.6),
  ],
)
def test_what_is_scored_is_the_whole_vocabulary(temperature, top_k, top_p):
  """Traps 4, 5 and 6: at the temperature, whatever narrows the drawing."""
  config = dataclasses.replace(
    STOP, temperature=temperature, top_k=top_k, top_p=top_p
  )
  written = write(config=config)
  assert np.isfinite(written.logprobs).all()
  lengths = written.sequences.response_lengths
  mask = np.arange(R) < lengths[:, None]
  assert (written.logprobs[mask] < 0).all()
  assert_logprobs_are_scored(written, SMALL, temperature)
  if top_k == 3:
    all_logprobs = scored(written.sequences, SMALL, temperature)
    rank = (all_logprobs > written.logprobs[..., None] + 1e-4).sum(-1)
    assert (rank[mask] < 3).all()


def test_top_k_of_one_is_greedy():
  config = dataclasses.replace(STOP, top_k=1)
  written = write(config=config)
  best = scored(written.sequences, SMALL).argmax(-1)
  mask = np.arange(R) < written.sequences.response_lengths[:, None]
  tokens = written.sequences.response_tokens
  np.testing.assert_array_equal(tokens[mask], best[mask])
  assert (written.logprobs[mask] < -1e-3).all()  # Not log 1.


@pytest.mark.parametrize(("temperature", "top_k"), [(0.6, 0), (1.0, 4)])
def test_tokens_are_drawn_from_the_policy(temperature, top_k):
  """Trap 5. Frequencies of 4096 first tokens against the softmax."""
  n = 4096
  prompts = types.Prompts(
    jnp.tile(jnp.array([[3, 8]]), (n, 1)), jnp.full((n,), 2)
  )
  config = rollout.RolloutConfig(1, temperature=temperature, top_k=top_k)
  tokens = write(config=config, prompts=prompts).sequences.response_tokens
  counts = np.bincount(tokens[:, 0], minlength=V)
  params = make_params(SMALL)
  apply = jax.jit(functools.partial(transformer.apply, config=SMALL))
  hidden, _ = apply(
    params,
    prompts.tokens[:1],
    positions=jnp.arange(2)[None],
    mask=jnp.tril(jnp.ones((1, 2, 2), bool)),
  )
  head = np.asarray(transformer.head_kernel(params), np.float64)
  p = np.exp(head @ np.asarray(hidden[0, -1]) / temperature)
  if top_k:
    p[p < np.sort(p)[-top_k]] = 0
  p /= p.sum()
  deviation = np.abs(counts - n * p) / np.sqrt(n * p * (1 - p) + 1e-9)
  assert deviation.max() < 4.0
  # Off by the temperature or the filter, it would be far outside.
  assert p.max() > 1.5 / V


def test_members_of_a_sweep_are_runs_of_their_own():
  """Under vmap the loop ends with the last member; none changes another."""
  members = [make_params(SMALL, seed) for seed in range(3)]
  keys = jax.random.split(jax.random.key(0), 3)
  config = dataclasses.replace(STOP, stop_ids=(0, 2, 5, 7, 8, 9))
  function = functools.partial(
    rollout.rollout, model=SMALL, config=config, member_axis="member"
  )
  sweep = jax.vmap(function, in_axes=(0, None, 0), axis_name="member")
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *members)
  together = jax.device_get(jax.jit(sweep)(stacked, make_prompts(), keys))
  run = compiled(SMALL, config)
  alone = [
    jax.device_get(run(params, make_prompts(), key))
    for params, key in zip(members, keys)
  ]
  alone = jax.tree.map(lambda *x: np.stack(x), *alone)
  jax.tree.map(
    np.testing.assert_array_equal, together.sequences, alone.sequences
  )
  np.testing.assert_array_equal(together.truncated, alone.truncated)
  np.testing.assert_allclose(together.logprobs, alone.logprobs, atol=1e-5)
  # One of them ended before another.
  assert len(set(alone.sequences.response_lengths.max(1).tolist())) > 1
