"""Texts in PPO's loss, against the loss written out."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax.data import arrays
from rlhf_jax.models import transformer
from rlhf_jax.objective import beta as beta_lib
from rlhf_jax.steps import ppo, reference, rollout, sharding, text_mix
from tests.steps import tiny

B, P, R, N, T = 8, 4, 5, 4, 10
BETA, GAMMA = 0.1, 0.7
MODEL, SCORES = tiny.SHALLOW, tiny.SCORES
CONFIG = ppo.PPOConfig(
  model=MODEL,
  rollout=rollout.RolloutConfig(
    response_length=R, temperature=1.3, stop_ids=(3, 7)
  ),
  whiten_advantages=False,
  logits_per_chunk=8 * N * 13,  # Chunks that do not divide S = T − 1.
)
KINDS = "nll", "forward_kl", "reverse_kl"
# Its state is the sum of the gradients that it saw; the policy stays.
SUM = optax.GradientTransformation(
  lambda params: jax.tree.map(jnp.zeros_like, params),
  lambda gradient, state, params: (
    jax.tree.map(jnp.zeros_like, gradient),
    jax.tree.map(jnp.add, state, gradient),
  ),
)


def make_pairs():
  """(prompt, response) ids; some rows have two texts, some padding."""
  rng = np.random.default_rng(5)
  sizes = [(2, 7), (0, 9), (3, 3), (1, 3), (2, 1), (0, 3), (1, 2)]
  draw = lambda size: rng.integers(0, 13, size).tolist()
  return [(draw(a), draw(b)) for a, b in sizes]


def make_texts(garbage=0):
  """Four packed rows; `garbage` fills what is padding."""
  packed, cut = arrays.pack(
    make_pairs(), sequence_length=T, pad_id=garbage, vocab_size=13, where=""
  )
  assert cut.rows == 0 and packed.tokens.shape == (N, T)
  assert packed.segments.max() == 3 and packed.segments.min() == 0
  return packed


BATCH = text_mix.Batch(tiny.prompts(), make_texts())


def make_step(config, optimizer=SUM):
  return ppo.make_step(
    config,
    score=tiny.given_scores,
    optimizer=optimizer,
    controller=beta_lib.fixed(),
  )


def start(optimizer=SUM, beta=BETA):
  return ppo.init_state(
    tiny.policy(0, MODEL),
    beta=beta,
    optimizer=optimizer,
    controller=beta_lib.fixed(),
  )


def run(
  config, held, batch: Any = BATCH, optimizer=SUM, scores=SCORES, beta=BETA
):
  """State and metrics of a step of policy 0."""
  step = jax.jit(make_step(config, optimizer))
  state = start(optimizer, beta)
  result = step(state, held, scores, batch, jax.random.key(0))
  return jax.tree.map(np.asarray, result)


def mixed(kind, coefficient=GAMMA, **fields):
  mix = text_mix.Mix(kind, coefficient)
  return dataclasses.replace(CONFIG, mix=mix, **fields)


@pytest.fixture(scope="module")
def other():
  return reference.freeze(tiny.policy(1, MODEL))


@pytest.fixture(scope="module")
def plain(other):
  """The step without a mix."""
  return run(CONFIG, other, BATCH.prompts)


def means(params, held):
  """`nll`, `forward_kl`, `reverse_kl`: means over all predicted tokens.

  Every text is alone in a row: what is packed beside it is not there.
  """
  pairs = make_pairs()
  tokens = np.zeros((len(pairs), T), np.int32)
  predicted = np.zeros((len(pairs), T), bool)
  for row, (prompt, response) in enumerate(pairs):
    size = len(prompt) + len(response)
    tokens[row, :size] = prompt + response
    predicted[row, max(len(prompt), 1) : size] = True
  log_p, log_q = (_log_softmax(model, tokens) for model in (params, held))
  rows, columns = np.nonzero(predicted)
  p, q = log_p[rows, columns - 1], log_q[rows, columns - 1]
  chosen = p[np.arange(len(rows)), tokens[rows, columns]]
  return {
    "nll": -chosen.mean(),
    "forward_kl": (jnp.exp(q) * (q - p)).sum(-1).mean(),
    "reverse_kl": (jnp.exp(p) * (p - q)).sum(-1).mean(),
  }


def _log_softmax(params, tokens):
  """At temperature 1, whatever the rollout's is."""
  hidden, _ = transformer.apply(
    params["transformer"],
    jnp.asarray(tokens),
    config=MODEL,
    positions=jnp.broadcast_to(jnp.arange(T), tokens.shape),
    mask=jnp.tril(jnp.ones((len(tokens), T, T), bool)),
  )
  head = transformer.head_kernel(params["transformer"])
  return jax.nn.log_softmax(hidden @ head.T)


assert_close = functools.partial(tiny.assert_close, tolerance=1e-5, floor=1e-7)


@pytest.fixture(scope="module")
def oracle(other):
  """Kind → the mean over predicted tokens, and its gradient."""
  policy = tiny.policy(0, MODEL)
  values, pull_back = jax.vjp(lambda params: means(params, other), policy)
  zeros = {kind: jnp.zeros(()) for kind in KINDS}
  one = lambda kind: zeros | {kind: jnp.ones(())}
  return {k: (values[k], pull_back(one(k))[0]) for k in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_the_loss(kind, other, plain, oracle):
  """What the mix adds is γ times the gradient of the mean over tokens."""
  state, metrics = run(mixed(kind), other)
  added = jax.tree.map(np.subtract, state.optimizer, plain[0].optimizer)
  wanted = jax.tree.map(lambda x: GAMMA * x, oracle[kind][1])
  assert_close(added, wanted)
  reported = ("nll",) if kind == "nll" else KINDS
  for name in KINDS:
    assert (f"mix/{name}" in metrics.scalars) == (name in reported)
  for name in reported:
    np.testing.assert_allclose(
      metrics.scalars[f"mix/{name}"], oracle[name][0], rtol=1e-5
    )
  # The rollout and its ledger know nothing of it.
  for name in plain[1].scalars:
    if name != "ppo/grad_norm":
      np.testing.assert_allclose(
        metrics.scalars[name], plain[1].scalars[name], rtol=1e-5, atol=1e-7
      )


def test_minibatches_and_epochs_see_every_text(other, oracle):
  """Over an epoch the gradients add up to those of all texts."""
  kind = "reverse_kl"
  pieces = {"minibatches": 2, "microbatches": 2, "epochs": 3}
  state, metrics = run(mixed(kind, **pieces), other)
  without = run(dataclasses.replace(CONFIG, **pieces), other, BATCH.prompts)[0]
  added = jax.tree.map(np.subtract, state.optimizer, without.optimizer)
  # Two minibatches of three epochs, each with half of the tokens.
  wanted = jax.tree.map(lambda x: 6 * GAMMA * x, oracle[kind][1])
  assert_close(added, wanted, tolerance=3e-5)
  np.testing.assert_allclose(
    metrics.scalars[f"mix/{kind}"], oracle[kind][0], rtol=1e-5
  )


def test_a_nat_costs_reward_units_beside_whitened_advantages(other):
  """Scores, β and γ in a unit ten times smaller give the same update."""
  config = mixed("nll", whiten_advantages=True, advantages="rloo", group_size=2)
  small = dataclasses.replace(config, mix=text_mix.Mix("nll", 10 * GAMMA))
  wanted, found = (
    run(config, other),
    run(small, other, scores=10 * SCORES, beta=10 * BETA),
  )
  assert_close(found[0].optimizer, wanted[0].optimizer, tolerance=1e-4)


def test_coefficient_0_is_no_mix(other):
  """With an optimiser that moves, and its moments."""
  optimizer = optax.adam(0.01)
  fields = {"epochs": 2, "minibatches": 2, "whiten_advantages": True}
  found, metrics = run(
    mixed("forward_kl", 0.0, **fields), other, BATCH, optimizer
  )
  wanted, figures = run(
    dataclasses.replace(CONFIG, **fields), other, BATCH.prompts, optimizer
  )
  assert_close(found, wanted, tolerance=1e-6)
  assert {*metrics.scalars} == {*figures.scalars} | {
    f"mix/{kind}" for kind in KINDS
  }


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_the_kls_are_0_where_the_policy_is_the_reference(kind):
  """Value and gradient, to rounding."""
  held = reference.freeze(tiny.policy(0, MODEL))
  state, metrics = run(mixed(kind), held)
  without = run(CONFIG, held, BATCH.prompts)[0]
  for name in ("forward_kl", "reverse_kl"):
    assert abs(metrics.scalars[f"mix/{name}"]) < 1e-6
  assert metrics.scalars["mix/nll"] > 1
  added = jax.tree.map(np.subtract, state.optimizer, without.optimizer)
  assert max(np.abs(x).max() for x in jax.tree.leaves(added)) < 1e-5


@pytest.mark.parametrize("kind", ["nll", "forward_kl"])
def test_padding_and_prompts_teach_nothing(kind, other):
  """Trap 8: garbage in the padding changes no bit."""
  results = [
    run(mixed(kind), other, BATCH._replace(texts=make_texts(garbage)))
    for garbage in (0, 11)
  ]
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_members_have_their_own_texts(other):
  """Under the sweep's `vmap`, each member as if it were alone."""
  config = mixed("reverse_kl", minibatches=2)
  texts = make_texts()
  turned = jax.tree.map(lambda x: x[::-1], texts)
  early = texts.loss_mask & (np.arange(T) < 7)
  fewer = dataclasses.replace(texts, loss_mask=early)
  batches = [BATCH._replace(texts=each) for each in (texts, turned, fewer)]
  step = make_step(config)
  members = jax.vmap(step, in_axes=(0, None, None, 0, 0), axis_name="member")
  stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)
  keys = jnp.stack([jax.random.key(0)] * 3)
  found = jax.jit(members)(
    stack(*[start()] * 3), other, SCORES, stack(*batches), keys
  )
  for index, batch in enumerate(batches):
    wanted = run(config, other, batch)
    mine = jax.tree.map(lambda x, i=index: np.asarray(x[i]), found)
    assert_close(mine[0].optimizer, wanted[0].optimizer, tolerance=3e-5)
    np.testing.assert_allclose(
      mine[1].scalars["mix/nll"], wanted[1].scalars["mix/nll"], rtol=1e-5
    )


def test_many_devices_are_one(other):
  """2 × 2 devices give what one gives, and go on with what they gave."""
  config = mixed("forward_kl")
  mesh = sharding.make_mesh(2, 2, 1)
  with jax.set_mesh(mesh):
    shardings = sharding.shardings(start(), mesh)
    state = jax.device_put(start(), shardings)
    held = jax.device_put(other, sharding.shardings(other, mesh))
    rest = held, SCORES, sharding.place_batch(BATCH, mesh), jax.random.key(0)
    step = jax.jit(make_step(config), out_shardings=(shardings, None))
    compiled = step.lower(state, *rest).compile()
    state, metrics = compiled(state, *rest)
    compiled(state, *rest)
  found = jax.tree.map(np.asarray, (state.optimizer, metrics.scalars))
  wanted = run(config, other)
  assert_close(found[0], wanted[0].optimizer, tolerance=1e-4)
  for name in ("mix/nll", "mix/forward_kl"):
    np.testing.assert_allclose(found[1][name], wanted[1].scalars[name], 1e-5)
