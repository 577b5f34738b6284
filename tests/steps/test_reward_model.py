"""Reward modelling: the loss on pairs, a step, and the moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import types
from rlhf_jax.steps import reward_model, rewards
from tests.steps import tiny

MODEL = tiny.SHALLOW
CONFIG = reward_model.RewardModelConfig(MODEL)
PAIR_SCORES = jax.jit(reward_model.pair_scores, static_argnums=2)


@pytest.fixture(scope="module")
def params():
  trained = tiny.reward_model(0, MODEL, bias=True)
  return {name: trained[name] for name in ("transformer", "score_head")}


def make_sequences(responses, lengths) -> types.Sequences:
  batch = len(lengths)
  return types.Sequences(
    prompt_tokens=jnp.tile(jnp.array([[0, 3]]), (batch, 1)),
    prompt_lengths=jnp.ones(batch, jnp.int32),
    response_tokens=jnp.array(responses),
    response_lengths=jnp.array(lengths),
  )


PAIRS = types.PreferencePairs(
  chosen=make_sequences([[1, 2, 5], [4, 7, 0], [6, 0, 0]], [3, 2, 1]),
  rejected=make_sequences([[9, 0, 0], [8, 8, 8], [2, 3, 0]], [1, 3, 2]),
)


def test_loss_and_accuracy_by_hand():
  """Differences log 3, −log 3 and a tie."""
  three = jnp.log(3.0)
  scalars = reward_model.pair_metrics(
    jnp.array([three, 0.0, 2.0]), jnp.array([0.0, three, 2.0])
  )
  # −log σ: log 4/3, log 4, log 2; accuracy (1 + 0 + ½) / 3.
  wanted = (np.log(4 / 3) + np.log(4) + np.log(2)) / 3
  np.testing.assert_allclose(scalars["reward_model/loss"], wanted, rtol=1e-6)
  np.testing.assert_allclose(scalars["reward_model/accuracy"], 0.5, rtol=1e-6)


def test_pairs_are_scored_as_their_sequences_are(params):
  """One batch of chosen then rejected, with unequal lengths."""
  raw_scores = jax.jit(functools.partial(rewards.raw_scores, model=MODEL))
  found = PAIR_SCORES(params, PAIRS, CONFIG)
  for scores, sequences in zip(found, (PAIRS.chosen, PAIRS.rejected)):
    wanted = raw_scores(params, sequences)
    assert np.abs(wanted).max() > 0.1
    np.testing.assert_allclose(scores, wanted, atol=1e-5)


def test_a_step_descends(params):
  optimizer = optax.sgd(0.01)
  step = jax.jit(reward_model.make_step(CONFIG, optimizer))
  state = types.TrainState(jnp.int32(0), params, optimizer.init(params), {})
  losses = []
  wanted = reward_model.pair_metrics(*PAIR_SCORES(params, PAIRS, CONFIG))
  for _ in range(3):
    state, scalars = step(state, PAIRS)
    losses.append(float(scalars["reward_model/loss"]))
  np.testing.assert_allclose(losses[0], wanted["reward_model/loss"], rtol=1e-5)
  assert losses[0] > losses[1] > losses[2]
  assert state.step == 3
  assert scalars["reward_model/grad_norm"] > 0


def test_moments_by_hand():
  # 1, 3, 5, 7: mean 4, variance (9 + 1 + 1 + 9) / 4 = 5.
  found = reward_model.moments(jnp.array([1.0, 3.0, 5.0, 7.0]))
  assert found["mean"] == 4.0
  np.testing.assert_allclose(found["std"], np.sqrt(5), rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("count", [1, 7, 100])
def test_equal_scores_are_not_scaled(value, count):
  """The mean of equal numbers is rounded: their deviation is not quite 0."""
  found = reward_model.moments(jnp.full((count,), value))
  assert found["std"] == 1.0
  np.testing.assert_allclose(found["mean"], value, rtol=1e-5)
