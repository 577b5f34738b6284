"""KL estimators by enumeration, and the one place where the penalty enters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objective import kl

RNG = np.random.default_rng(0)


def categoricals(scale):
  """Log p, log q of a random pair over five tokens, float64."""
  logits = scale * np.random.default_rng(3).normal(size=(2, 5))
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("estimator", [kl.k1, kl.k3])
def test_estimators_are_unbiased_for_the_reverse_kl(estimator, scale):
  """Trap 22. E over tokens of p of the estimate is Σ p (log p − log q)."""
  log_p, log_q = categoricals(scale)
  p = np.exp(log_p)
  wanted = (p * (log_p - log_q)).sum()
  estimates = estimator(jnp.asarray(log_p - log_q, jnp.float32))
  found = (p * np.asarray(estimates, np.float64)).sum()
  np.testing.assert_allclose(found, wanted, atol=2e-7)
  # The other direction is another number: the test can tell them apart.
  other = (np.exp(log_q) * (log_q - log_p)).sum()
  assert abs(other - wanted) > 1e-4


def test_k3_by_hand_and_never_negative():
  # ℓ = log 2: 1/2 − 1 + log 2. ℓ = −log 2: 2 − 1 − log 2.
  log_two = np.log(2.0)
  found = kl.k3(jnp.array([log_two, -log_two, 0.0], jnp.float32))
  wanted = [log_two - 0.5, 1 - log_two, 0.0]
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
  spread = jnp.concatenate([jnp.linspace(-60, 60, 999), jnp.array([1e-8])])
  assert (kl.k3(spread) >= 0).all()


def test_k2_by_hand():
  # ℓ = 2, −3, 0: 4/2, 9/2, 0.
  found = kl.k2(jnp.array([2.0, -3.0, 0.0]))
  np.testing.assert_array_equal(found, [2.0, 4.5, 0.0])


def test_k3_is_precise_for_tiny_ratios():
  """ℓ = 1e-4 gives ½ℓ² = 5e-9, below the rounding of e^{−ℓ} near 1."""
  tiny = np.float32(1e-4)
  wanted = np.expm1(-np.float64(tiny)) + np.float64(tiny)
  np.testing.assert_allclose(kl.k3(jnp.array([tiny]))[0], wanted, rtol=5e-3)
  naive = np.exp(-tiny) - np.float32(1) + tiny
  assert abs(naive - wanted) / wanted > 1.0


def test_clamped_log_ratios_are_finite_and_counted():
  """Trap 17."""
  log_ratio = jnp.array([-1e4, -60.0, 0.5, 60.0, 61.0, jnp.inf])
  clamped, moved = kl.clamp_log_ratio(log_ratio)
  np.testing.assert_array_equal(clamped, [-60, -60, 0.5, 60, 60, 60])
  np.testing.assert_array_equal(moved, [1, 0, 0, 0, 1, 1])
  assert np.isfinite(kl.k3(clamped)).all()


def random_pairs(count, vocabulary, seed=4):
  logits = 2 * np.random.default_rng(seed).normal(size=(2, count, vocabulary))
  logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
  return jnp.asarray(logits[0], jnp.float32), jnp.asarray(
    logits[1], jnp.float32
  )


def test_top_k_bounds_hold_and_close():
  """Every k brackets the exact KL; more tokens never widen the bracket."""
  log_p, log_q = random_pairs(64, 9)
  wanted = np.asarray((jnp.exp(log_p) * (log_p - log_q)).sum(-1))
  widths = []
  for k in range(1, 9):
    lower, upper = map(np.asarray, kl.exact_top_k(log_p, log_q, k=k))
    assert (lower <= wanted + 1e-6).all() and (wanted <= upper + 1e-6).all()
    widths.append(upper - lower)
  assert (np.diff(widths, axis=0) <= 1e-6).all()
  assert widths[0].mean() > 0.1
  # One token is left, so nothing is lumped.
  np.testing.assert_allclose(lower, wanted, atol=1e-6)
  np.testing.assert_allclose(upper, wanted, atol=1e-6)


def test_top_k_by_hand():
  # p = ½, ¼, ¼ and q = ¼, ½, ¼; K is the first token, ½ log 2 of it; the rest
  # lumped is ½ log (½ / ¾), its worst log-ratio is log (¼ / ¼) = 0.
  log_p = jnp.log(jnp.array([0.5, 0.25, 0.25]))
  log_q = jnp.log(jnp.array([0.25, 0.5, 0.25]))
  lower, upper = kl.exact_top_k(log_p, log_q, k=1)
  head = 0.5 * np.log(2)
  np.testing.assert_allclose(lower, head + 0.5 * np.log(2 / 3), rtol=1e-6)
  np.testing.assert_allclose(upper, head, rtol=1e-6)


def test_top_k_of_impossible_tokens():
  """A rest that p never draws adds nothing, whatever q thinks of it."""
  log_p = jnp.log(jnp.array([0.5, 0.5, 0.0, 0.0]))
  log_q = jnp.log(jnp.array([0.25, 0.25, 0.5, 0.0]))
  bounds = kl.exact_top_k(log_p, log_q, k=2)
  np.testing.assert_allclose(bounds, [np.log(2)] * 2, rtol=1e-6)


def test_top_k_bounds_where_the_rest_is_all_but_impossible():
  """Q's mass of the rest underflows; its logarithm does not."""
  log_p = jax.nn.log_softmax(jnp.array([3.0, 0.0, 0.0]))
  log_q = jax.nn.log_softmax(jnp.array([0.0, -120.0, -120.0]))
  exact = (jnp.exp(log_p) * (log_p - log_q)).sum()
  lower, upper = kl.exact_top_k(log_p, log_q, k=1)
  np.testing.assert_allclose([lower, upper], [exact, exact], rtol=1e-5)


def test_the_next_state_by_hand():
  x = jnp.array([[1.0, 2.0, 3.0], [4.0, 5.0, jnp.nan], [6.0, jnp.nan, 7.0]])
  mask = jnp.array([[1, 1, 1], [1, 1, 0], [1, 0, 0]], bool)
  found = kl.of_next_state(x, mask)
  np.testing.assert_array_equal(found, [[2, 3, 0], [5, 0, 0], [0, 0, 0]])


LENGTHS = np.array([2, 4, 0, 1])  # stopped, truncated, empty, one token
SCORE = np.array([0.7, -1.9, 5.0, 0.3], np.float32)
LOG_RATIO = RNG.normal(size=(4, 4)).astype(np.float32)
MASK = np.arange(4) < LENGTHS[:, None]


def penalised(score=SCORE, log_ratio=LOG_RATIO, beta=0.1):
  return kl.penalised_rewards(
    jnp.asarray(score),
    jnp.asarray(log_ratio),
    jnp.asarray(LENGTHS),
    beta=jnp.float32(beta),
  )


def test_rewards_token_by_token():
  """Traps 3 and 15: fractional scores, each on its response's last token."""
  wanted = np.zeros((4, 4))
  for row, length in enumerate(LENGTHS):
    for t in range(length):
      wanted[row, t] = -np.float64(0.1) * LOG_RATIO[row, t]
      if t == length - 1:
        wanted[row, t] += SCORE[row]
  np.testing.assert_allclose(penalised(), wanted, atol=1e-6)


def test_without_a_penalty_the_rewards_are_the_scores():
  """Trap 3: 0.7 and −1.9 arrive to the last bit."""
  total = np.asarray(penalised(beta=0.0)).sum(1)
  np.testing.assert_array_equal(total, np.where(LENGTHS > 0, SCORE, 0))


def test_the_penalty_counts_once():
  """Trap 19: Σ_t r_t = score − β Σ ℓ, so ∂/∂β is −Σ ℓ and not twice that."""
  total = lambda beta: kl.penalised_rewards(
    jnp.asarray(SCORE), jnp.asarray(LOG_RATIO), jnp.asarray(LENGTHS), beta=beta
  ).sum(1)
  log_ratio = np.where(MASK, LOG_RATIO.astype(np.float64), 0).sum(1)
  wanted = np.where(LENGTHS > 0, SCORE, 0) - 0.3 * log_ratio
  np.testing.assert_allclose(total(jnp.float32(0.3)), wanted, atol=1e-5)
  slope = jax.jacfwd(total)(jnp.float32(0.3))
  np.testing.assert_allclose(slope, -log_ratio, atol=1e-5)


def test_no_gradient_flows_through_the_penalty():
  """Trap 1: a reward is a number; π_θ inside it must not be differentiated."""
  total = lambda log_ratio: jnp.sin(penalised(log_ratio=log_ratio)).sum()
  assert not np.asarray(jax.grad(total)(jnp.asarray(LOG_RATIO))).any()


@pytest.mark.parametrize("garbage", [1e30, np.inf, np.nan])
def test_garbage_after_the_end_changes_no_bit(garbage):
  """Trap 17."""
  dirty = np.where(MASK, LOG_RATIO, np.float32(garbage))
  np.testing.assert_array_equal(penalised(log_ratio=dirty), penalised())


@pytest.mark.parametrize("key", kl.PENALTIES, ids="-".join)
def test_no_penalty_is_paid_beyond_the_end(key):
  """Trap 17: whatever stands there, and 0 is what the groups' sums see."""
  mask = jnp.array([[True, True, False, False]])
  dirty = jnp.where(mask, 0.5, jnp.nan)
  nats = kl.reward_penalty(kl.PENALTIES[key], kl.Terms(*[dirty] * 4), mask)
  assert (
    np.isfinite(nats).all() and not np.asarray(nats)[~np.asarray(mask)].any()
  )


@pytest.mark.parametrize("key", kl.PENALTIES, ids="-".join)
def test_every_penalty_is_finite_at_60_nats(key):
  """Trap 17: values and gradients, at ±60 nats and with ratios far from 1."""
  penalty = kl.PENALTIES[key]
  mask = jnp.ones((1, 4), bool)
  shared = jnp.array([[0.0, 60.0, 1.0, 0.0]])

  def loss(log_ratio):
    terms = kl.Terms(
      log_ratio=kl.clamp_log_ratio(log_ratio)[0],
      reverse_kl=shared,
      forward_kl=shared,
      importance_ratio=jnp.exp(jnp.clip(log_ratio, -20.0, 20.0)),
    )
    total = kl.reward_penalty(penalty, terms, mask).sum()
    return total + (
      0.0 if not penalty.in_loss else penalty.in_loss(terms).sum()
    )

  for log_ratio in ([-60.0, -59.0, 59.0, 60.0], [-1e4, -61.0, 61.0, 1e4]):
    value, gradient = jax.value_and_grad(loss)(jnp.array([log_ratio]))
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_a_pull_back_at_60_nats_has_its_size():
  """The token-local reverse penalty's gradient is ℓ, on either side."""
  penalty = kl.PENALTIES["token_reverse", "sampled"]
  zeros = jnp.zeros((1, 2))

  def loss(new):
    terms = kl.Terms(
      jnp.array([[60.0, -60.0]]), zeros, zeros, jnp.exp(new - zeros)
    )
    return penalty.in_loss(terms).sum()

  np.testing.assert_allclose(jax.grad(loss)(zeros), [[60.0, -60.0]])
