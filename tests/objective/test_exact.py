"""The exact oracle against sums over all responses, in loops, in float64.

Every problem holds NaN wherever its docstring says that nothing is read: in
dead rows, and as reward where no response ends. Trees with and without stop
tokens, with stop id 0 (whose rows are the first of each level) and with two.

Mutants tried, each of which fails here: stop tokens ignored in `_live`, or in
`_ends`; dead rows not replaced before the softmax; rewards not masked by dead
rows, or not by the end; the log-ratio's sign, the policy that KL averages
over, and β's sign; prefixes read with the last token most significant (in the
backward sum, in the Bellman pass and in `sequences`); rewards not divided by
β; log Z not subtracted; the `where` around 0 · ∞ removed; β ≤ 0 or NaN let
through; a repeated stop id listed twice; the mask before the softmax of
`token_logprobs` removed.
"""

import functools
import itertools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.objective import exact

TOLERANCE = 1e-12
BETA = 0.4

# V, R, stop ids.
TREES = {
  "never stops": (3, 3, ()),
  "stops with 0": (3, 4, (0,)),
  "two stops": (4, 3, (1, 3)),
  "binary": (2, 4, (1,)),
  "bandit": (3, 1, ()),
  "every token stops": (2, 3, (0, 1)),
}


class Problem(NamedTuple):
  vocab_size: int
  length: int
  stop_ids: tuple[int, ...]
  policy: exact.Levels
  reference: exact.Levels
  rewards: exact.Levels


def prefixes(vocab_size, length):
  """All of a length, in the order of their rows."""
  return list(itertools.product(range(vocab_size), repeat=length))


def ends(response, problem):
  return response[-1] in problem.stop_ids or len(response) == problem.length


def is_dead(prefix, problem):
  return bool(set(prefix) & set(problem.stop_ids))


def responses(problem, prefix=()):
  """Every response that begins with the prefix."""
  if prefix and ends(prefix, problem):
    yield prefix
  else:
    for v in range(problem.vocab_size):
      yield from responses(problem, (*prefix, v))


def make_problem(name, *, seed=0, fill=np.nan):
  vocab_size, length, stop_ids = TREES[name]
  rng = np.random.default_rng(seed)
  empty = Problem(vocab_size, length, stop_ids, (), (), ())
  levels = []
  for t in range(length):
    logits, other, reward = rng.normal(size=(3, vocab_size**t, vocab_size))
    for row, prefix in enumerate(prefixes(vocab_size, t)):
      if is_dead(prefix, empty):
        logits[row] = other[row] = reward[row] = fill
      for v in range(vocab_size):
        if not ends((*prefix, v), empty):
          reward[row, v] = fill
    levels.append((logits, other, reward))
  policy, reference, rewards = zip(*levels)
  return Problem(vocab_size, length, stop_ids, policy, reference, rewards)


def row(prefix, problem):
  """The number that a prefix spells, its first token most significant."""
  return prefixes(problem.vocab_size, len(prefix)).index(prefix)


def entry(levels, prefix, problem):
  return levels[len(prefix)][row(prefix, problem)]


def log_probability(levels, response, problem):
  total = 0.0
  for t, token in enumerate(response):
    logits = entry(levels, response[:t], problem)
    total += logits[token] - np.log(np.exp(logits).sum())
  return total


def reward_of(response, problem):
  return entry(problem.rewards, response[:-1], problem)[response[-1]]


def defined_kl(p, q, problem):
  total = 0.0
  for y in responses(problem):
    log_p, log_q = (log_probability(x, y, problem) for x in (p, q))
    total += np.exp(log_p) * (log_p - log_q)
  return total


def defined_objective(problem, beta):
  total = 0.0
  for y in responses(problem):
    probability = np.exp(log_probability(problem.policy, y, problem))
    total += probability * reward_of(y, problem)
  return total - beta * defined_kl(problem.policy, problem.reference, problem)


def defined_gradient(problem, beta):
  """Σ_y ∇π(y) (r − β log π/π_ref); what β ∇ log π adds averages to 0."""
  gradient = [np.zeros(level.shape) for level in problem.policy]
  for y in responses(problem):
    log_p = log_probability(problem.policy, y, problem)
    log_q = log_probability(problem.reference, y, problem)
    weight = np.exp(log_p) * (reward_of(y, problem) - beta * (log_p - log_q))
    for t, token in enumerate(y):
      logits = entry(problem.policy, y[:t], problem)
      score = -np.exp(logits) / np.exp(logits).sum()
      score[token] += 1.0
      gradient[t][row(y[:t], problem)] += weight * score
  return tuple(gradient)


def defined_optimum(problem, beta):
  """Log Z, and each response's probability under π*."""
  weights = {}
  for y in responses(problem):
    log_q = log_probability(problem.reference, y, problem)
    weights[y] = np.exp(log_q + reward_of(y, problem) / beta)
  total = sum(weights.values())
  return np.log(total), {y: weight / total for y, weight in weights.items()}


class Figures(NamedTuple):
  reverse_kl: np.ndarray
  forward_kl: np.ndarray
  reward: np.ndarray
  objective: np.ndarray
  gradient: exact.Levels
  log_z: np.ndarray
  best: exact.Levels
  gap: np.ndarray  # KL(π‖π*)


@functools.partial(jax.jit, static_argnames="stop_ids")
def compute(policy, reference, rewards, beta, *, stop_ids):
  kl = functools.partial(exact.sequence_kl, stop_ids=stop_ids)

  def objective(policy):
    return exact.objective(
      policy, reference, rewards, beta=beta, stop_ids=stop_ids
    )

  log_z, best = exact.optimum(reference, rewards, beta=beta, stop_ids=stop_ids)
  return Figures(
    reverse_kl=kl(policy, reference),
    forward_kl=kl(reference, policy),
    reward=exact.expected_reward(policy, rewards, stop_ids=stop_ids),
    objective=objective(policy),
    gradient=jax.grad(objective)(policy),
    log_z=log_z,
    best=best,
    gap=kl(policy, best),
  )


def figures(problem, beta=BETA):
  """All that the oracle says, as numpy."""
  arrays = jax.tree.map(jnp.asarray, problem[3:])
  return jax.device_get(compute(*arrays, beta, stop_ids=problem.stop_ids))


def listing(problem):
  return jax.device_get(
    exact.sequences(
      vocab_size=problem.vocab_size,
      response_length=problem.length,
      stop_ids=problem.stop_ids,
    )
  )


close = functools.partial(np.testing.assert_allclose, rtol=0, atol=TOLERANCE)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.fixture(params=TREES)
def problem(request):
  return make_problem(request.param)


def test_kl_both_ways(problem):
  found = figures(problem)
  p, q = problem.policy, problem.reference
  close(found.reverse_kl, defined_kl(p, q, problem))
  close(found.forward_kl, defined_kl(q, p, problem))
  assert found.reverse_kl.dtype == np.float64
  assert figures(problem._replace(reference=p)).reverse_kl == 0.0


@pytest.mark.parametrize("beta", [0.0, BETA, 3.0])
def test_the_objective_and_its_gradient(problem, beta):
  found = figures(problem, beta)
  close(found.objective, defined_objective(problem, beta))
  close(found.reward, defined_objective(problem, 0.0))
  jax.tree.map(close, found.gradient, defined_gradient(problem, beta))


def test_the_optimum(problem):
  found = figures(problem)
  log_z, probabilities = defined_optimum(problem, BETA)
  close(found.log_z, log_z)

  def through(prefix):
    t = len(prefix)
    return sum(p for y, p in probabilities.items() if y[:t] == prefix)

  for t in range(problem.length):
    for prefix in prefixes(problem.vocab_size, t):
      if not is_dead(prefix, problem):
        for v in range(problem.vocab_size):
          wanted = through((*prefix, v)) / through(prefix)
          close(np.exp(entry(found.best, prefix, problem)[v]), wanted)


@pytest.mark.parametrize("beta", [0.1, BETA, 3.0])
def test_distance_to_the_optimum_is_what_j_lacks(problem, beta):
  """KL(π‖π*) = (J* − J(π)) / β, with J* = β log Z; and J(π*) = J*."""
  found = figures(problem, beta)
  value = beta * found.log_z
  close(found.gap, (value - found.objective) / beta, rtol=TOLERANCE)
  at_best = figures(problem._replace(policy=found.best), beta)
  close(at_best.objective, value)
  for level in at_best.gradient:
    close(level, 0.0)


def test_a_bandit_by_hand():
  """π = (1/2, 1/4, 1/4), π_ref = (1/4, 1/4, 1/2), r = (0, 1, 2), β = 1/2.

  KL(π‖π_ref) = ½ ln 2 + 0 − ¼ ln 2 = ¼ ln 2; E r = ¼ + ½.
  Z = ¼ + ¼ e² + ½ e⁴.
  """
  policy, reference = (
    (np.log([p]),) for p in ([0.5, 0.25, 0.25], [0.25, 0.25, 0.5])
  )
  rewards = (np.array([[0.0, 1.0, 2.0]]),)
  found = figures(Problem(3, 1, (), policy, reference, rewards), 0.5)
  close(found.reverse_kl, 0.25 * np.log(2))
  close(found.reward, 0.75)
  close(found.objective, 0.75 - 0.125 * np.log(2))
  weights = np.array([0.25, 0.25 * np.e**2, 0.5 * np.e**4])
  close(found.log_z, np.log(weights.sum()))
  close(np.exp(found.best[0][0]), weights / weights.sum())


@pytest.mark.parametrize("name", TREES)
def test_what_is_not_read_changes_nothing(name):
  """Trap 17: NaN in dead rows, or as a reward that none gets, bit for bit."""
  problem, clean = (make_problem(name, fill=fill) for fill in (np.nan, 0.0))
  found = figures(problem)
  jax.tree.map(np.testing.assert_array_equal, found, figures(clean))
  for t in range(problem.length):
    for prefix in prefixes(problem.vocab_size, t):
      if is_dead(prefix, problem):
        assert not entry(found.gradient, prefix, problem).any()


def test_zero_times_infinity_is_zero():
  """A token that is never written, as one that hardly ever is."""
  problem = make_problem("two stops")

  def with_logit(levels, logit):
    first = levels[0].copy()
    first[0, 2] = logit
    return (first, *levels[1:])

  def policies(policy_logit, reference_logit):
    return problem._replace(
      policy=with_logit(problem.policy, policy_logit),
      reference=with_logit(problem.reference, reference_logit),
    )

  never = figures(policies(-np.inf, -np.inf))
  jax.tree.map(close, never.gradient, figures(policies(-700, -700)).gradient)
  for kl in (never.reverse_kl, never.forward_kl):
    assert np.isfinite(kl)
  close(never.reverse_kl, figures(policies(-700, -700)).reverse_kl)
  one_way = figures(policies(-np.inf, 0.0))
  assert np.isfinite(one_way.reverse_kl) and one_way.forward_kl == np.inf


@pytest.mark.parametrize(
  ("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 1e-5)]
)
def test_sixty_nats(dtype, tolerance):
  """Trap 17: finite, and right, where policy and reference are far apart."""
  problem = make_problem("two stops", fill=0.0)
  far = problem._replace(
    policy=tuple(60 * np.sign(level) for level in problem.policy),
    reference=tuple(60 * np.sign(level) for level in problem.reference),
  )
  arrays = jax.tree.map(lambda x: x.astype(dtype), far[3:])
  found = figures(Problem(*far[:3], *arrays))
  assert all(x.dtype == dtype for x in jax.tree.leaves(found))
  # What cancels is of the size of β · 120 nats.
  near = functools.partial(
    np.testing.assert_allclose, rtol=tolerance, atol=50 * tolerance
  )
  near(found.objective, defined_objective(far, BETA))
  wanted = defined_gradient(far, BETA)
  jax.tree.map(near, found.gradient, wanted)
  assert max(abs(level).max() for level in wanted) > 1.0
  near(found.log_z, defined_optimum(far, BETA)[0])


def test_a_heavy_penalty_gives_the_reference_back(problem):
  """β → ∞: π* → π_ref and J* → E_ref[r]."""
  at_reference = figures(problem._replace(policy=problem.reference), 1e9)
  close(at_reference.gap, 0.0)
  value = 1e9 * at_reference.log_z
  np.testing.assert_allclose(value, at_reference.reward, atol=1e-5)


def test_no_penalty_gives_the_best_response(problem):
  """β → 0: π* writes the response with the highest reward; J* is that."""
  best = max(responses(problem), key=lambda y: reward_of(y, problem))
  found = figures(problem, 1e-4)
  close(np.exp(log_probability(found.best, best, problem)), 1.0)
  value = 1e-4 * found.log_z
  np.testing.assert_allclose(value, reward_of(best, problem), atol=1e-2)


def test_beta_may_be_traced():
  """Many β in one program; the slope of J* in β is −KL(π*‖π_ref)."""
  problem = make_problem("stops with 0")

  @jax.jit
  @jax.vmap
  def optima(beta):
    def best_value(beta):
      log_z, best = exact.optimum(
        tuple(map(jnp.asarray, problem.reference)),
        tuple(map(jnp.asarray, problem.rewards)),
        beta=beta,
        stop_ids=problem.stop_ids,
      )
      return beta * log_z, best

    return jax.value_and_grad(best_value, has_aux=True)(beta)

  betas = np.array([0.05, 0.3, 2.0])
  (values, policies), slopes = jax.device_get(optima(betas))
  for i, beta in enumerate(betas.tolist()):
    best = tuple(level[i] for level in policies)
    found = figures(problem._replace(policy=best), beta)
    close(values[i], beta * found.log_z)
    jax.tree.map(close, best, found.best)
    close(slopes[i], -found.reverse_kl)


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_beta_must_be_positive(beta):
  levels = (jnp.zeros((1, 3)),)
  for given in (beta, jnp.asarray(beta)):
    with pytest.raises(ValueError, match=f"beta={beta}; wanted > 0"):
      exact.optimum(levels, levels, beta=given, stop_ids=())


@pytest.mark.parametrize("stop_ids", [(3,), (-1,), (0, 7)])
def test_stop_ids_must_be_in_the_vocabulary(stop_ids):
  """A stop id of another vocabulary would end nothing."""
  problem = make_problem("never stops")._replace(stop_ids=stop_ids)
  for function in (figures, listing):
    with pytest.raises(ValueError, match=r"stop_ids=.*wanted ids below"):
      function(problem)


def test_levels_of_another_length_are_refused():
  """The shorter of the two must not cut the longer off."""
  problem = make_problem("never stops")
  for field in ("policy", "reference", "rewards"):
    short = problem._replace(**{field: problem.policy[:2]})
    with pytest.raises(ValueError):
      figures(short)


def test_the_listing_holds_every_response_once(problem):
  tokens, lengths, rows = listing(problem)
  listed = [tuple(y[:n].tolist()) for y, n in zip(tokens, lengths)]
  assert sorted(listed) == sorted(responses(problem))
  assert list(lengths) == sorted(lengths)
  for s, response in enumerate(listed):
    assert not tokens[s, len(response) :].any()
    wanted = [row(response[:t], problem) for t in range(len(response))]
    padding = [0] * (problem.length - len(response))
    assert rows[s].tolist() == wanted + padding


def test_a_repeated_stop_id_is_one():
  once = make_problem("two stops")
  jax.tree.map(
    np.testing.assert_array_equal,
    listing(once._replace(stop_ids=(3, 1, 3))),
    listing(once),
  )


def test_listed_logprobs_and_scores(problem):
  """Token by token; and the gradient of J through them is the exact one."""
  listed = listing(problem)

  @jax.jit
  def read(policy, reference, rewards, listed):
    def value(policy):
      log_p = exact.token_logprobs(policy, listed)
      log_q = exact.token_logprobs(reference, listed).sum(1)
      scores = exact.scores(rewards, listed)
      total = log_p.sum(1)
      j = (jnp.exp(total) * (scores - BETA * (total - log_q))).sum()
      return j, (log_p, scores)

    return jax.grad(value, has_aux=True)(policy)

  gradient, (logprobs, scores) = jax.device_get(read(*problem[3:], listed))
  jax.tree.map(close, gradient, figures(problem).gradient)
  for s, length in enumerate(listed.lengths):
    response = tuple(listed.tokens[s, :length].tolist())
    sums = [
      log_probability(problem.policy, response[:t], problem)
      for t in range(length + 1)
    ]
    close(logprobs[s, :length], np.diff(sums))
    assert not logprobs[s, length:].any()
    assert scores[s] == reward_of(response, problem)


@pytest.mark.slow
def test_a_quarter_of_a_million_responses():
  """V = 8, R = 6: 262,144 of them, in float64, in less than 10 s.

  Compilation is included where the cache is cold.
  """
  rng = np.random.default_rng(0)
  policy, reference, rewards = (
    tuple(rng.normal(size=(8**t, 8)) for t in range(6)) for _ in range(3)
  )
  wall, busy = time.perf_counter(), time.process_time()
  found = figures(Problem(8, 6, (), policy, reference, rewards))
  # The smaller: neighbours on the machine add to the wall time alone.
  took = time.perf_counter() - wall, time.process_time() - busy
  assert min(took) < 10.0
  lack = (BETA * found.log_z - found.objective) / BETA
  np.testing.assert_allclose(found.gap, lack, rtol=1e-12)
  # The definition, with all log-probabilities in one array.
  log_p, log_q, reward = np.zeros(1), np.zeros(1), rewards[-1].reshape(-1)
  for p, q in zip(policy, reference):
    log_p, log_q = (
      (total[:, None] + x - np.log(np.exp(x).sum(1, keepdims=True))).reshape(-1)
      for total, x in ((log_p, p), (log_q, q))
    )
  assert len(log_p) == 262_144
  close(found.reverse_kl, (np.exp(log_p) * (log_p - log_q)).sum(), atol=1e-10)
  close(found.forward_kl, (np.exp(log_q) * (log_q - log_p)).sum(), atol=1e-10)
  close(found.reward, (np.exp(log_p) * reward).sum(), atol=1e-10)
  log_z = np.log(np.exp(log_q + reward / BETA).sum())
  close(found.log_z, log_z, atol=1e-10)
