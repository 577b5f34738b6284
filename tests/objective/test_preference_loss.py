"""Losses on preferences: by hand, from their definitions, at their optima.

DPO's family is minimised exactly, over all pairs of a small language, and held
against the closed form: who reaches π*, who does not, and by how much.
"""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from rlhf_jax.objective import exact, preference_loss


def test_by_hand():
  losses = preference_loss.bradley_terry_loss(
    jnp.array([1.0, 0.0, 3.0]), jnp.array([1.0, jnp.log(3.0), 3 - jnp.log(3.0)])
  )
  # σ(0) = 1/2; σ(−log 3) = 1/4; σ(log 3) = 3/4.
  wanted = [np.log(2), np.log(4), np.log(4 / 3)]
  np.testing.assert_allclose(losses, wanted, rtol=1e-6)


def test_it_is_a_likelihood_and_a_difference():
  chosen, rejected = jnp.array([0.4, -2.0]), jnp.array([1.3, 0.7])
  one = preference_loss.bradley_terry_loss(chosen, rejected)
  other = preference_loss.bradley_terry_loss(rejected, chosen)
  np.testing.assert_allclose(jnp.exp(-one) + jnp.exp(-other), 1.0, rtol=1e-6)
  moved = preference_loss.bradley_terry_loss(chosen + 8, rejected + 8)
  np.testing.assert_allclose(one, moved, rtol=1e-6)


def test_the_gradient_far_away_is_finite_and_right():
  """Trap 17: d/dΔ −log σ(Δ) = −σ(−Δ)."""
  loss = lambda x: preference_loss.bradley_terry_loss(x, jnp.zeros(3)).sum()
  value, gradient = jax.value_and_grad(loss)(jnp.array([-200.0, 0.0, 200.0]))
  np.testing.assert_allclose(value, 200 + np.log(2), rtol=1e-6)
  np.testing.assert_allclose(gradient, [-1.0, -0.5, 0.0], atol=1e-6)


@pytest.mark.parametrize(
  "first, second, wanted",
  [
    ([1, 2, 3, 4], [-1.0, 0.5, 7, 8], 1.0),
    ([1, 2, 3, 4], [8.0, 7, 0.5, -1], 0.0),
    # Pairs 12 13 23: alike, alike, not.
    ([1, 2, 3], [1.0, 3, 2], 2 / 3),
    # The first ties 12: ½; 13 and 23 alike.
    ([1, 1, 2], [1.0, 2, 3], 2.5 / 3),
    # The second ties 12, which then does not count; 13 alike, 23 not.
    ([1, 3, 2], [1.0, 1, 2], 1 / 2),
    # Both tie 12; 13 and 23 alike.
    ([1, 1, 2], [1.0, 1, 2], 1.0),
    # A first that says nothing; a second that asks nothing.
    ([1, 1, 1], [1.0, 2, 3], 0.5),
    ([1, 2, 3], [2.0, 2, 2], 0.5),
    ([1, 1], [2.0, 2], 0.5),
    ([1], [2.0], 0.5),
  ],
)
def test_concordance_by_hand(first, second, wanted):
  found = preference_loss.concordance(
    jnp.array(first, jnp.float32), jnp.array(second), group_size=1
  )
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_concordance_sees_the_order_and_nothing_else():
  rng = np.random.default_rng(0)
  first, second = jnp.asarray(rng.normal(size=(2, 12)), jnp.float32)
  concordance = functools.partial(preference_loss.concordance, group_size=1)
  whole = concordance(first, second)
  again = concordance(jnp.exp(first), 3 * second - 5)
  np.testing.assert_array_equal(whole, again)
  reversed_order = concordance(-first, second)
  np.testing.assert_allclose(whole + reversed_order, 1.0, rtol=1e-6)
  assert 0 < whole < 1


def test_concordance_of_nan_is_nan():
  """Trap 25. Never a number that a controller would trust."""
  found = preference_loss.concordance(
    jnp.array([1.0, jnp.nan, 2.0]), jnp.array([1.0, 2.0, 3.0]), group_size=1
  )
  assert np.isnan(found)


def test_concordance_within_prompts():
  """What a score thinks of a prompt is no merit and no fault."""
  gold = jnp.array([1.0, 2.0, 3.0, 11.0, 12.0, 13.0])
  right = jnp.array([21.0, 22.0, 23.0, 1.0, 2.0, 3.0])  # Within each prompt.
  prompts_only = jnp.array([3.0, 2.0, 1.0, 13.0, 12.0, 11.0])
  of = lambda first, size: float(
    preference_loss.concordance(first, gold, group_size=size)
  )
  assert (of(right, 3), of(prompts_only, 3)) == (1.0, 0.0)
  # Across prompts as well: 6 pairs of 15 within, 9 between.
  np.testing.assert_allclose(of(right, 1), 6 / 15, rtol=1e-6)
  np.testing.assert_allclose(of(prompts_only, 1), 9 / 15, rtol=1e-6)


# DPO and its family.

THREE = np.log(3.0)  # σ(log 3) = 3/4.


@pytest.mark.parametrize(
  "name, chosen, rejected, options, wanted",
  [
    # Δ = ½ (log 3 + log 3) = log 3.
    ("dpo_loss", THREE, -THREE, {"beta": 0.5}, np.log(4 / 3)),
    (
      "conservative_dpo_loss",
      THREE,
      -THREE,
      {"beta": 0.5, "label_smoothing": 0.1},
      0.9 * np.log(4 / 3) + 0.1 * np.log(4),
    ),
    (
      "robust_dpo_loss",
      THREE,
      -THREE,
      {"beta": 0.5, "label_smoothing": 0.1},
      (0.9 * np.log(4 / 3) - 0.1 * np.log(4)) / 0.8,
    ),
    # (3 − 1 − 1/(2 · 0.25))² = 0; (3 − 0 − 2)² = 1.
    ("ipo_loss", 3.0, 1.0, {"beta": 0.25}, 0.0),
    ("ipo_loss", 3.0, 0.0, {"beta": 0.25}, 1.0),
    # ½ (3 log 3 − log 3) = log 3, so 1 − 3/4; ½ (log 3 + log 3) = log 3, so
    # 2 (1 − 3/4); the mean of 1/4 and 1/2.
    (
      "kto_loss",
      3 * THREE,
      -THREE,
      {
        "baseline": jnp.float32(THREE),
        "beta": 0.5,
        "desirable_weight": 1.0,
        "undesirable_weight": 2.0,
      },
      3 / 8,
    ),
    # 1.7 − 0.2 − (1.5 − log 3) = log 3.
    ("simpo_loss", 1.7, 0.2, {"margin": 1.5 - THREE}, np.log(4 / 3)),
    # φ(2) − φ(1) = 2 + log 2 − 1; −log σ(1 + log 2) = log(1 + 1/(2e)).
    (
      "chi_po_loss",
      np.log(2),
      0.0,
      {"beta": 1.0, "reward_bound": 9.0},
      np.log(1 + 0.5 / np.e),
    ),
    # Clipped to 2 · ½.
    (
      "chi_po_loss",
      np.log(2),
      0.0,
      {"beta": 1.0, "reward_bound": 0.5},
      np.log(1 + 1 / np.e),
    ),
  ],
)
def test_the_family_by_hand(name, chosen, rejected, options, wanted):
  function = getattr(preference_loss, name)
  pair = (jnp.array([x], jnp.float32) for x in (chosen, rejected))
  np.testing.assert_allclose(function(*pair, **options), [wanted], atol=1e-6)


def test_implicit_rewards_by_hand():
  """SimPO's has the length in it, an empty response has nothing; χPO's φ."""
  found = preference_loss.simpo_reward(
    jnp.array([-6.0, -6.0, 0.0]), jnp.array([3, 2, 0]), beta=2.0
  )
  np.testing.assert_allclose(found, [-4.0, -6.0, 0.0])
  # 0.5 (4 + log 4), 0.5 (¼ − log 4), and z = 1.
  found = preference_loss.chi_po_reward(
    jnp.log(jnp.array([4.0, 0.25, 1.0])), beta=0.5
  )
  wanted = [2 + np.log(2), 0.125 - np.log(2), 0.5]
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_ktos_baseline_is_a_detached_mean_from_0_up():
  baseline = preference_loss.kto_baseline
  assert baseline(jnp.array([1.0, -0.5, 2.5])) == 1.0
  assert baseline(jnp.array([1.0, -3.5, 1.0])) == 0.0
  np.testing.assert_array_equal(jax.grad(baseline)(jnp.array([1.0, 2.0])), 0.0)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


# Each loss from its paper, in probabilities where the paper has them: p and q
# are the likelihoods of (chosen, rejected) under policy and reference.
def dpo(p, q, beta, epsilon):
  """The loss of the pair as it stands and as it would be, flipped."""
  del epsilon
  delta = beta * np.log(p[0] / q[0]) - beta * np.log(p[1] / q[1])
  return -np.log(sigmoid(delta)), -np.log(sigmoid(-delta))


DEFINITIONS = {
  "dpo_loss": lambda p, q, b, e: dpo(p, q, b, e)[0],
  "conservative_dpo_loss": lambda p, q, b, e: (
    (1 - e) * dpo(p, q, b, e)[0] + e * dpo(p, q, b, e)[1]
  ),
  "robust_dpo_loss": lambda p, q, b, e: (
    ((1 - e) * dpo(p, q, b, e)[0] - e * dpo(p, q, b, e)[1]) / (1 - 2 * e)
  ),
  "ipo_loss": lambda p, q, b, e: (
    (np.log(p[0] * q[1] / (p[1] * q[0])) - 1 / (2 * b)) ** 2
  ),
  "kto_loss": lambda p, q, b, e: (
    (
      (0.7 - 0.7 * sigmoid(b * (np.log(p[0] / q[0]) - 0.4)))
      + (1.3 - 1.3 * sigmoid(b * (0.4 - np.log(p[1] / q[1]))))
    )
    / 2
  ),
  "chi_po_loss": lambda p, q, b, e: (
    -np.log(
      sigmoid(
        np.clip(
          b * (p[0] / q[0] + np.log(p[0] / q[0]))
          - b * (p[1] / q[1] + np.log(p[1] / q[1])),
          -3.0,
          3.0,
        )
      )
    )
  ),
}
OPTIONS = {
  "conservative_dpo_loss": {"label_smoothing": 0.2},
  "robust_dpo_loss": {"label_smoothing": 0.2},
  "kto_loss": {
    "baseline": jnp.float32(0.4),
    "desirable_weight": 0.7,
    "undesirable_weight": 1.3,
  },
  "chi_po_loss": {"reward_bound": 1.5},
}


def bind(name, **options):
  options = OPTIONS.get(name, {}) | options
  return functools.partial(getattr(preference_loss, name), **options)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_family_from_its_definitions(name):
  rng = np.random.default_rng(1)
  p, q = rng.uniform(0.02, 0.6, size=(2, 2, 64))
  wanted = DEFINITIONS[name](p, q, 0.8, 0.2)
  found = bind(name, beta=jnp.float32(0.8))(
    *jnp.asarray(np.log(p) - np.log(q), jnp.float32)
  )
  assert found.dtype == jnp.float32 and found.shape == (64,)
  np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)


def random_pairs(count=32):
  rng = np.random.default_rng(2)
  return jnp.asarray(3 * rng.normal(size=(2, count)), jnp.float32)


@pytest.mark.parametrize("name", ["conservative_dpo_loss", "robust_dpo_loss"])
def test_without_smoothing_it_is_dpo(name):
  found = bind(name, label_smoothing=0.0, beta=0.3)(*random_pairs())
  wanted = preference_loss.dpo_loss(*random_pairs(), beta=0.3)
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_robust_is_unbiased_under_flipped_labels():
  """(1 − ε) L(c, r) + ε L(r, c) is DPO's loss; conservative's is not."""
  chosen, rejected = random_pairs()
  wanted = preference_loss.dpo_loss(chosen, rejected, beta=0.3)
  mean = lambda loss: (
    0.8 * loss(chosen, rejected) + 0.2 * loss(rejected, chosen)
  )
  found = mean(bind("robust_dpo_loss", beta=0.3))
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
  biased = mean(bind("conservative_dpo_loss", beta=0.3))
  assert np.abs(biased - wanted).max() > 0.1


def test_the_gradient_at_the_reference():
  """−β/2 (∇ log π(chosen) − ∇ log π(rejected)), at π = π_ref."""
  held = jnp.array([[-3.0, -20.0], [-7.0, -1.0]])

  def loss(chosen, rejected):
    ratios = chosen - held[0], rejected - held[1]
    return preference_loss.dpo_loss(*ratios, beta=0.3).sum()

  found = jax.grad(loss, argnums=(0, 1))(*held)
  np.testing.assert_allclose(found[0], -0.15, rtol=1e-6)
  np.testing.assert_allclose(found[1], 0.15, rtol=1e-6)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_family_far_away_is_finite(name):
  """Trap 17, in value and gradient, β = 0.1."""
  far = jnp.array([-400.0, 400.0, -400.0, 400.0])
  loss = lambda c, r: bind(name, beta=0.1)(c, r).sum()
  value, gradients = jax.value_and_grad(loss, argnums=(0, 1))(far, far[::-1])
  assert np.isfinite(value) and np.isfinite(gradients).all()


# All responses of up to three tokens out of three; 0 ends one.
TREE = {"vocab_size": 3, "response_length": 3, "stop_ids": (0,)}
BETA = 0.5
FLIPPED = 0.2


class World:
  """A reference, a reward, and every pair of the reference's responses."""

  def __init__(self):
    rng = np.random.default_rng(3)
    shapes = [(3**t, 3) for t in range(3)]
    draw = lambda: tuple(jnp.asarray(rng.normal(size=x)) for x in shapes)
    self.listing = exact.sequences(**TREE)
    self.reference, self.rewards = draw(), draw()
    self.log_q = self.logprobs(self.reference)
    self.scores = exact.scores(self.rewards, self.listing)
    # P(y beats y'), Bradley and Terry.
    self.beats = jax.nn.sigmoid(self.scores[:, None] - self.scores[None, :])

  def logprobs(self, policy):
    """Of whole responses, nats."""
    return exact.token_logprobs(policy, self.listing).sum(1)

  def expected(self, loss, log_ratio, beats):
    """E[loss(chosen, rejected)] over y, y' ~ π_ref and the judge's label."""
    q, count = jnp.exp(self.log_q), len(self.log_q)
    losses = loss(jnp.repeat(log_ratio, count), jnp.tile(log_ratio, count))
    each = q[:, None] * q * beats * losses.reshape(count, count)
    return 2 * each.sum()  # Whichever of the two was drawn first.

  def best(self, loss, beats, held):
    """The policy that minimises the expected loss; ρ = log π − `held`."""
    flat, restore = jax.flatten_util.ravel_pytree(self.reference)
    of = lambda x: self.logprobs(restore(x)) - held
    objective = jax.value_and_grad(lambda x: self.expected(loss, of(x), beats))
    found = optimize.minimize(
      jax.jit(objective), flat, jac=True, method="BFGS", options={"gtol": 1e-9}
    )
    return restore(jnp.asarray(found.x))

  def reached(self, policy, rewards):
    """(J − J(π_ref)) / (J* − J(π_ref))."""
    problem = {"beta": BETA, "stop_ids": TREE["stop_ids"]}
    value = lambda p: exact.objective(p, self.reference, rewards, **problem)
    log_z, _ = exact.optimum(self.reference, rewards, **problem)
    start = value(self.reference)
    return float((value(policy) - start) / (BETA * log_z - start))

  def table(self, scores):
    """Rewards as levels, from one number a listed response."""
    return tuple(
      jnp.zeros_like(level)
      .at[
        jnp.where(self.listing.lengths == t + 1, self.listing.rows[:, t], 3**t),
        self.listing.tokens[:, t],
      ]
      .set(scores, mode="drop")
      for t, level in enumerate(self.rewards)
    )


@pytest.fixture(scope="module")
def world():
  with jax.enable_x64(True):
    yield World()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dpo_loss", "robust_dpo_loss"])
def test_its_minimum_is_the_closed_form(world, name):
  """π* ∝ π_ref exp(r/β); robust learns it from labels of which 20 % lie."""
  with jax.enable_x64(True):
    beats = world.beats
    if name == "robust_dpo_loss":
      beats = (1 - FLIPPED) * beats + FLIPPED * (1 - beats)
    policy = world.best(bind(name, beta=BETA), beats, world.log_q)
    assert world.reached(policy, world.rewards) > 0.999
    wanted = world.log_q + world.scores / BETA
    wanted -= jax.nn.logsumexp(wanted)
    np.testing.assert_allclose(world.logprobs(policy), wanted, atol=1e-3)


def test_flipped_labels_cost_the_others_something(world):
  """DPO believes them: with 20 % flipped it is less far along, not wrong."""
  with jax.enable_x64(True):
    beats = (1 - FLIPPED) * world.beats + FLIPPED * (1 - world.beats)
    policy = world.best(bind("dpo_loss", beta=BETA), beats, world.log_q)
    reached = world.reached(policy, world.rewards)
    assert 0.6 < reached < 0.75  # 68 %.


def test_without_the_reference_it_is_another_optimum(world):
  """Log-ratios replaced by logprobs: π ∝ exp(r/β), which forgets π_ref."""
  with jax.enable_x64(True):
    policy = world.best(bind("dpo_loss", beta=BETA), world.beats, 0.0)
    wanted = jax.nn.log_softmax(world.scores / BETA)
    np.testing.assert_allclose(world.logprobs(policy), wanted, atol=1e-3)
    reached = world.reached(policy, world.rewards)
    assert 0.2 < reached < 0.4  # 31 %.


def test_ipos_minimum_is_that_of_its_own_reward(world):
  """Its reward is P(y beats a response of π_ref), bounded (theorem 1)."""
  with jax.enable_x64(True):
    scores = world.beats @ jnp.exp(world.log_q)
    policy = world.best(bind("ipo_loss", beta=BETA), world.beats, world.log_q)
    assert world.reached(policy, world.table(scores)) > 0.9999


@pytest.mark.slow
def test_chi_pos_minimum_is_regularised_by_chi_squared(world):
  """It maximises E[r] − β (KL + χ²/2): no direction goes up from there."""
  with jax.enable_x64(True):
    loss = bind("chi_po_loss", beta=BETA, reward_bound=50.0)
    policy = world.best(loss, world.beats, world.log_q)

    def value(policy):
      log_p = world.logprobs(policy)
      p, q = jnp.exp(log_p), jnp.exp(world.log_q)
      chi_squared = jnp.sum((p - q) ** 2 / q)
      divergence = p @ (log_p - world.log_q) + chi_squared / 2
      return p @ world.scores - BETA * divergence

    slope = lambda p: max(
      float(jnp.abs(g).max()) for g in jax.tree.leaves(jax.grad(value)(p))
    )
    assert slope(policy) < 1e-5 < 0.01 < slope(world.reference)
    dpo_policy = world.best(
      bind("dpo_loss", beta=BETA), world.beats, world.log_q
    )
    assert value(policy) > value(dpo_policy) + 0.01
