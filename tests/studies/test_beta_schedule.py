"""The study of schedules: its rule on planted runs, and a reduced run.

Mutants that were tried and fail here: a curve that goes on beyond its ends; one
straight in KL; constants in falling order; differences the other way round; the
interval's other end; an arm judged by the seeds that can be compared; each arm
at 95 %; a bias that is not charged, that is credited where it is below 0, or
taken for 0 where it is not known.
"""

import json
import math
import pathlib

import numpy as np
import pytest

from configs.studies import beta_schedule as config_file
from rlhf_jax.studies import beta_schedule, intervals, study, toy_runs

SEEDS = 4
KLS = (1.0, 4.0, 9.0, 16.0)
MOVED = ("linear", "dual")


def runs(golds, nats):
  return beta_schedule.Runs(
    np.array(golds, float), np.array(nats, float), np.ones((len(golds), 3))
  )


def constants(slope=0.5, noise=0.01):
  """Gold of slope · √KL, which a straight line in √KL finds again."""
  rng = np.random.default_rng(0)
  curves = {}
  for beta, kl in zip((0.5, 0.2, 0.1, 0.05), KLS):
    nats = kl * rng.uniform(0.9, 1.1, SEEDS)
    golds = slope * np.sqrt(nats) + rng.normal(0, noise, SEEDS)
    curves[f"constant {beta:g}"] = runs(golds, nats)
  return curves


def moved(ahead, kl=6.0, slope=0.5):
  """Runs that are ahead of the curve."""
  shifts = np.linspace(-0.02, 0.02, SEEDS)
  return runs(slope * np.sqrt(kl) + ahead + shifts, [kl] * SEEDS)


def judge(ahead, bias=0.0):
  moving = {name: moved(more) for name, more in ahead.items()}
  arms, _ = beta_schedule.of_arms(moving, constants())
  return beta_schedule.verdict(arms, bias)


def flat(seeds=2):
  """Constants from 0 to 4 nats, all without gold."""
  return {str(kl): runs([0] * seeds, [kl] * seeds) for kl in (0, 4)}


def left_out(*ahead):
  """Constants that a curve without them puts ahead; NaN: they have none."""
  of = lambda x: intervals.Interval(x, math.nan, math.nan)
  return [
    beta_schedule.Arm(f"constant {i}", 1, 1, 1, 1, of(x), SEEDS)
    for i, x in enumerate(ahead)
  ]


# The figures.


def test_a_run_by_hand():
  rows = [
    {"reward/gold": float(i), "kl/reverse_exact": 2.0 * i, "kl/beta": 0.1 * i}
    for i in range(4)
  ]
  members = [
    toy_runs.Member(0.5, seed, pathlib.Path("x"), of)
    for seed, of in enumerate((rows, rows[::-1]))
  ]
  found = beta_schedule.of_members(members, last=2)
  np.testing.assert_allclose(found.gold, [2.5, 0.5])
  np.testing.assert_allclose(found.kl, [5, 1])
  np.testing.assert_allclose(found.betas[0], [0, 0.1, 0.2, 0.3])


def test_ahead_by_hand():
  # Of two seeds; constants at 4 and 1 nats, in this order, with 1 and 0 gold,
  # and with 3 and 2. At 2.25 nats √KL is halfway: 0.5 and 2.5.
  curves = [runs([1, 3], [4, 4]), runs([0, 2], [1, 1])]
  found = beta_schedule.ahead(runs([0.75, 2.0], [2.25, 2.25]), curves)
  np.testing.assert_allclose(found, [0.25, -0.5])
  # No curve beyond its ends.
  found = beta_schedule.ahead(runs([9, 9], [0.9, 4.1]), curves)
  assert np.isnan(found).all()
  np.testing.assert_allclose(
    beta_schedule.ahead(runs([0, 3], [1, 4]), curves), [0, 0]
  )


def test_an_arm_by_hand():
  arm = beta_schedule.of_arm("dual", runs([1, 3], [1, 3]), flat(), level=0.95)
  # Two values: sd √2, error 1, and t of one degree of freedom is 12.706.
  assert arm[:5] == ("dual", 1, 1, 2, 2)
  assert arm.ahead == pytest.approx((2, 2 - 12.7062, 2 + 12.7062))
  assert arm.compared == 2


def test_several_arms_are_right_at_once():
  moving = {name: runs([1, 3], [1, 3]) for name in "abcde"}
  arms, _ = beta_schedule.of_arms(moving, flat())
  inner = {"2": runs([1, 3], [2, 2])}
  _, (_, _, left) = beta_schedule.of_arms(moving, flat() | inner)
  # Of five, each at 99 %: t of one degree of freedom is 63.657.
  assert left.arm == "2"
  for arm in (*arms, left):
    assert arm.ahead == pytest.approx((2, 2 - 63.6567, 2 + 63.6567))


def test_the_bias_by_hand():
  nan = math.nan
  assert beta_schedule.bias(left_out(nan, 0.3, -0.1, nan)) == pytest.approx(0.1)
  assert beta_schedule.bias(left_out(nan, 0.1, -0.3, nan)) == 0
  assert math.isnan(beta_schedule.bias(left_out(nan, nan, nan)))


def test_an_arm_that_one_seed_cannot_compare():
  odd = runs([5, 5], [1, 4.5])
  arm = beta_schedule.of_arm("dual", odd, flat(), level=0.95)
  assert arm.compared == 1 and not arm.is_comparable
  assert math.isnan(arm.ahead.mean)
  assert arm.ahead[1:] == (-math.inf, math.inf)
  assert beta_schedule.verdict([arm], 0.0) == study.DOES_NOT_HOLD


def test_a_constant_left_out_lies_on_the_curve():
  curves = constants()
  for name in ("constant 0.2", "constant 0.1"):
    arm = beta_schedule.of_arm(name, curves[name], curves, level=0.95)
    assert abs(arm.ahead.mean) < 0.02 and arm.compared == SEEDS


# The verdict.


@pytest.mark.parametrize(
  ("ahead", "verdict"),
  [
    ({"linear": 0.2, "dual": 0.1}, "holds"),
    ({"linear": 0.2, "dual": 0.0}, "holds when β follows linear"),
    ({"linear": 0.0, "dual": 0.0}, "does not hold here"),
    # Reversed: constants are ahead.
    ({"linear": -0.2, "dual": -0.1}, "does not hold here"),
    ({"linear": math.nan}, "does not hold here"),
  ],
)
def test_the_rule(ahead, verdict):
  assert judge(ahead) == verdict


def test_straight_pieces_under_a_curve_are_charged():
  """Ahead by 0.2 and 0.1, with intervals of ± 0.05 (t of 4.18 at 97.5 %)."""
  ahead = {"linear": 0.2, "dual": 0.1}
  assert judge(ahead, 0.04) == study.HOLDS
  assert judge(ahead, 0.1) == "holds when β follows linear"
  assert judge(ahead, 0.19) == study.DOES_NOT_HOLD
  assert judge(ahead, math.nan) == study.DOES_NOT_HOLD


def test_more_gold_for_more_kl_is_not_ahead():
  """An arm farther along the constants' own curve."""
  near, far = (
    beta_schedule.of_arm("linear", moved(0.0, kl=kl), constants(), level=0.95)
    for kl in (3.0, 12.0)
  )
  assert far.gold > near.gold + 0.5
  assert not near.ahead.low > 0 and not far.ahead.low > 0


# The words.


def words(ahead, *inner):
  """The paragraph on arms with what they are ahead by, and half a width."""
  of = lambda mean, half: intervals.Interval(mean, mean - half, mean + half)
  arms = [
    beta_schedule.Arm(name, 0.5, 0.05, 3.0, 1.0, of(*lead), SEEDS)
    for name, lead in ahead.items()
  ]
  return beta_schedule.paragraph(arms, left_out(math.nan, *inner, math.nan))


def test_what_the_words_say():
  said = words({"linear": (0.2, 0.1), "dual": (0.3, 0.4)}, 0.1, -0.02)
  assert said.startswith(
    "1 of 2 ways to move β are ahead of a constant β at the same KL by more"
    " gold than interpolating may add (+0.04); the best is linear with +0.20"
    " (+0.10 to +0.30). Gold"
  )
  assert "dual (β from 0.5 to 0.05) has 1.00 at 3.0 nats, +0.30 (-0.10" in said
  assert "ahead of it: constant 1 by +0.10, constant 2 by -0.02;" in said


@pytest.mark.parametrize(
  ("ahead", "inner", "first"),
  [
    (
      {"linear": (0.2, 0.1), "dual": (0.3, 0.4)},
      (0.12,),
      "0 of 2 ways to move β are ahead of a constant β at the same KL by more"
      " gold than interpolating may add (+0.12); the best is dual with +0.30"
      " (-0.10 to +0.70)",
    ),
    (
      {"linear": (math.nan, math.inf)},
      (),
      "0 of 1 ways to move β are ahead of a constant β at the same KL by more"
      " gold than interpolating may add (not known); none can be compared in"
      " every seed",
    ),
  ],
)
def test_what_is_said_of_none_ahead(ahead, inner, first):
  assert words(ahead, *inner).split(". Gold, ")[0] == first


# The study.


def read(path):
  return json.loads(path.read_text())


def test_what_it_leaves_behind(workdir, tables):
  assert tuple(row[0] for row in tables["arms"]["rows"]) == MOVED
  names = [f"constant {beta:g}" for beta in (0.02, 0.1, 0.5)]
  assert [row[0] for row in tables["left_out"]["rows"]] == names
  assert {row[0] for row in tables["runs"]["rows"]} == {*MOVED, *names}
  of = {tuple(row[:2]): row[2:] for row in tables["runs"]["rows"]}
  for (arm, seed), name in (
    (("constant 0.1", 1), "constant/beta=0.1,seed=1"),
    (("dual", 0), "dual/beta=0.5,seed=0"),
  ):
    text = (workdir / name / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    golds = [row["reward/gold"] for row in rows[-2:]]
    nats = [row["kl/reverse_exact"] for row in rows[-2:]]
    assert of[arm, seed] == pytest.approx([np.mean(golds), np.mean(nats)])


def of_config(config):
  """What says how β moves, and the rest."""
  told = (
    tuple(config["sweep"].pop("betas")),
    config["kl"].pop("beta"),
    config["kl"].pop("controller"),
    config["kl"].pop("target"),
    config["kl"]["schedule"].pop("shape"),
  )
  return told, config


def test_sweeps_differ_in_how_beta_moves_only(workdir):
  configs = {
    name: of_config(read(workdir / name / "config.json"))
    for name in ("constant", *MOVED)
  }
  assert {name: told for name, (told, _) in configs.items()} == {
    "constant": ((0.02, 0.1, 0.5), 0.05, "fixed", 0.0, "cosine"),
    "linear": ((), 0.5, "schedule", 0.0, "linear"),
    "dual": ((), 0.5, "dual", 4.0, "cosine"),
  }
  assert all(rest == configs["dual"][1] for _, rest in configs.values())
  assert configs["dual"][1]["sweep"]["seeds"] == [0, 1]


def test_every_arm_has_its_controller():
  config = config_file.get_config()
  beta_schedule.check(config)
  told = {
    name: of_config(sweep.to_dict())[0][1:]
    for name, sweep in beta_schedule.sweeps(config).items()
  }
  assert told == {
    "constant": (0.05, "fixed", 0.0, "cosine"),
    "linear": (0.5, "schedule", 0.0, "linear"),
    "cosine": (0.5, "schedule", 0.0, "cosine"),
    "ziegler": (0.5, "ziegler", 4.0, "cosine"),
    "dual": (0.5, "dual", 4.0, "cosine"),
    "trust": (0.5, "trust", 0.0, "cosine"),
  }


def test_resume_trains_nothing_again(resume):
  resume()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("constants=(0.1,0.2)", "config.constants: (0.1, 0.2); wanted 3 or more r"),
    ("constants=(0.1,0.1,0.2)", "config.constants: (0.1, 0.1, 0.2); wanted "),
    ("constants=(0,0.1,0.2)", "config.constants: (0, 0.1, 0.2); wanted 3 or"),
    ("arms=()", "config.arms: (); wanted different ones of linear, cosine"),
    ("arms=('pi',)", "config.arms: ('pi',); wanted different ones of linear"),
    ("arms=('dual','dual')", "config.arms: ('dual', 'dual'); wanted differen"),
    (
      "conservative_beta=0.01",
      "config.conservative_beta: 0.01; wanted above training.kl.trust.beta_mi",
    ),
    ("target=0.0", "config.target: 0.0; wanted finite and above 0"),
    ("seeds=1", "config.seeds: 1; wanted 2 to 20"),
    ("last=5", "config.last: 5; wanted 1 to training.train.steps=4"),
    (
      "training.kl.schedule.end=1.0",
      "config.training.kl.schedule.end: 1.0; wanted below 1",
    ),
    (
      "training.kl.controller=dual",
      "config.training.kl.controller: 'dual'; wanted 'fixed': the study sets",
    ),
    (
      "training.kl.target=2.0",
      "config.training.kl.target: 2.0; wanted 0.0: the study sets it itself",
    ),
    (
      "training.kl.beta_max=0.2",
      "config.training.kl.beta: 0.5; wanted every β",
    ),
  ],
)
def test_fields_that_make_no_sense(refusal, change, message):
  """Bad inputs 4, 5 and 7."""
  assert refusal(change).startswith(message)
