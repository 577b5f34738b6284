"""Stage `evaluate`: whose models it takes, what it leaves, what it refuses.

The models are not trained: what is shown here holds for any.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import defaults
from rlhf_jax import errors
from rlhf_jax.models import transformer
from rlhf_jax.stages import pipeline
from rlhf_jax.storage import pretrained
from rlhf_jax.storage import workdir as workdir_lib
from rlhf_jax.text import toy_language
from tests import tiny_network

PROMPTS, R = 12, 8


def tiny(*overrides):
  """A config of seconds: one narrow layer, a mesh of one device."""
  config = defaults.get_config()
  sizes = [
    *tiny_network.SIZES,
    f"rollout.response_length={R}",
    f"rollout.stop_ids={tuple(range(2, 30))}",  # Responses of all lengths.
    "train.batch_size=8",
    f"evaluate.prompts={PROMPTS}",
    "mesh.data=1",
  ]
  defaults.apply_overrides(config, [*sizes, *overrides])
  return config


def save(path, model, config):
  with workdir_lib.Workdir.open(path, config, resume=False) as opened:
    pretrained.save(opened, model)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """An SFT policy, a reward model, and the workdir of a run on top of them."""
  root = tmp_path_factory.mktemp("models")
  start = pretrained.load_policy(tiny())
  save(root / "sft", start, {"stage": "sft"})
  head = transformer.init_scalar_head(16, use_bias=False)
  head["kernel"] = jax.random.normal(jax.random.key(0), (16,))
  moments = {"mean": jnp.float32(0.5), "std": jnp.float32(2.0)}
  params = start.params | {"score_head": head, "normalisation": moments}
  reward = dataclasses.replace(start, params=params)
  save(root / "reward", reward, {"stage": "reward_model"})
  tuned = pretrained.load_policy(tiny("seed=1"))
  save(root / "ppo", tuned, trained(root))
  return root


def trained(root, *overrides):
  """The config of the PPO run."""
  paths = [f"policy.path={root / 'sft'}", f"reward.path={root / 'reward'}"]
  return tiny(*paths, *overrides).to_dict()


@pytest.fixture
def evaluate(models, tmp_path, capsys):
  """`evaluate(name, *overrides)` runs the stage; its workdir, what it said."""

  def run(name, *overrides, policy="ppo", resume=False):
    config = tiny(
      "stage=evaluate", f"policy.path={models / policy}", *overrides
    )
    pipeline.run(config, str(tmp_path / name), resume=resume)
    return tmp_path / name, capsys.readouterr().out

  return run


def summary_of(workdir):
  return json.loads((workdir / "summary.json").read_text())


def samples_of(workdir):
  lines = (workdir / "samples.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_models_are_those_of_the_run(models, evaluate):
  workdir, printed = evaluate("a")
  summary = summary_of(workdir)
  assert summary["stage"] == "evaluate" and summary["seed"] == 0
  assert summary["policy"] == str(models / "ppo")
  assert summary["reference"] == summary["against"] == str(models / "sft")
  assert summary["reward"] == str(models / "reward")
  assert summary["metrics"]["kl/reverse_exact"] > 0
  said = f"reference {models / 'sft'} and reward {models / 'reward'}"
  assert f"evaluate: {said}, as {models / 'ppo'} was trained" in printed
  assert "seed 8589934592" in printed and "wins by gold" in printed
  assert (workdir / "config.json").exists()


def test_samples_are_what_the_summary_is_of(evaluate):
  workdir, _ = evaluate("a", "evaluate.best_of=4")
  metrics, records = summary_of(workdir)["metrics"], samples_of(workdir)
  assert len(records) == PROMPTS
  mean = lambda name: np.mean([record[name] for record in records])
  assert metrics["reward/score"] == pytest.approx(mean("score"), rel=1e-5)
  assert metrics["reward/gold"] == pytest.approx(mean("gold"), rel=1e-5)
  assert metrics["win/rate"] == pytest.approx(mean("win"))
  kl = np.mean([sum(record["reverse_kl"]) for record in records])
  assert metrics["kl/reverse_exact"] == pytest.approx(kl, rel=1e-3)
  tokens = np.mean([len(record["logprobs"]) for record in records])
  assert metrics["rollout/response_tokens"] == tokens
  for record in records:
    difference = record["gold"] - record["against_gold"]
    assert record["win"] == (np.sign(difference) + 1) / 2
    assert len(record["reference_logprobs"]) == len(record["logprobs"])
    words = (record["prompt"] + " " + record["response"]).split()
    assert set(words) <= set(toy_language.VOCABULARY)
  assert {f"best_of_{n}/proxy" for n in (1, 2, 4)} <= set(metrics)
  assert metrics["best_of_4/kl_estimate"] <= metrics["best_of_4/kl_bound"]
  assert metrics["retention/built-in language/nll"] > 0


def test_once_more_is_the_same(evaluate):
  """The same seed, the same figures; another, others."""
  figures = lambda found: summary_of(found[0])["metrics"]
  workdir, _ = first = evaluate("a")
  metrics = figures(first)
  again = evaluate("a", resume=True)
  assert figures(again) == metrics
  assert len(samples_of(workdir)) == PROMPTS
  other = figures(evaluate("b", "seed=5"))
  assert other["reward/score"] != metrics["reward/score"]


def test_another_opponent(models, evaluate):
  """Against itself: drawn anew, so that not all are ties."""
  workdir, _ = evaluate(
    "a", f"evaluate.against={models / 'ppo'}", "evaluate.prompts=64"
  )
  metrics = summary_of(workdir)["metrics"]
  assert summary_of(workdir)["against"] == str(models / "ppo")
  assert metrics["kl/reverse_exact"] > 0  # To the reference, and not to it.
  assert metrics["win/ties"] < 1
  assert metrics["win/rate_low"] < 0.5 < metrics["win/rate_high"]
  records = samples_of(workdir)
  assert any(r["response"] != r["against_response"] for r in records)


def test_named_models_come_first(models, evaluate):
  """A policy that is its own reference is at KL 0, by any reward."""
  workdir, printed = evaluate(
    "a",
    f"reference.path={models / 'ppo'}",
    "reward.kind=python",
    "reward.function=rlhf_jax.text.rewards:happy_words",
  )
  summary = summary_of(workdir)
  assert summary["metrics"]["kl/reverse_exact"] == 0
  assert summary["reward"] == "rlhf_jax.text.rewards:happy_words"
  assert "was trained" not in printed


def test_reward_of_the_run_is_a_function(models, evaluate):
  config = trained(
    models,
    "reward.path=",
    "reward.kind=python",
    "reward.function=rlhf_jax.text.rewards:happy_words",
  )
  save(models / "happy", pretrained.load_policy(tiny()), config)
  workdir, _ = evaluate("a", policy="happy")
  assert summary_of(workdir)["reward"].endswith(":happy_words")


def test_a_run_that_made_its_own_models(models, evaluate):
  """Its config has no paths; they are in its sub-workdirs."""
  config = trained(models, "policy.path=", "reward.path=")
  config["pipeline"] = {"sft": {}, "reward_model": {}}
  whole = models / "whole"
  save(whole, pretrained.load_policy(tiny("seed=2")), config)
  shutil.copytree(models / "sft", whole / "sft")
  shutil.copytree(models / "reward", whole / "reward_model")
  workdir, _ = evaluate("a", policy="whole")
  assert summary_of(workdir)["reference"] == str(whole / "sft")
  assert summary_of(workdir)["reward"] == str(whole / "reward_model")


def test_prompts_in_common_are_counted(models, evaluate, tmp_path):
  """Bad input 23."""
  seen, asked = tmp_path / "seen.txt", tmp_path / "asked.txt"
  seen.write_text("it was\nwe liked\nthe film was\n")
  asked.write_text("it was\nwe liked\nthey said\nit was\n")
  model = pretrained.load_policy(tiny())
  save(models / "own", model, trained(models, f"data.path={seen}"))
  workdir, printed = evaluate("a", f"data.path={asked}", policy="own")
  assert f"3 of 4 prompts are in {seen}, read in training" in printed
  assert f"4 of {asked}: 4 prompts; 1 duplicates" in printed
  summary = summary_of(workdir)
  assert summary["prompts"] == 4 and "reward/gold" not in summary["metrics"]
  assert "wins by score" in printed
  seen.unlink()
  _, printed = evaluate("b", f"data.path={asked}", policy="own")
  assert f"{seen}, read in training, is gone" in printed


def test_the_file_of_the_training(models, evaluate, tmp_path):
  """Its held-out rows are asked, and no others."""
  seen = tmp_path / "seen.txt"
  seen.write_text("it was\nwe liked\nthe film was\nthey said\n")
  fields = f"data.path={seen}", "data.heldout_fraction=0.5"
  model = pretrained.load_policy(tiny())
  save(models / "same", model, trained(models, *fields))
  workdir, printed = evaluate("a", *fields, policy="same")
  assert f"2 of {seen}: 4 prompts, held out of training" in printed
  assert summary_of(workdir)["prompts"] == 2


def test_another_rollout_is_said(evaluate):
  _, printed = evaluate("a", "rollout.temperature=0.5")
  assert "rollout.temperature is 0.5, and was 1.0 in training" in printed
  assert "rollout.top_k" not in printed


def refusal(evaluate, *args, **options):
  with pytest.raises(errors.UserError) as caught:
    evaluate("refused", *args, **options)
  assert len(str(caught.value).splitlines()) == 1
  return str(caught.value)


def test_no_run_names_a_reference(evaluate):
  message = refusal(evaluate, policy="sft")
  assert message.startswith("config.reference.path: '', and")
  assert "no workdir of stage ppo or dpo" in message


def test_a_run_that_started_at_random(models, evaluate):
  config = trained(models, "policy.path=")
  save(models / "random", pretrained.load_policy(tiny()), config)
  message = refusal(evaluate, policy="random")
  assert "random/config.json has none" in message


def test_a_reference_that_has_gone(models, evaluate):
  config = trained(models, "reference.path=nowhere/at/all")
  save(models / "moved", pretrained.load_policy(tiny()), config)
  message = refusal(evaluate, policy="moved")
  assert "names 'nowhere/at/all', which does not exist here" in message
  assert "--config.reference.path=DIR" in message


def test_a_run_without_a_reward(models, evaluate):
  config = trained(models, "reward.path=") | {"stage": "dpo"}
  save(models / "dpo", pretrained.load_policy(tiny()), config)
  message = refusal(evaluate, policy="dpo")
  assert message.startswith("config.reward.path: ''")
  assert "dpo/config.json has none" in message


def test_an_opponent_that_is_a_reward_model(models, evaluate):
  against = f"evaluate.against={models / 'reward'}"
  assert "is a reward model" in refusal(evaluate, against)


def test_nothing_is_left_of_a_failure(evaluate, tmp_path):
  refusal(evaluate, policy="sft")
  assert not (tmp_path / "refused").exists()
