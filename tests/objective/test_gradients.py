"""Every penalty's expected gradient, by enumeration in float64.

Traps 1, 2 and 19. The oracle is autodiff of definitions, summed over every
response y of a small policy:

    sequence_reverse  Σ_y π(y) log π(y)/π_ref(y)
    token_reverse     Σ_y π̄(y) Σ_t KL(π(·|s_t)‖π_ref(·|s_t)),  π̄ held fixed
    token_forward     Σ_y π̄(y) Σ_t KL(π_ref(·|s_t)‖π(·|s_t))

The candidate is what a PPO step computes on each response (terms → rewards →
advantages → surrogate and penalty in the loss, at ratio 1), weighted with π(y).

Mutants that were tried, and the test that fails (here, if no file is named).
objective/kl.py: the sign of each of the six targets' terms; the next state's
KL taken from the state before, or without its mask; reverse and forward
exchanged; `_detached` without its stop_gradient, without its ratio; expm1 of
+ℓ; the penalty added to the rewards, or in rewards and loss both; without the
stop_gradient or the mask in the rewards, k3 with −ℓ (test_kl.py). The state's
own KL in place of the next one's survives here: it is a baseline, and equal on
average (test_kl.py knows it apart). objective/logprobs.py: Σ q d for Σ p d
(test_logprobs.py); the gradient without its mean, q − p, p − one_hot.
objective/advantages.py: the sign. steps/ppo.py and learner.py: the price
without whitening's scale, negated, without the weights, −ℓ
(steps/test_penalties.py).
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objective import advantages, kl, logprobs, policy_loss

BETA = 0.4
SAMPLED = "sequence_reverse", "sampled"
SEQUENCE_REVERSE = [SAMPLED, ("sequence_reverse", "rao_blackwellised")]
UNBIASED = [key for key in kl.PENALTIES if key[0] in kl.TARGETS]
RECIPES = [key for key in kl.PENALTIES if key[0] not in kl.TARGETS]


class Problem(NamedTuple):
  """All responses, and the state (the tokens so far) before each token."""

  tokens: np.ndarray  # [S, R]
  lengths: np.ndarray  # [S]
  states: np.ndarray  # [S, R], rows of the tables
  scores: np.ndarray  # [S]
  policy: np.ndarray  # [N, V] logits
  reference: np.ndarray  # [N, V]
  values: np.ndarray  # [N], arbitrary

  @property
  def mask(self):
    return np.arange(self.tokens.shape[1]) < self.lengths[:, None]


def make_problem(vocab_size, size, stops, distance, seed) -> Problem:
  rng = np.random.default_rng(seed)
  states: dict[tuple[int, ...], int] = {}
  responses = []
  for length in range(1, size + 1):
    words = [v for v in range(vocab_size) if v not in stops]
    for prefix in itertools.product(words, repeat=length - 1):
      states[prefix] = len(states)
      last = range(vocab_size) if length == size else stops
      responses += [(*prefix, token) for token in last]
  tokens = np.zeros((len(responses), size), int)
  visited = np.zeros((len(responses), size), int)
  for row, response in enumerate(responses):
    tokens[row, : len(response)] = response
    for t in range(len(response)):
      visited[row, t] = states[response[:t]]
  reference = rng.normal(size=(len(states), vocab_size))
  return Problem(
    tokens=tokens,
    lengths=np.array([len(response) for response in responses]),
    states=visited,
    scores=rng.normal(size=len(responses)),
    policy=reference + distance * rng.normal(size=reference.shape),
    reference=reference,
    values=rng.normal(size=len(states)),
  )


# Stopped early and cut off; the stop is the pad; without stops; two of them.
PROBLEMS = {
  "near": make_problem(3, 3, (0,), 0.3, seed=0),
  "far": make_problem(3, 3, (0,), 1.5, seed=1),
  "no stops": make_problem(2, 4, (), 1.0, seed=2),
  "two stops": make_problem(4, 3, (1, 3), 1.0, seed=3),
}


@pytest.fixture(params=PROBLEMS)
def name(request):
  return request.param


@pytest.fixture
def problem(name):
  return PROBLEMS[name]


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


# The definitions.


def log_tables(problem, logits):
  tables = jnp.asarray(logits), jnp.asarray(problem.reference)
  return tuple(jax.nn.log_softmax(table) for table in tables)


def response_logprobs(problem, logits):
  table = jax.nn.log_softmax(jnp.asarray(logits))
  chosen = table[problem.states, problem.tokens]
  return jnp.where(problem.mask, chosen, 0.0).sum(1)


def probabilities(problem):
  return np.exp(np.asarray(response_logprobs(problem, problem.policy)))


def sequence_reverse(problem, logits):
  logprob = response_logprobs(problem, logits)
  reference = response_logprobs(problem, problem.reference)
  return (jnp.exp(logprob) * (logprob - reference)).sum()


def over_visited_states(problem, kl_of_state):
  visits = np.zeros(len(problem.policy))
  weights = np.where(problem.mask, probabilities(problem)[:, None], 0.0)
  np.add.at(visits, problem.states, weights)
  return (visits * kl_of_state).sum()


def token_reverse(problem, logits):
  log_p, log_q = log_tables(problem, logits)
  kl_of_state = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
  return over_visited_states(problem, kl_of_state)


def token_forward(problem, logits):
  log_p, log_q = log_tables(problem, logits)
  kl_of_state = (jnp.exp(log_q) * (log_q - log_p)).sum(-1)
  return over_visited_states(problem, kl_of_state)


TARGETS = {
  "sequence_reverse": sequence_reverse,
  "token_reverse": token_reverse,
  "token_forward": token_forward,
}


def expected_reward(problem, logits):
  return (jnp.exp(response_logprobs(problem, logits)) * problem.scores).sum()


def gradient_of(function, problem, beta=0.0, reward=0.0):
  """∇ (β · function − reward · E[r]) at the policy."""
  total = lambda logits: (
    beta * function(problem, logits) - reward * expected_reward(problem, logits)
  )
  return np.asarray(jax.grad(total)(jnp.asarray(problem.policy)))


def target_gradient(problem, target):
  return gradient_of(TARGETS[target], problem, beta=1.0)


# What a step computes.


def terms_of(problem, logits, sampled_logprobs=None):
  comparison = logprobs.statistics(
    jnp.asarray(logits)[problem.states],
    jnp.asarray(problem.reference)[problem.states],
    jnp.asarray(problem.tokens),
  )
  real = lambda x: jnp.where(problem.mask, x, 0.0)
  new = real(comparison.logprobs)
  old = new if sampled_logprobs is None else sampled_logprobs
  terms = kl.Terms(
    log_ratio=real(comparison.logprobs - comparison.reference_logprobs),
    reverse_kl=comparison.reverse_kl,
    forward_kl=comparison.forward_kl,
    importance_ratio=policy_loss.importance_ratio(new, old),
  )
  return terms, new


def rewards_of(problem, penalty, *, beta, scores):
  terms, _ = terms_of(problem, problem.policy)
  nats = kl.reward_penalty(penalty, terms, jnp.asarray(problem.mask))
  return kl.penalised_rewards(
    jnp.asarray(scores),
    nats,
    jnp.asarray(problem.lengths),
    beta=jnp.asarray(beta, float),
  )


@functools.cache
def compiled_gradients(name, key, gamma, gae_lambda):
  """The gradients `[S, N, V]` of a problem's responses under a penalty."""
  problem, penalty = PROBLEMS[name], kl.PENALTIES[key]
  mask = jnp.asarray(problem.mask)

  def gradients(beta, scores, values):
    _, old = terms_of(problem, problem.policy)
    found, _ = advantages.generalized_advantages(
      rewards_of(problem, penalty, beta=beta, scores=scores),
      values[problem.states],
      mask,
      gamma=gamma,
      gae_lambda=gae_lambda,
    )

    def losses(logits):
      terms, new = terms_of(problem, logits, old)
      loss, _ = policy_loss.clipped_policy_loss(
        new, old, found, clip_epsilon=0.2
      )
      if penalty.in_loss is not None:
        loss = loss + beta * penalty.in_loss(terms)
      return jnp.where(mask, loss, 0.0).sum(1)

    return jax.jacrev(losses)(jnp.asarray(problem.policy))

  return jax.jit(gradients)


def response_gradients(
  name, key, *, beta=1.0, scores=0.0, values=0.0, gamma=1.0, gae_lambda=1.0
):
  """Each response's gradient `[S, N, V]` of the loss, at ratio 1."""
  problem = PROBLEMS[name]
  scores = scores + np.zeros(len(problem.lengths))
  values = values + np.zeros(len(problem.policy))
  compiled = compiled_gradients(name, key, gamma, gae_lambda)
  return np.asarray(compiled(beta, scores, values))


def expected(problem, gradients):
  return np.einsum("s,snv->nv", probabilities(problem), gradients)


def variance(problem, gradients):
  """Trace of the covariance of one response's gradient."""
  squares = np.square(gradients).sum((1, 2))
  mean = expected(problem, gradients)
  return probabilities(problem) @ squares - np.square(mean).sum()


def relative_error(found, wanted):
  return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def test_the_enumeration_is_complete(problem):
  assert jnp.zeros(()).dtype == jnp.float64
  np.testing.assert_allclose(probabilities(problem).sum(), 1.0, rtol=1e-14)
  # Responses and states: 1 + 2 + 4 · 3 (and 1 + 2 + 4), 2⁴, 2 + 4 + 4 · 4.
  sizes = {len(p.tokens): len(p.policy) for p in PROBLEMS.values()}
  assert sizes == {15: 7, 16: 15, 22: 7}


# The table.


@pytest.mark.parametrize("key", UNBIASED, ids="-".join)
def test_a_target_has_its_gradient(name, problem, key):
  """Trap 1, to 1e-10, and with rewards beside it to 1e-10 as well."""
  assert kl.PENALTIES[key].target == key[0]
  found = expected(problem, response_gradients(name, key))
  wanted = target_gradient(problem, key[0])
  np.testing.assert_allclose(found, wanted, atol=1e-10)
  rewarded = response_gradients(name, key, beta=BETA, scores=problem.scores)
  wanted = gradient_of(TARGETS[key[0]], problem, beta=BETA, reward=1.0)
  np.testing.assert_allclose(expected(problem, rewarded), wanted, atol=1e-10)


@pytest.mark.parametrize("key", RECIPES, ids="-".join)
def test_a_recipe_has_the_gradient_that_it_is_said_to_have(name, problem, key):
  """Trap 1: its target's on the first minibatch, or none of the three."""
  found = expected(problem, response_gradients(name, key))
  if target := kl.PENALTIES[key].target:
    wanted = target_gradient(problem, target)
    np.testing.assert_allclose(found, wanted, atol=1e-10)
  else:
    for target in kl.TARGETS:
      assert relative_error(found, target_gradient(problem, target)) > 0.05
  sequence = target_gradient(problem, "sequence_reverse")
  assert relative_error(found, sequence) > 0.05


def test_the_targets_differ(problem):
  """The comparisons above can tell them apart."""
  for a, b in itertools.combinations(kl.TARGETS, 2):
    error = relative_error(
      target_gradient(problem, a), target_gradient(problem, b)
    )
    assert error > 0.05


def test_k1_in_the_loss_does_not_know_the_reference(name, problem):
  """Trap 1: E[∇ log π] = 0, so its penalty is none at all."""
  gradients = response_gradients(name, ("k1_in_loss", "sampled"))
  np.testing.assert_allclose(expected(problem, gradients), 0.0, atol=1e-12)


def test_what_the_detached_exact_reward_lacks(name, problem):
  """It lacks what the loss of the Rao-Blackwellised penalty has."""
  key = "exact_detached_reward", "rao_blackwellised"
  found = expected(problem, response_gradients(name, key))
  wanted = target_gradient(problem, "sequence_reverse")
  missing = target_gradient(problem, "token_reverse")
  np.testing.assert_allclose(found, wanted - missing, atol=1e-10)


def test_no_discount_is_token_local(name, problem):
  """k1 in the reward with γ = 0 is the token-local reverse KL."""
  gradients = response_gradients(name, SAMPLED, gamma=0.0)
  wanted = target_gradient(problem, "token_reverse")
  np.testing.assert_allclose(expected(problem, gradients), wanted, atol=1e-10)


@pytest.mark.parametrize("target", kl.TARGETS)
def test_rao_blackwellising_lowers_the_variance(name, problem, target):
  sampled, exact = (
    variance(problem, response_gradients(name, (target, estimator)))
    for estimator in ("sampled", "rao_blackwellised")
  )
  assert exact < 0.9 * sampled


# PPO's own pieces around it.


@pytest.mark.parametrize("key", SEQUENCE_REVERSE, ids="-".join)
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_a_baseline_changes_nothing(name, problem, key, scale):
  gradients = response_gradients(
    name,
    key,
    beta=BETA,
    scores=problem.scores,
    values=scale * problem.values,
  )
  wanted = gradient_of(sequence_reverse, problem, beta=BETA, reward=1.0)
  np.testing.assert_allclose(expected(problem, gradients), wanted, atol=1e-10)


def state_values(problem, penalty):
  """V(s) = E[Σ_{k ≥ t} r_k | s], from all responses through s."""
  rewards = rewards_of(problem, penalty, beta=BETA, scores=problem.scores)
  to_go = np.cumsum(np.asarray(rewards)[:, ::-1], 1)[:, ::-1]
  values = np.zeros(len(problem.values))
  for state in range(len(values)):
    rows, columns = np.nonzero(problem.mask & (problem.states == state))
    weight = probabilities(problem)[rows]
    values[state] = (weight * to_go[rows, columns]).sum() / weight.sum()
  return values


@pytest.mark.slow
@pytest.mark.parametrize("key", SEQUENCE_REVERSE, ids="-".join)
def test_with_true_values_every_lambda_gives_the_same_gradient(
  name, problem, key
):
  """λ trades variance for the critic's bias; a perfect critic has none."""
  wanted = gradient_of(sequence_reverse, problem, beta=BETA, reward=1.0)
  true = state_values(problem, kl.PENALTIES[key])
  for gae_lambda in (0.0, 0.5, 0.95):
    found = [
      expected(
        problem,
        response_gradients(
          name,
          key,
          beta=BETA,
          scores=problem.scores,
          values=values,
          gae_lambda=gae_lambda,
        ),
      )
      for values in (true, problem.values)
    ]
    np.testing.assert_allclose(found[0], wanted, atol=1e-10)
    assert relative_error(found[1], wanted) > 0.005


@pytest.mark.parametrize("key", UNBIASED, ids="-".join)
def test_the_penalty_is_counted_once(name, problem, key):
  """Trap 19: the gradient's slope in β is its target's, once."""
  options = {"scores": problem.scores, "values": problem.values}
  low, high = (
    expected(problem, response_gradients(name, key, beta=beta, **options))
    for beta in (0.2, 0.7)
  )
  wanted = target_gradient(problem, key[0])
  np.testing.assert_allclose((high - low) / 0.5, wanted, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
  "key", [key for key in UNBIASED if key not in SEQUENCE_REVERSE], ids="-".join
)
def test_a_token_penalty_follows_the_policy_that_learns(problem, key):
  """Trap 2: off the policy that sampled, the ratio of the token and no other.

  The expected gradient under samples of π_old is Σ_y π_old(y) Σ_t ∇ KL of the
  learner at s_t, for both estimators: a ratio per token and not per sequence
  or batch. k2 and k3 in the loss, without a ratio, miss it.
  """
  rng = np.random.default_rng(5)
  learner = problem.policy + 0.5 * rng.normal(size=problem.policy.shape)
  _, old = terms_of(problem, problem.policy)
  mask = jnp.asarray(problem.mask)

  def loss(logits, penalty):
    terms, _ = terms_of(problem, logits, old)
    nats = jnp.where(mask, penalty.in_loss(terms), 0.0).sum(1)
    return (jnp.asarray(probabilities(problem)) * nats).sum()

  gradient = lambda key: np.asarray(
    jax.grad(loss)(jnp.asarray(learner), kl.PENALTIES[key])
  )
  wanted = np.asarray(
    jax.grad(lambda logits: TARGETS[key[0]](problem, logits))(
      jnp.asarray(learner)
    )
  )
  np.testing.assert_allclose(gradient(key), wanted, atol=1e-10)
  without = {"token_reverse": "k2_in_loss", "token_forward": "k3_in_loss"}
  assert relative_error(gradient((without[key[0]], "sampled")), wanted) > 0.05
