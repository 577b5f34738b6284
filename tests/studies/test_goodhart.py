"""The study of overoptimisation: its rule on planted ends, a reduced run.

Mutants that were tried and fail here: a peak that a seed chooses for itself;
nothing to be kept; a fall that is not asked for; a penalty that need not have
more gold, or less nonsense, than none; a mean in place of an interval's end;
a share of all responses that looks fluent, clean ones among them; nonsense of
any size.
"""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from rlhf_jax.studies import goodhart, held_out, intervals, study, toy_runs


def ends(
  proxy=1.5, gold=-2.0, peak=1.0, faults=3.0, fluent=0.0, noise=0.04, draw=0
):
  """Figures of one β, five seeds, with a noise that `draw` numbers."""
  rng = np.random.default_rng(draw)
  values = lambda mean: mean + noise * rng.normal(size=5)
  return goodhart.Ends(
    proxy=values(proxy),
    gold=values(gold),
    kl=values(10.0),
    faults=values(faults),
    nll=values(2.0),
    fluent=values(fluent),
    peak=values(peak),
    peak_step=np.full(5, 12.0),
  )


START = ends(proxy=0.0, gold=0.0, peak=0.0, faults=0.2, fluent=0.95, draw=1)
KEPT: dict[str, Any] = {
  **{"proxy": 1.2, "gold": 1.0, "peak": 1.05},
  **{"faults": 0.3, "fluent": 0.9, "draw": 2},
}


def verdict(none, *penalised):
  every = (none, *penalised)
  return goodhart.verdict(
    [
      goodhart.arm_of(0.1 * i, end, START, none, kept=0.8, level=level)
      for i, (end, level) in enumerate(zip(every, goodhart.levels(len(every))))
    ],
    nonsense=0.5,
  )


# The verdict.


def test_all_parts_hold():
  assert verdict(ends(fluent=0.9), ends(**KEPT)) == study.HOLDS
  # One penalty is enough.
  assert verdict(ends(fluent=0.9), ends(), ends(**KEPT)) == study.HOLDS


@pytest.mark.parametrize("fluent", [0.0, 0.5, np.nan])
def test_nonsense_that_does_not_look_fluent(fluent):
  found = verdict(ends(fluent=fluent), ends(**KEPT))
  assert found == "holds when the nonsense need not look fluent"


def test_seeds_that_differ_do_not_look_fluent():
  none = ends()._replace(fluent=np.array([1.0, 1.0, 1.0, 0.1, 0.1]))
  assert verdict(none, ends(**KEPT)) != study.HOLDS


def test_nonsense_alone_is_no_fall():
  """Gold stays at its peak, and a penalty has more of it all the same."""
  none = ends(gold=1.0, peak=0.99)
  better = ends(**KEPT | {"gold": 2.0, "peak": 2.0})
  assert verdict(none, better) == study.DOES_NOT_HOLD
  fallen = ends(gold=0.5, peak=0.99)
  assert verdict(fallen, better) != study.DOES_NOT_HOLD


@pytest.mark.parametrize(
  "none",
  [
    {"gold": 1.4, "peak": 1.4, "faults": 0.1},  # Reversed: gold rises, too.
    {"gold": 0.99},  # A fall that the noise may be.
    {"proxy": -1.0},
    {"faults": 0.2},
    {"faults": 0.6},  # More than the SFT policy's, but too few.
    {"gold": np.nan},
    {"proxy": np.nan},
  ],
)
def test_a_planted_reversal(none):
  assert verdict(ends(**none), ends(**KEPT)) == study.DOES_NOT_HOLD


def test_nonsense_is_judged_by_its_interval():
  none = ends()._replace(faults=np.array([0.9, 1.1, 1.6, 2.8, 4.1]))
  assert verdict(none, ends(**KEPT)) == study.DOES_NOT_HOLD


@pytest.mark.parametrize(
  "change",
  [
    {"gold": -1.0, "peak": -1.0},  # Less than the SFT policy's.
    {"gold": 0.6},  # Lost since the peak.
    {"faults": 3.0},  # As much nonsense as without.
    {"faults": 2.0},  # Less than without, and nonsense all the same.
    {"gold": np.nan},
  ],
)
def test_a_penalty_that_prevents_nothing(change):
  assert verdict(ends(), ends(**KEPT | change)) == study.DOES_NOT_HOLD


def test_a_penalty_is_no_cure_where_nothing_more_is_gained():
  """Its gold must be above that of no penalty, not only above the start."""
  none = ends(gold=1.05, peak=3.0)
  assert verdict(none, ends(**KEPT)) == study.DOES_NOT_HOLD


def test_noise_hides_everything():
  loud = [ends(noise=20.0), ends(**KEPT, noise=20.0)]
  assert verdict(*loud) == study.DOES_NOT_HOLD


def test_intervals_of_an_arm_by_hand():
  figures = lambda gold, peak: ends()._replace(
    gold=np.array(gold), peak=np.array(peak)
  )
  start = figures([0.0, 0.5], [0.0, 0.5])
  none = figures([-1.0, -2.0], [1.0, 1.0])
  end = figures([1.0, 2.5], [2.0, 2.5])
  arm = goodhart.arm_of(0.1, end, start, none, kept=0.5, level=0.95)
  assert arm.gold == intervals.of_mean([1.0, 2.0])
  assert arm.from_peak == intervals.of_mean([-1.0, 0.0])
  assert arm.over_none == intervals.of_mean([2.0, 4.5])
  # Gained 1 and 2, of which half of 2 and of 2 was wanted.
  assert arm.kept == intervals.of_mean([0.0, 1.0])
  wider = goodhart.arm_of(0.1, end, start, none, kept=0.5, level=0.99)
  assert wider.gold == intervals.of_mean([1.0, 2.0], level=0.99)


def test_levels_are_shared_by_the_penalised():
  assert goodhart.levels(2) == [0.95, 0.95]
  assert goodhart.levels(5) == pytest.approx([0.95] + [0.9875] * 4)


# What metrics and responses say.


def test_a_peak_is_where_the_others_are_highest():
  curves = np.array(
    [
      [np.nan, 9.0, 1.0, 1.0],  # Its own 9 is not what chooses.
      [np.nan, 1.0, 3.0, 1.0],
      [np.nan, 1.0, 2.0, 2.5],
    ]
  )
  # Others' sums: 2, 5, 3.5; 10, 3, 3.5; 10, 4, 2.
  assert goodhart.peak_steps(curves).tolist() == [2, 1, 1]


def test_ends_by_hand():
  def member(seed, *golds):
    rows = [
      {"reward/gold": g, "reward/score": 2 * g, "kl/reverse_exact": 3 * g}
      for g in golds
    ]
    return toy_runs.Member(0.1, seed, pathlib.Path("x"), rows)

  responses = [
    held_out.Responses(
      score=np.array([9.0, 9.0]),
      gold=np.array([9.0, 9.0]),
      kl=np.array([9.0, 9.0]),
      faults=np.array([0.0, count]),
      nll=np.array([1.0, 2.0]),
    )
    for count in (1.0, 3.0)
  ]
  end = goodhart.of_end(
    [member(0, 0.0, 4.0, 4.0, 1.0), member(1, 0.0, 2.0, 6.0, 2.0)],
    responses,
    usual=1.0,
    window=2,
  )
  # Means of 2: 2, 4, 2.5 and 1, 4, 4, both highest at the third step first.
  np.testing.assert_allclose(end.gold, [2.5, 4.0])
  np.testing.assert_allclose(end.proxy, [5.0, 8.0])
  np.testing.assert_allclose(end.kl, [7.5, 12.0])
  np.testing.assert_allclose(end.peak, [4.0, 4.0])
  np.testing.assert_allclose(end.peak_step, [3.0, 3.0])
  np.testing.assert_allclose(end.faults, [0.5, 1.5])
  np.testing.assert_allclose(end.fluent, [0.0, 0.0])
  start = goodhart.of_start(responses, usual=2.0)
  np.testing.assert_allclose(start.gold, [9.0, 9.0])
  np.testing.assert_allclose(start.fluent, [1.0, 1.0])


def responses(clean, faulty):
  """−log π_ref of responses without ungrammatical pairs, and with one."""
  nll = np.array([*clean, *faulty], np.float64)
  faults = np.array([0.0] * len(clean) + [1.0] * len(faulty))
  return held_out.Responses(nll, nll, nll, faults, nll)


def test_clean_responses_do_not_make_nonsense_look_fluent():
  planted = [
    responses([1.0] * 6, [9.0] * 4),  # Most are fluent, and no nonsense is.
    responses([9.0] * 6, [1.0, 2.0, 2.1, 9.0]),
    responses([1.0] * 10, []),
  ]
  found = goodhart.of_start(planted, usual=2.0)
  np.testing.assert_array_equal(found.fluent, [0.0, 0.5, np.nan])


def test_a_seed_without_nonsense_leaves_its_looks_open():
  none = ends(fluent=0.9)
  none.fluent[2] = np.nan
  found = verdict(none, ends(**KEPT))
  assert found == "holds when the nonsense need not look fluent"
  said = goodhart.share(intervals.of_mean(none.fluent))
  assert said == "a seed has no response with such pairs"


# The study.


def read(path):
  return json.loads(path.read_text())


def test_what_it_leaves_behind(workdir):
  record = read(workdir / "study.json")
  assert record["verdict"] == study.DOES_NOT_HOLD  # After four steps.
  tables = record["tables"]
  assert list(tables) == ["arms", "texts", "intervals", "samples", "seeds"]
  assert [row[0] for row in tables["arms"]["rows"]] == ["0", "0.1"]
  columns = tables["seeds"]["columns"]
  of = {
    (row[0], row[1]): dict(zip(columns[2:], row[2:]))
    for row in tables["seeds"]["rows"]
  }
  assert set(of) == {(b, s) for b in ("SFT", "0", "0.1") for s in (0, 1)}
  assert of["SFT", 0]["kl"] == 0  # It is the reference.
  for beta in ("0", "0.1"):
    for seed in (0, 1):
      path = workdir / f"sweep/beta={beta},seed={seed}"
      lines = (path / "metrics.jsonl").read_text().splitlines()
      golds = [json.loads(line)["reward/gold"] for line in lines]
      assert of[beta, seed]["gold"] == pytest.approx(np.mean(golds[-2:]))
  assert of["0", 0]["gold"] != of["0", 1]["gold"]
  first = (workdir / "sweep/beta=0,seed=0/samples.jsonl").read_text()
  sample = json.loads(first.splitlines()[0])
  assert tables["samples"]["rows"][0] == [
    "SFT policy",
    f"{sample['prompt']} | {sample['response']}",
  ]


def test_resume_trains_nothing_again(resume):
  resume()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("betas=(0,)", "config.betas: (0,); wanted 0 and then rising numbers"),
    ("betas=(0.1,0.2)", "config.betas: (0.1, 0.2); wanted 0 and then rising"),
    ("betas=(0,0.2,0.1)", "config.betas: (0, 0.2, 0.1); wanted 0 and then"),
    ("seeds=1", "config.seeds: 1; wanted 2 to 20"),
    ("window=5", "config.window: 5; wanted 1 to training.train.steps=4"),
    ("prompts=1", "config.prompts: 1; wanted at least 2"),
    ("kept=1.5", "config.kept: 1.5; wanted in (0, 1)"),
    ("nonsense=0.0", "config.nonsense: 0.0; wanted finite and above 0"),
    ("nonsense=inf", "config.nonsense: inf; wanted finite and above 0"),
    ("fluent=0.5", "config.fluent: 0.5; wanted in (0.5, 1)"),
    ("fluent=nan", "config.fluent: nan; wanted in (0.5, 1)"),
    ("training.kl.beta=1", "config.training.kl.beta: 1.0; wanted 0.05: the"),
    (
      "training.sweep.seeds=(3,)",
      "config.training.sweep.seeds: (3,); wanted (): the study sets it itself",
    ),
    ("training.kl.controller=pi", "config.training.kl.controller: 'pi'; want"),
    (
      "training.optimizer.learning_rate=nan",
      "config.training.optimizer.learning_rate: nan; wanted",
    ),
  ],
)
def test_fields_that_make_no_sense(refusal, change, message):
  """Bad inputs 3, 4, 5 and 7."""
  assert refusal(change).startswith(message)
