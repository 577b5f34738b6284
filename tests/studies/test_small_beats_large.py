"""The study of a small policy against a large model: its rule, a reduced run.

Mutants that were tried and fail here: the mean in place of the interval's end;
any large model, whatever its loss; the small language model in RLHF's place.
"""

import json

import jax
import numpy as np
import pytest

from configs.studies import small_beats_large as config_file
from rlhf_jax.measures import evaluation
from rlhf_jax.storage import pretrained
from rlhf_jax.studies import small_beats_large as study_lib
from rlhf_jax.studies import study
from rlhf_jax.text import toy_language

SMALL, RLHF, LARGE = study_lib.MODELS


def planted(wins, lead, *, noise=0.02, seeds=5):
  """Seeds in which RLHF wins so often, and the large model's loss leads so."""
  rng = np.random.default_rng(0)
  rows = []
  for seed in range(seeds):
    for model, nll in ((SMALL, 2.0 + lead), (RLHF, 2.2), (LARGE, 2.0)):
      mine = {SMALL: 0.45, RLHF: wins, LARGE: 0.5}[model]
      rows.append(
        study_lib.Measured(
          seed=seed,
          model=model,
          parameters=10 if model != LARGE else 1000,
          nll=nll + 0.1 * noise * rng.normal(),
          above_floor=nll - 1.8,
          gold=1.0 if model == RLHF else 0.0,
          errors=0.1,
          kl=3.0 if model == RLHF else 0.0,
          wins=mine + noise * rng.normal(),
          wins_low=mine - 0.04,
          wins_high=mine + 0.04,
          wins_by_score=mine,
        )
      )
  return rows


# The verdict.


def test_a_small_policy_that_wins():
  assert study_lib.verdict(planted(0.8, 0.1)) == study.HOLDS


def test_a_planted_reversal():
  assert study_lib.verdict(planted(0.2, 0.1)) == study.DOES_NOT_HOLD


def test_an_even_match_is_no_preference():
  assert study_lib.verdict(planted(0.51, 0.1)) == study.DOES_NOT_HOLD


def test_wins_that_seeds_do_not_agree_on():
  rows = planted(0.6, 0.1, noise=0.3)
  wins = [row.wins for row in rows if row.model == RLHF]
  assert np.mean(wins) > 0.5
  assert study_lib.verdict(rows) == study.DOES_NOT_HOLD


def test_a_large_model_that_is_not_the_better_language_model():
  assert study_lib.verdict(planted(0.8, -0.1)) == study.DOES_NOT_HOLD
  assert study_lib.verdict(planted(0.8, 0.0)) == study.DOES_NOT_HOLD


def test_a_model_over_seeds_by_hand():
  rows = planted(0.8, 0.1, seeds=3)
  wins = [0.7, 0.8, 0.9]
  rows = [
    row._replace(wins=wins[row.seed], gold=row.seed + 0.0)
    for row in rows
    if row.model == RLHF
  ]
  judged = study_lib.judge(rows, RLHF)
  # Student's t of 2 degrees of freedom is 4.303, both deviations in √3.
  half = 4.302653 / 3**0.5
  assert judged.wins.mean == pytest.approx(0.8)
  assert judged.wins.low == pytest.approx(0.8 - 0.1 * half)
  assert judged.wins.high == pytest.approx(0.8 + 0.1 * half)
  assert judged.gold.low == pytest.approx(1.0 - half)
  assert judged.parameters == 10


# The config.


def test_the_large_model_is_a_hundred_times_as_large():
  """By a count of its matrices, by hand."""
  config = config_file.get_config()
  small, large = map(study_lib._parameters, (config.training, config.large))

  def by_hand(width, layers, mlp):
    layer = 4 * width * width + 3 * width * mlp + 2 * width
    return 96 * width + layers * layer + width

  assert small == by_hand(16, 1, 32) == 4144
  assert large == by_hand(96, 4, 224)
  assert 100 <= large / small < 101


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("seeds=1", "config.seeds: 1; wanted 2 to 20"),
    ("prompts=1", "config.prompts: 1; wanted at least 2"),
    ("times=1", "config.times: 1; wanted above 1"),
    ("times=100", "config.times: 100; wanted at most 4.0: large has 13,408"),
    ("large.stage=ppo", "config.large.stage: 'ppo'; wanted 'sft': it is only"),
    ("large.policy.path=x", "config.large.policy.path: 'x'; wanted '': it is"),
    ("large.train.steps=0", "config.large.train.steps: 0; wanted"),
    (
      "training.sweep.seeds=(1,2)",
      "config.training.sweep.seeds: (1, 2); wanted (): the study sets it",
    ),
    ("training.kl.beta=-1", "config.training.kl.beta: -1.0; wanted"),
  ],
)
def test_fields_that_make_no_sense(refusal, change, message):
  """Bad inputs 4, 5 and 7."""
  assert refusal(change).startswith(message)


# The study.


def rows_of(table):
  return [dict(zip(table["columns"], row)) for row in table["rows"]]


def test_what_it_leaves_behind(tables):
  models = rows_of(tables["models"])
  assert [row["model"] for row in models] == [SMALL, RLHF, LARGE]
  assert models[2]["wins"] is None
  seeds = rows_of(tables["seeds"])
  assert [(row["seed"], row["model"]) for row in seeds] == [
    (seed, model) for seed in (0, 1) for model in (SMALL, RLHF, LARGE)
  ]
  assert [text["model"] for text in rows_of(tables["samples"])] == [
    SMALL,
    RLHF,
    LARGE,
  ]


def test_who_is_compared(workdir, tables):
  """The workdirs' own figures, for what the study says of them."""
  config = config_file.get_config("reduced")
  seeds = rows_of(tables["seeds"])
  for model, name in ((SMALL, "sft"), (LARGE, "large")):
    mine = [row for row in seeds if row["model"] == model]
    params = pretrained.load_workdir(workdir / name).params
    count = sum(x.size for x in jax.tree.leaves(params))
    assert {row["parameters"] for row in mine} == {count}
    # The same model, on other texts of the language.
    path = workdir / name / "summary.json"
    loss = json.loads(path.read_text())["metrics"]["sft/heldout_loss"]
    for row in mine:
      assert row["nll"] == pytest.approx(loss, abs=0.15)
    assert mine[0]["nll"] != mine[1]["nll"]
    assert [row["kl"] for row in mine] == [0.0, 0.0]
  assert all(row["kl"] > 0 for row in seeds if row["model"] == RLHF)
  # Against its own responses, which is why the table leaves it out.
  large = [row for row in seeds if row["model"] == LARGE]
  assert all(row["wins"] == 0.5 for row in large)
  assert config.large.train.steps == config.training.pipeline.sft.train.steps


def test_the_floor_is_the_languages_own_loss(tables):
  """On the very texts that the models' losses are of."""
  for row in rows_of(tables["seeds"]):
    texts = toy_language.sample_texts(evaluation.HELD_OUT + row["seed"], 16)
    nats = [toy_language.negative_log_likelihood(*text) for text in texts]
    floor = np.sum(nats) / sum(len(response) for _, response in texts)
    assert row["nll"] - row["above_floor"] == pytest.approx(floor)


def test_resuming_trains_nothing_again(resume):
  resume()
