"""The DPO stage at a tiny size: files, ledger, resume, refusals."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from configs import defaults, dpo
from rlhf_jax import errors, types
from rlhf_jax.data import batches
from rlhf_jax.data import preferences as preference_data
from rlhf_jax.stages import alarms, pipeline
from rlhf_jax.stages import dpo as dpo_stage
from rlhf_jax.steps import dpo as dpo_step
from rlhf_jax.storage import checkpoint, pretrained
from rlhf_jax.storage import workdir as workdir_lib
from rlhf_jax.text import toy_language
from tests import tiny_network

B, STEPS, EVERY, BETA = 8, 4, 2, 0.1
LOSSES = {
  "conservative": ("dpo.label_smoothing=0.1",),
  "robust": ("dpo.label_smoothing=0.1",),
  "ipo": (),
  "kto": (),
  "simpo": ("kl.beta=2",),
  "chi_po": (),
}
LOVELY, DULL = " lovely .", " dull ."
PAIRS = [
  {"prompt": f"{subject} {copula}", "chosen": LOVELY, "rejected": DULL}
  for subject in ("it", "the film", "the plot", "this story", "that hero")
  for copula in ("was", "felt", "seemed", "looked")
]


def tiny(*overrides):
  """A config of seconds: one narrow layer, few steps, a mesh of one device."""
  config = dpo.get_config().copy_and_resolve_references()
  sizes = [
    *tiny_network.SIZES,
    "rollout.response_length=8",
    "optimizer.learning_rate=0.01",
    f"kl.beta={BETA}",
    "data.size=64",
    f"train.batch_size={B}",
    f"train.steps={STEPS}",
    f"train.samples_every={EVERY}",
    "checkpoint.every=2",
    "mesh.data=1",
  ]
  for stage in (config, *config.pipeline.values()):
    defaults.apply_overrides(stage, sizes)
  defaults.apply_overrides(config, overrides)
  return config


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
  """The workdir of a policy that was never trained."""
  directory = tmp_path_factory.mktemp("policy")
  with workdir_lib.Workdir.open(
    directory, {"stage": "sft"}, resume=False
  ) as opened:
    pretrained.save(opened, pretrained.load_policy(tiny()))
  return directory


def train(policy, path, *overrides, resume=False):
  config = tiny(f"policy.path={policy}", *overrides)
  pipeline.run(config, str(path), resume=resume)
  return path


@pytest.fixture(scope="module")
def trained(policy, tmp_path_factory):
  return train(policy, tmp_path_factory.mktemp("dpo") / "run")


def read(path):
  return json.loads(path.read_text())


def rows(workdir, name="metrics"):
  lines = (workdir / f"{name}.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def untimed(workdir):
  return [
    {name: x for name, x in row.items() if not name.startswith("time/")}
    for row in rows(workdir)
  ]


def test_it_leaves_what_the_contract_names(policy, trained):
  summary = read(trained / "summary.json")
  assert (summary["stage"], summary["seed"], summary["steps"]) == ("dpo", 0, 4)
  assert summary["wall_s"] > 0
  metrics = summary["metrics"]
  for name in ("loss", "accuracy", "margin"):
    both = metrics[f"dpo/{name}"], metrics[f"dpo/heldout_{name}"]
    assert np.isfinite(both).all()
  for name in ("kl/reverse_exact", "reward/gold"):
    assert metrics[name] == rows(trained)[-1][name]
    assert metrics[f"{name}_se"] > 0
  assert metrics["kl/reverse_exact"] > 0.001
  found = pretrained.load_workdir(trained)
  assert found.stop_ids == (toy_language.STOP_ID,)
  assert list(found.params) == ["transformer"]
  # It is the policy that was trained.
  start = pretrained.load_workdir(policy)
  hashes = [checkpoint.tree_hash(model.params) for model in (start, found)]
  assert hashes[0] != hashes[1]


def test_the_first_step_begins_at_the_reference(trained):
  first, *_ = rows(trained)
  np.testing.assert_allclose(first["dpo/loss"], np.log(2), atol=1e-5)
  np.testing.assert_allclose(first["dpo/margin"], 0, atol=1e-5)
  assert first["kl/reverse_exact"] == 0 == first["kl/forward_exact"]
  assert first["kl/beta"] == pytest.approx(BETA)


def test_the_reference_is_scored_at_the_policys_temperature(policy, tmp_path):
  """Trap 5: else the margin is not 0 where both are one model."""
  run = train(
    policy, tmp_path / "run", "rollout.temperature=0.7", "train.steps=1"
  )
  first, _ = rows(run)
  np.testing.assert_allclose(first["dpo/loss"], np.log(2), atol=1e-5)
  np.testing.assert_allclose(first["dpo/margin"], 0, atol=1e-5)
  assert first["kl/reverse_exact"] == 0 == first["kl/forward_exact"]


def test_the_ledger_is_kept_now_and_then_and_at_the_end(trained):
  found = rows(trained)
  assert [row["step"] for row in found] == [0, 1, 2, 3, 4]
  looked = [row["step"] for row in found if "kl/reverse_exact" in row]
  assert looked == [0, 2, 4]
  assert ["dpo/loss" in row for row in found] == [True] * STEPS + [False]
  for row in found[:1] + found[2::2]:
    for meter in ("reverse_k1", "reverse_k3", "reverse_exact", "forward_exact"):
      assert {f"kl/{meter}", f"kl/{meter}_se"} <= set(row)
    np.testing.assert_allclose(
      row["kl/penalty"], BETA * row["kl/reverse_exact"], rtol=1e-5
    )
    assert np.isfinite([row["reward/gold"], row["reward/gold_se"]]).all()


def test_samples_add_up(trained):
  """A record's score is its implicit reward, β Σ log π/π_ref."""
  found = rows(trained, "samples")
  steps = [record["step"] for record in found]
  assert steps == [0] * 4 + [2] * 4 + [4] * 4
  for record in found:
    ratio = np.subtract(record["logprobs"], record["reference_logprobs"])
    np.testing.assert_allclose(record["score"], BETA * ratio.sum(), atol=1e-4)
    assert record["prompt"] and record["response"]
    assert (record["step"] == 0) == (not ratio.any())
  assert all("by_position" in record for record in found[::4])
  assert len({record["response"] for record in found}) > 6


def test_resumed_is_uninterrupted(policy, trained, tmp_path):
  """Traps 11 and 12. State, metrics and samples, to the last bit."""
  halves = train(policy, tmp_path / "run", "train.steps=2")
  assert len(rows(halves)) == 3
  train(policy, halves, resume=True)
  assert untimed(halves) == untimed(trained)
  assert rows(halves, "samples") == rows(trained, "samples")
  models = [checkpoint.load_params(d / "model")[0] for d in (trained, halves)]
  assert len(set(map(checkpoint.tree_hash, models))) == 1


def test_a_finished_run_is_finished(policy, tmp_path):
  run = train(policy, tmp_path / "run", "train.steps=2")
  before = untimed(run), rows(run, "samples")
  train(policy, run, "train.steps=2", resume=True)
  assert (untimed(run), rows(run, "samples")) == before


def move(directory):
  """Changes a number of a saved policy."""
  params, metadata = checkpoint.load_params(directory / "model")
  params["transformer"]["final_norm"]["scale"][:] += 1.0
  checkpoint.save_params(directory / "model", params, metadata)


@pytest.fixture
def held(policy, tmp_path):
  """Another policy."""
  shutil.copytree(policy, tmp_path / "held")
  move(tmp_path / "held")
  return tmp_path / "held"


def test_another_reference_is_refused_on_resume(policy, held, tmp_path):
  """Trap 11. By the cache, before anything is compiled; with it gone, too."""
  option = f"reference.path={held}"
  run = train(policy, tmp_path / "run", option, "train.steps=2")
  move(held)
  with pytest.raises(errors.UserError, match=r"safetensors: reference: \w{12}"):
    train(policy, run, option, resume=True)
  (run / "reference_logprobs.safetensors").unlink()
  with pytest.raises(errors.UserError, match="dpo: the reference"):
    train(policy, run, option, resume=True)


def test_a_reference_of_its_own(policy, held, tmp_path):
  """Then the policy does not begin at KL 0."""
  option = f"reference.path={held}"
  run = train(policy, tmp_path / "run", option, "train.steps=1")
  assert rows(run)[0]["kl/reverse_exact"] > 1e-4
  assert abs(rows(run)[0]["dpo/margin"]) > 1e-4


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_trains(policy, tmp_path, loss):
  options = f"dpo.loss={loss}", *LOSSES[loss], "train.steps=2"
  run = train(policy, tmp_path / "run", *options)
  metrics = read(run / "summary.json")["metrics"]
  assert metrics["kl/reverse_exact"] > 0
  assert metrics["dpo/grad_norm"] > 0
  cached = (run / "reference_logprobs.safetensors").exists()
  assert cached == (loss != "simpo")


def test_ktos_mismatched_pairs():
  """Each prompt with the next row's responses, whole."""
  policy = pretrained.load_policy(tiny())
  pairs = preference_data.sampled(tiny(), policy)
  found = preference_data.mismatched(pairs)
  for side, other in (
    (pairs.chosen, found.chosen),
    (pairs.rejected, found.rejected),
  ):
    np.testing.assert_array_equal(other.prompt_tokens, side.prompt_tokens)
    np.testing.assert_array_equal(other.prompt_lengths, side.prompt_lengths)
    for name in ("response_tokens", "response_lengths"):
      mine, theirs = vars(side)[name], vars(other)[name]
      np.testing.assert_array_equal(theirs[:-1], mine[1:])
      np.testing.assert_array_equal(theirs[-1], mine[0])


def test_it_makes_the_policy_that_it_lacks(tmp_path):
  config = tiny("train.steps=1")
  pipeline.run(config, str(tmp_path / "run"), resume=False)
  assert (tmp_path / "run" / "sft" / "summary.json").exists()
  assert read(tmp_path / "run" / "summary.json")["stage"] == "dpo"


def test_eight_devices_run_the_stage(policy, trained, tmp_path):
  """2 × 2 × 2: the same figures as one device has."""
  mesh = "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"
  eight = train(policy, tmp_path / "run", *mesh, "train.steps=2")
  for one, other in zip(rows(trained)[:2], rows(eight)):
    for name in ("dpo/loss", "dpo/margin", "dpo/grad_norm", "reward/gold"):
      if name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-4)


def test_what_is_held_out_is_judged_and_asked(policy, tmp_path, monkeypatch):
  """Held-out pairs are the other way round here: all of them are lost.

  The ledger's prompts are theirs, and none that is trained on.
  """
  monkeypatch.setattr(dpo_stage, "FINAL_PROMPTS", B)
  split, heldout = preference_data.split, []

  def reversed_where_held_out(config, pairs):
    train, held = split(config, pairs)
    heldout.append(held)
    return train, types.PreferencePairs(held.rejected, held.chosen)

  monkeypatch.setattr(preference_data, "split", reversed_where_held_out)
  steps, batch_at = set(), batches.batch_at

  def noted(rows, *, seed, step, batch_size):
    steps.add((type(rows), seed, step))
    return batch_at(rows, seed=seed, step=step, batch_size=batch_size)

  monkeypatch.setattr(batches, "batch_at", noted)
  pairs = write(tmp_path / "pairs.jsonl", PAIRS)
  options = f"data.path={pairs}", "data.heldout_fraction=0.25", "seed=3"
  run = train(policy, tmp_path / "run", *options, "train.steps=8")
  metrics = read(run / "summary.json")["metrics"]
  assert rows(run)[7]["dpo/accuracy"] == 1
  assert metrics["dpo/heldout_accuracy"] == 0
  (held,) = heldout
  tokenizer = toy_language.tokenizer()
  asked = {record["prompt"] for record in rows(run, "samples")}
  assert asked <= set(
    tokenizer.batch_decode(held.chosen.prompt_tokens, skip_special_tokens=True)
  )
  assert len(asked) > 2
  # Other pairs and prompts each step, and prompts for the finished policy.
  assert steps == {
    *((dpo_step.Batch, 3, step) for step in range(8)),
    *((types.Prompts, 3, step) for step in range(9)),
  }


def test_alarms_are_printed(policy, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(alarms.MISMATCH_TOLERANCE, "float32", -1.0)
  train(policy, tmp_path / "run")
  printed = capsys.readouterr().out
  assert printed.count("alarm: rollout/logprob") == 1
  assert "dpo step 0 alarm: rollout/logprob_max_abs_diff = " in printed


def write(path, pairs):
  path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
  return path


def test_pairs_of_a_file(policy, tmp_path, monkeypatch):
  """It learns them; there is no gold reward then."""
  monkeypatch.setattr(dpo_stage, "FINAL_PROMPTS", B)
  pairs = write(tmp_path / "pairs.jsonl", PAIRS)
  run = train(policy, tmp_path / "run", f"data.path={pairs}", "train.steps=8")
  metrics = read(run / "summary.json")["metrics"]
  assert metrics["dpo/heldout_accuracy"] == 1
  assert "reward/gold" not in metrics and metrics["kl/reverse_exact"] > 0


def long_pairs(same, total):
  """Of 15 words a response; in `same` of them only the last word differs."""
  words = ["the", "film", "was", "dull", "."] * 3
  for i in range(total):
    other = [*words[:-1], "dull"] if i < same else ["lovely", *words[1:]]
    yield {
      "prompt": "it was" if i % 2 else "the plot was",
      "chosen": " " + " ".join(words),
      "rejected": " " + " ".join(other),
    }


def test_pairs_that_are_the_same_once_they_are_cut(policy, tmp_path, capsys):
  """They are counted and left out; many are refused."""
  few = write(tmp_path / "few.jsonl", long_pairs(1, 40))
  train(policy, tmp_path / "run", f"data.path={few}", "train.steps=1")
  assert "1 pairs are the same once they are cut" in capsys.readouterr().out
  many = write(tmp_path / "many.jsonl", long_pairs(4, 40))
  with pytest.raises(
    errors.UserError, match=r"response_length: 8; .* the same in 4 of 40"
  ):
    train(policy, tmp_path / "other", f"data.path={many}")


@pytest.mark.parametrize(
  "row, message",
  [
    ({"chosen": " ", "rejected": DULL}, "chosen: empty or white"),
    ({"chosen": LOVELY}, "rejected: missing"),
    ({"chosen": [1], "rejected": DULL}, "chosen: message 1: not an object"),
    ({"chosen": DULL, "rejected": DULL}, "chosen: the same as rejected"),
  ],
)
def test_faulty_pairs_are_named(policy, tmp_path, row, message):
  """Bad inputs 19, 20 and 21: with file and line; nothing is trained."""
  faulty = [{"prompt": "it was"} | row] * 2
  pairs = write(tmp_path / "pairs.jsonl", [PAIRS[0], *faulty, *PAIRS[1:]])
  with pytest.raises(errors.UserError, match=rf"pairs\.jsonl:2: {message}"):
    train(policy, tmp_path / "run", f"data.path={pairs}")
  assert not (tmp_path / "run").exists()


def test_the_command_passes_the_message_on(policy, tmp_path):
  """Exit code 2, one line; a run that is there is not written over."""
  pairs = write(tmp_path / "pairs.jsonl", [PAIRS[0] | {"chosen": ""}])
  command = [sys.executable, "-m", "launch.train", "--config=configs/dpo.py"]
  command += [f"--config.policy.path={policy}", f"--workdir={tmp_path / 'run'}"]
  command += [f"--config.data.path={pairs}"]
  found = subprocess.run(
    command,
    cwd=defaults.__file__.removesuffix("configs/defaults.py"),
    capture_output=True,
    text=True,
  )
  assert found.returncode == 2
  (line,) = found.stderr.splitlines()
  assert line.startswith(f"{pairs}:1: chosen: empty")


def test_a_held_workdir_is_refused(policy, trained):
  before = {p: p.stat().st_mtime_ns for p in sorted(trained.rglob("*"))}
  with pytest.raises(errors.UserError, match="--resume"):
    train(policy, trained)
  assert {p: p.stat().st_mtime_ns for p in sorted(trained.rglob("*"))} == before
