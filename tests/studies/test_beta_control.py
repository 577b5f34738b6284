"""The study of controllers: its rule on planted metrics, and a reduced run.

Mutants that were tried and fail here: a rule that lets a KL be too low, or one
target be enough; a NaN that counts as settled; an interval without 1.96, or of
another root; first steps in place of the last; windows off by one; twice the
target given to the controllers; finished runs that are done again.
"""

import json
import math

import numpy as np
import pytest

from configs.studies import beta_control as config_file
from rlhf_jax import errors
from rlhf_jax.host import ppo_stage
from rlhf_jax.studies import beta_control, study, toy_runs


def planted(nats, se=0.1):
  """Metrics of a run with this KL at each step."""
  return [
    {
      "step": i,
      "kl/reverse_exact": x,
      "kl/reverse_exact_se": se,
      "kl/beta": 0.1 * i,
      "reward/gold": 1.0,
      "reward/pair_accuracy": 0.5 + 0.1 * i,
    }
    for i, x in enumerate(nats)
  ]


def held(nats, target=2.0, last=2):
  return beta_control.of_target(
    "pi", target, planted(nats), last=last, tolerance=0.15
  )


# What metrics say.


def test_a_run_by_hand():
  # Means of 2: –, 1.0, 2.0, 1.75, 1.75; of 2 nats 15 % is 1.7 to 2.3.
  row = held([0.0, 2.0, 2.0, 1.5, 2.0])
  assert row.controller == "pi" and row.target == 2.0
  assert row.kl == pytest.approx(1.75)
  assert row.off == pytest.approx(-0.125)
  assert row.settled == 2
  # Two steps with an error of 0.1: 1.96 √(2 · 0.01) / 2.
  assert row.ci95 == pytest.approx(1.96 * 0.02**0.5 / 2)
  assert row.beta == pytest.approx(0.35) and row.gold == 1.0


@pytest.mark.parametrize(
  ("nats", "settled"),
  [
    ([2.0, 2.0, 2.0, 2.0], 1),  # A mean of 2 is known from step 1 on.
    ([0.0, 2.0, 2.0, 2.0], 2),
    ([2.0, 2.0, 2.0, 4.0], None),
    ([2.0, 4.0, 2.0, 2.0], 3),
    ([1.7, 1.7, 1.7, 1.6], None),
    ([2.0, 2.0, math.nan, 2.0], None),
  ],
)
def test_when_it_settles(nats, settled):
  assert held(nats).settled == settled


def test_a_controller_without_target():
  row = beta_control.of_free("trust", planted([1.0, 2.0, 3.0, 5.0]), last=2)
  wanted = ("trust", 0.0, 0.0, 0.25, 1.5, 4.0, 0.55, 0.75, 1.0)
  assert row[0] == wanted[0]
  np.testing.assert_allclose(row[1:], wanted[1:])


def test_trailing_means():
  values = np.array([1.0, 3.0, 2.0, 7.0])
  found = toy_runs.trailing_mean(values, 2)
  np.testing.assert_allclose(found, [np.nan, 2.0, 2.5, 4.5])
  np.testing.assert_array_equal(toy_runs.trailing_mean(values, 1), values)
  np.testing.assert_allclose(
    toy_runs.trailing_mean(values, 4), [np.nan, np.nan, np.nan, 3.25]
  )


# The verdict.


@pytest.mark.parametrize(
  ("ends", "verdict"),
  [
    ({"ziegler": (2.29, 8.6), "pi": (1.71, 11.4)}, "holds"),
    (
      {"ziegler": (2.31, 10.0), "pi": (2.0, 10.0)},
      "holds when the controller is pi",
    ),
    (
      {"ziegler": (2.0, 8.4), "pi": (2.0, 10.0), "dual": (2.1, 9.0)},
      "holds when the controller is pi or dual",
    ),
    ({"ziegler": (2.0, 60.0), "pi": (0.1, 10.0)}, "does not hold here"),
    ({"ziegler": (2.0, math.nan)}, "does not hold here"),
  ],
)
def test_the_rule(ends, verdict):
  rows = [
    held([end] * 4, target)._replace(controller=controller)
    for controller, of in ends.items()
    for target, end in zip((2.0, 10.0), of)
  ]
  assert beta_control.verdict(rows, tolerance=0.15) == verdict


# The study.


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp("beta_control") / "run"
  study.run(config_file.get_config("reduced"), str(path), resume=False)
  return path


def read(path):
  return json.loads(path.read_text())


def test_what_it_leaves_behind(workdir):
  record = read(workdir / "study.json")
  assert record["verdict"] == study.DOES_NOT_HOLD  # After four steps.
  assert (workdir / "figure.png").stat().st_size > 10_000
  names = ["sft", "reward_model", "pi-1", "schedule", "trust"]
  for name in names:
    assert len((workdir / name / "metrics.jsonl").read_text().splitlines()) == 4
  (row,) = record["tables"]["held"]["rows"]
  assert row[:2] == ["pi", 1.0]
  rows = toy_runs.column(
    [
      json.loads(line)
      for line in (workdir / "pi-1/metrics.jsonl").read_text().splitlines()
    ],
    "kl/reverse_exact",
  )
  assert rows[0] == 0  # All start from the reference.
  assert row[2] == pytest.approx(rows[-2:].mean())
  assert [row[0] for row in record["tables"]["free"]["rows"]] == [
    *beta_control.FREE
  ]


def test_runs_differ_in_their_controllers_only(workdir):
  configs = {
    name: read(workdir / name / "config.json")
    for name in ("pi-1", "schedule", "trust")
  }
  fields = {
    name: [config["kl"].pop(field) for field in ("controller", "target")]
    + [config["kl"].pop("beta")]
    for name, config in configs.items()
  }
  assert fields == {
    "pi-1": ["pi", 1.0, 0.1],
    "schedule": ["schedule", 0.0, 0.5],
    "trust": ["trust", 0.0, 0.5],
  }
  assert configs["pi-1"] == configs["schedule"] == configs["trust"]
  assert configs["trust"]["policy"]["path"] == str(workdir / "sft")
  assert configs["trust"]["reward"]["path"] == str(workdir / "reward_model")


def test_resume_does_what_is_missing(workdir, monkeypatch):
  done = []

  def again(config, opened, *, console):
    done.append(opened.path.name)
    opened.write_summary(summary)
    return summary

  monkeypatch.setattr(ppo_stage, "run", again)
  before = (workdir / "study.json").read_text()
  summary = read(workdir / "trust/summary.json")
  (workdir / "study.json").unlink()
  (workdir / "trust/summary.json").unlink()
  study.run(config_file.get_config("reduced"), str(workdir), resume=True)
  assert done == ["trust"]
  drop = lambda text: {
    name: x for name, x in json.loads(text).items() if name != "wall_s"
  }
  assert drop((workdir / "study.json").read_text()) == drop(before)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("controllers=('fixed',)", "config.controllers: ('fixed',); wanted diff"),
    ("controllers=()", "config.controllers: (); wanted different ones of"),
    ("targets=(2,2)", "config.targets: (2, 2); wanted different numbers above"),
    ("targets=(0,)", "config.targets: (0,); wanted different numbers above 0"),
    ("last=1", "config.last: 1; wanted 2 to training.train.steps=4"),
    ("last=5", "config.last: 5; wanted 2 to training.train.steps=4"),
    ("tolerance=nan", "config.tolerance: nan; wanted in (0, 1)"),
    (
      "conservative_beta=0.01",
      "config.conservative_beta: 0.01; wanted above training.kl.trust.beta_min",
    ),
    (
      "training.kl.controller=dual",
      "config.training.kl.controller: 'dual'; wa",
    ),
    ("training.seed=1", "config.training.seed: 1; wanted 0: the study sets"),
    ("training.data.path=x", "config.training.data.path: 'x'; wanted '': th"),
    ("training.sweep.betas=(0.1,)", "config.training.sweep.betas: (0.1,); wa"),
    (
      "training.kl.beta=20",
      "config.training.kl.beta: 20.0; wanted every β (sweep.betas=()) at most"
      " kl.beta_max=10.0",
    ),
    ("training.mesh.data=3", "config.training.mesh: data×fsdp×tensor = 3×1×1"),
    (
      "training.pipeline.sft.train.steps=0",
      "config.training.pipeline.sft.train.steps: 0; wanted at least 1",
    ),
  ],
)
def test_fields_that_make_no_sense(change, message):
  """Bad inputs 3, 4, 6 and 7."""
  with pytest.raises(errors.UserError) as caught:
    beta_control.check(config_file.get_config(f"reduced,{change}"))
  assert str(caught.value).startswith(message)
  assert len(str(caught.value).splitlines()) == 1
