"""A sweep over β and seeds: chunks, devices, resume, and single runs."""

import itertools
import json
import shutil

import jax
import numpy as np
import pytest

from configs import defaults, ppo
from rlhf_jax import errors
from rlhf_jax.settings import devices, roles, static
from rlhf_jax.stages import pipeline, sweep, sweep_frontier
from rlhf_jax.stages import ppo as ppo_stage
from rlhf_jax.storage import checkpoint
from tests import tiny_network

BETAS, SEEDS = (0.0, 0.3), (0, 7)


def shrunk(*overrides):
  """A config of seconds, its earlier stages included."""
  config = ppo.toy()
  for stage in (config, *config.pipeline.values()):
    sizes = [
      *tiny_network.SIZES,
      "rollout.response_length=8",
      "data.size=64",
      "train.batch_size=8",
      "train.steps=3",
      "train.samples_every=2",
      "checkpoint.every=1",
      "sweep.best_of=4",
      "evaluate.prompts=64",
    ]
    defaults.apply_overrides(stage, sizes)
  for stage in config.pipeline.values():
    defaults.apply_overrides(stage, ["mesh.data=1"])
  defaults.apply_overrides(config, overrides)
  return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Four members on eight devices, two of which each has to itself: a vmap."""
  directory = tmp_path_factory.mktemp("sweep")
  config = shrunk(
    f"sweep.betas={BETAS}", f"sweep.seeds={SEEDS}", "ppo.minibatches=1"
  )
  pipeline.run(config, str(directory / "run"), resume=False)
  return directory / "run"


def read(path):
  return json.loads(path.read_text())


def rows(path):
  lines = (path / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def on(run, *overrides):
  """A config that begins where the sweep began."""
  return shrunk(
    f"policy.path={run / 'sft'}",
    f"reward.path={run / 'reward_model'}",
    "ppo.minibatches=1",
    *overrides,
  )


def test_the_members_and_their_workdirs(run):
  summary = read(run / "summary.json")
  assert summary["stage"] == "sweep"
  found = [(m["beta"], m["seed"], m["workdir"]) for m in summary["members"]]
  assert found == [
    (beta, seed, f"beta={beta:g},seed={seed}")
    for beta in BETAS
    for seed in SEEDS
  ]
  for member in summary["members"]:
    config = read(run / member["workdir"] / "config.json")
    assert config["kl"]["beta"] == member["beta"]
    assert config["seed"] == member["seed"]
    assert config["sweep"]["betas"] == config["sweep"]["seeds"] == []
    assert (
      member["metrics"]
      == read(run / member["workdir"] / "summary.json")["metrics"]
    )


def test_the_frontier(run):
  """Its figures are those of the final policies; everything is in its place."""
  record = read(run / "frontier.json")
  found = [(m["beta"], m["seed"]) for m in record["members"]]
  assert found == [(beta, seed) for beta in BETAS for seed in SEEDS]
  for member in record["members"]:
    assert set(member["sample"]) == {"prompt", "response"}
    assert 0 <= member["win_rate"] <= 1 and member["kl_se"] > 0
    # 64 responses here, the last steps' there: both are near the start.
    metrics = read(run / member["workdir"] / "summary.json")["metrics"]
    wanted = metrics["reward/gold"]
    assert member["gold"] == pytest.approx(wanted, abs=6 * member["gold_se"])
  assert [row["beta"] for row in record["by_beta"]] == list(BETAS)
  assert {row["interval"] for row in record["by_beta"]} == {"seeds"}
  assert [point["n"] for point in record["best_of_n"]] == [1, 2, 4]
  assert record["best_of_n"][0]["kl_estimate"] == 0
  assert record["recommendation"]["beta"] in BETAS
  assert (run / "frontier.png").stat().st_size > 10_000


def test_an_untrained_member_does_not_tie_with_its_reference(
  run, tmp_path, capsys
):
  """One draw for both would: equal policies would write the same responses.

  They answer those prompts of the file that were held out of training.
  """
  file = tmp_path / "prompts.txt"
  words = itertools.product(
    ("the film", "the plot", "this story", "that hero", "it", "the music"),
    ("was", "felt", "seemed", "looked"),
    ("", " very", " quite", " so"),
  )
  file.write_text("\n".join(f"{a} {b}{c}" for a, b, c in words))
  config = on(
    run,
    f"data.path={file}",
    "data.heldout_fraction=0.5",
    f"sweep.betas={BETAS}",
    "optimizer.learning_rate=1e-30",
    "train.steps=1",
    "mesh.data=1",
  )
  pipeline.run(config, str(tmp_path / "run"), resume=False)
  record = read(tmp_path / "run" / "frontier.json")
  asked = f"evaluate: 48 of {file}: 96 prompts, held out of training"
  assert asked in capsys.readouterr().out
  first, second = record["members"]
  for member in (first, second):
    assert member["kl"] == 0
    assert member["win_rate_se"] > 0.01
    assert member["proxy"] != record["reference"]["proxy"]
    assert abs(member["win_rate"] - 0.5) < 4 * member["win_rate_se"]
  # Members share theirs, so that what differs between them is what they are.
  assert first["proxy"] == second["proxy"]


def test_members_are_divided_over_devices():
  mesh = static.mesh(shrunk(), members=4)
  assert dict(mesh.shape) == {"member": 4, "data": 2, "fsdp": 1, "tensor": 1}
  assert "member" not in static.mesh(shrunk(), members=1).shape
  assert "member" not in static.mesh(shrunk("mesh.data=8"), members=4).shape


def assert_near(found, wanted):
  """Runs whose sums were rounded otherwise."""
  for name in ("reward/score", "reward/gold", "kl/reverse_exact"):
    np.testing.assert_allclose(
      [row[name] for row in found], [row[name] for row in wanted], atol=2e-3
    )


def test_chunks_and_single_runs(run, tmp_path):
  """Three at once are two chunks of two; each is in its own checkpoints.

  One device loops over its members: each is the single run with its seed, to
  the last bit.
  """
  one = "mesh.data=1"
  config = on(
    run,
    f"sweep.betas={BETAS}",
    f"sweep.seeds={SEEDS}",
    "sweep.members_at_once=3",
    "sweep.frontier=False",
    one,
  )
  pipeline.run(config, str(tmp_path / "run"), resume=False)
  assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2
  totals = set()
  for member in read(run / "summary.json")["members"]:
    whole, part = (rows(d / member["workdir"]) for d in (run, tmp_path / "run"))
    assert_near(part, whole)
    totals.add(part[-1]["reward/total"])
  assert len(totals) == 4
  config = on(run, "kl.beta=0.3", "seed=7", one)
  pipeline.run(config, str(tmp_path / "alone"), resume=False)
  for member, alone in zip(
    rows(tmp_path / "run" / "beta=0.3,seed=7"),
    rows(tmp_path / "alone"),
    strict=True,
  ):
    for clock in ("time/step_s", "time/response_tokens_per_s"):
      del member[clock], alone[clock]
    assert member == alone


def test_whole_members_on_each_device(run, tmp_path):
  """Sixteen on eight devices: two on each, which it takes in turn."""
  seeds = (*SEEDS, *range(20, 26))
  config = on(
    run,
    f"sweep.betas={BETAS}",
    f"sweep.seeds={seeds}",
    "sweep.frontier=False",
  )
  assert static.mesh(config, members=16).shape["member"] == 8
  pipeline.run(config, str(tmp_path / "run"), resume=False)
  for member in read(run / "summary.json")["members"]:
    assert_near(
      rows(tmp_path / "run" / member["workdir"]), rows(run / member["workdir"])
    )


def lengths_reward(prompts, responses):
  return [float(len(text)) for text in responses]


def test_a_reward_on_the_host(run, tmp_path):
  """Called by every device; a member's scores are those of its responses."""
  config = shrunk(
    f"policy.path={run / 'sft'}",
    "ppo.minibatches=1",
    "reward.kind=python",
    f"reward.function={__name__}:lengths_reward",
    f"sweep.seeds={tuple(range(8))}",
    "sweep.frontier=False",
  )
  pipeline.run(config, str(tmp_path / "run"), resume=False)
  for seed in range(8):
    path = tmp_path / "run" / f"beta=0.05,seed={seed}"
    samples = (path / "samples.jsonl").read_text().splitlines()
    for sample in map(json.loads, samples):
      assert sample["score"] == len(sample["response"])


def test_resume_does_the_chunk_that_is_missing(run, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  fields = (f"sweep.betas={BETAS}", "sweep.members_at_once=1", "mesh.data=1")
  pipeline.run(on(run, *fields), str(workdir), resume=False)
  before = checkpoint.load_params(workdir / "beta=0.3" / "model")[0]
  for file in ("summary.json", "beta=0.3/summary.json"):
    (workdir / file).unlink()
  shutil.rmtree(workdir / "checkpoints" / "beta=0.3" / "3")
  done = []
  train = ppo_stage.train

  def noted(models, members, *rest, **named):
    done.extend(member.label for member in members)
    return train(models, members, *rest, **named)

  monkeypatch.setattr(ppo_stage, "train", noted)
  pipeline.run(on(run, *fields), str(workdir), resume=True)
  assert done == ["β=0.3"]
  assert [row["step"] for row in rows(workdir / "beta=0.3")] == [0, 1, 2]
  after = checkpoint.load_params(workdir / "beta=0.3" / "model")[0]
  assert checkpoint.tree_hash(before) == checkpoint.tree_hash(after)


@pytest.mark.parametrize(
  "size, wanted",
  [(5, [5]), (9, [5]), (4, [2, 3]), (2, [1, 2, 2]), (1, [1] * 5)],
)
def test_chunks(size, wanted):
  found = sweep.chunks(list(range(5)), size)
  assert [len(chunk) for chunk in found] == wanted
  assert [member for chunk in found for member in chunk] == list(range(5))


def test_memory_bounds_the_members(run, monkeypatch):
  config = on(run)
  models = roles.load(config)
  most = sweep.most_members(config, models, 4)
  assert most > 100
  memory = sweep._memory(1)
  monkeypatch.setattr(sweep, "_memory", lambda devices: memory // devices // 2)
  assert sweep.most_members(config, models, 4) < 0.6 * most
  monkeypatch.setattr(sweep, "_memory", lambda devices: 1)
  assert sweep.most_members(config, models, 4) == 1


def test_a_sweep_goes_on_in_the_chunks_that_it_began_with(
  run, tmp_path, monkeypatch
):
  """Whatever memory there is now; and does the steps that were added."""
  workdir = tmp_path / "run"
  fields = f"sweep.betas={BETAS}", "sweep.frontier=False", "mesh.data=1"
  monkeypatch.setattr(sweep, "most_members", lambda *_: 1)
  pipeline.run(on(run, *fields, "train.steps=1"), str(workdir), resume=False)
  assert read(workdir / "chunks.json") == {"sizes": [1, 1]}
  monkeypatch.setattr(sweep, "most_members", lambda *_: 2)
  pipeline.run(on(run, *fields, "train.steps=2"), str(workdir), resume=True)
  for beta in BETAS:
    path = workdir / f"beta={beta:g}"
    assert [row["step"] for row in rows(path)] == [0, 1]
    assert read(path / "summary.json")["steps"] == 2
  # Nothing was begun anew as another chunk.
  assert len(list((workdir / "checkpoints").iterdir())) == 2


def test_members_that_devices_do_not_divide(run, tmp_path, monkeypatch):
  """Three on two devices: one is run twice, and written once."""
  monkeypatch.setattr(devices, "are_divided_cores", lambda: True)
  monkeypatch.setattr(jax, "device_count", lambda: 2)
  config = on(run, "sweep.betas=(0.0,0.3,1.0)", "sweep.frontier=False")
  assert static.mesh(config, members=3).shape["member"] == 2
  pipeline.run(config, str(tmp_path / "run"), resume=False)
  for beta in (0.0, 0.3):
    name = f"beta={beta:g}"
    assert_near(rows(tmp_path / "run" / name), rows(run / f"{name},seed=0"))
  assert len(rows(tmp_path / "run" / "beta=1")) == 3


def test_too_few_held_out_prompts_are_refused_before_training(
  run, tmp_path, monkeypatch
):
  """One has no error; it was a traceback after all members had trained."""
  monkeypatch.setattr(ppo_stage, "train", None)
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("it was\nthe film was\nthe plot was\nit felt\nit is\n")
  config = on(run, "sweep.betas=(0.1, 0.3)", f"data.path={prompts}")
  with pytest.raises(errors.UserError, match="1 prompt is held out of 5; at l"):
    pipeline.run(config, str(tmp_path / "run"), resume=False)
  assert not (tmp_path / "run").exists()


def test_the_summary_is_there_before_the_frontier(run, tmp_path, monkeypatch):
  def fails(*_):
    raise RuntimeError("out of memory")

  monkeypatch.setattr(sweep_frontier, "write", fails)
  config = on(run, "sweep.betas=(0.1, 0.3)", "train.steps=1")
  with pytest.raises(RuntimeError, match="out of memory"):
    pipeline.run(config, str(tmp_path / "run"), resume=False)
  assert len(read(tmp_path / "run" / "summary.json")["members"]) == 2
