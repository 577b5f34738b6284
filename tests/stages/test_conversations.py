"""Conversations through the stages: SFT, then PPO and DPO from its policy."""

import json

import numpy as np
import pytest

from configs import defaults, dpo, ppo, sft
from rlhf_jax.stages import pipeline
from rlhf_jax.storage import pretrained
from tests import tiny_network
from tests.text import test_chat

END, EOS = 2, 0
LENGTHS = ("rollout.prompt_length=64", "rollout.response_length=8")
SUBJECTS = ("snow", "coal", "milk", "ash", "salt", "soot", "ice", "tar")


def asked(subject):
  return [
    {"role": "system", "content": "one word"},
    {"role": "user", "content": subject},
  ]


def answered(subject, word):
  return [*asked(subject), {"role": "assistant", "content": word}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """A tokenizer, conversations, prompts and pairs."""
  found = tmp_path_factory.mktemp("data")
  test_chat.make_tokenizer().save_pretrained(found / "tokenizer")
  rows = {
    "texts": [{"messages": answered(x, "white")} for x in SUBJECTS * 4],
    "prompts": [{"messages": asked(x)} for x in SUBJECTS],
    "pairs": [
      {"chosen": answered(x, "white"), "rejected": answered(x, "no")}
      for x in SUBJECTS * 2
    ],
  }
  for name, content in rows.items():
    lines = "".join(json.dumps(row) + "\n" for row in content)
    (found / f"{name}.jsonl").write_text(lines)
  return found


def run(module, workdir, *overrides):
  config = module.get_config().copy_and_resolve_references()
  sizes = [
    *tiny_network.SIZES,
    *LENGTHS,
    "train.batch_size=4",
    "train.steps=2",
    "mesh.data=1",
    *overrides,
  ]
  for stage in (config, *config.pipeline.values()):
    defaults.apply_overrides(stage, sizes)
  pipeline.run(config, str(workdir), resume=False)
  return workdir


@pytest.fixture(scope="module")
def policy(directory, tmp_path_factory):
  return run(
    sft,
    tmp_path_factory.mktemp("sft") / "run",
    f"data.path={directory / 'texts.jsonl'}",
    f"policy.tokenizer={directory / 'tokenizer'}",
    "data.sequence_length=96",
    "train.steps=60",
    "optimizer.learning_rate=0.02",
  )


def samples(workdir):
  lines = (workdir / "samples.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_sft_teaches_the_answer_and_the_end_of_its_turn(policy):
  """The loss is the answers' alone; a response stops where a turn ends."""
  found = pretrained.load_workdir(policy)
  assert found.stop_ids == (END, EOS)
  assert found.tokenizer.chat_template == test_chat.CHATML
  metrics = json.loads((policy / "summary.json").read_text())["metrics"]
  assert metrics["sft/loss"] < 0.5  # Every answer is the same.


def test_ppo_asks_conversations(policy, directory, tmp_path, capsys):
  workdir = run(
    ppo,
    tmp_path / "run",
    f"policy.path={policy}",
    f"data.path={directory / 'prompts.jsonl'}",
    "reward.kind=python",
    "reward.function=tests.stages.conversation_reward:score",
  )
  printed = capsys.readouterr().out
  assert (
    "the first prompt as the model reads it: '<|im_start|>system\\none"
    in (printed)
  )
  assert "a response ends with '<|im_end|>' (2), '<eos>' (0)" in printed
  assert "spell special tokens" not in printed
  found = samples(workdir)
  assert not any("<|im_" in record["prompt"] for record in found)
  assert {record["response"] for record in found} == {"white"}
  # 5 bytes, and the end of the turn.
  assert {len(record["logprobs"]) for record in found} == {6}
  assert {record["score"] for record in found} == {5.0}


def test_dpo_learns_from_pairs_of_messages(policy, directory, tmp_path):
  workdir = run(
    dpo,
    tmp_path / "run",
    f"policy.path={policy}",
    f"data.path={directory / 'pairs.jsonl'}",
    "train.samples_every=1",
  )
  first, *_ = (workdir / "metrics.jsonl").read_text().splitlines()
  assert json.loads(first)["dpo/loss"] == pytest.approx(np.log(2), abs=1e-5)
  assert {record["response"] for record in samples(workdir)} == {"white"}


def test_templated_texts_are_counted(policy, tmp_path, capsys):
  """Spelled out, they are no turns: 33 ids where 13 were meant."""
  path = tmp_path / "prompts.jsonl"
  prompt = "<|im_start|>user\nsnow<|im_end|>\n<|im_start|>assistant\n"
  path.write_text(json.dumps({"prompt": prompt}) + '\n{"prompt": "snow"}\n')
  run(
    ppo,
    tmp_path / "run",
    f"policy.path={policy}",
    f"data.path={path}",
    "reward.kind=python",
    "reward.function=tests.stages.conversation_reward:score",
    "train.steps=1",
    "data.heldout_fraction=0.0",
    "rollout.stop_ids=(2,)",
  )
  # As it was run, and not as it was loaded.
  assert pretrained.load_workdir(tmp_path / "run").stop_ids == (END,)
  wanted = "alarm: 1 of 2 prompts spell special tokens, such as '<|im_"
  assert wanted in capsys.readouterr().out
