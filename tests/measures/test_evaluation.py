"""A policy's figures on held-out prompts, from the definitions.

The models are not trained: what is shown here holds for any.
"""

import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich import console as rich_console
from scipy import stats

from configs import defaults
from rlhf_jax import errors
from rlhf_jax.data import prompts as prompts_lib
from rlhf_jax.data import sampling
from rlhf_jax.measures import evaluation
from rlhf_jax.models import transformer
from rlhf_jax.settings import roles
from rlhf_jax.steps import rewards
from rlhf_jax.storage import pretrained
from rlhf_jax.text import toy_language
from tests import tiny_network

B, R, PROMPTS = 8, 8, 20  # Batches do not divide the prompts.


def tiny(*overrides):
  """A config of seconds: one narrow layer, a mesh of one device."""
  config = defaults.get_config()
  sizes = [
    "stage=evaluate",
    *tiny_network.SIZES,
    f"rollout.response_length={R}",
    f"rollout.stop_ids={tuple(range(2, 30))}",  # Responses of all lengths.
    f"train.batch_size={B}",
    f"evaluate.prompts={PROMPTS}",
    "mesh.data=1",
  ]
  defaults.apply_overrides(config, [*sizes, *overrides])
  return config


@pytest.fixture(scope="module")
def policy():
  return pretrained.load_policy(tiny())


@pytest.fixture(scope="module")
def reference():
  return pretrained.load_policy(tiny("seed=1"))


@pytest.fixture(scope="module")
def reward(policy):
  head = transformer.init_scalar_head(16, use_bias=False)
  head["kernel"] = jax.random.normal(jax.random.key(0), (16,))
  moments = {"mean": jnp.float32(0.5), "std": jnp.float32(2.0)}
  params = policy.params | {"score_head": head, "normalisation": moments}
  score = rewards.from_model(policy.model)
  return roles.Reward(params, score, "a reward model", normalised=True)


@pytest.fixture(scope="module")
def prompts(policy):
  return evaluation.heldout_prompts(tiny(), policy, quiet(), shared=False)


@pytest.fixture(scope="module")
def measured(policy, reference, reward, prompts):
  return evaluation.evaluate(tiny(), policy, reference, reward, prompts, seed=0)


def quiet():
  return rich_console.Console(file=io.StringIO())


def assert_same(found, wanted):
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_row_for_each_prompt(measured, prompts):
  sequences = measured.rollout.sequences
  np.testing.assert_array_equal(sequences.prompt_tokens, prompts.tokens)
  assert {len(x) for x in jax.tree.leaves(measured)} == {PROMPTS}
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(measured))
  assert len(np.unique(sequences.response_lengths)) > 3
  gold = toy_language.gold_reward(jax.tree.map(jnp.asarray, sequences))
  np.testing.assert_allclose(measured.gold, gold, atol=1e-6)


def test_batches_draw_numbers_of_their_own(policy, reward, prompts):
  """Two batches of one prompt are not two copies of one batch."""
  first = jax.tree.map(lambda x: np.repeat(x[:1], 2 * B, axis=0), prompts)
  found = evaluation.evaluate(tiny(), policy, policy, reward, first, seed=0)
  tokens = found.rollout.sequences.response_tokens
  assert (tokens[:B] != tokens[B:]).any()


def test_equal_models_are_at_kl_zero(policy, reward, prompts):
  found = evaluation.evaluate(tiny(), policy, policy, reward, prompts, seed=0)
  metrics = evaluation.summarise(found)
  for name in ("reverse_exact", "reverse_k1", "reverse_k3", "forward_exact"):
    assert metrics[f"kl/{name}"] == metrics[f"kl/{name}_se"] == 0


def test_summary_is_means_with_errors(measured):
  metrics = evaluation.summarise(measured)
  lengths = measured.rollout.sequences.response_lengths
  for name, x in {
    "reward/score": measured.score,
    "reward/gold": measured.gold,
    "kl/reverse_exact": measured.reverse_exact,
    "kl/reverse_k1": measured.reverse_k1,
    "kl/reverse_k3": measured.reverse_k3,
    "kl/forward_exact": measured.forward_exact,
    "rollout/response_tokens": lengths,
    "rollout/truncated_fraction": measured.rollout.truncated,
  }.items():
    x = np.float64(x)
    error = np.sqrt(((x - x.mean()) ** 2).sum() / (PROMPTS - 1) / PROMPTS)
    assert metrics[name] == pytest.approx(x.mean(), rel=1e-6), name
    assert metrics[f"{name}_se"] == pytest.approx(error, rel=1e-6), name
  nll = np.float64(measured.reference_nll)
  assert metrics["rollout/reference_nll"] == pytest.approx(
    nll.sum() / lengths.sum()
  )


def test_error_of_a_ratio():
  """Against the spread of the ratio over many draws of the data."""
  rng = np.random.default_rng(0)
  counts = rng.integers(1, 9, size=(1000, 100))
  sums = 2.0 * counts + rng.normal(size=counts.shape)
  found = [evaluation.ratio_with_error("x", s, n) for s, n in zip(sums, counts)]
  spread = np.std([each["x"] for each in found])
  errors_ = np.mean([each["x_se"] for each in found])
  assert np.mean([each["x"] for each in found]) == pytest.approx(2, abs=0.01)
  assert errors_ == pytest.approx(spread, rel=0.1)


def test_diversity_is_of_words_and_not_of_stops(measured):
  sequences, rollout = measured.rollout.sequences, measured.rollout
  words = []
  for ids, size, truncated in zip(
    sequences.response_tokens, sequences.response_lengths, rollout.truncated
  ):
    words.extend(ids[: size if truncated else size - 1].tolist())
  metrics = evaluation.summarise(measured)
  assert metrics["text/distinct_1"] == len(set(words)) / len(words)
  assert 0 <= metrics["text/self_repetition"] < 1


def test_who_wins():
  """By hand: wins, a loss, a tie; (2 + ½) / 4."""
  mine, theirs = np.array([1.0, 2.0, 0.0, 5.0]), np.array([0.0, 1.0, 1.0, 5.0])
  found = evaluation.win_rate(mine, theirs)
  assert found["win/rate"] == 0.625
  assert found["win/ties"] == 0.25
  error = np.std([1, 1, 0, 0.5], ddof=1) / 2
  assert found["win/rate_se"] == pytest.approx(error)
  # With half a win, half a loss and a tie: 2½ wins, 1½ losses, 2 ties of 6.
  centre, square = (2.5 + 1) / 6, (2.5 + 2 / 4) / 6
  half = stats.norm.ppf(0.975) * np.sqrt((square - centre**2) / 6)
  assert found["win/rate_low"] == pytest.approx(centre - half)
  assert found["win/rate_high"] == pytest.approx(min(centre + half, 1))


def test_an_interval_has_width_where_all_outcomes_are_the_same():
  ones, zeros = np.ones(20), np.zeros(20)
  wins = evaluation.win_rate(ones, zeros)
  assert wins["win/rate"] == wins["win/rate_high"] == 1
  assert 0.8 < wins["win/rate_low"] < 1
  losses = evaluation.win_rate(zeros, ones)
  assert losses["win/rate_high"] == pytest.approx(1 - wins["win/rate_low"])
  ties = evaluation.win_rate(ones, ones)
  assert ties["win/rate"] == 0.5 and ties["win/ties"] == 1
  assert ties["win/rate_low"] < 0.5 < ties["win/rate_high"]


@pytest.mark.parametrize("chances", [(0.5, 0.3), (0.9, 0.05), (0.2, 0.2)])
def test_interval_covers(chances):
  """The true rate, in about 95 % of 1,000 experiments with 100 prompts."""
  win, tie = chances
  rng = np.random.default_rng(0)
  outcomes = rng.choice(
    [1.0, 0.5, 0.0], size=(1000, 100), p=[win, tie, 1 - win - tie]
  )
  half = np.full(100, 0.5)
  intervals = [evaluation.win_rate(row, half) for row in outcomes]
  rate = win + tie / 2
  covered = np.mean(
    [i["win/rate_low"] <= rate <= i["win/rate_high"] for i in intervals]
  )
  assert 0.93 < covered < 0.975


def test_a_policy_against_itself(policy, reference, reward):
  """One seed: ties only. Two seeds: ½ is in the interval."""
  config = tiny("evaluate.prompts=256", "train.batch_size=128")
  prompts = evaluation.heldout_prompts(config, policy, quiet(), shared=False)
  worths = [
    evaluation.worth(
      evaluation.evaluate(config, policy, to, reward, prompts, seed=seed)
    )
    for to, seed in ((reference, 3), (policy, 3), (policy, 4))
  ]
  alike = evaluation.win_rate(worths[0], worths[1])
  assert alike["win/rate"] == 0.5 and alike["win/ties"] == 1
  drawn = evaluation.win_rate(worths[0], worths[2])
  assert drawn["win/ties"] < 1
  assert drawn["win/rate_low"] < 0.5 < drawn["win/rate_high"]


def test_worth_is_gold_or_else_the_score(measured):
  np.testing.assert_array_equal(evaluation.worth(measured), measured.gold)
  without = measured._replace(gold=None)
  np.testing.assert_array_equal(evaluation.worth(without), measured.score)


def test_best_of_one_is_the_policy(policy, reward, prompts):
  """And the best of more has a higher proxy."""
  config, samples = tiny(), 5
  found = evaluation.best_of_n(
    config, policy, reward, prompts, samples=samples, seed=2
  )
  assert [each.n for each in found] == [1, 2, 4]
  repeated = jax.tree.map(lambda x: np.repeat(x, samples, axis=0), prompts)
  all_of_them = evaluation.evaluate(
    config, policy, policy, reward, repeated, seed=2
  )
  assert found[0].proxy == pytest.approx(all_of_them.score.mean(), rel=1e-5)
  gold = evaluation.worth(all_of_them).mean()
  assert found[0].gold == pytest.approx(gold, rel=1e-5)
  # Samples of one prompt, and not of its neighbours.
  best = all_of_them.score.reshape(PROMPTS, samples).max(1).mean()
  assert found[0].proxy < found[1].proxy < found[2].proxy < best


def test_heldout_prompts_are_of_no_training_seed(policy):
  """Seeds are below 2³², and a run adds no more than a few to its own."""
  texts, line = evaluation.heldout_texts(tiny("seed=7"), shared=False)
  wanted = toy_language.sample_prompts(2**33 + 7, PROMPTS)
  assert texts == wanted and str(2**33 + 7) in line


def test_prompts_of_a_file(policy, tmp_path):
  path = tmp_path / "prompts.txt"
  words = ["it was", "we liked", "the film was", "i thought", "they said"]
  path.write_text("\n".join(words))
  few = tiny(f"data.path={path}", "evaluate.prompts=3")
  texts, line = evaluation.heldout_texts(few, shared=False)
  assert len(set(texts)) == 3 and set(texts) < set(words)
  assert line == f"3 of {path}: 5 prompts"
  other, _ = evaluation.heldout_texts(
    tiny(f"data.path={path}", "evaluate.prompts=3", "seed=1"), shared=False
  )
  assert set(other) != set(texts)
  whole = tiny(f"data.path={path}", "data.heldout_fraction=0.4")
  all_texts, _ = evaluation.heldout_texts(whole, shared=False)
  assert sorted(all_texts) == sorted(words)
  # Where training read the file, too: what it held out, whatever the seed.
  held, line = evaluation.heldout_texts(whole, shared=True)
  assert len(held) == 2 and line.endswith("5 prompts, held out of training")
  whole.seed = 8
  assert sorted(evaluation.heldout_texts(whole, shared=True)[0]) == sorted(held)
  trained_on = prompts_lib.load(whole, policy, quiet())
  apart, _ = sampling.prompts_array(held, whole, policy, "prompts")
  rows = lambda prompts: {row.tobytes() for row in prompts.tokens}
  assert len(rows(trained_on)) == 3 and not rows(trained_on) & rows(apart)
  none = tiny(f"data.path={path}", "data.heldout_fraction=0.0")
  texts, line = evaluation.heldout_texts(none, shared=True)
  assert len(texts) == 5 and "all of them trained on" in line
  # Without the built-in language's prompts there is no gold.
  found = evaluation.heldout_prompts(few, policy, quiet(), shared=False)
  assert len(found.lengths) == 3


def test_no_gold_beyond_the_built_in_language(
  policy, reward, prompts, tmp_path
):
  config = tiny(f"data.path={tmp_path / 'any.txt'}")
  found = evaluation.evaluate(config, policy, policy, reward, prompts, seed=0)
  assert found.gold is None
  assert "reward/gold" not in evaluation.summarise(found)
  (one,) = evaluation.best_of_n(
    config, policy, reward, prompts, samples=1, seed=0
  )
  assert one.gold is None


def test_a_score_that_is_no_number(policy, reward, prompts):
  def broken(reward_model, sequences, step):
    del reward_model, step
    is_sixth = (sequences.prompt_tokens == prompts.tokens[5]).all(1)
    return jnp.where(is_sixth, jnp.nan, 0.0)

  rows, _ = np.unique(prompts.tokens, axis=0, return_index=True)
  assert len(rows) > 1
  faulty = dataclasses.replace(reward, score=broken)
  first = int((prompts.tokens == prompts.tokens[5]).all(1).argmax()) + 1
  with pytest.raises(errors.UserError) as caught:
    evaluation.evaluate(tiny(), policy, policy, faulty, prompts, seed=0)
  assert f"prompt {first} has a response with score nan" in str(caught.value)


def test_a_mesh_gives_the_same_figures(
  policy, reference, reward, prompts, measured
):
  """Eight devices ≡ one."""
  config = tiny("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
  found = evaluation.evaluate(
    config, policy, reference, reward, prompts, seed=0
  )
  assert_same(found.rollout.sequences, measured.rollout.sequences)
  metrics, wanted = map(evaluation.summarise, (found, measured))
  assert metrics == pytest.approx(wanted, rel=1e-4, abs=1e-6)
