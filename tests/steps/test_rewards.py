"""What scores a response: a model, a function of arrays, a host function."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.steps import rewards, sharding
from tests.steps import tiny

P, R, B = 3, 4, 8
MODEL, V = tiny.SHALLOW, tiny.SHALLOW.vocab_size
PROMPT_LENGTHS = np.array([1, 2, 3, 3, 2, 1, 3, 2])
RESPONSE_LENGTHS = np.array([0, 1, 4, 2, 3, 4, 1, 2])
MASK = np.arange(R) < RESPONSE_LENGTHS[:, None]
SCORES = np.array([0.7, -1.9, 0.25, 1e-3, -0.5, 3.3, 0.0, 2.5], np.float32)


@pytest.fixture(scope="module")
def reward_model():
  return tiny.reward_model(0, MODEL, bias=True)


def make_sequences(garbage=0) -> types.Sequences:
  rng = np.random.default_rng(0)
  prompts = rng.integers(V, size=(B, P))
  responses = rng.integers(V, size=(B, R))
  real = np.arange(P) >= P - PROMPT_LENGTHS[:, None]
  return types.Sequences(
    prompt_tokens=jnp.asarray(np.where(real, prompts, garbage)),
    prompt_lengths=jnp.asarray(PROMPT_LENGTHS),
    response_tokens=jnp.asarray(np.where(MASK, responses, garbage)),
    response_lengths=jnp.asarray(RESPONSE_LENGTHS),
  )


RAW_SCORES = jax.jit(functools.partial(rewards.raw_scores, model=MODEL))


def test_raw_scores_read_the_last_real_token(reward_model):
  """Trap 15. Each row alone; an empty one reads the prompt's end."""
  sequences = make_sequences()
  found = RAW_SCORES(reward_model, sequences)
  apply = jax.jit(functools.partial(transformer.apply, config=MODEL))
  for row in range(5):  # Lengths 0, 1, full, 2, 3.
    prompt = sequences.prompt_tokens[row, P - PROMPT_LENGTHS[row] :]
    response = sequences.response_tokens[row, : RESPONSE_LENGTHS[row]]
    # Zeros to one size: nothing looks ahead, and it compiles once.
    text = np.concatenate([prompt, response])
    hidden, _ = apply(
      reward_model["transformer"],
      jnp.asarray(np.pad(text, (0, P + R - len(text))))[None],
      positions=jnp.arange(P + R)[None],
      mask=jnp.tril(jnp.ones((1, P + R, P + R), bool)),
    )
    last = np.asarray(hidden[0, len(text) - 1], np.float64)
    head = reward_model["score_head"]
    wanted = last @ np.asarray(head["kernel"]) + head["bias"]
    np.testing.assert_allclose(found[row], wanted, atol=1e-5)


def test_what_stands_under_padding_changes_no_bit(reward_model):
  """Trap 8: before the prompt and after the response, gradients included."""

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def total(params, sequences):
    raw = rewards.raw_scores(params, sequences, model=MODEL)
    return jnp.sin(raw).sum(), raw

  one = total(reward_model, make_sequences(garbage=0))
  other = total(reward_model, make_sequences(garbage=7))
  jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_models_score_is_normalised_by_its_own_moments(reward_model):
  sequences = make_sequences()
  score = jax.jit(rewards.from_model(MODEL))
  found = score(reward_model, sequences, jnp.int32(0))
  # (raw − 0.5) / 2
  wanted = (RAW_SCORES(reward_model, sequences) - 0.5) / 2
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_the_scale_turns_a_score_back_into_raw_units(reward_model):
  """What `kl/beta_effective` is multiplied by: score · scale + mean = raw."""
  sequences = make_sequences()
  score = rewards.from_model(MODEL)(reward_model, sequences, jnp.int32(0))
  scale = rewards.score_scale(reward_model)
  assert scale == 2.0
  raw = RAW_SCORES(reward_model, sequences)
  np.testing.assert_allclose(score * scale + 0.5, raw, rtol=1e-5)


def wrong(reward_model):
  """A member that orders every pair the other way round."""
  head = reward_model["score_head"]
  return reward_model | {
    "score_head": jax.tree.map(jnp.negative, head),
    "normalisation": {"mean": jnp.float32(-0.5), "std": jnp.float32(4.0)},
  }


def test_an_ensembles_score_is_the_mean_of_the_normalised(reward_model):
  """(x − 0.5) / 2 and (−x + 0.5) / 4: the mean is (x − 0.5) / 8."""
  sequences = make_sequences()
  score, _ = rewards.from_ensemble([MODEL, MODEL], group_size=1)
  members = {"members": (reward_model, wrong(reward_model))}
  found = jax.jit(score)(members, sequences, jnp.int32(0))
  wanted = (RAW_SCORES(reward_model, sequences) - 0.5) / 8
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
  "wrong_members, wanted",
  [
    # Pairs of members that agree, of all pairs: 3 of 3; 1 of 3; 2 of 6.
    ([False, False, False], 1.0),
    ([False, True, False], 1 / 3),
    ([True, False, False, True], 1 / 3),
    ([False, True], 0.0),
  ],
)
def test_agreement_by_hand(reward_model, wrong_members, wanted):
  """Members agree on every pair of responses or on none."""
  sequences = make_sequences()
  _, agreement = rewards.from_ensemble(
    [MODEL] * len(wrong_members), group_size=1
  )
  members = tuple(
    wrong(reward_model) if flag else reward_model for flag in wrong_members
  )
  found = jax.jit(agreement)({"members": members}, sequences, jnp.int32(0))
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_members_may_have_architectures_of_their_own(reward_model):
  """The agreement against a count over pairs, the mean against each alone."""
  narrow = dataclasses.replace(MODEL, width=8, heads=1, kv_heads=1)
  other = {
    "transformer": transformer.init(jax.random.key(1), narrow),
    "score_head": {"kernel": jnp.arange(8.0) - 3, "bias": jnp.zeros(())},
    "normalisation": {"mean": jnp.float32(0.0), "std": jnp.float32(1.0)},
  }
  sequences = make_sequences()
  score, agreement = rewards.from_ensemble([MODEL, narrow], group_size=1)
  arguments = {"members": (reward_model, other)}, sequences, jnp.int32(0)
  one, two = (
    np.asarray(rewards.from_model(m)(p, sequences, jnp.int32(0)), np.float64)
    for m, p in ((MODEL, reward_model), (narrow, other))
  )
  np.testing.assert_allclose(score(*arguments), (one + two) / 2, atol=1e-5)
  pairs = list(itertools.combinations(range(B), 2))
  alike = [(one[i] - one[j]) * (two[i] - two[j]) > 0 for i, j in pairs]
  assert 0 < sum(alike) < len(pairs)
  np.testing.assert_allclose(agreement(*arguments), np.mean(alike), rtol=1e-6)


def test_a_function_sees_all_tokens_and_the_responses_mask():
  """Trap 3: whole numbers out of it become floats, and not the reverse."""
  seen = {}

  def count(tokens, mask):
    seen["tokens"], seen["mask"] = tokens, mask
    return mask.sum(1)

  sequences = make_sequences()
  found = rewards.from_function(count)({}, sequences, jnp.int32(0))
  np.testing.assert_array_equal(found, RESPONSE_LENGTHS)
  assert found.dtype == jnp.float32
  np.testing.assert_array_equal(seen["tokens"], sequences.tokens)
  assert not seen["mask"][:, :P].any()
  np.testing.assert_array_equal(seen["mask"][:, P:], MASK)

  fractions = rewards.from_function(lambda tokens, mask: jnp.asarray(SCORES))
  found = fractions({}, sequences, jnp.int32(0))
  np.testing.assert_array_equal(found, SCORES)


class Host:
  """A host function that remembers its arguments and returns the scores."""

  def __init__(self):
    self.calls: list[tuple[types.Sequences, int]] = []

  def __call__(self, sequences: types.Sequences, step: int) -> np.ndarray:
    self.calls.append((sequences, step))
    return SCORES + np.float32(step)


def test_a_host_function_is_called_from_the_compiled_step():
  """Trap 3: fractional scores arrive to the last bit."""
  host = Host()
  score = jax.jit(rewards.from_host(host))
  sequences = make_sequences()
  np.testing.assert_array_equal(score({}, sequences, jnp.int32(0)), SCORES)
  np.testing.assert_array_equal(score({}, sequences, jnp.int32(2)), SCORES + 2)
  seen, step = host.calls[-1]
  assert type(step) is int and step == 2
  assert all(type(x) is np.ndarray for x in jax.tree.leaves(seen))
  jax.tree.map(np.testing.assert_array_equal, seen, sequences)


def test_a_host_function_sees_one_member_at_a_time():
  host = Host()
  sequences = make_sequences()
  stacked = jax.tree.map(lambda x: jnp.stack([x, x + 1, x]), sequences)
  score = jax.vmap(rewards.from_host(host), in_axes=(None, 0, None))
  found = jax.jit(score)({}, stacked, jnp.int32(0))
  np.testing.assert_array_equal(found, np.tile(SCORES, (3, 1)))
  assert len(host.calls) == 3
  lengths = [seen.response_lengths.tolist() for seen, _ in host.calls]
  wanted = np.asarray(stacked.response_lengths).tolist()
  assert sorted(lengths) == sorted(wanted)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_a_host_function_on_a_mesh_sees_the_whole_batch_in_order(shape):
  """Trap 26: one call with all rows, whichever device holds them."""
  host = Host()
  mesh = sharding.make_mesh(*shape)
  sequences = make_sequences()
  with jax.set_mesh(mesh):
    placed = sharding.place_batch(sequences, mesh)
    found = jax.jit(rewards.from_host(host))({}, placed, jnp.int32(0))
    np.testing.assert_array_equal(found, SCORES)
  assert len(host.calls) == 1
  jax.tree.map(np.testing.assert_array_equal, host.calls[0][0], sequences)
