"""A file of preferences as arrays: sides, ends, and what is held out."""

import io
import json

import jax
import numpy as np
import pytest
from rich import console as rich_console

from configs import defaults
from rlhf_jax.data import preferences, texts
from rlhf_jax.storage import pretrained
from rlhf_jax.text import toy_language

PROMPTS = [
  f"{subject} {copula}"
  for subject in ("it", "the film", "the plot", "this story", "that hero")
  for copula in ("was", "felt")
]
CHOSEN = ["lovely", "superb", "brilliant", "charming"]
REJECTED = ["dull", "clumsy", "cold", "awful"]


@pytest.fixture(scope="module")
def policy():
  return pretrained.load_policy(tiny())


@pytest.fixture
def read(policy, tmp_path):
  """`read(rows, **fields)` writes a file and reads its pairs."""

  def read(rows, *overrides):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny(f"data.path={path}", *overrides)
    console = rich_console.Console(file=io.StringIO())
    return config, preferences.read(config, policy, console, stage="test")

  return read


def tiny(*overrides):
  config = defaults.get_config()
  sizes = ["model.width=8", "model.layers=1", "model.mlp_width=8"]
  sizes += ["rollout.prompt_length=4", "rollout.response_length=4"]
  sizes += ["train.batch_size=32", "mesh.data=1"]
  defaults.apply_overrides(config, [*sizes, *overrides])
  return config


def repeated():
  """Each prompt four times, with other answers each time."""
  return [
    {"prompt": prompt, "chosen": f" {good}", "rejected": f" {bad} ."}
    for good, bad in zip(CHOSEN, REJECTED)
    for prompt in PROMPTS
  ]


def words(tokens, lengths, *, left=False):
  """The real tokens of each row as words, the stop among them."""
  vocabulary = toy_language.VOCABULARY
  rows = []
  for row, length in zip(np.asarray(tokens), np.asarray(lengths)):
    ids = row[len(row) - length :] if left else row[:length]
    rows.append(" ".join(vocabulary[id_] for id_ in ids))
  return rows


def prompts_of(pairs):
  asked = preferences.prompts_of(pairs)
  return words(asked.tokens, asked.lengths, left=True)


def responses_of(side):
  return words(side.response_tokens, side.response_lengths)


def test_both_sides_as_the_file_has_them(read):
  """Chosen is chosen; each response ends with the stop, as the policy's do."""
  rows = repeated()
  _, pairs = read(rows)
  stop = toy_language.VOCABULARY[toy_language.STOP_ID]
  start = toy_language.VOCABULARY[1]
  for side, name in ((pairs.chosen, "chosen"), (pairs.rejected, "rejected")):
    assert responses_of(side) == [f"{row[name].strip()} {stop}" for row in rows]
    prompts = words(side.prompt_tokens, side.prompt_lengths, left=True)
    assert prompts == [f"{start} {row['prompt']}" for row in rows]


def test_the_stop_is_the_first_that_the_rollout_has(read):
  period = toy_language.VOCABULARY.index(".")
  _, pairs = read(repeated(), f"rollout.stop_ids=({period},2)")
  assert {text.split()[-1] for text in responses_of(pairs.chosen)} == {"."}


def test_a_prompt_is_on_one_side_with_all_its_pairs(read):
  """What is held out was never trained on, however often it was asked."""
  config, pairs = read(repeated(), "data.heldout_fraction=0.3")
  train, heldout = preferences.split(config, pairs)
  seen, held = (prompts_of(side) for side in (train, heldout))
  assert (len(seen), len(held)) == (28, 12)
  assert not set(seen) & set(held)
  assert len(set(seen)) == 7 and len(set(held)) == 3
  answers = responses_of(train.chosen) + responses_of(heldout.chosen)
  assert sorted(answers) == sorted(responses_of(pairs.chosen))


def test_a_sure_judge_prefers_what_gold_prefers(policy):
  """Two independent answers to a prompt; the better one is chosen."""
  config = tiny(
    "data.size=96",
    "data.judge_temperature=1e-6",
    "rollout.prompt_length=8",
    "seed=3",
  )
  pairs = preferences.sampled(config, policy)
  gold = jax.jit(toy_language.gold_reward)
  chosen, rejected = map(gold, (pairs.chosen, pairs.rejected))
  assert np.all(chosen >= rejected) and np.mean(chosen > rejected) > 0.2
  for name in ("prompt_tokens", "prompt_lengths"):
    both = (getattr(side, name) for side in (pairs.chosen, pairs.rejected))
    np.testing.assert_array_equal(*both)
  first, second = map(responses_of, (pairs.chosen, pairs.rejected))
  assert np.mean([a != b for a, b in zip(first, second)]) > 0.9
  # The second batch of rows has random numbers of its own.
  assert len(set(first)) > 90


def test_responses_of_texts_end_with_the_stop(policy, tmp_path):
  """SFT learns to end; both what it trains on and what is held out does."""
  path = tmp_path / "texts.jsonl"
  rows = [{"prompt": p, "response": f" {w} ."} for p in PROMPTS for w in CHOSEN]
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = tiny(f"data.path={path}")
  console = rich_console.Console(file=io.StringIO())
  options = {"stage": "test", "path": str(path), "opening": ""}
  sides = texts.read(config, policy, console, **options)
  assert [len(side) for side in sides] == [36, 4]
  period = toy_language.VOCABULARY.index(".")
  for side in sides:
    for _, response in side:
      assert response[-2:] == [period, toy_language.STOP_ID]
