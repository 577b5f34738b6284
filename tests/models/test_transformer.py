"""The network against float64 sums, and against itself on other paths."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.models import rope, transformer
from rlhf_jax.objective import logprobs
from tests.steps import tiny

LLAMA = transformer.TransformerConfig(
  vocab_size=13,
  width=16,
  layers=2,
  heads=4,
  kv_heads=2,
  head_size=6,
  mlp_width=20,
  max_length=24,
  norm_epsilon=0.1,
  rope_theta=100.0,
  unroll=2,
)
GPT2 = dataclasses.replace(
  LLAMA,
  kv_heads=4,
  norm="layer",
  positions="learned",
  activation="gelu",
  qkv_bias=True,
  out_bias=True,
  mlp_bias=True,
  tie_embeddings=False,
)
KINDS = {"llama": LLAMA, "gpt2": GPT2}


@pytest.fixture(params=KINDS)
def config(request):
  return KINDS[request.param]


def random_params(config):
  return tiny.network(0, config)


def random_tokens(rows, columns, seed=1):
  rng = np.random.default_rng(seed)
  return rng.integers(0, LLAMA.vocab_size, (rows, columns))


def padded(lengths, columns, start):
  """Masks and positions of rows that begin at `start[b]`."""
  column = np.arange(columns)
  end = np.asarray(start) + lengths
  real = (column >= np.asarray(start)[:, None]) & (column < end[:, None])
  mask = real[:, None, :] & np.tril(np.ones((columns, columns), bool))
  positions = np.maximum(column - np.asarray(start)[:, None], 0)
  return jnp.asarray(mask), jnp.asarray(positions), real


def forward(params, config, tokens, mask=None, positions=None):
  rows, columns = tokens.shape
  if mask is None:
    mask, positions, _ = padded([columns] * rows, columns, [0] * rows)
  hidden, _ = jax.jit(transformer.apply, static_argnames="config")(
    params, jnp.asarray(tokens), config=config, positions=positions, mask=mask
  )
  return hidden


# From the definition.


def numpy_forward(params, config, tokens):
  """Hidden states of one text: loops and float64 sums, head by head."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  group = config.heads // config.kv_heads
  size = config.head_size

  def norm(x, p):
    if config.norm == "layer":
      x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon)
    return x * p["scale"] + p.get("bias", 0.0)

  def rotate(x):
    if config.positions == "learned":
      return x
    turned = np.empty_like(x)
    for t, i in itertools.product(range(len(x)), range(size // 2)):
      angle = t * config.rope_theta ** (-2 * i / size)
      pair = complex(x[t, i], x[t, i + size // 2]) * np.exp(1j * angle)
      turned[t, i], turned[t, i + size // 2] = pair.real, pair.imag
    return turned

  def attend(query, key, value):
    out = np.empty_like(value)
    for t in range(len(query)):
      weights = np.exp(key[: t + 1] @ query[t] / np.sqrt(size))
      out[t] = weights @ value[: t + 1] / weights.sum()
    return out

  def attention(x, p):
    kernel, bias = p["qkv"]["kernel"], p["qkv"].get("bias")
    bias = np.zeros(kernel.shape[1:]) if bias is None else bias
    y = np.zeros(x.shape) + p["out"].get("bias", 0.0)
    for g, n in itertools.product(range(config.kv_heads), range(group)):
      query, key, value = (
        x @ kernel[:, g, i] + bias[g, i] for i in (n, group, group + 1)
      )
      mixed = attend(rotate(query), rotate(key), value)
      y += mixed @ p["out"]["kernel"][g, n]
    return y

  def mlp(x, p):
    bias = p["in"].get("bias", np.zeros(2))
    y = [
      x @ kernel + b
      for kernel, b in zip(p["in"]["kernel"].swapaxes(0, 1), bias)
    ]
    if config.activation == "swiglu":
      y = y[0] / (1 + np.exp(-y[0])) * y[1]
    else:
      inner = np.sqrt(2 / np.pi) * (y[0] + 0.044715 * y[0] ** 3)
      y = 0.5 * y[0] * (1 + np.tanh(inner))
    return y @ p["out"]["kernel"] + p["out"].get("bias", 0.0)

  x = params["embedding"]["tokens"][tokens]
  if config.positions == "learned":
    x = x + params["embedding"]["positions"][: len(tokens)]
  for i in range(config.layers):
    layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
    x = x + attention(norm(x, layer["attention_norm"]), layer["attention"])
    x = x + mlp(norm(x, layer["mlp_norm"]), layer["mlp"])
  return norm(x, params["final_norm"])


def test_forward_is_that_of_numpy(config):
  params, tokens = random_params(config), random_tokens(2, 7)
  found = forward(params, config, tokens)
  for row in range(2):
    wanted = numpy_forward(params, config, tokens[row])
    np.testing.assert_allclose(found[row], wanted, rtol=1e-4, atol=2e-5)


def test_norms_against_numpy():
  """With x = (1, 3) and ε = 1: rms² = 5, so x/√6; centred ±1, so ±1/√2."""
  x = jnp.array([1.0, 3.0])
  scale, bias = jnp.array([2.0, 1.0]), jnp.array([0.0, 0.5])
  for norm, params, wanted in [
    ("rms", {"scale": scale}, [2 / 6**0.5, 3 / 6**0.5]),
    ("layer", {"scale": scale, "bias": bias}, [-(2**0.5), 0.5 + 0.5**0.5]),
  ]:
    config = dataclasses.replace(LLAMA, norm=norm, norm_epsilon=1.0)
    found = transformer._Norm(config).apply({"params": params}, x)
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=1e-6)


def test_llama3_stretches_long_wavelengths_only():
  """θ = 10⁴, K = 8, 100 original positions, factor 8, bands at 1 and 4 turns.

  The pairs turn 1, 0.1, 0.01, 0.001 radians a token, 15.9, 1.59, 0.16, 0.02
  times in 100 tokens. The first is kept, the last two are divided by 8, the
  second keeps k = (100 · 0.1 / 2π − 1) / 3 = 0.19718:
  0.1 (k + (1 − k) / 8) = 0.1 (0.19718 + 0.10035) = 0.029753.
  """
  config = dataclasses.replace(
    LLAMA,
    head_size=8,
    rope_theta=1e4,
    rope_scaling=rope.RopeScaling(
      kind="llama3",
      factor=8.0,
      low_frequency_factor=1.0,
      high_frequency_factor=4.0,
      original_max_length=100,
    ),
  )
  cos, sin = transformer._rotary(jnp.array([[0, 1]]), config, "global")
  np.testing.assert_array_equal(cos[0, 0], 1.0)
  angles = [1.0, 0.029753, 0.00125, 0.000125]
  np.testing.assert_allclose(sin[0, 1], np.sin(angles), rtol=1e-4)


def test_parameter_count_of_a_known_shape():
  """Llama-3.2-1B has 1 235 814 400 parameters."""
  config = transformer.TransformerConfig(
    vocab_size=128_256,
    width=2048,
    layers=16,
    heads=32,
    kv_heads=8,
    head_size=64,
    mlp_width=8192,
    max_length=131_072,
  )
  params = jax.eval_shape(lambda: transformer.init(jax.random.key(0), config))
  assert sum(x.size for x in jax.tree.leaves(params)) == 1_235_814_400


# One path against another.


def test_scan_is_unrolled(config):
  """Values and gradients; one, two (recomputed) and four layers at a time."""
  config = dataclasses.replace(config, layers=4)
  params, tokens = random_params(config), random_tokens(2, 6)

  def value_and_grad(unroll, remat):
    other = dataclasses.replace(config, unroll=unroll, remat=remat)
    loss = lambda params: jnp.square(forward(params, other, tokens)).sum()
    return jax.jit(jax.value_and_grad(loss))(params)

  wanted = value_and_grad(4, False)
  for unroll, remat in [(1, False), (2, True)]:
    found = value_and_grad(unroll, remat)
    compare = lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()
    )
    jax.tree.map(compare, found, wanted)


@pytest.mark.parametrize("unroll", [1, 2])
def test_cached_decode_is_the_full_forward(config, unroll):
  """Left-padded prompts of lengths 1 to 4, then five tokens one by one."""
  config = dataclasses.replace(config, unroll=unroll)
  params, tokens = random_params(config), random_tokens(3, 9)
  lengths, start = np.array([6, 7, 9]), np.array([3, 2, 0])
  mask, positions, real = padded(lengths, 9, start)
  wanted = forward(params, config, tokens, mask, positions)
  apply = jax.jit(transformer.apply, static_argnames="config")
  cache = transformer.init_cache(config, 3, 12)  # Three slots to spare.
  pieces = []
  for begin, end in [(0, 4)] + [(t, t + 1) for t in range(4, 9)]:
    hidden, cache = apply(
      params,
      jnp.asarray(tokens[:, begin:end]),
      config=config,
      positions=positions[:, begin:end],
      mask=mask[:, begin:end, : max(end, 9)],
      cache=cache,
      index=begin,
    )
    pieces.append(hidden)
  found = np.concatenate(pieces, axis=1)
  np.testing.assert_allclose(found[real], wanted[real], rtol=1e-4, atol=1e-5)


def test_padding_changes_nothing(config):
  """Trap 8: left and right; what stands there never reaches a real token."""
  params, tokens = random_params(config), random_tokens(2, 5)
  plain = forward(params, config, tokens)
  for left, right in [(3, 0), (0, 4), (2, 1)]:
    columns = left + 5 + right
    mask, positions, real = padded([5, 5], columns, [left, left])
    results = []
    for seed in (2, 3):
      wide = random_tokens(2, columns, seed)
      wide[real] = tokens.ravel()
      hidden = forward(params, config, wide, mask, positions)
      results.append(np.asarray(hidden)[real])
    np.testing.assert_array_equal(*results)
    found = results[0].reshape(plain.shape)
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_queries_are_repeated_keys_and_values(kv_heads):
  grouped = dataclasses.replace(LLAMA, kv_heads=kv_heads)
  whole = dataclasses.replace(LLAMA, kv_heads=4)
  params, tokens = random_params(grouped), random_tokens(2, 6)
  attention = params["layers"]["attention"]
  qkv, out = attention["qkv"]["kernel"], attention["out"]["kernel"]
  group = 4 // kv_heads
  shape = (LLAMA.layers, LLAMA.width, 4, 1, LLAMA.head_size)
  repeat = lambda x: jnp.repeat(x[:, :, :, None], group, axis=2)
  repeated = jnp.concatenate(
    [
      qkv[:, :, :, :group].reshape(shape),
      repeat(qkv[:, :, :, group]),
      repeat(qkv[:, :, :, group + 1]),
    ],
    axis=3,
  )
  layers = params["layers"] | {
    "attention": {
      "qkv": {"kernel": repeated},
      "out": {"kernel": out.reshape(out.shape[0], 4, 1, *out.shape[3:])},
    }
  }
  found = forward(params, grouped, tokens)
  wanted = forward(params | {"layers": layers}, whole, tokens)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16_computes_close_to_float32(config):
  """Hidden states and cache are bfloat16; parameters and logits float32."""
  params, tokens = random_params(config), random_tokens(2, 6)
  half = dataclasses.replace(config, compute_dtype="bfloat16")
  assert transformer.init_cache(half, 1, 1).keys[0].dtype == jnp.bfloat16
  hidden = forward(params, half, tokens)
  assert hidden.dtype == jnp.bfloat16
  found, wanted = (
    logprobs.token_logits(x, transformer.head(params, config), temperature=1.0)
    for x in (hidden, forward(params, config, tokens))
  )
  assert found.dtype == jnp.float32
  error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
  assert 1e-4 < error < 0.03


@pytest.mark.parametrize(
  "change, words",
  [
    ({"kv_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
    ({"unroll": 3}, "unroll=3 does not divide layers=2"),
    ({"head_size": 5}, "head_size=5 is odd"),
  ],
)
def test_impossible_architectures_are_refused(change, words):
  with pytest.raises(ValueError, match=words):
    dataclasses.replace(LLAMA, **change)
