"""An evaluation beside the PPO step: the same responses, the same figures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.models import transformer
from rlhf_jax.objective import beta, logprobs, masking
from rlhf_jax.steps import anchor, evaluate, ppo, rewards, rollout
from tests.steps import tiny

B, P, R, V = 8, 4, 6, 13
MODEL = tiny.MODEL
NARROW = dataclasses.replace(MODEL, width=8, layers=1, unroll=1)
ROLLOUT = rollout.RolloutConfig(
  response_length=R, temperature=1.3, stop_ids=(3, 7), pad_id=3
)
KEY = jax.random.key(5)


def tokens_sum(sequences):
  """A gold: the sum of a response's ids."""
  mask = masking.response_mask(sequences.response_lengths, R)
  return jnp.where(mask, sequences.response_tokens, 0).sum(1) * 1.0


def run(
  policy, reference, key=KEY, *, gold=tokens_sum, narrow=False, prefix=None
):
  config = evaluate.EvaluateConfig(
    model=MODEL,
    reference=NARROW if narrow else MODEL,
    rollout=ROLLOUT,
    prefix=prefix,
    logits_per_chunk=4 * B * V,  # A column at a time.
  )
  compiled = jax.jit(
    evaluate.make(config, score=rewards.from_model(MODEL), gold=gold)
  )
  prompts = tiny.prompts()
  if prefix is not None:  # Which every prompt must have, whole.
    words = np.random.default_rng(7).integers(0, V, (B, P))
    prompts = tiny.left_padded(words.tolist(), P)
  return jax.device_get(
    compiled(policy, reference, tiny.reward_model(3), prompts, key)
  )


@pytest.fixture(scope="module")
def evaluation():
  return run(tiny.policy(1), tiny.policy(2))


def test_figures_are_those_of_a_ppo_step(evaluation):
  """The ledger's names, on the rollout that a step with this key makes."""
  config = ppo.PPOConfig(
    model=MODEL, rollout=ROLLOUT, logits_per_chunk=4 * B * V
  )
  optimizer, controller = optax.sgd(0.1), beta.fixed()
  step = ppo.make_step(
    config,
    score=rewards.from_model(MODEL),
    optimizer=optimizer,
    controller=controller,
    gold=tokens_sum,
  )
  state = ppo.init_state(
    tiny.policy(1), beta=0.1, optimizer=optimizer, controller=controller
  )
  step_key = jax.random.key(9)
  rollout_key = jax.random.split(jax.random.fold_in(step_key, 0))[0]
  _, metrics = jax.jit(step)(
    state, tiny.policy(2), tiny.reward_model(3), tiny.prompts(), step_key
  )
  found = run(tiny.policy(1), tiny.policy(2), rollout_key)
  jax.tree.map(
    np.testing.assert_array_equal,
    found.rollout.sequences,
    jax.device_get(metrics.samples.sequences),
  )
  tokens = found.rollout.sequences.response_lengths.sum()
  for name, mine in {
    "kl/reverse_k1": found.reverse_k1.mean(),
    "kl/reverse_k3": found.reverse_k3.mean(),
    "kl/reverse_exact": found.reverse_exact.mean(),
    "kl/forward_exact": found.forward_exact.mean(),
    "reward/score": found.score.mean(),
    "reward/gold": found.gold.mean(),
    "rollout/reference_nll": found.reference_nll.sum() / tokens,
    "rollout/truncated_fraction": found.rollout.truncated.mean(),
    "ppo/entropy": found.entropy.sum() / tokens,
  }.items():
    assert mine == pytest.approx(float(metrics.scalars[name]), rel=1e-5), name


def test_equal_models_are_at_kl_zero_exactly():
  found = run(tiny.policy(1), tiny.policy(1))
  for nats in (
    found.reverse_k1,
    found.reverse_k3,
    found.reverse_exact,
    found.forward_exact,
  ):
    assert (nats == 0).all()


def test_figures_are_sums_over_the_response(evaluation):
  """From the definition, row by row, at lengths that differ."""
  lengths = evaluation.rollout.sequences.response_lengths
  assert len(set(lengths.tolist())) > 1
  for row, length in enumerate(lengths):
    of = logprobs.Comparison(*(x[row, :length] for x in evaluation.comparison))
    log_ratio = np.float64(of.logprobs) - of.reference_logprobs
    k3 = np.expm1(-log_ratio) + log_ratio
    for mine, nats in (
      (evaluation.reverse_k1, log_ratio),
      (evaluation.reverse_k3, k3),
      (evaluation.reverse_exact, of.reverse_kl),
      (evaluation.forward_exact, of.forward_kl),
      (evaluation.reference_nll, -of.reference_logprobs),
      (evaluation.entropy, of.entropy),
    ):
      np.testing.assert_allclose(mine[row], nats.sum(), rtol=1e-4)
    # Decoding and teacher forcing agree on the policy's own logprobs.
    decoded = evaluation.rollout.logprobs[row, :length]
    np.testing.assert_allclose(of.logprobs, decoded, atol=1e-5)


def test_a_reference_of_another_architecture():
  found = run(tiny.policy(1), tiny.policy(2, NARROW), narrow=True)
  assert (found.reverse_exact > 0).all()


def test_no_gold(evaluation):
  found = run(tiny.policy(1), tiny.policy(2), gold=None)
  assert found.gold is None
  np.testing.assert_array_equal(found.score, evaluation.score)


def test_the_monitor_sees_what_a_prefix_hides():
  """Policy and reference are one; only one of them reads the prefix."""
  prefix = anchor.Prefix(size=2, begin=1)
  policy = tiny.policy(1)
  found = run(policy, policy, prefix=prefix)
  assert (found.reverse_exact == 0).all()
  assert (found.anchored > 1e-4).all() and found.anchored.mean() > 0.1
  sequences = jax.tree.map(jnp.asarray, found.rollout.sequences)
  clean = anchor.without_prefix(sequences, prefix)
  score = rewards.from_model(MODEL)(tiny.reward_model(3), clean, 0)
  np.testing.assert_allclose(found.score, score, rtol=1e-4, atol=1e-5)
  assert found.anchored == by_hand(policy, sequences, clean)


def by_hand(policy, sequences, clean):
  """Σ_t KL(π(·|prefix, x, y_<t)‖π(·|x, y_<t)), from both models' logits."""

  def logits(sequences):
    hidden = rollout.teacher_forced(
      policy["transformer"], sequences, model=MODEL
    )
    states = masking.response_states(hidden, R)
    head = transformer.head_kernel(policy["transformer"])
    return jax.nn.log_softmax(states @ head.T / ROLLOUT.temperature)

  log_p, log_q = np.float64(logits(sequences)), np.float64(logits(clean))
  nats = (np.exp(log_p) * (log_p - log_q)).sum(-1)
  mask = np.asarray(masking.response_mask(sequences.response_lengths, R))
  return pytest.approx((nats * mask).sum(1), rel=1e-4)
