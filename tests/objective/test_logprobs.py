"""Logits to logprobs and tokens, against float64 numpy."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import types
from rlhf_jax.objective import logprobs

B, R, D, V = 3, 5, 8, 11
# Logits at once: one column, two columns (ragged: 5 = 2 + 2 + 1), all.
ONE, TWO, ALL = 1, 2 * B * V, 2**20
CHUNKS = [ONE, TWO, ALL]
CASES = [(ONE, 0.5), (TWO, 1.3), (TWO, 1.0), (ALL, 0.5), (ALL, 1.0)]

token_logprobs = jax.jit(
  logprobs.token_logprobs, static_argnames=("temperature", "logits_per_chunk")
)
compare_models = jax.jit(
  logprobs.compare, static_argnames=("temperature", "logits_per_chunk")
)
sample = jax.jit(logprobs.sample, static_argnames="block")
filter_logits = jax.jit(
  logprobs.filter_logits, static_argnames=("top_k", "top_p")
)


def make_model(seed, scale=1.0):
  """Hidden states [B, R, D] and a head [V, D]."""
  rng = np.random.default_rng(seed)
  hidden = scale * rng.normal(size=(B, R, D))
  return (
    jnp.asarray(hidden, jnp.float32),
    types.Head(jnp.asarray(rng.normal(size=(V, D)), jnp.float32)),
  )


POLICY, REFERENCE = make_model(0), make_model(1)
TARGETS = jnp.asarray(np.random.default_rng(2).integers(V, size=(B, R)))


def in_float64(model):
  return np.asarray(model[0], np.float64), np.asarray(model[1].kernel, "f8")


def log_softmax(model, temperature):
  hidden, kernel = in_float64(model)
  logits = hidden @ kernel.T
  if (cap := model[1].softcap) is not None:
    logits = cap * np.tanh(logits / cap)
  logits /= temperature
  if (tokens := model[1].tokens) is not None:
    logits[..., tokens:] = -np.inf
  logits -= logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def chosen(x):
  return np.take_along_axis(x, np.asarray(TARGETS)[..., None], -1)[..., 0]


@pytest.mark.parametrize(("chunk", "temperature"), CASES)
def test_token_logprobs(chunk, temperature):
  """Trap 5: at the temperature, in one piece and in many."""
  found = token_logprobs(
    *POLICY, TARGETS, temperature=temperature, logits_per_chunk=chunk
  )
  wanted = chosen(log_softmax(POLICY, temperature))
  np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_gradient_of_token_logprobs(chunk):
  """(onehot − softmax) / temperature, carried to hidden states and head."""
  weights = np.random.default_rng(3).normal(size=(B, R))

  def total(hidden, head):
    found = logprobs.token_logprobs(
      hidden, head, TARGETS, temperature=0.7, logits_per_chunk=chunk
    )
    return (found * jnp.asarray(weights, jnp.float32)).sum()

  found = jax.jit(jax.grad(total, argnums=(0, 1)))(*POLICY)
  softmax = np.exp(log_softmax(POLICY, 0.7))
  logits_gradient = np.eye(V)[np.asarray(TARGETS)] - softmax
  logits_gradient *= weights[..., None] / 0.7
  hidden, kernel = in_float64(POLICY)
  np.testing.assert_allclose(found[0], logits_gradient @ kernel, atol=1e-5)
  wanted = np.einsum("brv,brd->vd", logits_gradient, hidden)
  np.testing.assert_allclose(found[1].kernel, wanted, atol=1e-5)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_capped_logits_and_ids_that_are_no_tokens(chunk):
  """Gemma 2's c·tanh(x/c) before the temperature; 2 of 11 ids have no text."""
  head = lambda model: dataclasses.replace(model[1], softcap=1.5, tokens=9)
  policy, reference = ((m[0], head(m)) for m in (POLICY, REFERENCE))
  targets = TARGETS % 9
  log_p, log_q = (log_softmax(m, 0.7) for m in (policy, reference))
  options = {"temperature": 0.7, "logits_per_chunk": chunk}
  of = lambda x: np.take_along_axis(x, np.asarray(targets)[..., None], -1)
  found = token_logprobs(*policy, targets, **options)
  np.testing.assert_allclose(found, of(log_p)[..., 0], atol=1e-5)
  compared = compare_models(policy, reference, targets, **options)
  np.testing.assert_allclose(compared.logprobs, found, atol=1e-5)
  real = slice(None, 9)
  p, q = log_p[..., real], log_q[..., real]
  wanted = (np.exp(p) * (p - q)).sum(-1)
  np.testing.assert_allclose(compared.reverse_kl, wanted, atol=1e-5)
  gradient = jax.grad(
    lambda model: compare_models(
      model, reference, targets, **options
    ).reverse_kl.sum()
  )(policy)
  # By the other road: autodiff of the definition, over the tokens alone.

  def by_definition(model):
    hidden, head = model
    logits = 1.5 * jnp.tanh(hidden @ head.kernel[real].T / 1.5) / 0.7
    p = jax.nn.log_softmax(logits)
    return (jnp.exp(p) * (p - log_q[..., real].astype("f4"))).sum()

  close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5)
  jax.tree.map(close, gradient, jax.grad(by_definition)(policy))


def test_no_chunk_holds_more_logits_than_allowed():
  """The jaxpr of the chunked pass has no array of the whole batch's logits."""

  def shapes(chunk):
    total = lambda hidden, head: logprobs.token_logprobs(
      hidden, head, TARGETS, temperature=1.0, logits_per_chunk=chunk
    ).sum()
    jaxpr = str(jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(*POLICY))
    return set(re.findall(r"f32\[([\d,]+)\]", jaxpr))

  assert f"{B},{R},{V}" in shapes(ALL)
  assert f"{B},2,{V}" in shapes(TWO)
  assert not {f"{B},{R},{V}", f"3,{B},2,{V}"} & shapes(TWO)


def compare(policy, reference, temperature=1.0, chunk=ALL):
  return compare_models(
    policy,
    reference,
    TARGETS,
    temperature=temperature,
    logits_per_chunk=chunk,
  )


@pytest.mark.parametrize(("chunk", "temperature"), CASES)
def test_comparison(chunk, temperature):
  """Traps 5 and 22: both directions, each the sum of its definition."""
  found = compare(POLICY, REFERENCE, temperature, chunk)
  log_p = log_softmax(POLICY, temperature)
  log_q = log_softmax(REFERENCE, temperature)
  p, q = np.exp(log_p), np.exp(log_q)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5)
  close(found.logprobs, chosen(log_p))
  close(found.reference_logprobs, chosen(log_q))
  close(found.reverse_kl, (p * (log_p - log_q)).sum(-1))
  close(found.forward_kl, (q * (log_q - log_p)).sum(-1))
  close(found.entropy, -(p * log_p).sum(-1))
  # The two directions differ here by far more than the tolerance.
  assert np.abs(found.reverse_kl - found.forward_kl).max() > 0.1


@pytest.mark.parametrize("chunk", CHUNKS)
def test_equal_models_are_at_exactly_zero(chunk):
  """Trap 10: 0.0, and not 1e-8, of two arguments that happen to be equal."""
  copy = jax.tree.map(jnp.copy, POLICY)
  found = compare(POLICY, copy, 0.7, chunk)
  assert not np.asarray(found.reverse_kl).any()
  assert not np.asarray(found.forward_kl).any()
  np.testing.assert_array_equal(found.logprobs, found.reference_logprobs)


def definitions(logits, reference_logits):
  """Each statistic of its definition, by autodiff-friendly sums."""
  log_p = jax.nn.log_softmax(logits)
  log_q = jax.nn.log_softmax(reference_logits)
  chosen = lambda x: jnp.take_along_axis(x, TARGETS[..., None], -1)[..., 0]
  return logprobs.Comparison(
    logprobs=chosen(log_p),
    reference_logprobs=chosen(log_q),
    reverse_kl=(jnp.exp(log_p) * (log_p - log_q)).sum(-1),
    forward_kl=(jnp.exp(log_q) * (log_q - log_p)).sum(-1),
    entropy=-(jnp.exp(log_p) * log_p).sum(-1),
  )


@pytest.mark.parametrize("name", logprobs.Comparison._fields)
def test_statistics_and_their_gradient_in_float64(name):
  """To 1e-12, each alone (the others' cotangents are symbolic zeros)."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(6)
    logits, other, weights = (
      jnp.asarray(rng.normal(size=shape))
      for shape in ((B, R, V), (B, R, V), (B, R))
    )

    def total(function):
      of = lambda logits: (weights * function(logits)._asdict()[name]).sum()
      return jax.value_and_grad(of)(2 * logits)

    found = total(lambda x: logprobs.statistics(x, other, TARGETS))
    wanted = total(lambda x: definitions(x, other))
  np.testing.assert_allclose(found[0], wanted[0], rtol=1e-12)
  np.testing.assert_allclose(found[1], wanted[1], atol=1e-12)


def test_gradients_of_all_statistics_add_up():
  """Their cotangents together, as a loss of several has them."""
  with jax.enable_x64(True):
    rng = np.random.default_rng(7)
    logits, other = (jnp.asarray(rng.normal(size=(B, R, V))) for _ in range(2))

    def total(function):
      mixed = lambda of: (
        2 * of.logprobs - of.reverse_kl * of.entropy + 3 * of.forward_kl
      ).sum()
      return jax.grad(lambda x: mixed(function(x)))(logits)

    found = total(lambda x: logprobs.statistics(x, other, TARGETS))
    wanted = total(lambda x: definitions(x, other))
  np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_the_reference_is_a_constant():
  def total(reference_logits):
    of = logprobs.statistics(POLICY[0], reference_logits, TARGETS % D)
    return (of.reverse_kl + of.reference_logprobs + of.forward_kl).sum()

  assert not np.asarray(jax.grad(total)(REFERENCE[0])).any()


@pytest.mark.parametrize("gap", [60.0, 120.0])
def test_statistics_at_60_nats(gap):
  """Trap 17: log-ratios of ±60 nats and more, in value and gradient.

  p sits on token 0 and q on token 1: reverse = forward ≈ gap, and the
  gradient of the reverse KL is p (d − KL), the forward's p − q.
  """
  logits = jnp.array([[gap, 0.0, -gap]])
  other = jnp.array([[0.0, gap, -gap]])
  target = jnp.array([0])
  found, pull_back = jax.vjp(
    lambda x: logprobs.statistics(x, other, target), logits
  )
  np.testing.assert_allclose(found.reverse_kl, [gap], rtol=1e-6)
  np.testing.assert_allclose(found.forward_kl, [gap], rtol=1e-6)
  zero = jnp.zeros(1)
  for name, wanted in {
    "reverse_kl": [0.0, 0.0, 0.0],
    "forward_kl": [1.0, -1.0, 0.0],
    "entropy": [0.0, 0.0, 0.0],
  }.items():
    cotangents = logprobs.Comparison(zero, zero, zero, zero, zero)
    cotangents = cotangents._replace(**{name: jnp.ones(1)})
    (gradient,) = pull_back(cotangents)
    np.testing.assert_allclose(gradient, [wanted], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("tokens", [1, 2 * B, 3 * B, 10**6])
def test_the_gradient_in_columns_is_the_gradient(tokens):
  """One column, two, three (5 = 3 + 2, the rest filled up), and all at once."""
  weights = jnp.asarray(np.random.default_rng(8).normal(size=(B, R)))
  columns = {
    "weights": weights.astype(jnp.float32),
    "reference": REFERENCE[0],
    "targets": TARGETS,
    "mask": jnp.ones((B, R), bool),
  }

  def loss(hidden, head, columns):
    of = logprobs.statistics(
      logprobs.token_logits(hidden, head, temperature=0.7),
      logprobs.token_logits(
        columns["reference"], REFERENCE[1], temperature=0.7
      ),
      columns["targets"],
    )
    terms = jnp.where(columns["mask"], of.reverse_kl - of.logprobs, 0.0)
    sums = {"reverse_kl": jnp.where(columns["mask"], of.reverse_kl, 0.0).sum(1)}
    return (columns["weights"] * terms).sum(), sums

  found = jax.jit(
    lambda *args: logprobs.gradient_in_columns(loss, *args, tokens=tokens)
  )(*POLICY, columns)
  whole = jax.grad(loss, argnums=(0, 1), has_aux=True)
  gradients, sums = jax.jit(whole)(*POLICY, columns)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
  jax.tree.map(close, found, (sums, gradients))


def test_far_apart_models_stay_finite():
  """Trap 17: logits in the hundreds, log-ratios beyond ±60 nats."""
  policy, reference = make_model(4, scale=40.0), make_model(5, scale=40.0)
  found = compare(policy, reference)
  log_ratio = found.logprobs - found.reference_logprobs
  assert log_ratio.max() > 60 and log_ratio.min() < -60
  for name, values in found._asdict().items():
    assert np.isfinite(values).all(), name
  log_p, log_q = log_softmax(policy, 1.0), log_softmax(reference, 1.0)
  wanted = (np.exp(log_p) * (log_p - log_q)).sum(-1)
  np.testing.assert_allclose(found.reverse_kl, wanted, rtol=1e-4, atol=1e-4)
  total = lambda hidden: token_logprobs(
    hidden, policy[1], TARGETS, temperature=1.0, logits_per_chunk=ALL
  ).sum()
  gradient = jax.grad(total)(policy[0])
  assert np.isfinite(gradient).all()


BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))


def draw(logits, uniforms, block):
  logits = jnp.broadcast_to(
    jnp.asarray(logits, jnp.float32), (len(uniforms), len(logits))
  )
  uniforms = jnp.asarray(uniforms, jnp.float32)
  return np.asarray(sample(logits, uniforms, block=block))


def softmax(logits):
  weights = np.exp(np.asarray(logits, np.float64) - np.max(logits))
  return weights / weights.sum()


@pytest.mark.parametrize(
  ("vocabulary", "block"),
  [(11, 4), (12, 4), (11, 256), (4, 4), (300, 256), (37, 1)],
)
def test_evenly_spread_uniforms_draw_each_token_in_proportion(
  vocabulary, block
):
  """An even grid of n numbers hits an interval of length p within 1 of np."""
  rng = np.random.default_rng(vocabulary)
  logits = rng.normal(size=vocabulary).astype(np.float32)
  n = 4096
  tokens = draw(logits, (np.arange(n) + 0.5) / n, block)
  counts = np.bincount(tokens, minlength=vocabulary)
  assert len(counts) == vocabulary
  assert np.abs(counts - n * softmax(logits)).max() <= 1.01
  assert (np.diff(tokens) >= 0).all()  # The inverse of a distribution.


@pytest.mark.parametrize("block", [1, 4, 8, 256])
def test_a_forbidden_token_is_never_drawn(block):
  """Trap 6: also where rounding puts the number between two tokens.

  Uniforms at every border of the cumulative distribution and up to four
  roundings to either side of it, and the ends of [0, 1).
  """
  rng = np.random.default_rng(0)
  for _ in range(8):
    logits = (3 * rng.normal(size=40)).astype(np.float32)
    logits[rng.random(40) < 0.7] = -np.inf
    logits[rng.integers(40)] = 0.0
    borders = np.cumsum(softmax(logits)).astype(np.float32)
    near = borders + 3e-8 * np.arange(-4, 5, dtype=np.float32)[:, None]
    uniforms = np.clip(np.append(near, 0.0), 0.0, BELOW_ONE)
    tokens = draw(logits, uniforms, block)
    assert np.isfinite(logits[tokens]).all()


@pytest.mark.parametrize("block", [2, 3, 256])
def test_the_ends_of_the_unit_interval(block):
  """0 draws the first possible token, the largest number below 1 the last."""
  logits = np.array([-np.inf, -np.inf, 0.1, -np.inf, 2.0, -np.inf, -np.inf])
  tokens = draw(logits, [0.0, BELOW_ONE], block)
  np.testing.assert_array_equal(tokens, [2, 4])


def test_large_logits_do_not_overflow():
  tokens = draw([900.0, 900.0, -900.0], [0.25, 0.75, BELOW_ONE], 256)
  np.testing.assert_array_equal(tokens, [0, 1, 1])


def filtered(logits, top_k, top_p):
  """One row at a time: sort, cut, and keep what ties with the last kept."""
  kept = logits.copy()
  for row in kept:
    if 0 < top_k < len(row):
      row[row < np.sort(row)[-top_k]] = -np.inf
    if top_p < 1:
      mass = 0.0
      for smallest in np.sort(row)[::-1]:
        mass += np.exp(smallest - row.max()) / np.exp(row - row.max()).sum()
        if mass >= top_p:
          break
      row[row < smallest] = -np.inf
  return kept


@pytest.mark.parametrize("top_k", [0, 1, 3, V, V + 5])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_filters_against_a_loop(top_k, top_p):
  logits = np.random.default_rng(0).normal(size=(16, V))
  found = filter_logits(
    jnp.asarray(logits, jnp.float32), top_k=top_k, top_p=top_p
  )
  wanted = filtered(logits, top_k, top_p)
  np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))
  kept = np.isfinite(wanted)
  np.testing.assert_allclose(np.asarray(found)[kept], wanted[kept], rtol=1e-6)
  assert kept.any(-1).all()


def test_filters_by_hand_with_ties():
  # Masses 0.4, 0.2, 0.2, 0.1, 0.1.
  logits = jnp.log(jnp.array([[0.2, 0.4, 0.1, 0.2, 0.1]]))
  kept = lambda **filters: np.isfinite(filter_logits(logits, **filters))[
    0
  ].astype(int)
  # What ties with the last one kept is kept: no arbitrary choice among equals.
  np.testing.assert_array_equal(kept(top_k=2, top_p=1.0), [1, 1, 0, 1, 0])
  np.testing.assert_array_equal(kept(top_k=0, top_p=0.5), [1, 1, 0, 1, 0])
  np.testing.assert_array_equal(kept(top_k=0, top_p=0.3), [0, 1, 0, 0, 0])
  # The nucleus is of the renormalised three: 0.5, 0.25, 0.25.
  np.testing.assert_array_equal(kept(top_k=3, top_p=0.45), [0, 1, 0, 0, 0])
  np.testing.assert_array_equal(kept(top_k=0, top_p=0.45), [1, 1, 0, 1, 0])
  np.testing.assert_array_equal(kept(top_k=0, top_p=1.0), [1, 1, 1, 1, 1])


def test_bfloat16_states_are_scored_in_float32():
  """Trap 10: logits keep float32 whatever the network computes in."""
  half = lambda x: x.astype(jnp.bfloat16)
  hidden, head = half(POLICY[0]), types.Head(half(POLICY[1].kernel))
  logits = logprobs.token_logits(hidden, POLICY[1], temperature=1.0)
  assert logits.dtype == jnp.float32
  wanted = log_softmax((hidden, head), 1.0)
  found = jax.nn.log_softmax(logits)
  np.testing.assert_allclose(found, wanted, atol=1e-4)
