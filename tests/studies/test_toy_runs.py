"""Runs of a study: made once, begun at one policy, swept at once."""

import json

from ml_collections import ConfigDict
import numpy as np
import pytest
from rich import console as rich_console

from configs import ppo, studies
from rlhf_jax import errors
from rlhf_jax.stages import pipeline
from rlhf_jax.storage import workdir as workdir_lib
from rlhf_jax.studies import study, toy_runs

CONSOLE = rich_console.Console(quiet=True)


def training():
  config = ppo.toy()
  studies.shrink(config)
  config.train.steps = 2
  return config


def lab_in(workdir):
  """A study of one seed there."""
  config = ConfigDict({"seed": 3, "seeds": 1, "training": training()})
  return study.Lab(config, workdir, CONSOLE)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A study's workdir with a start and a sweep of two members."""
  path = tmp_path_factory.mktemp("study") / "run"
  with workdir_lib.Workdir.open(path, {"study": "x"}, resume=False) as opened:
    lab = lab_in(opened)
    begun = toy_runs.start(lab)
    config = toy_runs.from_start(toy_runs.sweep(lab.config, (0, 0.5)), begun)
    swept = toy_runs.made(lab, "arms/sweep", config)
  return path, begun, config, swept


def test_a_start_is_a_policy_with_its_reward_model(made):
  path, begun, _, _ = made
  assert (begun.policy, begun.reward) == (path / "sft", path / "reward_model")
  summary = json.loads((path / "sft" / "summary.json").read_text())
  assert begun.gold == summary["metrics"]["reward/gold"]


def test_members_are_in_the_sweeps_order(made):
  *_, swept = made
  members = toy_runs.members(swept)
  assert [(m.beta, m.seed) for m in members] == [(0.0, 3), (0.5, 3)]
  for member in members:
    assert [row["step"] for row in member.rows] == [0, 1]
    assert toy_runs.column(member.rows, "kl/beta")[0] == member.beta
    assert (member.path / "model").is_dir()
  # A study judges by figures of its own.
  assert not (swept / "frontier.json").exists()


def test_what_has_ended_is_not_done_again(made, monkeypatch):
  path, _, config, swept = made
  monkeypatch.setattr(pipeline, "run_stage", lambda *a, **k: pytest.fail("ran"))
  with workdir_lib.Workdir.open(path, {"study": "x"}, resume=True) as opened:
    again = toy_runs.made(lab_in(opened), "arms/sweep", config)
  assert again == swept


def test_an_input_that_is_gone_is_named(made):
  """A study without its inputs: one line, and nothing is written over."""
  path, begun, *_ = made
  model = path / "sft" / "model"
  model.rename(path / "elsewhere")
  config = toy_runs.from_start(training(), begun)
  with workdir_lib.Workdir.open(path, {"study": "x"}, resume=True) as opened:
    assert toy_runs.start(lab_in(opened)) == begun
    with pytest.raises(errors.UserError, match="no model in it") as caught:
      toy_runs.made(lab_in(opened), "more", config)
  (path / "elsewhere").rename(model)
  assert len(str(caught.value).splitlines()) == 1


def test_trailing_means():
  values = np.array([1.0, 3.0, 2.0, 7.0])
  found = toy_runs.trailing_mean(values, 2)
  np.testing.assert_allclose(found, [np.nan, 2.0, 2.5, 4.5])
  np.testing.assert_array_equal(toy_runs.trailing_mean(values, 1), values)
  np.testing.assert_allclose(
    toy_runs.trailing_mean(values, 4), [np.nan, np.nan, np.nan, 3.25]
  )
  rows = toy_runs.trailing_mean(np.array([values, 10 * values]), 2)
  np.testing.assert_array_equal(rows, [found, 10 * found])


def test_a_row_a_seed():
  config = ConfigDict({"seed": 3, "seeds": 2})
  arms = {
    ("a", 0.1): (np.array([1, 2]), np.array([5, 6])),
    ("b", 0.2): (np.array([7, 8]), np.array([9, 10])),
  }
  columns = ("arm", "β", "seed", "x", "y")
  assert toy_runs.every_run(config, "All", columns, arms) == (
    "All",
    columns,
    [
      ("a", 0.1, 3, 1, 5),
      ("a", 0.1, 4, 2, 6),
      ("b", 0.2, 3, 7, 9),
      ("b", 0.2, 4, 8, 10),
    ],
    False,
  )
