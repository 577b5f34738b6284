"""The PPO step as a whole: what must hold whatever it learns."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlhf_jax import types
from rlhf_jax.models import transformer
from rlhf_jax.objective import beta as beta_lib
from rlhf_jax.steps import optimizer as optimizer_lib
from rlhf_jax.steps import ppo, reference, rewards, rollout
from tests.steps import tiny

B, P, R = 8, 4, 6
BETA = 0.1
STOP_IDS = (3, 7)
MODEL = tiny.MODEL
# One whole-batch update; the pad is a stop id; the chunks do not divide R.
ONCE = ppo.PPOConfig(
  model=MODEL,
  rollout=rollout.RolloutConfig(
    response_length=R, temperature=1.3, stop_ids=STOP_IDS, pad_id=3
  ),
  whiten_advantages=False,
  logits_per_chunk=4 * B * MODEL.vocab_size,
)
CONFIG = dataclasses.replace(
  ONCE, epochs=2, minibatches=2, whiten_advantages=True
)


def make_step(config, optimizer, score=tiny.given_scores, **options):
  controller = beta_lib.fixed()
  options |= {"score": score, "optimizer": optimizer, "controller": controller}
  return ppo.make_step(config, **options)


def compile_step(*args, **options):
  return jax.jit(make_step(*args, **options), donate_argnums=0)


def start(policy, optimizer, beta=BETA):
  policy = jax.tree.map(jnp.copy, policy)
  controller = beta_lib.fixed()
  return ppo.init_state(
    policy, beta=beta, optimizer=optimizer, controller=controller
  )


def run(step, optimizer, policy, *frozen, prompts=None, seed=0):
  """State and metrics after step 0, as numpy."""
  state = start(policy, optimizer)
  prompts = tiny.prompts() if prompts is None else prompts
  return tiny.to_numpy(step(state, *frozen, prompts, jax.random.key(seed)))


ROUNDING = "rollout/logprob_max_abs_diff"  # No two programs agree on it.
SGD = optax.sgd(0.03, momentum=0.9)
KEEP = tiny.keep_gradient(0.5)
SCORES = tiny.SCORES


@pytest.fixture(scope="session")
def step():
  return compile_step(CONFIG, SGD, rewards.from_model(MODEL))


@pytest.fixture(scope="session")
def one_update():
  return compile_step(ONCE, KEEP)


@pytest.fixture(scope="session")
def models():
  """Policy, another model as its reference, and a reward model."""
  other = reference.freeze(tiny.policy(1))
  return tiny.policy(0), other, tiny.reward_model(2)


@pytest.fixture(scope="session")
def first(step, models):
  """Step 0 of the policy against another model."""
  return run(step, SGD, *models)[1]


# Step 0, where reference and policy are the same.


@pytest.mark.quick
@pytest.mark.parametrize(
  "temperature, prompt_size, top_p",
  [(0.5, 4, 1.0), (1.0, 7, 0.6), (1.3, 11, 1.0)],
)
def test_kl_is_zero_and_ratio_one_at_step_0(temperature, prompt_size, top_p):
  """Traps 4, 5, 6, 7, 9, 10."""
  drawn = dataclasses.replace(
    ONCE.rollout, temperature=temperature, top_p=top_p
  )
  config = dataclasses.replace(CONFIG, rollout=drawn)
  policy = tiny.policy(0)
  frozen = reference.freeze(policy)
  same_type = lambda a, b: a.dtype == b.dtype and a is not b
  same_type = jax.tree.map(
    same_type, frozen["transformer"], policy["transformer"]
  )
  assert all(jax.tree.leaves(same_type))
  still = tiny.keep_gradient(0.0)
  step = compile_step(config, still)
  prompts = tiny.prompts(prompt_size)
  scalars = run(step, still, policy, frozen, SCORES, prompts=prompts)[1].scalars
  for name, value in scalars.items():
    if re.match("kl/(reverse|forward|per_token|penalty|clamp)", name):
      assert value == 0.0, name
  assert scalars["rollout/logprob_max_abs_diff"] < 1e-4
  assert scalars["kl/to_old_policy"] < 1e-9
  assert scalars["kl/decode_mismatch"] < 1e-9
  assert scalars["ppo/clip_fraction"] == 0.0


def test_what_families_differ_in_goes_through_the_whole_step():
  """Windows, caps, norms and ids without text: sampler and scorers agree."""
  model = dataclasses.replace(
    MODEL,
    layer_kinds=("local", "unturned"),
    window=3,
    qk_norm="heads",
    norms_after=True,
    attention_softcap=2.0,
    logit_softcap=1.5,
    tokens=9,
  )
  config = dataclasses.replace(CONFIG, model=model)
  policy = tiny.policy(0, model)
  still = tiny.keep_gradient(0.0)
  _, metrics = run(
    compile_step(config, still), still, policy, reference.freeze(policy), SCORES
  )
  scalars = metrics.scalars
  assert scalars["kl/reverse_exact"] == 0 == scalars["kl/reverse_k3"]
  assert scalars["rollout/logprob_max_abs_diff"] < 1e-5
  sequences = metrics.samples.sequences
  mask = np.arange(R) < sequences.response_lengths[:, None]
  drawn = sequences.response_tokens[mask]
  assert drawn.max() == 8 and len(set(drawn)) > 4
  # The entropy is one over the tokens.
  assert 0 < scalars["ppo/entropy"] <= np.log(9)


def test_the_ratio_is_to_the_policy_that_sampled(monkeypatch):
  """In bfloat16, where decoding and learning need not read the same.

  Here they differ by 0.3 nats a token. The KL is 0 all the same, for both
  models are read by the learner; the ratio of an unmoved policy is e^−0.3.
  """
  draw = rollout.rollout

  def surer(*args, **named):
    drawn = draw(*args, **named)
    return dataclasses.replace(drawn, logprobs=drawn.logprobs + 0.3)

  monkeypatch.setattr(rollout, "rollout", surer)
  model = dataclasses.replace(MODEL, compute_dtype="bfloat16")
  policy, still = tiny.policy(0), tiny.keep_gradient()
  step = compile_step(dataclasses.replace(ONCE, model=model), still)
  _, metrics = run(step, still, policy, reference.freeze(policy), SCORES)
  scalars = metrics.scalars
  assert scalars["kl/reverse_exact"] == scalars["kl/reverse_k1"] == 0.0
  lengths = metrics.samples.sequences.response_lengths
  wanted = (np.exp(-0.3) - 1 + 0.3) * lengths.mean()
  for name in ("kl/to_old_policy", "kl/decode_mismatch"):
    np.testing.assert_allclose(scalars[name], wanted, rtol=0.05, err_msg=name)
  # Below 1 − ε: cut off wherever the advantage is negative.
  assert 0.1 < scalars["ppo/clip_fraction"] < 1


# What is frozen and what is donated.


def test_donation_takes_the_state_and_spares_the_frozen(step, models):
  """Trap 30, and the reference never moves: several steps, then the bits."""
  policy, _, reward_model = models
  policy = jax.tree.map(jnp.copy, policy)
  frozen = reference.freeze(policy), reward_model
  before = tiny.to_numpy(frozen)
  state = ppo.init_state(
    policy, beta=BETA, optimizer=SGD, controller=beta_lib.fixed()
  )
  for _ in range(3):
    old = state
    state, _ = step(old, *frozen, tiny.prompts(), jax.random.key(0))
    assert all(x.is_deleted() for x in jax.tree.leaves(old))
  tiny.assert_same(tiny.to_numpy(frozen), before)
  moved = state.params["transformer"]["embedding"]["tokens"]
  held = frozen[0]["transformer"]["embedding"]["tokens"]
  assert float(jnp.abs(moved - held).max()) > 1e-4
  assert int(state.step) == 3


def test_one_compilation_serves_the_run(step, models):
  policy, *frozen = models
  state = start(policy, SGD)
  for _ in range(5):
    state, _ = step(state, *frozen, tiny.prompts(), jax.random.key(0))
  assert step._cache_size() == 1
  assert int(state.step) == 5


def largest_constant(lowered) -> int:
  """Bytes of the largest constant that is not one repeated number."""
  found = re.findall(r'dense<"0x([0-9A-F]+)">', lowered.as_text())
  return max((len(digits) // 2 for digits in found), default=0)


def test_no_model_among_the_constants():
  """Trap 21: and the check sees a reference that is closed over."""
  model = dataclasses.replace(MODEL, vocab_size=20_000, layers=1, unroll=1)
  config = dataclasses.replace(ONCE, model=model)
  policy = tiny.policy(0, model=model)
  held = reference.freeze(policy)
  assert held["transformer"]["embedding"]["tokens"].nbytes > 2**20
  step = make_step(config, SGD)
  closed = lambda state, held_, *rest: step(state, held, *rest)
  state = start(policy, SGD)
  arguments = state, held, SCORES, tiny.prompts(), jax.random.key(0)
  assert largest_constant(jax.jit(step).lower(*arguments)) < 2**20
  assert largest_constant(jax.jit(closed).lower(*arguments)) > 2**20


# What must not matter.


@pytest.mark.parametrize("pieces", [2, 4])
def test_microbatches_add_up_to_the_whole(one_update, models, pieces):
  """Trap 18: with unequal lengths, state and figures."""
  policy, held, _ = models
  split = compile_step(dataclasses.replace(ONCE, microbatches=pieces), KEEP)
  found, wanted = (
    run(step, KEEP, policy, held, SCORES) for step in (split, one_update)
  )
  lengths = wanted[1].samples.sequences.response_lengths
  assert len(set(lengths.tolist())) > 2
  tiny.assert_close(found[0], wanted[0], 1e-5)
  # Means whose terms cancel are as exact as a term is.
  tiny.assert_close(found[1].scalars, wanted[1].scalars, 1e-5, floor=1e-7)


def test_wider_prompts_change_nothing(one_update, models):
  """Traps 8, 18: loss, ledger and gradient; the tokens are the same."""
  policy, held, _ = models
  found, wanted = (
    run(one_update, KEEP, policy, held, SCORES, prompts=tiny.prompts(size))
    for size in (7, P)
  )
  for name in ("response_tokens", "response_lengths"):
    pair = (getattr(x[1].samples.sequences, name) for x in (found, wanted))
    np.testing.assert_array_equal(*pair)
  for _, metrics in (found, wanted):
    assert metrics.scalars.pop(ROUNDING) < 1e-5
  tiny.assert_close(found[1].scalars, wanted[1].scalars, 2e-5)
  tiny.assert_close(found[0].optimizer, wanted[0].optimizer, 2e-5)


def test_garbage_in_the_padding_changes_no_bit(step, models):
  """Trap 8: what a padded column holds reaches nothing."""
  results = []
  for garbage in (0, 11):
    prompts = tiny.prompts(garbage=garbage)
    state, metrics = run(step, SGD, *models, prompts=prompts)
    response = metrics.samples.sequences.response_tokens
    results.append((state, metrics.scalars, response))
  tiny.assert_same(*results)


# What is sampled.


def test_scored_tokens_are_the_sampled_ones(models, first):
  """Trap 20: a second rollout with the step's own key writes the same."""
  policy, *_ = models
  rollout_key, _ = jax.random.split(jax.random.fold_in(jax.random.key(0), 0))
  again = jax.jit(
    lambda params, prompts, key: rollout.rollout(
      params, prompts, key, model=MODEL, config=ONCE.rollout
    )
  )(policy["transformer"], tiny.prompts(), rollout_key)
  sequences = first.samples.sequences
  tiny.assert_same(tiny.to_numpy(again.sequences), sequences)
  logprobs = full_logprobs(policy, sequences)
  difference = 0.0
  for row, length in enumerate(sequences.response_lengths):
    tokens = sequences.response_tokens[row, :length]
    wanted = logprobs[row][np.arange(length), tokens]
    for found in (again.logprobs, first.samples.logprobs):
      np.testing.assert_allclose(found[row, :length], wanted, atol=1e-5)
    pair = again.logprobs[row, :length], first.samples.logprobs[row, :length]
    difference = max(difference, np.abs(pair[0] - pair[1]).max())
  found = first.scalars["rollout/logprob_max_abs_diff"]
  np.testing.assert_allclose(found, difference, atol=1e-6)


def test_noise_is_new_in_every_row_and_step(step, models):
  """Trap 23: equal prompts; and the same key and step give the same."""
  policy, *frozen = models
  tokens = jnp.tile(jnp.array([[0, 1, 2, 4]], jnp.int32), (B, 1))
  prompts = types.Prompts(tokens, jnp.full((B,), P, jnp.int32))

  def responses(number, seed):
    state = dataclasses.replace(start(policy, SGD), step=jnp.int32(number))
    _, metrics = step(state, *frozen, prompts, jax.random.key(seed))
    return np.array(metrics.samples.sequences.response_tokens)

  same = responses(0, 0)
  assert len({tuple(row) for row in same}) > B // 2
  np.testing.assert_array_equal(same, responses(0, 0))
  assert (same != responses(1, 0)).mean() > 0.3
  assert (same != responses(0, 1)).mean() > 0.3


# What is reported, against sums from the definition.


def full_logprobs(params, sequences):
  """Float64 log-softmax `[n, V]` of each response; no padding on the left."""
  logits = hidden_states(params, texts_of(sequences))
  logits = (
    logits @ np.asarray(transformer.head_kernel(params["transformer"]), "f8").T
  )
  logits = logits / ONCE.rollout.temperature
  logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return [
    row[size - 1 : size - 1 + length]
    for row, size, length in zip(
      logprobs, sequences.prompt_lengths, sequences.response_lengths
    )
  ]


def texts_of(sequences):
  """The real tokens of every row."""
  return [
    np.concatenate([prompt[P - size :], response[:length]])
    for prompt, size, response, length in zip(
      sequences.prompt_tokens,
      sequences.prompt_lengths,
      sequences.response_tokens,
      sequences.response_lengths,
    )
  ]


def hidden_states(params, texts):
  """Every text from column 0 on; what follows it cannot be attended to."""
  tokens = np.zeros((len(texts), P + R), np.int32)
  for row, text in enumerate(texts):
    tokens[row, : len(text)] = text
  positions = jnp.broadcast_to(jnp.arange(P + R), tokens.shape)
  causal = jnp.tril(jnp.ones((len(texts), P + R, P + R), bool))
  hidden, _ = jax.jit(transformer.apply, static_argnames="config")(
    params["transformer"],
    jnp.asarray(tokens),
    config=MODEL,
    positions=positions,
    mask=causal,
  )
  return np.asarray(hidden, "f8")


def check_scalars(scalars, wanted, rtol=1e-4):
  """`wanted` holds numbers, and `[B]` where a standard error is reported."""
  for name, value in wanted.items():
    value = np.asarray(value, "f8")
    if value.ndim:
      error = value.std(ddof=1) / np.sqrt(B)
      found = scalars[f"{name}_se"]
      np.testing.assert_allclose(found, error, rtol, 1e-6, err_msg=name)
    found = scalars[name]
    np.testing.assert_allclose(found, value.mean(), rtol, 1e-6, err_msg=name)


def test_ledger_is_that_of_the_full_logits(models, first):
  """Traps 18, 22: response tokens only, mean over responses, right sign."""
  policy, held, reward_model = models
  sequences = first.samples.sequences
  lengths = sequences.response_lengths
  rows = range(B)
  log_p, log_q = (full_logprobs(m, sequences) for m in (policy, held))
  chosen = [
    (np.arange(n), sequences.response_tokens[row, :n])
    for row, n in enumerate(lengths)
  ]
  k1 = [log_p[row][chosen[row]] - log_q[row][chosen[row]] for row in rows]
  kl = lambda a, b: np.array(
    [np.sum(np.exp(a[row]) * (a[row] - b[row])) for row in rows]
  )
  k1_sums = np.array([x.sum() for x in k1])
  tokens = lengths.sum()
  texts = texts_of(sequences)
  hidden = hidden_states(reward_model, texts)
  last = np.stack(
    [hidden[row, len(text) - 1] for row, text in enumerate(texts)]
  )
  scores = last @ np.asarray(reward_model["score_head"]["kernel"], "f8")
  scores = (scores - 0.5) / 2.0
  stopped = [
    sequences.response_tokens[row, lengths[row] - 1] in STOP_IDS for row in rows
  ]
  check_scalars(
    first.scalars,
    {
      "kl/reverse_k1": k1_sums,
      "kl/reverse_k3": [np.sum(np.exp(-x) - 1 + x) for x in k1],
      "kl/reverse_exact": kl(log_p, log_q),
      "kl/forward_exact": kl(log_q, log_p),
      "kl/per_token": k1_sums.sum() / tokens,
      "kl/beta": BETA,
      "kl/penalty": BETA * kl(log_p, log_q).mean(),
      "kl/clamp_fraction": 0.0,
      "reward/score": scores,
      "reward/total": scores - BETA * kl(log_p, log_q),
      "ppo/entropy": -sum((np.exp(x) * x).sum() for x in log_p) / tokens,
      "rollout/reference_nll": -sum(
        log_q[row][chosen[row]].sum() for row in rows
      )
      / tokens,
      "rollout/response_tokens": lengths.mean(),
      "rollout/truncated_fraction": 1 - np.mean(stopped),
    },
  )
  # Lengths and stops from the tokens themselves, all kinds present.
  for row, length in enumerate(lengths):
    before = sequences.response_tokens[row, : length - 1]
    assert not np.isin(before, STOP_IDS).any()
    assert stopped[row] or length == R
  assert 0 < np.mean(stopped) < 1 and lengths.min() < R
  np.testing.assert_allclose(first.samples.scores, scores, rtol=1e-4)


def test_far_references_stay_finite_and_are_counted(step, models):
  """Trap 17: log-ratios of hundreds of nats, in metrics and parameters."""
  policy, held, reward_model = models
  far = jax.tree.map(lambda x: 40 * x, held)
  state, metrics = run(step, SGD, policy, far, reward_model)
  sequences = metrics.samples.sequences
  difference = metrics.samples.logprobs - metrics.samples.reference_logprobs
  real = np.arange(R) < sequences.response_lengths[:, None]
  clamped = (np.abs(difference) > 60)[real].mean()
  assert 0.1 < clamped < 1
  found = metrics.scalars["kl/clamp_fraction"]
  np.testing.assert_allclose(found, clamped, rtol=1e-6)
  assert all(np.isfinite(x) for x in metrics.scalars.values())
  finite = jax.tree.map(lambda x: bool(np.isfinite(x).all()), state)
  assert all(jax.tree.leaves(finite))


@pytest.mark.quick
def test_losses_are_those_of_the_definition(one_update, models):
  """Two epochs on one batch, sums over t and k written out."""
  policy, held, _ = models
  config = dataclasses.replace(ONCE, epochs=2)
  arguments = KEEP, policy, held, SCORES
  moved, _ = run(one_update, *arguments)
  _, metrics = run(compile_step(config, KEEP), *arguments)
  sequences = metrics.samples.sequences
  lengths = sequences.response_lengths

  def read(params):
    hidden = hidden_states(params, texts_of(sequences))
    head = params["value_head"]
    values = hidden @ np.asarray(head["kernel"], "f8") + float(head["bias"])
    logprobs = full_logprobs(params, sequences)
    rows = zip(sequences.prompt_lengths, lengths, sequences.response_tokens)
    for row, (size, length, tokens) in enumerate(rows):
      chosen = logprobs[row][np.arange(length), tokens[:length]]
      yield chosen, values[row, size - 1 : size - 1 + length]

  figures = {"policy_loss": 0.0, "value_loss": 0.0, "clip_fraction": 0.0}
  moved_kl = []
  moved = jax.tree.map(jnp.asarray, moved.params)
  everything = zip(read(policy), read(moved), read(policy | held))
  for row, ((old, v), (new, new_v), (ref, _)) in enumerate(everything):
    r = -BETA * (old - ref)
    r[-1] += SCORES[row]
    delta = r + np.append(v[1:], 0.0) - v
    n = len(delta)
    a = [sum(0.95**k * delta[t + k] for k in range(n - t)) for t in range(n)]
    a, ratio = np.array(a), np.exp(new - old)
    figures["policy_loss"] -= a.sum()
    figures["policy_loss"] -= np.minimum(
      ratio * a, np.clip(ratio, 0.8, 1.2) * a
    ).sum()
    figures["clip_fraction"] += np.sum(
      (ratio > 1.2) & (a > 0) | (ratio < 0.8) & (a < 0)
    )
    target = a + v
    near = v + np.clip(new_v - v, -0.2, 0.2)
    worst = np.maximum((new_v - target) ** 2, (near - target) ** 2)
    figures["value_loss"] += 0.5 * (a**2).sum() + 0.5 * worst.sum()
    moved_kl.append(np.sum(ratio - 1 - np.log(ratio)))
  tokens = 2 * lengths.sum()
  assert 0.02 < figures["clip_fraction"] / tokens < 0.5
  wanted = {f"ppo/{n}": x / tokens for n, x in figures.items()}
  wanted["kl/to_old_policy"] = moved_kl
  check_scalars(metrics.scalars, wanted, rtol=3e-4)


def test_scores_arrive_as_they_are(one_update, models):
  """Traps 3, 25: fractions stay fractions and a NaN is nobody's 0."""
  policy, held, _ = models
  fine, bad = (
    run(one_update, KEEP, policy, held, scores)[1]
    for scores in (SCORES, SCORES.at[2].set(jnp.nan))
  )
  np.testing.assert_array_equal(fine.samples.scores, SCORES)
  np.testing.assert_array_equal(bad.samples.scores, SCORES.at[2].set(jnp.nan))
  for name in ("reward/score", "reward/total", "ppo/policy_loss"):
    assert np.isfinite(fine.scalars[name]) and np.isnan(bad.scalars[name])
  assert np.isfinite(bad.scalars["kl/reverse_exact"])


# What β does.


def test_larger_beta_gives_smaller_kl():
  """Trap 1: three βs in one program, each as if it were alone.

  Trap 9: also under `vmap` the KL is 0 at step 0.
  """
  betas = np.array([0.0, 0.1, 1.0], np.float32)
  policy = tiny.policy(0, scale=0.2)
  held = reference.freeze(policy)
  prompts = jax.tree.map(lambda x: jnp.concatenate([x] * 4), tiny.prompts())
  optimizer = optax.sgd(0.1, momentum=0.9)
  fives = lambda tokens, mask: 0.3 * ((tokens == 5) & mask).sum(1)
  options = {
    "score": rewards.from_function(fives),
    "optimizer": optimizer,
    "gold": lambda sequences: 2.0 * sequences.response_lengths,
  }
  config = dataclasses.replace(ONCE, epochs=2, whiten_advantages=True)
  members = jax.jit(
    jax.vmap(
      make_step(config, **options, member_axis="member"),
      in_axes=(0, None, None, None, None),
      axis_name="member",
    ),
    donate_argnums=0,
  )
  state = jax.vmap(lambda beta: start(policy, optimizer, beta))(betas)
  alone = start(policy, optimizer, float(betas[1]))
  step = compile_step(config, **options)
  history = []
  for i in range(30):
    state, metrics = members(state, held, {}, prompts, jax.random.key(0))
    history.append(tiny.to_numpy(metrics.scalars))
    if i < 3:
      alone, metrics = step(alone, held, {}, prompts, jax.random.key(0))
      member, scalars = jax.tree.map(lambda x: x[1], (state, history[-1]))
      assert scalars.pop(ROUNDING) + metrics.scalars.pop(ROUNDING) < 1e-4
      tiny.assert_close(member, alone, 1e-5)
      tiny.assert_close(scalars, metrics.scalars, 1e-5, floor=1e-6)
  np.testing.assert_array_equal(history[0]["kl/reverse_exact"], 0.0)
  np.testing.assert_array_equal(history[0]["kl/reverse_k1"], 0.0)
  mean = lambda name: np.mean([h[name] for h in history[-5:]], axis=0)
  kl, score = mean("kl/reverse_exact"), mean("reward/score")
  assert kl[0] > 1.5 * kl[1] > 3 * kl[2] > 0
  assert score[0] > score[1] > score[2]
  np.testing.assert_array_equal(history[-1]["kl/beta"], betas)
  gold = 2 * mean("rollout/response_tokens")
  np.testing.assert_allclose(mean("reward/gold"), gold, rtol=1e-6)


# Shapes that no test machine could hold.


@pytest.mark.parametrize("name", ["1b", "8b"])
def test_full_size_models_trace(name):
  """State in, state out; metrics are scalars and the samples are [B, R]."""
  small = name == "1b"
  model = transformer.TransformerConfig(
    vocab_size=128_256,
    width=2048 if small else 4096,
    layers=16 if small else 32,
    heads=32,
    kv_heads=8,
    head_size=64 if small else 128,
    mlp_width=8192 if small else 14_336,
    max_length=8192,
    rope_theta=500_000.0,
    tie_embeddings=small,
    compute_dtype="bfloat16",
    unroll=1,
    remat=True,
  )
  drawn = rollout.RolloutConfig(response_length=512, stop_ids=(128_001,))
  config = ppo.PPOConfig(
    model=model, rollout=drawn, epochs=2, minibatches=4, microbatches=4
  )
  optimizer = optimizer_lib.make(
    optimizer_lib.OptimizerConfig(learning_rate=1e-6, updates=8)
  )
  step = make_step(config, optimizer, rewards.from_model(model))
  prompts = types.Prompts(
    jnp.zeros((64, 256), jnp.int32), jnp.ones((64,), jnp.int32)
  )

  def run():
    policy = tiny.initial_policy(model)
    head = transformer.init_scalar_head(model.width, use_bias=False)
    reward_model = {
      "transformer": transformer.init(jax.random.key(1), model, lm_head=False),
      "score_head": head,
      "normalisation": {"mean": jnp.zeros(()), "std": jnp.ones(())},
    }
    state = start(policy, optimizer)
    frozen = reference.freeze(policy), reward_model
    return state, *step(state, *frozen, prompts, jax.random.key(0))

  before, after, metrics = jax.eval_shape(run)
  assert after == before
  count = sum(x.size for x in jax.tree.leaves(before.params["transformer"]))
  assert count == (1_235_814_400 if small else 8_030_261_248)
  assert {x.shape for x in metrics.scalars.values()} == {()}
  assert metrics.samples.logprobs.shape == (64, 512)
