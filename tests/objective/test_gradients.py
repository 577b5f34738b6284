"""The expected gradient of our estimator is that of the objective, exactly.

Traps 1, 2 and 19. A policy over 3 tokens, responses of up to 3, ended early
by token 0: 15 sequences, all enumerated, in float64. The oracle is autodiff
of the definition

    J(θ) = Σ_y π(y) (r(y) − β log π(y)/π_ref(y))

and the candidate is what a PPO step computes on each sequence (penalised
rewards → GAE → surrogate at ratio 1), weighted with π(y) held fixed.
"""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objective import advantages, kl, masking, policy_loss

V, R, EOS = 3, 3, 0
BETA = 0.4


class Problem(NamedTuple):
  """All sequences, and the state (the tokens so far) before each token."""

  tokens: np.ndarray  # [15, R]
  lengths: np.ndarray  # [15]
  states: np.ndarray  # [15, R], into a table of 7
  scores: np.ndarray  # [15]
  policy: np.ndarray  # [7, V] logits
  reference: np.ndarray  # [7, V]
  values: np.ndarray  # [7], arbitrary


def make_problem() -> Problem:
  rng = np.random.default_rng(0)
  states: dict[tuple[int, ...], int] = {(): 0}
  sequences = []
  for length in range(1, R + 1):
    words = range(1, V)
    for prefix in itertools.product(words, repeat=length - 1):
      states.setdefault(prefix, len(states))
      sequences.append((*prefix, EOS))
  sequences += itertools.product(range(1, V), repeat=R)  # Truncated.
  tokens = np.zeros((len(sequences), R), int)
  visited = np.zeros((len(sequences), R), int)
  for row, sequence in enumerate(sequences):
    tokens[row, : len(sequence)] = sequence
    for t in range(len(sequence)):
      visited[row, t] = states[sequence[:t]]
  return Problem(
    tokens=tokens,
    lengths=np.array([len(sequence) for sequence in sequences]),
    states=visited,
    scores=rng.normal(size=len(sequences)),
    policy=rng.normal(size=(len(states), V)),
    reference=rng.normal(size=(len(states), V)),
    values=rng.normal(size=len(states)),
  )


PROBLEM = make_problem()
MASK = np.arange(R) < PROBLEM.lengths[:, None]


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def token_logprobs(logits):
  """[15, R], 0 after the end."""
  table = jax.nn.log_softmax(jnp.asarray(logits))
  return jnp.where(MASK, table[PROBLEM.states, PROBLEM.tokens], 0.0)


def true_gradient(beta=BETA, scores=PROBLEM.scores):
  """∇(−J), with J from its definition."""

  def objective(logits):
    logprob = token_logprobs(logits).sum(1)
    reference = token_logprobs(PROBLEM.reference).sum(1)
    total = jnp.asarray(scores) - beta * (logprob - reference)
    return (jnp.exp(logprob) * total).sum()

  return -np.asarray(jax.grad(objective)(jnp.asarray(PROBLEM.policy)))


def rewards_of(beta=BETA, scores=PROBLEM.scores):
  old, reference = map(token_logprobs, (PROBLEM.policy, PROBLEM.reference))
  log_ratio = old - reference
  return kl.penalised_rewards(
    jnp.asarray(scores),
    log_ratio,
    jnp.asarray(PROBLEM.lengths),
    beta=jnp.asarray(beta, float),
  )


def expected_gradient(rewards, values, *, gamma=1.0, gae_lambda=1.0):
  """Σ_y π(y) ∇ Σ_t of the surrogate at ratio 1, π(y) held fixed."""
  old = token_logprobs(PROBLEM.policy)
  found, _ = advantages.generalized_advantages(
    rewards,
    jnp.asarray(values),
    jnp.asarray(MASK),
    gamma=gamma,
    gae_lambda=gae_lambda,
  )
  weight = jnp.exp(old.sum(1))

  def loss(logits):
    losses, _ = policy_loss.clipped_policy_loss(
      token_logprobs(logits), old, found, clip_epsilon=0.2
    )
    per_sequence = jnp.where(MASK, losses, 0.0).sum(1)
    return masking.masked_sum(weight * per_sequence, jnp.ones(15, bool))

  return np.asarray(jax.grad(loss)(jnp.asarray(PROBLEM.policy)))


def relative_error(found, wanted):
  return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


def state_values(beta=BETA):
  """V(s) = E[Σ_{k ≥ t} r_k | s], from all sequences through s."""
  probability = np.exp(token_logprobs(PROBLEM.policy).sum(1))
  to_go = np.cumsum(np.asarray(rewards_of(beta))[:, ::-1], 1)[:, ::-1]
  values = np.zeros(len(PROBLEM.values))
  for state in range(len(values)):
    rows, columns = np.nonzero(MASK & (PROBLEM.states == state))
    weight = probability[rows]
    values[state] = (weight * to_go[rows, columns]).sum() / weight.sum()
  return values


def test_the_enumeration_is_complete():
  assert jnp.zeros(()).dtype == jnp.float64
  assert len(PROBLEM.tokens) == 15 and len(PROBLEM.policy) == 7
  probability = np.exp(token_logprobs(PROBLEM.policy).sum(1))
  np.testing.assert_allclose(probability.sum(), 1.0, rtol=1e-14)


@pytest.mark.parametrize("baseline", ["none", "arbitrary", "huge", "exact"])
@pytest.mark.parametrize("beta", [0.0, BETA, 3.0])
def test_the_gradient_is_that_of_the_sequence_reverse_kl(baseline, beta):
  """Trap 1: whatever the baseline."""
  table = {
    "none": np.zeros(7),
    "arbitrary": PROBLEM.values,
    "huge": 100 * PROBLEM.values,
    "exact": state_values(beta),
  }[baseline]
  found = expected_gradient(rewards_of(beta), table[PROBLEM.states])
  np.testing.assert_allclose(found, true_gradient(beta), atol=1e-10)


@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 0.95])
def test_with_true_values_every_lambda_gives_the_same_gradient(gae_lambda):
  """λ trades variance for the critic's bias; a perfect critic has none."""
  values = state_values()[PROBLEM.states]
  found = expected_gradient(rewards_of(), values, gae_lambda=gae_lambda)
  np.testing.assert_allclose(found, true_gradient(), atol=1e-10)
  biased = PROBLEM.values[PROBLEM.states]
  found = expected_gradient(rewards_of(), biased, gae_lambda=gae_lambda)
  assert relative_error(found, true_gradient()) > 0.01


def test_the_penalty_is_counted_once():
  """Trap 19: the gradient's slope in β is ∇ KL(π‖π_ref), once."""
  values = PROBLEM.values[PROBLEM.states]
  low, high = (expected_gradient(rewards_of(b), values) for b in (0.2, 0.7))
  wanted = true_gradient(beta=1.0, scores=np.zeros(15))
  np.testing.assert_allclose((high - low) / 0.5, wanted, atol=1e-10)


@pytest.mark.parametrize(
  ("mutant", "least_error"),
  [
    ("flipped sign", 1.99),
    ("counted twice", 0.99),
    ("k2", 0.1),
    ("k3", 0.1),
    ("absolute", 0.1),
    ("no return-to-go", 0.1),
  ],
)
def test_no_other_penalty_has_that_gradient(mutant, least_error):
  """Trap 1: what goes by the name of a KL penalty elsewhere, measured.

  Scores are 0: the error is that of the penalty's gradient alone.
  """
  zeros = np.zeros(15)
  old, reference = map(token_logprobs, (PROBLEM.policy, PROBLEM.reference))
  log_ratio = old - reference
  rewards = {
    "flipped sign": rewards_of(-BETA, zeros),
    "counted twice": rewards_of(2 * BETA, zeros),
    "k2": -BETA * log_ratio**2 / 2,
    "k3": -BETA * kl.k3(log_ratio),
    "absolute": -BETA * jnp.abs(log_ratio),
    "no return-to-go": rewards_of(BETA, zeros),
  }[mutant]
  gamma = 0.0 if mutant == "no return-to-go" else 1.0
  found = expected_gradient(rewards, jnp.zeros_like(rewards), gamma=gamma)
  assert relative_error(found, true_gradient(scores=zeros)) > least_error


def test_k1_in_the_loss_does_not_know_the_reference():
  """Trap 1: E[∇ log π] = 0, so its penalty is none at all."""
  weight = jnp.exp(token_logprobs(PROBLEM.policy).sum(1))
  reference = token_logprobs(PROBLEM.reference).sum(1)

  def penalty(logits):
    return (weight * (token_logprobs(logits).sum(1) - reference)).sum()

  gradient = jax.grad(penalty)(jnp.asarray(PROBLEM.policy))
  np.testing.assert_allclose(gradient, 0.0, atol=1e-12)
