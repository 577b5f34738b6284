"""The study of both bounds: its rule on planted runs, and a reduced run.

Mutants that were tried and fail here: either interval judged by its other end;
differences the other way round; the penalty's taken with clipping both times;
one difference that is enough; a step's size over the last steps only; steps
that are subtracted, not divided; a largest step that nothing is wanted of.
"""

import json
import math
import pathlib

import numpy as np
import pytest

from rlhf_jax.studies import clip_and_penalty, collection, study, toy_runs

ON, OFF = "on", "off"
NO_CLIP = 0.99


def runs(*, gold, kl, step, largest, seeds=4):
  """An arm whose seeds differ a little."""
  shift = np.linspace(-0.01, 0.01, seeds)
  arrays = gold + shift, kl - shift, step + shift, largest + shift, 0 * shift
  return clip_and_penalty.Runs(*(np.broadcast_to(x, seeds) for x in arrays))


def planted(**changes):
  """Arms as the claim has them, at clip 0.2, but for `changes`.

  Args:
    **changes: `both`, `clip`, `penalty` or `neither`: figures of an arm.
  """
  usual = {
    "neither": {"gold": 0.5, "kl": 20.0, "step": 2.0, "largest": 9.0},
    "clip": {"gold": 1.0, "kl": 18.0, "step": 0.5, "largest": 1.0},
    "penalty": {"gold": 1.1, "kl": 5.0, "step": 1.5, "largest": 6.0},
    "both": {"gold": 1.2, "kl": 4.0, "step": 0.4, "largest": 0.8},
  }
  of = {n: runs(**(usual[n] | changes.get(n, {}))) for n in usual}
  return {
    (0.2, ON): of["both"],
    (0.2, OFF): of["clip"],
    (NO_CLIP, ON): of["penalty"],
    (NO_CLIP, OFF): of["neither"],
  }


def judge(arms, *clips):
  rows = [
    row
    for clip in clips or (0.2,)
    for row in clip_and_penalty.differences(arms, clip, NO_CLIP, margin=0.2)
  ]
  return clip_and_penalty.verdict(rows)


# The figures.


def test_a_run_by_hand():
  def member(beta, seed, gold):
    rows = [
      {
        "reward/gold": gold + i,
        "kl/reverse_exact": 10.0 * i,
        "kl/to_old_policy": (9.0, 1.0, 0.5, 2.0)[i],
        "ppo/clip_fraction": 0.1 * i,
      }
      for i in range(4)
    ]
    return toy_runs.Member(beta, seed, pathlib.Path("x"), rows)

  members = [member(0.0, 0, 0.0), member(0.1, 0, 5.0), member(0.1, 1, 7.0)]
  arms = clip_and_penalty.of_members(0.2, members, last=2)
  assert set(arms) == {(0.2, ON), (0.2, OFF)}
  on = arms[0.2, ON]
  np.testing.assert_allclose(on.gold, [7.5, 9.5])  # The last two of 5, 6, 7, 8.
  np.testing.assert_allclose(on.kl, [25, 25])
  np.testing.assert_allclose(on.step, [1.5, 1.5])  # The median of all four.
  np.testing.assert_allclose(on.largest, [9, 9])
  np.testing.assert_allclose(on.clipped, [0.15, 0.15])
  np.testing.assert_allclose(arms[0.2, OFF].gold, [2.5])


def test_differences_by_hand():
  """Each is of the pair that its name says, seed by seed."""
  rows = clip_and_penalty.differences(planted(), 0.2, NO_CLIP, margin=0.2)
  means = {(row.figure, row.of, row.at): row.mean for row in rows}
  wanted = {
    ("step", "clipping", "penalty off"): 0.5 / 2.0,
    ("step", "clipping", "penalty on"): 0.4 / 1.5,
    ("largest", "clipping", "penalty off"): 1.0 / 9.0,
    ("largest", "clipping", "penalty on"): 0.8 / 6.0,
    ("kl", "penalty", "clipping off"): 5.0 - 20.0,
    ("kl", "penalty", "clipping on"): 4.0 - 18.0,
    ("gold", "clipping", "penalty on"): 1.2 - 1.1,
    ("gold", "penalty", "clipping on"): 1.2 - 1.0,
    ("kl", "clipping", "penalty off"): 18.0 - 20.0,
    ("step", "penalty", "clipping off"): 1.5 / 2.0,
  }
  assert means == pytest.approx(wanted, rel=1e-3)
  # The seeds' shifts are alike in both arms of a pair; of a ratio, nearly.
  assert all(row.high - row.low < 0.02 for row in rows)


# The verdict.


@pytest.mark.parametrize(
  ("changes", "verdict"),
  [
    ({}, study.HOLDS),
    # What is not part of the claim.
    ({"clip": {"kl": 30.0}, "penalty": {"step": 3.0}}, study.HOLDS),
    # A loss of gold that is tolerated, and one that is not.
    ({"both": {"gold": 0.95}}, study.HOLDS),
    ({"both": {"gold": 0.85}}, study.DOES_NOT_HOLD),
    ({"clip": {"gold": 1.45}}, study.DOES_NOT_HOLD),
    # Each of the two without an effect, or with the other's.
    ({"both": {"step": 1.5}}, study.DOES_NOT_HOLD),
    ({"clip": {"step": 2.0}}, study.DOES_NOT_HOLD),
    # Typical steps are smaller, and the largest is not.
    ({"both": {"largest": 6.0}}, study.DOES_NOT_HOLD),
    ({"clip": {"largest": 9.0}}, study.DOES_NOT_HOLD),
    ({"both": {"kl": 18.0}}, study.DOES_NOT_HOLD),
    ({"penalty": {"kl": 20.0}}, study.DOES_NOT_HOLD),
    ({"both": {"gold": math.nan}}, study.DOES_NOT_HOLD),
  ],
)
def test_the_rule(changes, verdict):
  assert judge(planted(**changes)) == verdict


def test_a_planted_reversal():
  """Clipping that makes steps larger, a penalty that drives away."""
  arms = planted()
  swapped = {
    (0.2, ON): arms[NO_CLIP, OFF],
    (0.2, OFF): arms[NO_CLIP, ON],
    (NO_CLIP, ON): arms[0.2, OFF],
    (NO_CLIP, OFF): arms[0.2, ON],
  }
  assert judge(swapped) == study.DOES_NOT_HOLD


def test_clip_ranges_are_judged_one_by_one():
  arms = planted()
  arms[0.5, ON] = arms[NO_CLIP, ON]  # Clips nothing.
  arms[0.5, OFF] = arms[NO_CLIP, OFF]
  assert judge(arms, 0.2, 0.5) == "holds when the clip range is 0.2"


def test_seeds_that_disagree_prove_nothing():
  for figure, odd in (("step", 5.0), ("largest", 30.0), ("gold", -2.0)):
    arms = planted()
    both = arms[0.2, ON]._asdict()[figure].copy()
    both[-1] = odd
    arms[0.2, ON] = arms[0.2, ON]._replace(**{figure: both})
    assert judge(arms) == study.DOES_NOT_HOLD


# The study.


def read(path):
  return json.loads(path.read_text())


def test_what_it_leaves_behind(workdir):
  record = read(workdir / "study.json")
  tables = record["tables"]
  arms = {tuple(row[:2]): row for row in tables["arms"]["rows"]}
  assert set(arms) == {(c, p) for c in (0.2, NO_CLIP) for p in (ON, OFF)}
  of = {tuple(row[:3]): row[3:] for row in tables["runs"]["rows"]}
  assert len(of) == 8
  for clip, penalty, beta in ((0.2, ON, 0.1), (NO_CLIP, OFF, 0)):
    path = workdir / f"clip={clip}/beta={beta},seed=11/metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = dict(zip(clip_and_penalty.Runs._fields, of[clip, penalty, 11]))
    column = lambda name, rows=rows: np.array([row[name] for row in rows])
    assert found == pytest.approx(
      {
        "gold": column("reward/gold")[-2:].mean(),
        "kl": column("kl/reverse_exact")[-2:].mean(),
        "step": np.median(column("kl/to_old_policy")),
        "largest": column("kl/to_old_policy").max(),
        "clipped": column("ppo/clip_fraction").mean(),
      }
    )
  assert len(tables["differences"]["rows"]) == 10
  first = collection.table([record]).splitlines()[2]
  differences = {tuple(row[:4]): row for row in tables["differences"]["rows"]}
  for figure, of, at, form in (
    ("step", "clipping", "penalty on", "{:.2f} times ({:.2f} to {:.2f})"),
    ("largest", "clipping", "penalty on", "{:.2f} times ({:.2f} to {:.2f})"),
    ("kl", "penalty", "clipping on", "{:+.2f} ({:+.2f} to {:+.2f}) nats"),
  ):
    assert form.format(*differences[0.2, figure, of, at][4:7]) in first


def test_sweeps_differ_in_the_clip_only(workdir):
  configs = [read(workdir / f"clip={c}/config.json") for c in (0.2, NO_CLIP)]
  clips = [config["ppo"].pop("clip_epsilon") for config in configs]
  assert clips == [0.2, NO_CLIP] and configs[0] == configs[1]
  assert configs[0]["sweep"]["betas"] == [0.0, 0.1]
  assert configs[0]["ppo"]["epochs"] == 4


def test_resume_trains_nothing_again(resume):
  resume()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("clips=()", "config.clips: (); wanted rising numbers in (0, no_clip=0.9"),
    ("clips=(0.5,0.2)", "config.clips: (0.5, 0.2); wanted rising numbers in"),
    ("clips=(0.2,0.99)", "config.clips: (0.2, 0.99); wanted rising numbers "),
    ("no_clip=1.0", "config.no_clip: 1.0; wanted in (0, 1)"),
    ("seeds=1", "config.seeds: 1; wanted 2 to 20"),
    ("last=5", "config.last: 5; wanted 1 to training.train.steps=4"),
    ("margin=-1.0", "config.margin: -1.0; wanted at least 0"),
    ("training.kl.beta=0.0", "config.training.kl.beta: 0.0; wanted above 0"),
    ("training.ppo.epochs=1", "config.training.ppo.epochs: 1; wanted at lea"),
    ("training.reward.path=x", "config.training.reward.path: 'x'; wanted ''"),
  ],
)
def test_fields_that_make_no_sense(refusal, change, message):
  """Bad inputs 4, 5 and 7."""
  assert refusal(change).startswith(message)
