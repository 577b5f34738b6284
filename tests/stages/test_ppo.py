"""The PPO stage's penalties, controllers, groups, references and ensembles.

The models are not trained: what is shown here holds for any.
"""

import dataclasses
import itertools
import json
import shutil
import sys

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np
import pytest
import tokenizers

from configs import defaults
from rlhf_jax import errors
from rlhf_jax.data import batches
from rlhf_jax.models import transformer
from rlhf_jax.stages import alarms, loop, pipeline
from rlhf_jax.stages import ppo as ppo_stage
from rlhf_jax.steps import optimizer as optimizer_lib
from rlhf_jax.storage import checkpoint, pretrained
from rlhf_jax.storage import workdir as workdir_lib
from rlhf_jax.text import toy_language
from tests import tiny_network

B, R = 8, 8
BETA = 0.05
SCORE_SCALES = {"reward_a": 2.0, "reward_b": 0.5}
CONTROLLED = (
  "kl.estimator=rao_blackwellised",
  "kl.controller=pi",
  "kl.target=1",
  "train.steps=4",
)


def tiny(*overrides):
  """A config of seconds: one narrow layer, few steps, a mesh of one device."""
  config = defaults.get_config()
  sizes = [
    *tiny_network.SIZES,
    f"rollout.response_length={R}",
    f"rollout.stop_ids={tuple(range(2, 30))}",  # Responses of all lengths.
    "optimizer.learning_rate=0.02",
    f"kl.beta={BETA}",
    "data.size=64",
    f"train.batch_size={B}",
    "train.steps=2",
    "train.samples_every=1",
    "checkpoint.every=2",
    "mesh.data=1",
  ]
  defaults.apply_overrides(config, [*sizes, *overrides])
  return config


def save(path, model, stage="sft"):
  with workdir_lib.Workdir.open(path, {"stage": stage}, resume=False) as opened:
    pretrained.save(opened, model)


def another_tokenizer():
  """As many tokens as the built-in language has, and other ones."""
  words = {f"word{i}": i for i in range(len(toy_language.VOCABULARY))}
  backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
  return type(toy_language.tokenizer())(tokenizer_object=backend)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """A policy, references for it, reward models."""
  directory = tmp_path_factory.mktemp("models")
  policy = pretrained.load_policy(tiny())
  save(directory / "policy", policy)
  narrow = pretrained.load_policy(tiny("model.width=8", "seed=1"))
  save(directory / "narrow", narrow)
  larger = pretrained.load_policy(tiny("model.vocab_size=128"))
  save(directory / "larger", larger)
  foreign = dataclasses.replace(policy, tokenizer=another_tokenizer())
  save(directory / "foreign", foreign)
  for seed, (name, scale) in enumerate(SCORE_SCALES.items()):
    head = transformer.init_scalar_head(16, use_bias=False)
    head["kernel"] = jax.random.normal(jax.random.key(seed), (16,))
    moments = {"mean": jnp.float32(0.5), "std": jnp.float32(scale)}
    params = policy.params | {"score_head": head, "normalisation": moments}
    reward = dataclasses.replace(policy, params=params)
    save(directory / name, reward, "reward_model")
  # Only the built-in language has a gold reward.
  prompts = "the film was\nit was\nwe liked\ni thought this story was\n"
  (directory / "prompts.txt").write_text(prompts)
  return directory


@pytest.fixture
def train(models, tmp_path, monkeypatch):
  """`train(name, *overrides)` runs the stage and returns its workdir."""
  return trainer(models, tmp_path, monkeypatch)


def trainer(models, directory, monkeypatch):
  monkeypatch.setattr(ppo_stage, "SAMPLES", B)

  def run(name, *overrides, resume=False):
    config = tiny(
      f"policy.path={models / 'policy'}",
      f"reward.path={models / 'reward_a'}",
      *overrides,
    )
    pipeline.run(config, str(directory / name), resume=resume)
    return directory / name

  return run


@pytest.fixture(scope="module")
def controlled(models, tmp_path_factory):
  """A run with the Rao-Blackwellised gradient and a controller."""
  with pytest.MonkeyPatch.context() as monkeypatch:
    run = trainer(models, tmp_path_factory.mktemp("runs"), monkeypatch)
    return run("controlled", *CONTROLLED)


def rows(workdir, name="metrics"):
  lines = (workdir / f"{name}.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def samples_by_step(workdir):
  records = rows(workdir, "samples")
  steps = dict.fromkeys(record["step"] for record in records)
  return [[r for r in records if r["step"] == step] for step in steps]


def untimed(workdir):
  return [
    {name: x for name, x in row.items() if not name.startswith("time/")}
    for row in rows(workdir)
  ]


def test_the_controller_moves_beta(controlled):
  """The PI controller's formula, on the KL that the run reports."""
  metrics = rows(controlled)
  total = np.log(BETA) + 0.5
  for before, after in itertools.pairwise(metrics):
    error = np.clip(before["kl/reverse_exact"] - 1, -1, 1)
    total += 0.07 * error
    wanted = np.exp(total + 0.5 * error)
    np.testing.assert_allclose(after["kl/beta"], wanted, rtol=1e-5)
  assert metrics[0]["kl/reverse_exact"] == 0
  np.testing.assert_allclose(
    [row["kl/beta"] for row in metrics[:2]], [BETA, BETA * np.exp(-0.07)]
  )
  assert metrics[-1]["kl/reverse_exact"] > 0


def test_the_rate_falls_over_updates_and_not_over_steps(train, monkeypatch):
  """Two steps of 2 × 2 updates are eight; the last step still moves.

  And each step has a batch of its own, of the run's seed.
  """
  made, make = [], optimizer_lib.make

  def noted(config):
    made.append(config)
    return make(config)

  monkeypatch.setattr(optimizer_lib, "make", noted)
  steps, batch_at = set(), batches.batch_at

  def drawn(rows, *, seed, step, batch_size):
    steps.add((seed, step))
    return batch_at(rows, seed=seed, step=step, batch_size=batch_size)

  monkeypatch.setattr(batches, "batch_at", drawn)
  run = train("run", "optimizer.schedule=linear", "seed=3")
  assert steps == {(3, 0), (3, 1)}
  assert [config.updates for config in made] == [8]
  assert rows(run)[-1]["kl/to_old_policy"] > 1e-6


def test_a_resumed_controller_goes_on(controlled, train):
  """Trap 12. Interrupted ≡ uninterrupted, β to the last bit."""
  train("halves", *CONTROLLED, "train.steps=2")
  halves = train("halves", *CONTROLLED, resume=True)
  assert untimed(halves) == untimed(controlled)
  assert rows(halves, "samples") == rows(controlled, "samples")
  assert len({row["kl/beta"] for row in rows(halves)}) == 4


def test_the_ledger_of_every_step(controlled):
  for row in rows(controlled):
    for meter in ("reverse_k1", "reverse_k3", "reverse_exact", "forward_exact"):
      assert {f"kl/{meter}", f"kl/{meter}_se"} <= set(row)
    for meter in ("kl/decode_mismatch", "kl/to_old_policy"):
      # Each is a KL; at rounding's size the one, of an update the other.
      assert row[meter] >= 0 and row[f"{meter}_se"] >= 0
    assert row["kl/decode_mismatch"] < 1e-6
    assert row["kl/to_old_policy"] > 1e-6 and row["kl/to_old_policy_se"] > 0
    np.testing.assert_allclose(
      row["kl/beta_effective"],
      row["kl/beta"] * SCORE_SCALES["reward_a"],
      rtol=1e-6,
    )
    np.testing.assert_allclose(
      row["kl/penalty"], row["kl/beta"] * row["kl/reverse_exact"], rtol=1e-5
    )
    # 8 responses have 28 pairs; a whole number of halves agrees.
    assert 0 <= row["reward/pair_accuracy"] <= 1
    assert "reward/agreement" not in row


def test_another_reward_is_refused_on_resume(models, train, tmp_path):
  """Trap 11: the reward of a resumed run is the one that it began with."""
  shutil.copytree(models / "reward_a", tmp_path / "reward")
  options = f"reward.path={tmp_path / 'reward'}", "train.steps=2"
  train("run", *options)
  params, metadata = checkpoint.load_params(tmp_path / "reward" / "model")
  params["score_head"]["kernel"][0] += 1e-3
  checkpoint.save_params(tmp_path / "reward" / "model", params, metadata)
  with pytest.raises(errors.UserError, match="reward model is not the one"):
    train("run", options[0], "train.steps=4", resume=True)


def columns(records, values):
  """Each position's mean and its standard error over the rows that reach it."""
  means, standard_errors, counts = [], [], []
  for t in range(max(len(r["reverse_kl"]) for r in records)):
    reach = [values(r)[t] for r in records if len(values(r)) > t]
    error = np.std(reach, ddof=1) / len(reach) ** 0.5 if len(reach) > 1 else 0
    means.append(np.mean(reach))
    standard_errors.append(error)
    counts.append(len(reach))
  return means, standard_errors, counts


def test_the_ledger_by_position_is_that_of_the_batch(controlled):
  """Trap 22. All responses are recorded here, and averaged by hand."""
  batches = samples_by_step(controlled)
  assert len(batches) == 4
  for records, metrics in zip(batches, rows(controlled)):
    assert len(records) == B
    assert ["by_position" in r for r in records] == [True] + [False] * (B - 1)
    lengths = [len(r["reverse_kl"]) for r in records]
    assert lengths == [len(r["logprobs"]) for r in records]
    found = records[0]["by_position"]
    readings = {
      "kl/reverse_exact": lambda r: r["reverse_kl"],
      "kl/reverse_k1": lambda r: np.subtract(
        r["logprobs"], r["reference_logprobs"]
      ),
    }
    for name, values in readings.items():
      means, standard_errors, counts = columns(records, values)
      np.testing.assert_allclose(found[name], means, atol=3e-5)
      np.testing.assert_allclose(
        found[f"{name}_se"], standard_errors, atol=3e-5
      )
      assert found["responses"] == counts
      assert counts == sorted(counts, reverse=True) and counts[0] == B
      total = np.dot(means, counts) / B
      np.testing.assert_allclose(metrics[name], total, atol=3e-4)
    assert {len(column) for column in found.values()} == {max(lengths)}
  assert len(set(lengths)) > 1


def test_the_policy_as_its_own_reference_by_path(models, controlled, train):
  """The path and '' are one reference, while it is what the policy was."""
  named = train("run", *CONTROLLED, f"reference.path={models / 'policy'}")
  assert untimed(named) == untimed(controlled)


@pytest.mark.parametrize(
  "name, found",
  [
    ("larger", r"config\.reference\.path: .*larger has 128 logits.*policy has"),
    ("foreign", r"policy and .*foreign have different tokenizers"),
    ("reward_a", r"config\.reference\.path: .*reward_a is a reward model"),
  ],
)
def test_a_reference_that_cannot_be_one(models, train, name, found):
  """Bad input 29: before anything is compiled."""
  with pytest.raises(errors.UserError, match=found) as caught:
    train("run", f"reference.path={models / name}")
  assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def grouped(models, tmp_path_factory):
  """Runs in groups of four, without a gold reward: a model each, and both."""
  groups = ["ppo.group_size=4", f"data.path={models / 'prompts.txt'}"]
  alone = [*groups, "ppo.advantages=rloo"]
  alone.append(f"reference.path={models / 'narrow'}")
  ensemble = [*groups, "ppo.advantages=grpo", "kl.controller=trust"]
  ensemble += ["kl.trust.decay=0", "kl.trust.reliability_wanted=1"]
  ensemble.append(f"reward.ensemble={str(models / 'reward_b')!r}")
  with pytest.MonkeyPatch.context() as monkeypatch:
    run = trainer(models, tmp_path_factory.mktemp("runs"), monkeypatch)
    return {
      "reward_a": run("reward_a", *alone),
      "reward_b": run("reward_b", *alone, f"reward.path={models / 'reward_b'}"),
      "both": run("both", *ensemble, "train.steps=3"),
    }


@pytest.mark.parametrize("name", ["reward_a", "both"])
def test_responses_come_in_groups(grouped, name):
  """Four neighbours share a prompt, and nothing else."""
  prompts = []
  for records, metrics in zip(
    samples_by_step(grouped[name]), rows(grouped[name]), strict=True
  ):
    for group in (records[:4], records[4:]):
      assert len({record["prompt"] for record in group}) == 1
      assert len({record["response"] for record in group}) > 1
      prompts.append(group[0]["prompt"])
    assert metrics["ppo/value_loss"] == 0  # Nobody has a critic.
  assert len(set(prompts)) > 1


@pytest.mark.parametrize("name", ["reward_a", "both"])
def test_errors_are_over_prompts(grouped, name):
  """Answers to one prompt are one draw of it: sd of the groups' means / √2."""
  for records, metrics in zip(
    samples_by_step(grouped[name]), rows(grouped[name]), strict=True
  ):
    k1 = lambda r: np.sum(r["logprobs"]) - np.sum(r["reference_logprobs"])
    readings = {
      "kl/reverse_exact": lambda r: np.sum(r["reverse_kl"]),
      "kl/reverse_k1": k1,
      "reward/score": lambda r: r["score"],
    }
    for figure, of in readings.items():
      values = np.array([of(record) for record in records])
      error = values.reshape(2, 4).mean(1).std(ddof=1) / np.sqrt(2)
      found = metrics[f"{figure}_se"]
      np.testing.assert_allclose(found, error, atol=2e-4, err_msg=figure)
      np.testing.assert_allclose(metrics[figure], values.mean(), atol=2e-4)


def test_another_reference(grouped):
  """Of other sizes; its KL is there from step 0 on."""
  row = rows(grouped["reward_a"])[0]
  assert row["kl/reverse_exact"] > 0.01
  assert row["kl/forward_exact"] > 0.01
  for record in samples_by_step(grouped["reward_a"])[0]:
    assert record["logprobs"] != record["reference_logprobs"]
    assert min(record["reverse_kl"]) > 0


def test_the_effective_beta_has_the_units_of_the_raw_reward(grouped):
  """β · σ of the reward model's scores, times σ of the groups'."""
  for name, scale in SCORE_SCALES.items():
    for row in rows(grouped[name]):
      np.testing.assert_allclose(row["kl/beta_effective"], BETA * scale)
  for records, row in zip(
    samples_by_step(grouped["both"]), rows(grouped["both"])
  ):
    scores = np.reshape([record["score"] for record in records], (2, 4))
    # The ensemble's score is mean(r/σ): a unit of it is 1 / mean(1/σ).
    raw = 1 / np.mean([1 / scale for scale in SCORE_SCALES.values()])
    wanted = row["kl/beta"] * raw * scores.std(1, ddof=1).mean()
    np.testing.assert_allclose(row["kl/beta_effective"], wanted, rtol=1e-5)
    assert row["ppo/equal_groups"] == 0


def test_an_ensemble_scores_by_its_mean(grouped):
  """Step 0 samples from the same policy with the same key."""
  first = {name: samples_by_step(run)[0] for name, run in grouped.items()}
  texts = [[r["response"] for r in records] for records in first.values()]
  assert texts[0] == texts[1] == texts[2]
  scores = {n: [r["score"] for r in records] for n, records in first.items()}
  wanted = np.mean([scores["reward_a"], scores["reward_b"]], axis=0)
  np.testing.assert_allclose(scores["both"], wanted, atol=1e-5)

  one, two = np.array([scores["reward_a"], scores["reward_b"]])
  i, j = np.triu_indices(B, 1)
  i, j = np.array([i, j])[:, i // 4 == j // 4]  # Of the same prompt.
  alike = (one[i] - one[j]) * (two[i] - two[j]) > 0
  agreement = rows(grouped["both"])[0]["reward/agreement"]
  np.testing.assert_allclose(agreement, alike.mean(), rtol=1e-6)


def test_an_ensemble_is_trusted_as_far_as_it_agrees(grouped):
  """Without a gold reward, `trust` reads the members' agreement."""
  metrics = rows(grouped["both"])
  for before, after in itertools.pairwise(metrics):
    assert 0 <= before["reward/agreement"] <= 1
    trusted = np.clip(2 * before["reward/agreement"] - 1, 0, 1)
    wanted = BETA ** (1 - trusted) * 0.01**trusted
    np.testing.assert_allclose(after["kl/beta"], wanted, rtol=1e-5)
    assert "reward/gold" not in before


def test_a_prefix_and_the_kl_that_it_cannot_hide(train):
  """At step 0 the policy is the reference, and both read the prefix."""
  run = train("run", "rollout.prefix=we liked", "kl.anchored=True")
  first, second = rows(run)
  assert first["kl/reverse_exact"] == first["kl/forward_exact"] == 0
  assert first["kl/anchored"] > 1e-6 and second["kl/reverse_exact"] > 0
  for row in (first, second):
    np.testing.assert_allclose(
      row["kl/penalty"], row["kl/beta"] * row["kl/anchored"], rtol=1e-5
    )
  for record in rows(run, "samples"):
    assert record["prompt"].startswith("we liked ")


def test_texts_in_the_loss_of_every_member(train):
  """A sweep's members have texts of their seeds, as single runs have."""
  mix = ["mix.kind=forward_kl", "mix.batch_size=4", "data.sequence_length=48"]
  sweep = train("sweep", *mix, "sweep.seeds=0,1", "kl.beta=0.1")
  alone = train("alone", *mix, "seed=1", "kl.beta=0.1")
  members = [
    rows(sweep / f"beta=0.1,seed={seed}", "metrics") for seed in (0, 1)
  ]
  for name in ("mix/nll", "mix/forward_kl", "mix/reverse_kl"):
    found, wanted = members[1][0][name], rows(alone)[0][name]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-7)
    assert members[0][0][name] != members[1][0][name]


def test_an_alarm_is_printed_once(train, monkeypatch, capsys):
  monkeypatch.setitem(alarms.MISMATCH_TOLERANCE, "float32", -1.0)
  train("run", *CONTROLLED)
  printed = capsys.readouterr().out
  assert printed.count("alarm: ") == 1
  assert "ppo step 0 alarm: rollout/logprob_max_abs_diff = " in printed


def test_the_config_goes_through_few_modules(models, tmp_path, monkeypatch):
  """Who follows it from the start of a run to the loop meets at most twenty."""
  met, called = set(), []

  def note(frame, event, _):
    name = frame.f_globals.get("__name__", "")
    if event == "call" and name.startswith("rlhf_jax."):
      code = frame.f_code
      names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
      arguments = [frame.f_locals.get(n) for n in names]
      if any(isinstance(x, ConfigDict) for x in arguments):
        met.add(name)

  def drive(*_, **__):
    sys.setprofile(None)
    called.append(True)
    raise KeyboardInterrupt

  monkeypatch.setattr(loop, "drive", drive)
  config = tiny(
    f"policy.path={models / 'policy'}", f"reward.path={models / 'reward_a'}"
  )
  sys.setprofile(note)
  try:
    with pytest.raises(KeyboardInterrupt):
      pipeline.run(config, str(tmp_path / "run"), resume=False)
  finally:
    sys.setprofile(None)
  assert called and "rlhf_jax.settings.static" in met
  assert len(met) <= 20, sorted(met)
