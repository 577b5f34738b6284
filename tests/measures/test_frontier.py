"""The record of a sweep, on hand-made members."""

import dataclasses
import json
import math

import numpy as np
import pytest

from rlhf_jax.measures import best_of_n, frontier, scaling_fits

_REFERENCE = {"proxy": 0.0, "gold": 0.0}


def _member(beta, kl, gold, *, seed=0, error=0.05, proxy=1.0, **changes):
  member = frontier.Member(
    beta=beta,
    seed=seed,
    workdir=f"beta={beta:g},seed={seed}",
    proxy=proxy,
    proxy_se=error,
    gold=gold,
    gold_se=None if gold is None else error,
    win_rate=0.7,
    win_rate_se=0.02,
    kl=kl,
    kl_se=error,
  )
  return dataclasses.replace(member, **changes)


def _record(members, *, best=(), reference=None, trajectories=None):
  return frontier.record(
    members, best, reference or _REFERENCE, trajectories or {}
  )


def _points(record):
  return {p["beta"]: p for p in record["pareto"]["points"]}


def test_one_seed_has_the_interval_of_its_responses():
  (row,) = _record([_member(0.1, 4.0, 1.5, error=0.1)])["by_beta"]
  assert (row["seeds"], row["interval"]) == ([0], "responses")
  # 1.96 · 0.1.
  assert row["gold"] == pytest.approx(
    {"mean": 1.5, "low": 1.304, "high": 1.696}, abs=1e-4
  )


def test_several_seeds_have_students_interval():
  members = [
    _member(0.1, kl, gold, seed=seed, error=9.0)
    for seed, (kl, gold) in enumerate([(4.0, 1.0), (5.0, 2.0), (6.0, 3.0)])
  ]
  (row,) = _record(members)["by_beta"]
  assert (row["seeds"], row["interval"]) == ([0, 1, 2], "seeds")
  # t(0.975, 2) · sd/√3 = 4.3027 · 1/1.7321 = 2.4841.
  assert row["gold"] == pytest.approx(
    {"mean": 2.0, "low": -0.4841, "high": 4.4841}, abs=1e-4
  )
  assert row["kl"]["mean"] == 5.0
  assert row["win_rate"]["high"] == pytest.approx(0.7)


def test_the_front_of_hand_made_points():
  # Gold against KL: 1 and 0.3 and 0.1 rise together; 0.03 has less gold than
  # 0.1 at more KL; 0 has less than 0.3 and 0.1, but no less than 1.
  record = _record(
    [
      _member(1.0, 1.0, 0.5),
      _member(0.3, 3.0, 1.0),
      _member(0.1, 8.0, 1.4),
      _member(0.03, 12.0, 1.2),
      _member(0.0, 40.0, 0.7),
    ]
  )
  points = _points(record)
  front = [beta for beta, point in points.items() if point["on_front"]]
  assert front == [0.1, 0.3, 1.0]
  assert points[0.03]["dominated_by"] == [0.1]
  assert points[0.0]["dominated_by"] == [0.03, 0.1, 0.3]
  assert points[0.1]["dominated_by"] == []
  assert record["pareto"]["reward"] == "gold"


def test_equal_points_leave_each_other_on_the_front():
  points = _points(_record([_member(0.1, 4.0, 1.0), _member(0.2, 4.0, 1.0)]))
  assert points[0.1]["on_front"] and points[0.2]["on_front"]
  # The same gold for more KL is dominated, as is less gold for the same KL.
  points = _points(_record([_member(0.1, 5.0, 1.0), _member(0.2, 4.0, 1.0)]))
  assert points[0.1]["dominated_by"] == [0.2]
  points = _points(_record([_member(0.1, 4.0, 0.9), _member(0.2, 4.0, 1.0)]))
  assert points[0.1]["dominated_by"] == [0.2]


def test_how_sure_the_front_is():
  """0.1 is surely beaten; which of 0.2 and 0.3 has more gold is a coin's."""
  members = [
    _member(0.1, 9.0, 0.2, error=0.01),
    _member(0.2, 6.0, 1.0, error=0.01),
    _member(0.3, 4.0, 1.0, error=0.01),
  ]
  points = _points(_record(members))
  assert points[0.1]["share_on_front"] == 0.0
  assert points[0.2]["share_on_front"] == pytest.approx(0.5, abs=0.05)
  assert points[0.3]["share_on_front"] == 1.0


def test_the_front_pairs_seeds():
  """Seeds that move all β alike do not make the front doubtful.

  0.1 has 0.1 more gold than 0.3 in each seed, and seeds differ by 2; taken
  apart, the better one would be dominated nearly half of the time.
  """
  members = [
    _member(beta, 4.0 + beta, gold + 2.0 * seed, seed=seed, error=1e-3)
    for beta, gold in ((0.1, 1.1), (0.3, 1.0))
    for seed in range(3)
  ]
  points = _points(_record(members))
  assert points[0.1]["share_on_front"] == 1.0
  assert points[0.3]["share_on_front"] == 0.0
  # Dearer: gold for KL, both on the front.
  dearer = [
    dataclasses.replace(m, kl=9.0) if m.beta == 0.1 else m for m in members
  ]
  points = _points(_record(dearer))
  assert points[0.1]["share_on_front"] == 1.0
  assert points[0.3]["share_on_front"] == 1.0


def test_planted_laws_are_found_in_the_record():
  kls = np.array([0.5, 2.0, 5.0, 12.0, 30.0])
  law = lambda kl: float(scaling_fits.rl(np.sqrt([kl]), 1.7, 0.6)[0])
  reference = {"proxy": 0.0, "gold": 0.3}
  members = [
    _member(1 / kl, float(kl), 0.3 + law(kl), seed=i)
    for i, kl in enumerate(kls)
  ]
  trajectories = {
    (member.beta, member.seed): [
      (kl, 1.0, 0.3 + law(kl)) for kl in np.linspace(0, member.kl, 20)
    ]
    + [(math.nan, math.nan, math.nan)]
    for member in members
  }
  best = [
    best_of_n.BestOfN(
      n=n,
      proxy=1.0,
      proxy_se=0.1,
      gold=0.3 + math.sqrt(kl) * (2.0 - 0.5 * math.sqrt(kl)),
      gold_se=0.1,
      kl_bound=99.0,
      kl_estimate=kl,
      kl_estimate_se=0.1,
    )
    for n, kl in ((1, 0.0), (2, 0.19), (4, 0.6), (16, 1.8), (64, 3.1))
  ]
  record = _record(
    members, best=best, reference=reference, trajectories=trajectories
  )
  fits = record["fits"]
  for name, points in (("rl", 5), ("rl_along_training", 5 * 19)):
    assert fits[name]["alpha_rl"]["value"] == pytest.approx(1.7)
    assert fits[name]["beta_rl"]["value"] == pytest.approx(0.6)
    assert fits[name]["points"] == points
  assert fits["best_of_n"]["alpha_bon"]["value"] == pytest.approx(2.0)
  assert fits["best_of_n"]["beta_bon"]["value"] == pytest.approx(0.5)
  assert fits["best_of_n"]["peak"]["value"] == pytest.approx(2.0)
  assert [row["n"] for row in record["best_of_n"]] == [1, 2, 4, 16, 64]
  json.dumps(record, allow_nan=False)


def test_without_gold_proxy_takes_its_place():
  members = [
    _member(0.1, 8.0, None, proxy=2.0),
    _member(0.3, 4.0, None, proxy=1.9),
    _member(1.0, 5.0, None, proxy=0.5),
  ]
  record = _record(members, reference={"proxy": 0.0, "gold": None})
  assert record["pareto"]["reward"] == "proxy"
  assert _points(record)[1.0]["dominated_by"] == [0.3]
  assert record["by_beta"][0]["gold"] is None
  assert set(map(str, record["fits"].values())) == {
    "{'reason': 'there is no gold'}"
  }
  assert record["recommendation"]["beta"] == 0.3
  assert "no gold" in record["recommendation"]["text"]
  json.dumps(record, allow_nan=False)


def test_a_member_that_is_not_finite_is_named_and_left_out():
  members = [
    _member(0.0, 3.0, 0.0, seed=0, win_rate_se=math.nan),
    _member(0.0, math.inf, 0.0, seed=1),
    _member(0.0, 9.0, 0.1, seed=2),
    _member(0.1, 4.0, 1.0, seed=1),
    _member(0.1, 4.0, math.nan, seed=2),
  ]
  record = _record(members)
  assert record["left_out"] == [
    {"beta": 0.0, "seed": 0},
    {"beta": 0.0, "seed": 1},
    {"beta": 0.1, "seed": 2},
  ]
  assert [row["seeds"] for row in record["by_beta"]] == [[2], [1]]
  assert record["members"][1]["kl"] is None
  json.dumps(record, allow_nan=False)
  with pytest.raises(ValueError, match="no member has finite figures"):
    _record([_member(0.0, math.nan, 1.0)])


def test_gold_of_some_members_only_is_refused():
  with pytest.raises(ValueError, match="of some but not of all"):
    _record([_member(0.0, 4.0, 1.0), _member(0.1, 3.0, None)])
  with pytest.raises(ValueError, match="of some but not of all"):
    _record([_member(0.1, 3.0, None)])
