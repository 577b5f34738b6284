"""Stages from end to end at a tiny size: files, resume, refusals."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs import defaults, ppo, quickstart
from rlhf_jax import errors
from rlhf_jax.models import convert
from rlhf_jax.stages import pipeline as pipeline_lib
from rlhf_jax.storage import checkpoint, export, pretrained
from rlhf_jax.storage import workdir as workdir_lib
from tests import tiny_network

BETAS = (0.0, 0.3)
CONTROLLER = ("kl.controller=dual", "kl.target=0.1")
SWEEP = (f"sweep.betas={BETAS}", *CONTROLLER)


def shrunk(config, *overrides):
  """A config of seconds: one narrow layer, few steps, a mesh of one device."""
  config = config.copy_and_resolve_references()
  for stage in (config, *config.pipeline.values()):
    sizes = [
      *tiny_network.SIZES,
      "rollout.response_length=8",
      "data.size=64",
      "train.batch_size=8",
      "train.steps=4",
      "train.samples_every=2",
      "checkpoint.every=2",
      "mesh.data=1",
      "sweep.best_of=4",
      "evaluate.prompts=64",
    ]
    defaults.apply_overrides(stage, sizes)
  defaults.apply_overrides(config, overrides)
  return config


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("pipeline") / "run"
  config = shrunk(quickstart.get_config(), *SWEEP)
  pipeline_lib.run(config, str(workdir), resume=False)
  return workdir


def read(path):
  return json.loads(path.read_text())


def rows(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def single(pipeline, *overrides):
  return shrunk(
    ppo.get_config(),
    f"policy.path={pipeline / 'sft'}",
    f"reward.path={pipeline / 'reward_model'}",
    *CONTROLLER,
    *overrides,
  )


def test_pipeline_leaves_what_the_contract_names(pipeline):
  summary = read(pipeline / "summary.json")
  assert summary["stage"] == "pipeline"
  assert list(summary["stages"]) == ["sft", "reward_model", "ppo"]
  for name in ("sft", "reward_model"):
    stage = summary["stages"][name]
    assert {"stage", "seed", "steps", "wall_s", "metrics"} <= set(stage)
    assert stage == read(pipeline / name / "summary.json")
  sft = summary["stages"]["sft"]["metrics"]
  assert np.isfinite([sft["reward/gold"], sft["reward/score"]]).all()
  sweep = summary["stages"]["ppo"]
  assert sweep["stage"] == "sweep"
  assert [member["beta"] for member in sweep["members"]] == list(BETAS)
  for member in sweep["members"]:
    directory = pipeline / "ppo" / member["workdir"]
    assert read(directory / "config.json")["kl"]["beta"] == member["beta"]
    assert len(rows(directory / "metrics.jsonl")) == 4
    assert member["metrics"] == read(directory / "summary.json")["metrics"]
    assert set(member["sample"]) == {"prompt", "response"}
    policy = pretrained.load_workdir(directory)
    assert policy.stop_ids == (2,)
  assert (pipeline / "ppo" / "frontier.png").stat().st_size > 10_000


def test_each_stage_leaves_what_it_trained(pipeline):
  """And stands on what the one before it left."""
  start = pretrained.load_policy(shrunk(quickstart.get_config()))
  places = ("sft", "reward_model", "ppo/beta=0", "ppo/beta=0.3")
  models = [start, *(pretrained.load_workdir(pipeline / p) for p in places)]
  hashes = {checkpoint.tree_hash(m.params["transformer"]) for m in models}
  assert len(hashes) == 5
  sft = str(pipeline / "sft")
  for stage in ("reward_model", "ppo"):
    assert read(pipeline / stage / "config.json")["policy"]["path"] == sft
  paid = read(pipeline / "ppo" / "config.json")["reward"]["path"]
  assert paid == str(pipeline / "reward_model")


def test_metrics_are_means_of_the_last_steps(pipeline):
  member = pipeline / "ppo" / "beta=0.3"
  metrics = rows(member / "metrics.jsonl")
  assert [row["step"] for row in metrics] == [0, 1, 2, 3]
  mean = np.mean([row["reward/gold"] for row in metrics])
  summary = read(member / "summary.json")["metrics"]
  assert summary["reward/gold"] == pytest.approx(mean)
  assert metrics[0]["time/step_s"] > 0
  assert metrics[0]["time/response_tokens_per_s"] > 0


def test_samples_add_up_to_the_ledger(pipeline):
  """Per-token logprobs in samples.jsonl are those of the KL."""
  samples = rows(pipeline / "ppo" / "beta=0" / "samples.jsonl")
  assert sorted({row["step"] for row in samples}) == [0, 2, 3]
  for row in samples:
    assert len(row["logprobs"]) == len(row["reference_logprobs"]) > 0
    assert max(row["logprobs"]) <= 0
    if row["step"] == 0:
      assert row["logprobs"] == row["reference_logprobs"]
  assert any(
    row["logprobs"] != row["reference_logprobs"]
    for row in samples
    if row["step"] == 3
  )


def test_reward_model_is_normalised_on_the_reference(pipeline):
  """Mean 0 and variance 1 on other samples of the SFT policy than its own."""
  score = read(pipeline / "sft" / "summary.json")["metrics"]["reward/score"]
  assert abs(score) < 0.3  # 512 fresh samples: six standard errors.


def test_a_sweeps_member_is_the_single_run(pipeline, tmp_path):
  """Its controller's state included, which is one of its own."""
  config = single(pipeline, "kl.beta=0.3")
  pipeline_lib.run(config, str(tmp_path / "run"), resume=False)
  alone = rows(tmp_path / "run" / "metrics.jsonl")
  member = rows(pipeline / "ppo" / "beta=0.3" / "metrics.jsonl")
  for name in ("reward/score", "reward/gold", "kl/reverse_exact", "kl/beta"):
    np.testing.assert_allclose(
      [row[name] for row in alone], [row[name] for row in member], atol=2e-3
    )
  # From a KL of 0 the first update goes down by its whole learning rate.
  np.testing.assert_allclose([r["kl/beta"] for r in member[:2]], [0.3, 0.29])


def test_resumed_is_uninterrupted(pipeline, tmp_path):
  """Traps 11 and 12. State, metrics and samples, to the last bit."""
  whole, halves = tmp_path / "whole", tmp_path / "halves"
  pipeline_lib.run(single(pipeline), str(whole), resume=False)
  pipeline_lib.run(single(pipeline, "train.steps=2"), str(halves), resume=False)
  pipeline_lib.run(single(pipeline), str(halves), resume=True)

  def untimed(path):
    return [
      {name: x for name, x in row.items() if not name.startswith("time/")}
      for row in rows(path / "metrics.jsonl")
    ]

  assert untimed(whole) == untimed(halves)
  first, second = (checkpoint.load_params(d / "model") for d in (whole, halves))
  assert checkpoint.tree_hash(first[0]) == checkpoint.tree_hash(second[0])


def test_resume_refuses_another_reference(pipeline, tmp_path):
  """Trap 11. The reference of a resumed run is the one that it began with."""
  sft = tmp_path / "sft"
  shutil.copytree(pipeline / "sft", sft)
  config = single(pipeline, f"policy.path={sft}", "train.steps=2")
  pipeline_lib.run(config, str(tmp_path / "run"), resume=False)
  params, metadata = checkpoint.load_params(sft / "model")
  params["transformer"]["final_norm"]["scale"][0] += 1e-3
  checkpoint.save_params(sft / "model", params, metadata)
  longer = single(pipeline, f"policy.path={sft}", "train.steps=4")
  with pytest.raises(errors.UserError, match="the reference"):
    pipeline_lib.run(longer, str(tmp_path / "run"), resume=True)


def test_a_held_workdir_is_refused_without_resume(pipeline):
  before = sorted(pipeline.rglob("*"))
  with pytest.raises(errors.UserError, match="--resume"):
    pipeline_lib.run(
      shrunk(quickstart.get_config()), str(pipeline), resume=False
    )
  assert sorted(pipeline.rglob("*")) == before


def failing_reward(prompts, responses):
  del prompts
  return [float("nan")] * len(responses)


def test_a_faulty_reward_function_stops_the_run(pipeline, tmp_path):
  """Trap 25. Named by function and prompt; nothing is trained on it."""
  config = shrunk(
    ppo.get_config(),
    f"policy.path={pipeline / 'sft'}",
    "reward.kind=python",
    f"reward.function={__name__}:failing_reward",
  )
  with pytest.raises(errors.UserError, match=r"failing_reward: returned nan"):
    pipeline_lib.run(config, str(tmp_path / "run"), resume=False)
  assert not list((tmp_path / "run").rglob("checkpoints/*"))


def scalar_reward(tokens, mask):
  return (tokens * mask).sum()


def raising_reward(tokens, mask):
  raise RuntimeError("no")


@pytest.mark.parametrize(
  "function, found",
  [("scalar_reward", "returned ShapeDtypeStruct"), ("raising_reward", "no;")],
)
def test_a_faulty_jax_reward_is_named(pipeline, tmp_path, function, found):
  """Bad inputs 41 and 42, before anything is compiled."""
  config = shrunk(
    ppo.get_config(),
    f"policy.path={pipeline / 'sft'}",
    "reward.kind=function",
    f"reward.function={__name__}:{function}",
  )
  with pytest.raises(errors.UserError, match=f"{function}: .*{found}"):
    pipeline_lib.run(config, str(tmp_path / "run"), resume=False)


def test_a_reward_model_is_no_policy(pipeline, tmp_path):
  config = single(pipeline, f"policy.path={pipeline / 'reward_model'}")
  with pytest.raises(errors.UserError, match="is a reward model"):
    pipeline_lib.run(config, str(tmp_path / "run"), resume=False)


def test_resume_from_another_directory(pipeline, tmp_path, monkeypatch):
  """The same workdir, spelled from elsewhere, is the same run."""
  config = shrunk(quickstart.get_config(), *SWEEP)
  monkeypatch.chdir(tmp_path)
  shutil.copytree(pipeline, tmp_path / "copy")
  for file in (tmp_path / "copy").rglob("config.json"):
    text = file.read_text()
    file.write_text(text.replace(str(pipeline), str(tmp_path / "copy")))
  pipeline_lib.run(config, "copy", resume=True)
  before = read(pipeline / "ppo" / "beta=0" / "summary.json")["metrics"]
  after = read(tmp_path / "copy" / "ppo" / "beta=0" / "summary.json")["metrics"]
  assert before == after


def test_ppo_makes_the_models_that_it_lacks(tmp_path):
  config = shrunk(ppo.get_config(), "train.steps=2")
  pipeline_lib.run(config, str(tmp_path / "run"), resume=False)
  for stage in ("sft", "reward_model"):
    assert (tmp_path / "run" / stage / "summary.json").exists()
  summary = read(tmp_path / "run" / "summary.json")
  assert (summary["stage"], summary["steps"]) == ("ppo", 2)


def test_files_of_prompts_texts_and_pairs(pipeline, tmp_path):
  """SFT, a reward model and PPO on JSONL, from a policy's workdir."""
  texts = tmp_path / "texts.jsonl"
  responses = [" lovely .", " dull ."]
  texts.write_text(
    "".join(
      json.dumps({"prompt": f"{w} was", "response": responses[i % 2]}) + "\n"
      for i, w in enumerate(["it", "the film", "the plot", "this story"] * 10)
    )
  )
  pairs = tmp_path / "pairs.jsonl"
  subjects = ["it", "the film", "the plot", "this story", "that hero"]
  pairs.write_text(
    "".join(
      json.dumps(
        {"prompt": f"{w} {c}", "chosen": " lovely .", "rejected": " dull ."}
      )
      + "\n"
      for w in subjects
      for c in ("was", "felt", "seemed", "looked")
    )
  )
  policy = f"policy.path={pipeline / 'sft'}"
  base = shrunk(ppo.get_config(), policy, "train.steps=2")

  def run(name, stage, path, *more):
    config = base.copy_and_resolve_references()
    defaults.apply_overrides(
      config, [f"stage={stage}", f"data.path={path}", *more]
    )
    pipeline_lib.run(config, str(tmp_path / name), resume=False)
    return read(tmp_path / name / "summary.json")["metrics"]

  assert run("sft", "sft", texts, "train.batch_size=2")["sft/loss"] > 0
  reward = run("reward_model", "reward_model", pairs)
  assert 0 <= reward["reward_model/heldout_accuracy"] <= 1
  metrics = run("ppo", "ppo", pairs, f"reward.path={tmp_path / 'reward_model'}")
  assert "reward/gold" not in metrics
  assert np.isfinite(metrics["reward/score"])


def test_the_built_in_language_needs_its_own_policy(shared_data, tmp_path):
  config = shrunk(
    ppo.get_config(),
    f"policy.path={shared_data / 'stories260K'}",
    "reward.kind=python",
    "reward.function=rlhf_jax.text.rewards:happy_words",
  )
  with pytest.raises(errors.UserError, match=r"config.data.path: ''"):
    pipeline_lib.run(config, str(tmp_path / "run"), resume=False)


@pytest.mark.parametrize("stage", ["ppo/beta=0", "reward_model"])
def test_export_is_read_back(pipeline, tmp_path, stage):
  export.run(str(pipeline / stage), str(tmp_path / "exported"))
  params, _ = convert.load(
    tmp_path / "exported", unroll=0, remat=False, compute_dtype="float32"
  )
  kept = pretrained.load_workdir(pipeline / stage).params
  trunk = params["transformer"] if "score_head" in params else params
  assert checkpoint.tree_hash(trunk) == checkpoint.tree_hash(
    kept["transformer"]
  )
  if "score_head" in params:
    expected = kept["score_head"]["kernel"] / kept["normalisation"]["std"]
    np.testing.assert_allclose(params["score_head"]["kernel"], expected)


def test_an_unfinished_workdir_has_no_model(tmp_path):
  with workdir_lib.Workdir.open(tmp_path, {"stage": "ppo"}, resume=False):
    pass
  with pytest.raises(errors.UserError, match="not finished"):
    pretrained.load(str(tmp_path), ppo.get_config())


def test_eight_devices_run_the_stages(pipeline, tmp_path):
  """The same run on a mesh of 2 × 2 × 2: figures agree, workdirs load."""
  assert jax.device_count() == 8
  mesh = ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
  for name, more in {"one": [], "eight": mesh}.items():
    config = single(pipeline, "kl.beta=0.1", "train.steps=2", *more)
    pipeline_lib.run(config, str(tmp_path / name), resume=False)
  one, eight = (rows(tmp_path / n / "metrics.jsonl") for n in ("one", "eight"))
  for name in ("reward/score", "reward/gold", "ppo/policy_loss"):
    np.testing.assert_allclose(one[0][name], eight[0][name], atol=1e-5)


def test_workdir_paths_of_a_summary_are_relative(pipeline):
  for member in read(pipeline / "ppo" / "summary.json")["members"]:
    assert not pathlib.PurePath(member["workdir"]).is_absolute()
