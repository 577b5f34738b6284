"""The penalty inside the PPO step: the real network, the real first minibatch.

A transformer over 3 tokens answers one prompt with up to 3; token 0 ends a
response. All 15 responses go through `ppo.make_step`, a batch of one each, and
their gradients are weighted with π(y): what is found is the gradient that the
step has on average, and what is wanted is autodiff of the definition.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import types
from rlhf_jax.measures import enumeration
from rlhf_jax.models import transformer
from rlhf_jax.objective import beta as beta_lib
from rlhf_jax.objective import exact, kl, logprobs, masking
from rlhf_jax.steps import learner, ppo, reference, rollout
from tests.steps import tiny

V, R, BETA = 3, 3, 0.4
STOP_IDS = (0,)
PROMPT = np.array([1, 2], np.int32)
TEMPERATURE = 1.3
MODEL = transformer.TransformerConfig(
  vocab_size=V,
  width=8,
  layers=1,
  heads=2,
  kv_heads=1,
  head_size=4,
  mlp_width=12,
  max_length=8,
)
CONFIG = ppo.PPOConfig(
  model=MODEL,
  rollout=rollout.RolloutConfig(
    response_length=R, temperature=TEMPERATURE, stop_ids=STOP_IDS
  ),
  value_coefficient=0.0,
  gae_lambda=1.0,
  whiten_advantages=False,
)
UNBIASED = [key for key in kl.PENALTIES if key[0] in kl.TARGETS]
EXACT_TOKENS = "token_reverse", "rao_blackwellised"
LISTING = exact.sequences(vocab_size=V, response_length=R, stop_ids=STOP_IDS)
MASK = np.arange(R) < np.asarray(LISTING.lengths)[:, None]
KEEP = tiny.keep_gradient()


def make_params(seed, value_scale=0.5):
  params = tiny.policy(seed, MODEL)
  head = jax.tree.map(lambda x: value_scale * x, params["value_head"])
  return params | {"value_head": head}


POLICY = make_params(0)
HELD = reference.freeze(make_params(1))


def scores_of(reward_model, sequences, step):
  """An arbitrary function of the response."""
  del reward_model, step
  weights = jnp.array([1.0, 3.0, 7.0])
  mask = masking.response_mask(sequences.response_lengths, R)
  words = jnp.where(mask, sequences.response_tokens + 1, 0)
  return jnp.sin(words @ weights)


def as_sequences(tokens):
  rows = tokens.shape[0]
  stopped = tokens == 0
  lengths = jnp.where(stopped.any(1), stopped.argmax(1) + 1, R)
  return types.Sequences(
    prompt_tokens=jnp.broadcast_to(jnp.asarray(PROMPT), (rows, len(PROMPT))),
    prompt_lengths=jnp.full((rows,), len(PROMPT)),
    response_tokens=tokens,
    response_lengths=lengths,
  )


def response_logits(params, tokens):
  sequences = as_sequences(tokens)
  hidden = rollout.teacher_forced(params["transformer"], sequences, model=MODEL)
  return logprobs.token_logits(
    masking.response_states(hidden, R),
    transformer.head(params["transformer"], MODEL),
    temperature=TEMPERATURE,
  )


@pytest.fixture(autouse=True)
def given_responses(monkeypatch):
  """The rollout is what stands in the prompts."""

  def given(params, prompts, key, *, model, config, member_axis):
    del key, model, config, member_axis
    tokens = prompts.tokens
    log_p = jax.nn.log_softmax(response_logits({"transformer": params}, tokens))
    chosen = jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0]
    sequences = as_sequences(tokens)
    mask = masking.response_mask(sequences.response_lengths, R)
    truncated = jnp.zeros(len(tokens), bool)
    return types.Rollout(sequences, jnp.where(mask, chosen, 0.0), truncated)

  monkeypatch.setattr(rollout, "rollout", given)


def step_gradient(config, tokens, *, policy=POLICY, beta=BETA):
  """The gradient that the step hands its optimiser, and the metrics."""
  controller = beta_lib.fixed()
  step = ppo.make_step(
    config, score=scores_of, optimizer=KEEP, controller=controller
  )
  state = ppo.init_state(
    policy, beta=beta, optimizer=KEEP, controller=controller
  )
  prompts = types.Prompts(tokens, jnp.ones(len(tokens), jnp.int32))
  state, metrics = step(state, HELD, {}, prompts, jax.random.key(0))
  return state.optimizer, metrics


def each_gradient(config, **options):
  """Of a batch of one, for every response."""
  one = lambda tokens: step_gradient(config, tokens[None], **options)[0]
  return jax.jit(jax.vmap(one))(LISTING.tokens)


@functools.cache
def probabilities():
  log_p = jax.nn.log_softmax(response_logits(POLICY, LISTING.tokens))
  chosen = jnp.take_along_axis(log_p, LISTING.tokens[..., None], -1)[..., 0]
  return np.exp(np.where(MASK, chosen, 0.0).sum(1))


def expected(gradients):
  weigh = lambda g: np.tensordot(probabilities(), np.asarray(g), 1)
  return jax.tree.map(weigh, gradients)["transformer"]


def loss_of(target, beta):
  """β KL_target − E[r], from the definitions."""

  def sequence_reverse(params):
    levels = lambda params: enumeration.prefix_logits(
      params,
      jnp.asarray(PROMPT),
      model=MODEL,
      response_length=R,
      temperature=TEMPERATURE,
    )
    return exact.sequence_kl(
      levels(params), levels(HELD["transformer"]), stop_ids=STOP_IDS
    )

  def token_local(params):
    log_p = jax.nn.log_softmax(
      response_logits({"transformer": params}, LISTING.tokens)
    )
    log_q = jax.nn.log_softmax(response_logits(HELD, LISTING.tokens))
    of_state = (jnp.exp(log_p) * (log_p - log_q)).sum(-1)
    if target == "token_forward":
      of_state = (jnp.exp(log_q) * (log_q - log_p)).sum(-1)
    return (jnp.asarray(probabilities()) * (of_state * MASK).sum(1)).sum()

  def reward(params):
    log_p = jax.nn.log_softmax(
      response_logits({"transformer": params}, LISTING.tokens)
    )
    chosen = jnp.take_along_axis(log_p, LISTING.tokens[..., None], -1)[..., 0]
    scores = scores_of({}, as_sequences(LISTING.tokens), 0)
    return (jnp.exp((chosen * MASK).sum(1)) * scores).sum()

  penalty = sequence_reverse if target == "sequence_reverse" else token_local
  return lambda params: beta * penalty(params) - reward(params)


def norm(tree):
  return float(optax.global_norm(tree))


def relative_error(found, wanted):
  return norm(jax.tree.map(jnp.subtract, found, wanted)) / norm(wanted)


def test_the_responses_are_all():
  np.testing.assert_allclose(probabilities().sum(), 1.0, rtol=1e-5)


@pytest.mark.parametrize(
  "key, chunk",
  [
    *((key, 2**20) for key in UNBIASED),
    (("sequence_reverse", "rao_blackwellised"), 1),
    (("token_reverse", "sampled"), 1),
  ],
)
def test_the_first_minibatch_has_the_target_s_gradient(key, chunk):
  """Traps 1 and 19: in the network's parameters, rewards included.

  In one piece, and in columns.
  """
  config = dataclasses.replace(
    CONFIG, penalty=kl.PENALTIES[key], logits_per_chunk=chunk
  )
  found = expected(each_gradient(config))
  found = jax.tree.map(lambda g: R * g, found)  # The step's divisor.
  wanted = jax.jit(jax.grad(loss_of(key[0], BETA)))(POLICY["transformer"])
  assert relative_error(found, wanted) < 1e-5
  other = jax.jit(jax.grad(loss_of(key[0], 2 * BETA)))(POLICY["transformer"])
  assert relative_error(found, other) > 0.01


@functools.cache
def pairs():
  """All pairs of responses, and how likely each is."""
  first, second = np.indices((len(LISTING.tokens),) * 2).reshape(2, -1)
  tokens = jnp.stack([LISTING.tokens[first], LISTING.tokens[second]], 1)
  return tokens, probabilities()[first] * probabilities()[second]


def expected_of_pairs(config, beta):
  """The step's expected gradient where two responses answer the prompt."""
  tokens, weights = pairs()
  one = lambda tokens: step_gradient(config, tokens, beta=beta)[0]
  weigh = lambda g: R * np.tensordot(weights, np.asarray(g, np.float64), 1)
  gradients = jax.jit(jax.vmap(one))(tokens)["transformer"]
  return jax.tree.map(weigh, gradients)


@pytest.mark.parametrize(
  "advantages, key",
  [
    ("rloo", ("sequence_reverse", "sampled")),
    ("rloo", ("sequence_reverse", "rao_blackwellised")),
    ("grpo", ("sequence_reverse", "sampled")),
    ("grpo", ("sequence_reverse", "rao_blackwellised")),
    ("grpo", EXACT_TOKENS),
    ("reinforce_pp", ("sequence_reverse", "rao_blackwellised")),
  ],
)
def test_every_advantage_estimator_has_the_target_s_gradient(advantages, key):
  """Trap 19: in groups of two, rewards and penalty in one unit."""
  config = dataclasses.replace(
    CONFIG,
    penalty=kl.PENALTIES[key],
    advantages=advantages,
    group_size=2,
    normalise_groups=False,
  )
  wanted = jax.jit(jax.grad(loss_of(key[0], BETA)))(POLICY["transformer"])
  assert relative_error(expected_of_pairs(config, BETA), wanted) < 1e-5


@pytest.mark.parametrize("key", [("sequence_reverse", "sampled"), EXACT_TOKENS])
def test_normalised_groups_pay_the_penalty_once(key):
  """Trap 19: ∂/∂β is ∇KL, whatever the scores are divided by."""
  config = dataclasses.replace(
    CONFIG, penalty=kl.PENALTIES[key], advantages="grpo", group_size=2
  )
  ends = (expected_of_pairs(config, beta) for beta in (0.2, 0.7))
  slope = jax.tree.map(lambda low, high: (high - low) / 0.5, *ends)
  penalty, none = (loss_of(key[0], beta) for beta in (1.0, 0.0))
  wanted = jax.jit(jax.grad(lambda params: penalty(params) - none(params)))(
    POLICY["transformer"]
  )
  assert relative_error(slope, wanted) < 1e-4


def test_decode_mismatch_is_the_kl_of_decoding_and_learner(monkeypatch):
  """k3 of what decoding said less what the learner says, a response's sum."""
  given = rollout.rollout

  def biased(*args, **options):
    found = given(*args, **options)
    return dataclasses.replace(found, logprobs=found.logprobs + 0.3)

  monkeypatch.setattr(rollout, "rollout", biased)
  _, metrics = step_gradient(CONFIG, LISTING.tokens)
  found = metrics.scalars["kl/decode_mismatch"]
  of_token = np.exp(-0.3) - 1 + 0.3
  lengths = np.asarray(LISTING.lengths)
  np.testing.assert_allclose(found, of_token * lengths.mean(), rtol=1e-4)
  error = of_token * lengths.std(ddof=1) / np.sqrt(len(lengths))
  found = metrics.scalars["kl/decode_mismatch_se"]
  np.testing.assert_allclose(found, error, rtol=1e-4)
  found = metrics.scalars["rollout/logprob_max_abs_diff"]
  np.testing.assert_allclose(found, 0.3, rtol=1e-4)


@pytest.mark.parametrize("key", [("token_reverse", "sampled"), EXACT_TOKENS])
def test_nan_under_the_mask_reaches_no_gradient(key):
  """Trap 17: states, logprobs and advantages beyond a response's end."""
  config = dataclasses.replace(CONFIG, penalty=kl.PENALTIES[key])
  rng = np.random.default_rng(3)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  mask = jnp.asarray(MASK)
  rows = len(MASK)
  head = types.Head(draw(V, MODEL.width))
  hidden = draw(rows, R, MODEL.width)
  columns = {
    name: draw(rows, R)
    for name in ("logprobs", "reference_logprobs", "advantages", "weights")
  }
  columns |= {"tokens": LISTING.tokens, "mask": mask}
  if config.penalty.needs_reference:
    columns["reference_hidden"] = draw(rows, R, MODEL.width)

  def gradient(fill):
    dirty = lambda x: (
      jnp.where(mask.reshape(mask.shape + (1,) * (x.ndim - 2)), x, fill)
      if x.dtype == jnp.float32
      else x
    )
    return learner.head_gradient(
      dirty(hidden),
      head,
      jax.tree.map(dirty, columns),
      jnp.float32(BETA),
      head,
      config,
    )

  clean, dirty = gradient(0.0), gradient(jnp.nan)
  jax.tree.map(np.testing.assert_array_equal, clean, dirty)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_batch_is_the_mean_of_its_responses(normalise):
  """With length normalisation a response weighs 1, without it a token does."""
  config = dataclasses.replace(
    CONFIG,
    penalty=kl.PENALTIES[EXACT_TOKENS],
    length_normalisation=normalise,
  )
  found, _ = jax.jit(lambda tokens: step_gradient(config, tokens))(
    LISTING.tokens
  )
  each = each_gradient(config)
  wanted = jax.tree.map(lambda g: g.mean(0), each)
  assert relative_error(found, wanted) < 1e-5
  plain = each_gradient(dataclasses.replace(config, length_normalisation=False))
  for row, length in enumerate(np.asarray(LISTING.lengths)):
    share = R / length if normalise else 1.0
    scaled = jax.tree.map(lambda g, row=row, s=share: s * g[row], plain)
    mine = jax.tree.map(lambda g, row=row: g[row], each)
    assert relative_error(mine, scaled) < 1e-5


def test_whitening_scales_the_penalty_as_it_scales_the_rewards():
  """β keeps its meaning: ∂gradient/∂β shrinks by the advantages' deviation."""
  policy = make_params(0, value_scale=0.0)  # The advantage is the score.

  def slope(whiten):
    config = dataclasses.replace(
      CONFIG, penalty=kl.PENALTIES[EXACT_TOKENS], whiten_advantages=whiten
    )
    gradient = jax.jit(
      lambda tokens, beta: step_gradient(
        config, tokens, policy=policy, beta=beta
      )[0]["transformer"]
    )
    ends = (gradient(LISTING.tokens, beta) for beta in (0.0, 1.0))
    return jax.tree.map(jnp.subtract, *ends)

  scores = np.asarray(scores_of({}, as_sequences(LISTING.tokens), 0))
  deviation = np.repeat(scores, np.asarray(LISTING.lengths)).std()
  assert abs(deviation - 1) > 0.1
  wanted = jax.tree.map(lambda g: g / deviation, slope(False))
  assert relative_error(slope(True), wanted) < 1e-4
