"""DPO's step: logprobs of responses, every loss through it, its gradient."""

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
from rlhf_jax.objective import exact
from rlhf_jax.objective import preference_loss as losses
from rlhf_jax.steps import dpo, sharding
from tests.steps import tiny

V, P, R, BETA = 16, 2, 3, 0.3
MODEL = dataclasses.replace(tiny.SHALLOW, vocab_size=V)
TEMPERATURE = 1.3
CONFIGS = {
  "dpo": {},
  "conservative": {"label_smoothing": 0.1},
  "robust": {"label_smoothing": 0.1},
  "ipo": {},
  "kto": {"desirable_weight": 1.5, "undesirable_weight": 0.5},
  "simpo": {"margin": 0.4},
  "chi_po": {"reward_bound": 3.0},
}
KEEP = tiny.keep_gradient()


def make_config(loss, **fields):
  return dpo.DPOConfig(
    MODEL, loss, temperature=TEMPERATURE, **CONFIGS[loss] | fields
  )


def make_params(seed, model=MODEL):
  return {"transformer": tiny.network(seed, model)}


PARAMS, HELD = make_params(4), make_params(0)
PAIR_LOGPROBS = jax.jit(dpo.pair_logprobs, static_argnums=2)
FIGURES = jax.jit(dpo.pair_figures, static_argnums=3)


def make_sequences(responses, lengths, prompts=None) -> types.Sequences:
  batch = len(lengths)
  prompts = prompts or [[0, 3 + row] for row in range(batch)]
  return types.Sequences(
    prompt_tokens=jnp.array(prompts),
    prompt_lengths=jnp.full(batch, 1, jnp.int32),
    response_tokens=jnp.array(responses),
    response_lengths=jnp.array(lengths),
  )


PAIRS = types.PreferencePairs(
  chosen=make_sequences(
    [[1, 2, 5], [4, 7, 0], [6, 0, 0], [9, 1, 0]], [3, 2, 1, 2]
  ),
  rejected=make_sequences(
    [[9, 0, 0], [8, 8, 8], [2, 3, 0], [5, 5, 5]], [1, 3, 2, 3]
  ),
)
# The next row's responses: what `preference_data.mismatched` makes.
OTHERS = types.PreferencePairs(
  *(
    dataclasses.replace(
      side,
      response_tokens=jnp.roll(side.response_tokens, -1, 0),
      response_lengths=jnp.roll(side.response_lengths, -1),
    )
    for side in (PAIRS.chosen, PAIRS.rejected)
  )
)


def make_batch(loss, params=HELD) -> dpo.Batch:
  if loss == "simpo":
    return dpo.Batch(PAIRS)
  of = lambda pairs: dpo.Batch(
    pairs, PAIR_LOGPROBS(params, pairs, make_config("dpo"))
  )
  batch = of(PAIRS)
  return batch._replace(mismatched=of(OTHERS)) if loss == "kto" else batch


def response_logprob(params, sequences, row):
  """Σ log softmax of one response without padding, in float64."""
  prompt = sequences.prompt_tokens[row, -1:].tolist()
  size = int(sequences.response_lengths[row])
  text = prompt + sequences.response_tokens[row, :size].tolist()
  hidden, _ = transformer.apply(
    params["transformer"],
    jnp.array([text]),
    config=MODEL,
    positions=jnp.arange(len(text))[None],
    mask=jnp.tril(jnp.ones((1, len(text), len(text)), bool)),
  )
  head = np.asarray(transformer.head_kernel(params["transformer"]), np.float64)
  logits = np.asarray(hidden[0], np.float64) @ head.T / TEMPERATURE
  logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return sum(logprobs[t, text[t + 1]] for t in range(size))


def test_a_response_has_the_logprob_of_its_tokens():
  """Traps 5 and 8: at the temperature, prompt and padding left out."""
  found = PAIR_LOGPROBS(PARAMS, PAIRS, make_config("dpo"))
  for side, sequences in zip(found, (PAIRS.chosen, PAIRS.rejected)):
    wanted = [response_logprob(PARAMS, sequences, row) for row in range(4)]
    np.testing.assert_allclose(side, wanted, rtol=2e-5)


def test_what_is_masked_changes_no_bit():
  def garbage(side):
    beyond = jnp.arange(R) >= side.response_lengths[:, None]
    return dataclasses.replace(
      side,
      prompt_tokens=side.prompt_tokens.at[:, 0].set(7),
      response_tokens=jnp.where(beyond, 11, side.response_tokens),
    )

  dirty = types.PreferencePairs(garbage(PAIRS.chosen), garbage(PAIRS.rejected))
  config = make_config("dpo")
  jax.tree.map(
    np.testing.assert_array_equal,
    PAIR_LOGPROBS(PARAMS, PAIRS, config),
    PAIR_LOGPROBS(PARAMS, dirty, config),
  )


def test_an_empty_response_has_no_gradient():
  """Bad inputs 46."""
  empty = dataclasses.replace(
    PAIRS.chosen, response_lengths=jnp.zeros(4, jnp.int32)
  )
  pairs = types.PreferencePairs(empty, PAIRS.rejected)
  batch = make_batch("dpo")._replace(pairs=pairs)
  figures = FIGURES(PARAMS, batch, jnp.float32(BETA), make_config("dpo"))
  np.testing.assert_array_equal(figures["dpo/logprob_chosen"], 0.0)
  figures = FIGURES(
    PARAMS, dpo.Batch(pairs), jnp.float32(BETA), make_config("simpo")
  )
  np.testing.assert_array_equal(figures["dpo/reward_chosen"], 0.0)
  assert np.isfinite(figures["dpo/loss"]).all()


def wanted_figures(loss):
  """Losses and rewards, from the pure functions and the models' logprobs."""
  config = make_config(loss)
  policy, held = (PAIR_LOGPROBS(p, PAIRS, config) for p in (PARAMS, HELD))
  ratios = [a - b for a, b in zip(policy, held)]
  rewards = [BETA * ratio for ratio in ratios]
  fields = CONFIGS[loss]
  if loss == "simpo":
    sides = PAIRS.chosen, PAIRS.rejected
    rewards = [
      BETA * x / side.response_lengths for x, side in zip(policy, sides)
    ]
    return losses.simpo_loss(*rewards, **fields), rewards
  if loss == "chi_po":
    rewards = [BETA * (jnp.exp(ratio) + ratio) for ratio in ratios]
  if loss == "kto":
    others, theirs = (PAIR_LOGPROBS(p, OTHERS, config) for p in (PARAMS, HELD))
    mean = np.mean(np.concatenate(others) - np.concatenate(theirs))
    assert mean > 0.1  # The clamp at 0 does not hide it.
    fields = fields | {"baseline": jnp.float32(mean)}
  names = {"dpo": "dpo_loss", "robust": "robust_dpo_loss"}
  names["conservative"] = "conservative_dpo_loss"
  function = vars(losses)[names.get(loss, f"{loss}_loss")]
  return function(*ratios, beta=BETA, **fields), rewards


def start(params, optimizer, beta=BETA):
  return dpo.init_state(params, beta=beta, optimizer=optimizer)


@pytest.mark.parametrize("loss", CONFIGS)
def test_a_step_descends_its_loss(loss):
  optimizer = optax.sgd(0.003)
  step = jax.jit(dpo.make_step(make_config(loss), optimizer))
  batch = make_batch(loss)
  values, rewards = wanted_figures(loss)
  state, scalars = step(start(PARAMS, optimizer), batch)
  margin = rewards[0] - rewards[1]
  for name, wanted in {
    "dpo/loss": values,
    "dpo/reward_chosen": rewards[0],
    "dpo/reward_rejected": rewards[1],
    "dpo/margin": margin,
    "dpo/accuracy": margin > 0,
  }.items():
    mean = np.mean(wanted)
    np.testing.assert_allclose(scalars[name], mean, rtol=1e-4, err_msg=name)
  assert scalars["kl/beta"] == jnp.float32(BETA) == state.beta
  assert scalars["dpo/grad_norm"] > 0
  _, after = step(state, batch)
  assert state.step == 1 and after["dpo/loss"] < scalars["dpo/loss"]


def test_one_compilation_for_every_beta():
  """β is traced."""
  step = jax.jit(dpo.make_step(make_config("dpo"), KEEP))
  batch = make_batch("dpo")
  loss = lambda beta: step(start(PARAMS, KEEP, beta), batch)[1]["dpo/loss"]
  found = [loss(0.1), loss(2.0)]
  assert step._cache_size() == 1
  assert abs(found[0] - found[1]) > 0.01


def test_at_the_reference_nothing_is_known():
  """Rewards 0, a loss of log 2, and the gradient −β/2 (∇c − ∇r)."""
  step = jax.jit(dpo.make_step(make_config("dpo"), KEEP))
  state, scalars = step(start(PARAMS, KEEP), make_batch("dpo", PARAMS))
  for name in ("dpo/reward_chosen", "dpo/reward_rejected", "dpo/margin"):
    np.testing.assert_allclose(scalars[name], 0.0, atol=1e-6)
  np.testing.assert_allclose(scalars["dpo/loss"], np.log(2), rtol=1e-6)

  def difference(params):
    chosen, rejected = dpo.pair_logprobs(params, PAIRS, make_config("dpo"))
    return -BETA / 2 * (chosen - rejected).mean()

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-6),
    state.optimizer,
    jax.jit(jax.grad(difference))(PARAMS),
  )


def test_ktos_gradient_holds_its_baseline_fixed():
  """Autodiff of the loss with its baseline as a number, which is not 0."""
  config = make_config("kto")
  step = jax.jit(dpo.make_step(config, KEEP))
  state, _ = step(start(PARAMS, KEEP), make_batch("kto"))
  others = dpo.pair_logprobs(PARAMS, OTHERS, config)
  theirs = dpo.pair_logprobs(HELD, OTHERS, config)
  ratios = jnp.concatenate(others) - jnp.concatenate(theirs)
  held = dpo.pair_logprobs(HELD, PAIRS, config)

  def loss(params):
    policy = dpo.pair_logprobs(params, PAIRS, config)
    ours = [a - b for a, b in zip(policy, held)]
    fixed = jnp.float32(np.mean(ratios))
    return losses.kto_loss(*ours, fixed, beta=BETA, **CONFIGS["kto"]).mean()

  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-6),
    state.optimizer,
    jax.jit(jax.grad(loss))(PARAMS),
  )


def test_chunking_changes_nothing():
  batch = make_batch("dpo")
  one, other = (
    jax.jit(dpo.make_step(make_config("dpo", **fields), KEEP))(
      start(PARAMS, KEEP), batch
    )
    for fields in ({}, {"logits_per_chunk": 8 * V})
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5), one, other
  )


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_eight_devices_step_as_one_does(loss):
  """Trap 26: 2 × 2 × 2, unequal lengths, the gradient."""
  assert jax.device_count() == 8
  batch, state = make_batch(loss), start(PARAMS, KEEP)
  step = dpo.make_step(make_config(loss), KEEP)
  found = []
  for shape in ((1, 1, 1), (2, 2, 2)):
    mesh = sharding.make_mesh(*shape)
    placed = jax.device_put(state, sharding.shardings(state, mesh))
    with jax.set_mesh(mesh):
      found.append(jax.jit(step)(placed, sharding.place_batch(batch, mesh)))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), *found
  )


def test_the_expected_gradient_is_that_of_the_definition():
  """All 225 pairs of a language of 15 responses, one by one through the step.

  Wanted: the gradient of Σ π_ref(y) π_ref(y') P(y beats y') loss(y, y'), with
  the policy read off the network as a prefix tree.
  """
  model = dataclasses.replace(MODEL, vocab_size=3)
  policy, held = make_params(2, model), make_params(3, model)
  prompt, stop_ids = jnp.array([1, 2]), (0,)
  listing = exact.sequences(vocab_size=3, response_length=R, stop_ids=stop_ids)
  count = len(listing.lengths)

  def logprobs(params):
    levels = enumeration.prefix_logits(
      params["transformer"],
      prompt,
      model=model,
      response_length=R,
      temperature=TEMPERATURE,
    )
    return exact.token_logprobs(levels, listing).sum(1)

  log_q = jax.jit(logprobs)(held)
  scores = jnp.asarray(np.random.default_rng(4).normal(size=count), jnp.float32)
  first, second = jnp.divmod(jnp.arange(count**2), count)
  beats = jax.nn.sigmoid(scores[first] - scores[second])
  weights = jnp.exp(log_q[first] + log_q[second]) * beats

  @jax.jit
  @jax.grad
  def wanted(params):
    ratios = logprobs(params) - log_q
    return weights @ losses.dpo_loss(ratios[first], ratios[second], beta=BETA)

  config = dpo.DPOConfig(model, "dpo", temperature=TEMPERATURE)
  step = dpo.make_step(config, KEEP)

  def side(index):
    return types.Sequences(
      prompt_tokens=prompt[None],
      prompt_lengths=jnp.array([2]),
      response_tokens=listing.tokens[index][None],
      response_lengths=listing.lengths[index][None],
    )

  def of_pair(i, j):
    pairs = types.PreferencePairs(side(i), side(j))
    batch = dpo.Batch(pairs, (log_q[i][None], log_q[j][None]))
    return step(start(policy, KEEP), batch)[0].optimizer

  each = jax.jit(jax.vmap(of_pair))(first, second)
  found = jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), each)
  assert optax.global_norm(found) > 0.01
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6),
    found,
    wanted(policy),
  )
