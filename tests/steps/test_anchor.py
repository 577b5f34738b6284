"""The prefix, and the KL that it cannot hide."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import beta as beta_lib
from rlhf_jax.objective import kl
from rlhf_jax.steps import anchor, ppo, reference, rollout
from tests.steps import tiny

B, P, R = 8, 7, 5
BETA = 0.3
BOS, PREFIX = 1, [9, 4, 9]
PLACE = anchor.Prefix(size=3, begin=1)
MODEL = tiny.SHALLOW
CONFIG = ppo.PPOConfig(
  model=MODEL,
  rollout=rollout.RolloutConfig(
    response_length=R, temperature=1.3, stop_ids=(3, 7)
  ),
  whiten_advantages=False,
  logits_per_chunk=4 * B * MODEL.vocab_size * 2,  # Chunks that do not divide R.
)
KEEP, SCORES = tiny.keep_gradient(), tiny.SCORES
WORDS = [5], [6, 2], [7, 8, 9], [9], [4, 9], [2], [9, 4, 9], [0, 0]
CLEAN = [[BOS, *words] for words in WORDS]


PROMPTS = tiny.left_padded([[BOS, *PREFIX, *row[1:]] for row in CLEAN], P)


def run(config, held, prompts=PROMPTS, score=None, beta=BETA, **options):
  """State and metrics of a step of policy 0."""
  controller = options.pop("controller", beta_lib.fixed())
  step = ppo.make_step(
    config,
    score=score or tiny.given_scores,
    optimizer=KEEP,
    controller=controller,
    **options,
  )
  state = ppo.init_state(
    tiny.policy(0, MODEL), beta=beta, optimizer=KEEP, controller=controller
  )
  result = jax.jit(step)(state, held, SCORES, prompts, jax.random.key(0))
  return jax.tree.map(np.asarray, result)


@pytest.fixture(scope="module")
def other():
  return reference.freeze(tiny.policy(1, MODEL))


def with_prefix(**fields):
  return dataclasses.replace(CONFIG, prefix=PLACE, **fields)


def logprobs_of(params, texts):
  """Float64 log-softmax after each token of texts of any length, `[n, V]`."""
  size = max(map(len, texts))
  tokens = np.zeros((len(texts), size), np.int32)
  for row, text in enumerate(texts):
    tokens[row, : len(text)] = text
  hidden, _ = transformer.apply(
    params["transformer"],
    jnp.asarray(tokens),
    config=MODEL,
    positions=jnp.broadcast_to(jnp.arange(size), tokens.shape),
    mask=jnp.tril(jnp.ones((len(texts), size, size), bool)),
  )
  head = np.asarray(transformer.head_kernel(params["transformer"]), "f8")
  logits = np.asarray(hidden, "f8") @ head.T / CONFIG.rollout.temperature
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def by_hand(policy, held, sequences):
  """Each response's anchored KL, exact and k1: two passes, row by row."""
  responses = [
    row[:n].tolist()
    for row, n in zip(sequences.response_tokens, sequences.response_lengths)
  ]
  prefixed = [[BOS, *PREFIX, *row[1:]] for row in CLEAN]
  texts = [a + y for a, y in zip(prefixed, responses)]
  log_p = logprobs_of(policy, texts)
  log_q = logprobs_of(held, [a + y for a, y in zip(CLEAN, responses)])
  exact, k1 = [], []
  for row, y in enumerate(responses):
    n = len(prefixed[row]) - 1
    p = log_p[row, n : n + len(y)]
    n = len(CLEAN[row]) - 1
    q = log_q[row, n : n + len(y)]
    exact.append(np.sum(np.exp(p) * (p - q)))
    chosen = np.arange(len(y)), y
    k1.append(np.sum(p[chosen] - q[chosen]))
  return np.array(exact), np.array(k1)


@pytest.mark.parametrize("begin", [0, 1])
@pytest.mark.parametrize("size", [0, 1, 3])
def test_without_prefix_is_the_prompts_as_they_were(begin, size):
  """Words of the prompt that look like the prefix stay."""
  prefix = [9, 4, 9][:size]
  rows = [row[:begin] + prefix + row[begin:] for row in CLEAN]
  prompts = tiny.left_padded(rows, P)
  responses = jnp.arange(B * R, dtype=jnp.int32).reshape(B, R)
  lengths = jnp.arange(B, dtype=jnp.int32) % (R + 1)
  found = anchor.without_prefix(
    types.Sequences(prompts.tokens, prompts.lengths, responses, lengths),
    anchor.Prefix(size, begin),
  )
  wanted = tiny.left_padded(CLEAN, P - size)
  np.testing.assert_array_equal(found.prompt_tokens, wanted.tokens)
  np.testing.assert_array_equal(found.prompt_lengths, wanted.lengths)
  np.testing.assert_array_equal(found.response_tokens, responses)
  np.testing.assert_array_equal(found.response_lengths, lengths)


def test_the_anchored_kl_is_that_of_two_passes(other):
  scalars, samples = _of(run(with_prefix(), other))
  assert len(set(samples.sequences.response_lengths.tolist())) > 2
  exact, k1 = by_hand(tiny.policy(0, MODEL), other, samples.sequences)
  for name, wanted in (("kl/anchored", exact), ("kl/anchored_k1", k1)):
    np.testing.assert_allclose(scalars[name], wanted.mean(), rtol=2e-5)
    error = wanted.std(ddof=1) / np.sqrt(B)
    np.testing.assert_allclose(scalars[f"{name}_se"], error, rtol=1e-4)
  # The ledger's other meters are of the prefixed prompt, as is the penalty.
  assert abs(scalars["kl/reverse_exact"] - exact.mean()) > 0.05
  np.testing.assert_allclose(
    scalars["kl/penalty"], BETA * scalars["kl/reverse_exact"], rtol=1e-6
  )


def test_the_prefix_hides_nothing_from_the_anchored_kl():
  """Policy and reference are one model: every other meter reads exactly 0."""
  scalars, _ = _of(run(with_prefix(), reference.freeze(tiny.policy(0, MODEL))))
  for name in ("reverse_k1", "reverse_k3", "reverse_exact", "forward_exact"):
    assert scalars[f"kl/{name}"] == 0.0, name
  assert scalars["kl/anchored"] > 0.1


def test_an_empty_prefix_hides_nothing(other):
  """Size 0: the anchored KL is the reverse KL, and all else is as without."""
  plain = run(CONFIG, other)
  config = dataclasses.replace(CONFIG, prefix=anchor.Prefix(0, 1))
  state, metrics = run(config, other)
  scalars = metrics.scalars
  np.testing.assert_array_equal(
    scalars.pop("kl/anchored"), scalars["kl/reverse_exact"]
  )
  np.testing.assert_array_equal(
    scalars.pop("kl/anchored_k1"), scalars["kl/reverse_k1"]
  )
  del scalars["kl/anchored_se"], scalars["kl/anchored_k1_se"]
  jax.tree.map(np.testing.assert_array_equal, (state, metrics), plain)


@pytest.mark.parametrize(
  "gradient, estimator",
  [
    ("sequence_reverse", "sampled"),
    ("sequence_reverse", "rao_blackwellised"),
    ("k3_in_loss", "sampled"),
  ],
)
def test_the_penalty_can_be_charged_on_the_anchored_kl(
  other, gradient, estimator
):
  """With the policy's own gradient, against the loss written out.

  A reference that is asked the clean prompt: nothing but its logits enters.
  """
  penalty = kl.PENALTIES[gradient, estimator]
  config = with_prefix(
    penalty=penalty, anchored=True, advantages="rloo", group_size=2
  )
  state, metrics = run(config, other)
  scalars, sequences = metrics.scalars, metrics.samples.sequences
  exact, _ = by_hand(tiny.policy(0, MODEL), other, sequences)
  np.testing.assert_allclose(
    scalars["kl/penalty"], BETA * exact.mean(), rtol=2e-5
  )
  np.testing.assert_allclose(
    scalars["reward/total"], SCORES.mean() - BETA * exact.mean(), rtol=2e-5
  )
  wanted = jax.grad(_loss)(tiny.policy(0, MODEL), other, sequences, penalty)
  compare = lambda a, b: np.testing.assert_allclose(
    a, b, rtol=2e-4, atol=2e-5 * np.abs(b).max() + 1e-8
  )
  jax.tree.map(compare, state.optimizer, wanted)


def _loss(policy, held, sequences, penalty):
  """RLOO of pairs with the anchored penalty, on whole arrays."""
  sequences = jax.tree.map(jnp.asarray, sequences)
  clean = anchor.without_prefix(sequences, PLACE)

  def log_softmax(params, sequences):
    hidden = rollout.teacher_forced(
      params["transformer"], sequences, model=MODEL
    )[:, -R - 1 : -1]
    head = transformer.head_kernel(params["transformer"])
    return jax.nn.log_softmax(hidden @ head.T / CONFIG.rollout.temperature)

  chosen = lambda x: jnp.take_along_axis(
    x, sequences.response_tokens[..., None], axis=-1
  )[..., 0]
  log_p, log_q = log_softmax(policy, sequences), log_softmax(held, clean)
  reverse = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
  new = chosen(log_p)
  old, held_logprobs = jax.lax.stop_gradient((new, chosen(log_q)))
  terms = kl.Terms(
    log_ratio=old - held_logprobs,
    reverse_kl=jax.lax.stop_gradient(reverse),
    forward_kl=jnp.zeros_like(reverse),
    importance_ratio=jnp.ones_like(new),
  )
  mask = jnp.arange(R) < sequences.response_lengths[:, None]
  nats = kl.reward_penalty(penalty, terms, mask)
  rewards = kl.penalised_rewards(
    SCORES, nats, sequences.response_lengths, beta=jnp.float32(BETA)
  )
  totals = jnp.where(mask, rewards, 0).sum(1)
  partners = totals.reshape(-1, 2)[:, ::-1].reshape(-1)
  loss = -jnp.exp(new - old) * (totals - partners)[:, None]
  if penalty.in_loss is not None:
    loss += BETA * penalty.in_loss(
      terms._replace(log_ratio=new - held_logprobs, reverse_kl=reverse)
    )
  return jnp.where(mask, loss, 0).sum() / (B * R)


def test_what_is_charged_is_what_a_controller_holds(other):
  """β after a step, by whether the penalty is anchored."""
  controller = beta_lib.dual(target=1.0, beta_max=9.0, learning_rate=0.1)
  betas = {}
  for anchored in (False, True):
    config = with_prefix(anchored=anchored)
    state, metrics = run(config, other, controller=controller)
    name = "kl/anchored" if anchored else "kl/reverse_exact"
    state = jax.tree.map(jnp.asarray, state.beta)
    betas[anchored] = controller.value(state)
    moved = controller.update(
      controller.init(BETA), metrics.scalars[name], jnp.float32(0)
    )
    np.testing.assert_allclose(betas[anchored], controller.value(moved))


def test_rewards_judge_the_clean_prompt(other):
  """Score and gold see neither the prefix nor its place."""

  def read(sequences):
    digits = sequences.prompt_tokens * 10.0 ** jnp.arange(P - 3)
    return digits.sum(1) + sequences.prompt_lengths

  _, metrics = run(
    with_prefix(),
    other,
    score=lambda model, sequences, step: read(sequences),
    gold=read,
  )
  clean = tiny.left_padded(CLEAN, P - 3)
  empty = jnp.zeros((B, 0), jnp.int32), jnp.zeros((B,), jnp.int32)
  wanted = read(types.Sequences(clean.tokens, clean.lengths, *empty))
  np.testing.assert_allclose(metrics.samples.scores, wanted)
  np.testing.assert_allclose(metrics.scalars["reward/gold"], wanted.mean())
  np.testing.assert_array_equal(
    metrics.samples.sequences.prompt_tokens, PROMPTS.tokens
  )


def _of(result):
  return result[1].scalars, result[1].samples
