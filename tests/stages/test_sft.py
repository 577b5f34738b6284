"""Stage `sft` at a tiny size: batches, what is held out, resuming."""

import json
import shutil

import pytest

from configs import defaults, sft
from rlhf_jax.data import batches, texts
from rlhf_jax.stages import pipeline
from rlhf_jax.storage import checkpoint, pretrained
from rlhf_jax.text import toy_language
from tests import tiny_network

STEPS = 4


def tiny(*overrides):
  """A config of seconds: one narrow layer, few steps, a mesh of one device."""
  config = sft.get_config()
  sizes = [
    *tiny_network.SIZES,
    "rollout.response_length=8",
    "data.size=64",
    "train.batch_size=8",
    f"train.steps={STEPS}",
    "checkpoint.every=2",
    "mesh.data=1",
  ]
  defaults.apply_overrides(config, [*sizes, *overrides])
  return config


def read(path):
  return json.loads(path.read_text())


def rows(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture
def drawn(monkeypatch):
  """The (seed, step) of every batch that is drawn."""
  found, batch_at = set(), batches.batch_at

  def noted(rows, *, seed, step, batch_size):
    found.add((seed, step))
    return batch_at(rows, seed=seed, step=step, batch_size=batch_size)

  monkeypatch.setattr(batches, "batch_at", noted)
  return found


def test_steps_beyond_the_checkpoint_are_in_no_file_twice(tmp_path, drawn):
  """Killed after steps that no checkpoint has: they are done and told anew."""
  workdir = tmp_path / "run"
  config = tiny("seed=3")
  pipeline.run(config, str(workdir), resume=False)
  assert drawn == {(3, step) for step in range(STEPS)}
  before = checkpoint.load_params(workdir / "model")[0]
  start = pretrained.load_policy(config).params
  assert checkpoint.tree_hash(before) != checkpoint.tree_hash(start)

  shutil.rmtree(workdir / "checkpoints" / "4")
  drawn.clear()
  pipeline.run(config, str(workdir), resume=True)
  assert drawn == {(3, 2), (3, 3)}
  assert [row["step"] for row in rows(workdir)] == [0, 1, 2, 3]
  after = checkpoint.load_params(workdir / "model")[0]
  assert checkpoint.tree_hash(before) == checkpoint.tree_hash(after)


def test_it_is_measured_on_what_it_did_not_read(tmp_path, monkeypatch):
  """What is held out ends otherwise here than all that is trained on."""
  vocabulary = toy_language.VOCABULARY
  ids = lambda text: [vocabulary.index(word) for word in text.split()]
  prompts = [f"<start> {word} was" for word in ("it", "film", "plot", "story")]
  sides = [
    [(ids(prompt), ids(end)) for prompt in prompts for end in ends]
    for ends in (["lovely .", "warm ."] * 40, ["dull", "cold"])
  ]
  monkeypatch.setattr(texts, "read", lambda *args, **named: sides)
  config = tiny("optimizer.learning_rate=0.03", "train.steps=12")
  pipeline.run(config, str(tmp_path / "run"), resume=False)
  heldout = read(tmp_path / "run" / "summary.json")["metrics"]
  assert rows(tmp_path / "run")[-1]["sft/loss"] < 2
  assert heldout["sft/heldout_loss"] > 4
