"""The study of both estimators under PPO: its rule, and a reduced run.

Mutants that were tried and fail here: differences the other way round; the
deviation of n in place of n − 1; another row of Student's table; the mean in
place of the interval's end; times one too short; runs that never get there
counted as if they did; a gain from 0; the same estimator, or seed, everywhere;
a delay within the tolerance, though measured; a verdict where nothing is
learned, or where the gain is so in the mean alone.
"""

import json
import math
import pathlib

import numpy as np
import pytest

from configs.studies import rao_blackwell as config_file
from rlhf_jax.studies import (
  collection,
  intervals,
  rao_blackwell,
  study,
  toy_runs,
)


def planted(*golds):
  """Runs with these gold rewards."""
  golds = np.array(golds, np.float64)
  ones = np.ones(len(golds))
  return rao_blackwell.Runs(golds, golds[:, -1], ones, 0.1 * ones)


# What metrics say.


def test_a_run_by_hand():
  rows = [
    {
      "step": i,
      "reward/gold": float(i),
      "kl/reverse_exact": 2.0 * i,
      "time/step_s": seconds,
    }
    for i, seconds in enumerate([9.0, 1.0, 1.2, 1.4, 1.1])
  ]
  member = toy_runs.Member(0.1, 0, pathlib.Path("x"), rows)
  other = member._replace(rows=[row | {"reward/gold": 9.0} for row in rows])
  runs = rao_blackwell.of_runs([member, other], last=2)
  assert [x[0] for x in runs[1:]] == [3.5, 7.0, 1.2]
  np.testing.assert_array_equal(runs.golds, [range(5), [9] * 5])
  runs = rao_blackwell.of_runs([member], last=2, gold="kl/reverse_exact")
  assert (runs.gold, runs.kl) == (7.0, 7.0)


def test_thresholds_are_shares_of_the_sampled_gain():
  runs = planted([0.0, 3.0], [0.0, 5.0])  # From 1 to a mean of 4.
  assert rao_blackwell.thresholds(1.0, runs, (0.5, 1.0)) == [2.5, 4.0]


def test_times_by_hand():
  # Means of 2: –, 1, 3, 4 and –, 3, 2, 2.
  runs = planted([0.0, 2.0, 4.0, 4.0], [4.0, 2.0, 2.0, 2.0])
  times = lambda threshold: [
    of.tolist()
    for of in rao_blackwell.times_to(threshold, runs, runs, window=2)
  ]
  assert times(3.0) == [[3, 2], [3, 2]]
  assert times(3.5) == [[4, 4], [4, math.inf]]  # Each against the claim.
  assert times(5.0) == [[4, 4], [math.inf, math.inf]]


def test_the_interval_of_pairs():
  row = rao_blackwell.compare("x", [10.0, 20.0, 30.0], [11.0, 23.0, 35.0])
  # Differences 1, 3, 5: mean 3, sd 2; t of 2 degrees of freedom is 4.303.
  half = 4.302653 * 2 / 3**0.5
  assert row[0] == "x"
  assert row.row()[1:] == pytest.approx(
    (20, 23, 3, 3 - half, 3 + half), rel=1e-6
  )


def test_a_run_that_never_gets_there():
  row = rao_blackwell.compare("x", [10.0, 20.0], [11.0, math.inf])
  assert row.difference == (math.inf, math.inf, math.inf)


# The verdict.


GAIN = intervals.Interval(1.0, 0.9, 1.1)


def pairs(low, high):
  added = intervals.Interval((low + high) / 2, low, high)
  return rao_blackwell.Pairs("x", 50.0, 50.0, added)


@pytest.mark.parametrize(
  ("rows", "verdict"),
  [
    (((-4.0, 2.0), (0.0, 10.0)), "holds"),
    (
      ((-7.0, -1.0), (-4.0, 10.1)),
      "holds when the gold to reach, as a share of the gain, is 50%",
    ),
    (
      ((3.0, 5.0), (-1.0, 5.0)),  # More of them, measured, though tolerable.
      "holds when the gold to reach, as a share of the gain, is 90%",
    ),
    (((5.0, 11.0), (math.inf, math.inf)), "does not hold here"),
    (((math.nan, math.nan), (-math.inf, math.inf)), "does not hold here"),
  ],
)
def test_the_rule(rows, verdict):
  rows = [pairs(*row) for row in rows]
  assert rao_blackwell.verdict((0.5, 0.9), rows, GAIN, tolerance=10) == verdict


@pytest.mark.parametrize("golds", [(-0.2, -0.1, -0.3), (0.9, -0.1, 0.1)])
def test_where_nothing_is_learned_nothing_holds(golds):
  """Both arms are at every threshold at once."""
  gain = intervals.of_mean(golds)
  rows = [pairs(-0.1, 0.1)] * 2
  assert rao_blackwell.verdict((0.5, 0.9), rows, gain, tolerance=10) == (
    study.DOES_NOT_HOLD
  )


def first_sentence(gain):
  config = config_file.get_config("gains=(0.5,)")
  paragraph = rao_blackwell._paragraph(
    config, [pairs(-1.0, 2.0)], [pairs(-1.0, 1.0)] * 3, gain
  )
  return collection._first(paragraph)


def test_the_paragraph_says_whether_something_is_learned():
  assert first_sentence(GAIN) == (
    "Iterations that Rao-Blackwellising adds until the mean gold reward of 5"
    " steps is at a share of the sampled runs' gain of 1.00 (0.90 to 1.10):"
    " 50%: +0.5 (-1.0 to +2.0)."
  )
  assert first_sentence(intervals.Interval(-0.2, -0.3, -0.1)) == (
    "The sampled runs gain -0.20 (-0.30 to -0.10) in gold over the SFT policy,"
    " not clearly above 0, so that no iterations to a share of it can be"
    " compared."
  )


@pytest.mark.parametrize("delay", [0, 30])
def test_a_planted_delay_is_seen(delay):
  """The same curves in both arms, one of them late."""
  rng = np.random.default_rng(0)
  steps = np.arange(120)
  curve = lambda late: (
    1 - np.exp(-np.maximum(steps - late, 0) / 20) + rng.normal(0, 0.05, 120)
  )
  sampled, rao_bl = (
    planted(*(curve(late) for _ in range(5))) for late in (0, delay)
  )
  rows = [
    rao_blackwell.compare(
      "x", *rao_blackwell.times_to(threshold, sampled, rao_bl, window=10)
    )
    for threshold in (0.5, 0.75)
  ]
  assert rao_blackwell.verdict((0.5, 0.75), rows, GAIN, tolerance=10) == (
    study.DOES_NOT_HOLD if delay else study.HOLDS
  )
  assert all(low <= delay <= high for *_, (_, low, high) in rows)


# The study.


def read(path):
  return json.loads(path.read_text())


def test_what_it_leaves_behind(workdir):
  record = read(workdir / "study.json")
  rows = [row[0] for row in record["tables"]["pairs"]["rows"]]
  assert rows == [
    "iterations to 50% of the gain",
    "iterations to 75% of the gain",
    "iterations to 90% of the gain",
    "gold reward at the end",
    "KL at the end, nats per response",
    "seconds per step",
  ]
  table = record["tables"]["runs"]
  of = {
    (estimator, seed): dict(zip(table["columns"][2:], rest))
    for estimator, seed, *rest in table["rows"]
  }
  assert set(of) == {
    (estimator, seed)
    for estimator in ("sampled", "rao_blackwellised")
    for seed in (0, 1)
  }
  for (estimator, seed), row in of.items():
    text = (workdir / f"{estimator}-{seed}/metrics.jsonl").read_text()
    golds = [json.loads(line)["reward/gold"] for line in text.splitlines()]
    assert row["gold"] == pytest.approx(np.mean(golds[-2:]))
  assert of["sampled", 0]["gold"] != of["sampled", 1]["gold"]


def test_pairs_are_alike_but_for_the_estimator(workdir):
  configs, first = {}, {}
  for name in ("sampled-1", "rao_blackwellised-1", "sampled-0"):
    configs[name] = read(workdir / name / "config.json")
    lines = (workdir / name / "metrics.jsonl").read_text().splitlines()
    first[name] = json.loads(lines[0])["reward/gold"]
  assert configs["sampled-1"]["kl"].pop("estimator") == "sampled"
  other = configs["rao_blackwellised-1"]
  assert other["kl"].pop("estimator") == "rao_blackwellised"
  assert configs["sampled-1"] == other and other["seed"] == 1
  assert other["policy"]["path"] == configs["sampled-0"]["policy"]["path"]
  # The same prompts and random numbers, from the same policy.
  assert first["sampled-1"] == first["rao_blackwellised-1"]
  assert first["sampled-1"] != first["sampled-0"]


def test_resume_trains_nothing_again(resume):
  resume()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("seeds=1", "config.seeds: 1; wanted at least 2"),
    ("gains=()", "config.gains: (); wanted rising numbers in (0, 1]"),
    ("gains=(0.9,0.5)", "config.gains: (0.9, 0.5); wanted rising numbers"),
    ("gains=(0.5,1.1)", "config.gains: (0.5, 1.1); wanted rising numbers"),
    ("window=5", "config.window: 5; wanted 1 to training.train.steps=4"),
    ("last=0", "config.last: 0; wanted 1 to training.train.steps=4"),
    (
      "training.kl.estimator=rao_blackwellised",
      "config.training.kl.estimator: 'rao_blackwellised'; wanted 'sampled': th",
    ),
    (
      "training.kl.beta=-1",
      "config.training.kl.beta: -1.0; wanted finite and at least 0 (run sampl",
    ),
  ],
)
def test_fields_that_make_no_sense(refusal, change, message):
  """Bad inputs 4, 5 and 7."""
  assert refusal(change).startswith(message)
