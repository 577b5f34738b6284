"""Stage `reward_model` at a tiny size: what is held out, and its moments.

The policy that it stands on is not trained: what is shown holds for any.
"""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from configs import defaults, reward_model
from rlhf_jax import errors, types
from rlhf_jax.data import batches, preferences, sampling
from rlhf_jax.stages import pipeline
from rlhf_jax.steps import rewards
from rlhf_jax.storage import checkpoint, pretrained
from rlhf_jax.storage import workdir as workdir_lib
from tests import tiny_network

STEPS = 4
PAIRS = [
  {"prompt": f"{subject} {copula}", "chosen": good, "rejected": bad}
  for subject in ("it", "the film", "the plot", "this story", "that hero")
  for copula in ("was", "felt", "seemed", "looked")
  for good, bad in ((" lovely .", " dull ."), (" warm .", " cold ."))
]


def tiny(*overrides):
  """A config of seconds: one narrow layer, few steps, a mesh of one device."""
  config = reward_model.get_config()
  sizes = [
    *tiny_network.SIZES,
    "rollout.response_length=8",
    "train.batch_size=8",
    f"train.steps={STEPS}",
    "optimizer.learning_rate=0.01",
    "checkpoint.every=2",
    "mesh.data=1",
    "data.heldout_fraction=0.25",
  ]
  defaults.apply_overrides(config, [*sizes, *overrides])
  return config


@pytest.fixture
def config(tmp_path):
  """`config(*overrides)`: on a saved policy, and a file of pairs."""
  with workdir_lib.Workdir.open(
    tmp_path / "policy", {"stage": "sft"}, resume=False
  ) as opened:
    pretrained.save(opened, pretrained.load_policy(tiny()))
  path = tmp_path / "pairs.jsonl"
  path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
  places = f"policy.path={tmp_path / 'policy'}", f"data.path={path}"
  return lambda *overrides: tiny(*places, *overrides)


def read(path):
  return json.loads(path.read_text())


def rows(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_steps_beyond_the_checkpoint_are_in_no_file_twice(
  config, tmp_path, monkeypatch
):
  """Killed after steps that no checkpoint has: they are done and told anew.

  Each with its own batch, of the run's seed.
  """
  drawn, batch_at = set(), batches.batch_at

  def noted(rows, *, seed, step, batch_size):
    drawn.add((seed, step))
    return batch_at(rows, seed=seed, step=step, batch_size=batch_size)

  monkeypatch.setattr(batches, "batch_at", noted)
  workdir, config = tmp_path / "run", config("seed=3")
  pipeline.run(config, str(workdir), resume=False)
  assert drawn == {(3, step) for step in range(STEPS)}
  before = checkpoint.load_params(workdir / "model")[0]
  shutil.rmtree(workdir / "checkpoints" / "4")
  pipeline.run(config, str(workdir), resume=True)
  assert [row["step"] for row in rows(workdir)] == [0, 1, 2, 3]
  after = checkpoint.load_params(workdir / "model")[0]
  assert checkpoint.tree_hash(before) == checkpoint.tree_hash(after)


def test_another_policy_to_stand_on_is_refused_on_resume(config, tmp_path):
  """Trap 11, of the model that the score's moments are measured with."""
  workdir, policy = tmp_path / "run", tmp_path / "policy" / "model"
  pipeline.run(config("train.steps=2"), str(workdir), resume=False)
  params, metadata = checkpoint.load_params(policy)
  params["transformer"]["final_norm"]["scale"][0] += 1e-3
  checkpoint.save_params(policy, params, metadata)
  with pytest.raises(errors.UserError, match="reward model is not the one"):
    pipeline.run(config(), str(workdir), resume=True)


def test_a_reward_model_that_learned_nothing_is_refused(config, tmp_path):
  """Its deviation would be a divisor: noise, blown up to a reward."""
  still = config("optimizer.learning_rate=1e-9")
  with pytest.raises(errors.UserError, match=r"scores all .* alike \(dev"):
    pipeline.run(still, str(tmp_path / "run"), resume=False)


def test_what_is_held_out_judges_and_normalises(config, tmp_path, monkeypatch):
  """Held-out pairs are the other way round here: all of them are lost.

  And the score has mean 0 and deviation 1 where the policy answers their
  prompts, which it was not trained on.
  """
  sets, drawn = [], []
  split, sample = preferences.split, sampling.sample

  def reversed_where_held_out(config, pairs):
    sets.extend(split(config, pairs))
    return sets[0], types.PreferencePairs(sets[1].rejected, sets[1].chosen)

  def noted(*args, **named):
    drawn.append(sample(*args, **named))
    return drawn[-1]

  monkeypatch.setattr(preferences, "split", reversed_where_held_out)
  monkeypatch.setattr(sampling, "sample", noted)
  workdir = tmp_path / "run"
  pipeline.run(config("train.steps=12"), str(workdir), resume=False)
  assert rows(workdir)[-1]["reward_model/accuracy"] == 1
  metrics = read(workdir / "summary.json")["metrics"]
  assert metrics["reward_model/heldout_accuracy"] == 0

  (responses,), (_, heldout) = drawn, sets
  as_set = lambda tokens: {tuple(row) for row in np.asarray(tokens).tolist()}
  held = as_set(heldout.chosen.prompt_tokens)
  assert len(held) == 5
  assert as_set(responses.prompt_tokens) == held

  model = pretrained.load_workdir(workdir)
  raw = jax.jit(functools.partial(rewards.raw_scores, model=model.model))
  scores = raw(model.params, responses)
  moments = model.params["normalisation"]
  np.testing.assert_allclose(moments["mean"], scores.mean(), atol=1e-5)
  np.testing.assert_allclose(moments["std"], scores.std(), rtol=1e-4)
