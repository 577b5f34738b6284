"""The study `closed_form`, reduced: who ends at π*, and who as predicted."""

import math

import pytest

from rlhf_jax.studies import closed_form, intervals, study
from rlhf_jax.studies.closed_form import arms as arms_lib


@pytest.fixture
def arms(tables):
  """(penalty, by) → (share, predicted)."""
  rows = tables["arms"]["rows"]
  return {(row[1], row[2]): (row[4], row[7]) for row in rows}


def test_both_estimators_end_at_the_optimum(arms):
  """With a quarter of the full size's samples."""
  assert arms["sequence_reverse", "sampled"][0] > 0.99
  assert arms["sequence_reverse", "rao-bl."][0] > 0.97


def test_the_exact_gradient_of_both_leads_there(arms):
  for by in ("sampled", "rao-bl."):
    assert arms["sequence_reverse", by][1] > 0.9999


def test_wrong_penalties_end_where_the_oracle_says(arms):
  for key in (("token_forward", "rao-bl."), ("k3_in_reward", "sampled")):
    share, predicted = arms[key]
    assert abs(share - predicted) < 0.03
    assert share < 0.95


def test_the_sampled_penalty_is_noiseless_at_the_optimum(tables):
  """R − β log π*/π_ref is the same for all responses: β log Z."""
  for _, start, _, end, end_exact in tables["noise"]["rows"]:
    assert end < 1e-20 < 1e-3 < end_exact
    assert start > 1


RIGHT = arms_lib.Arm(
  "RLOO", "sequence_reverse", "sampled", 0.5, 0.999, 0.995, 1.003, 1.0, 0.0, 1.0
)
WRONG = RIGHT._replace(
  penalty="token_forward", reached=0.93, low=0.92, high=0.94, predicted=0.925
)


@pytest.mark.parametrize(
  ("low", "holds"), [(0.99, True), (0.989, False), (math.nan, False)]
)
def test_a_right_arm_is_at_the_optimum_with_all_of_its_interval(low, holds):
  assert RIGHT._replace(low=low).as_claimed == holds


@pytest.mark.parametrize(
  ("low", "high", "predicted", "holds"),
  [
    (0.92, 0.94, 0.925, True),
    (0.904, 0.94, 0.925, False),  # Each end is to be as predicted,
    (0.92, 0.946, 0.925, False),
    (0.98, 0.995, 0.98, False),  # and short of the optimum.
    (-5.77, -5.75, -5.76, True),
    (math.nan, math.nan, 0.925, False),
    (0.92, 0.94, None, False),
  ],
)
def test_a_wrong_arm_ends_where_it_is_predicted(low, high, predicted, holds):
  arm = WRONG._replace(low=low, high=high, predicted=predicted)
  assert arm.as_claimed == holds


def test_the_verdict_follows_the_arms():
  other = RIGHT._replace(algorithm="DPO", estimator="pairs", beta=1.0)
  missed = RIGHT._replace(low=0.98)
  reversed_effect = WRONG._replace(reached=0.999, low=0.995, high=1.003)
  verdict = lambda *arms: closed_form.verdict([*arms])
  assert verdict(RIGHT, WRONG, other) == study.HOLDS
  assert verdict(missed, WRONG, other) == study.holds_when(
    "the β of the sequence's KL is 1"
  )
  kept = WRONG._replace(penalty="k3_in_loss")
  assert verdict(RIGHT, reversed_effect, kept) == study.holds_when(
    "the other penalty is k3_in_loss"
  )
  assert verdict(missed, WRONG, other._replace(low=0.5)) == study.DOES_NOT_HOLD
  assert verdict(RIGHT, reversed_effect, other) == study.DOES_NOT_HOLD


def test_the_first_sentence_follows_the_arms():
  missed = RIGHT._replace(algorithm="PPO", reached=0.985, low=0.97, high=1.0)
  noise = [arms_lib.Noise(1.0, 2.0, 3.0, 1e-32, 1.2)]
  plateaus = [arms_lib.Plateaus(b, e, 0.4) for b, e in ((0.1, 0.5), (1.0, 0.9))]
  other = WRONG._replace(
    penalty="k1_in_loss", beta=1.0, reached=-0.62, low=-0.63, high=-0.61,
    predicted=-0.60,
  )  # fmt: skip
  arms = [RIGHT, missed, WRONG._replace(beta=1.0), other]
  found = closed_form._paragraph(arms, [], noise, plateaus)
  assert found.startswith(
    "With the sequence's reverse KL 1 of 2 arms reach 99% of J* − J(π_ref) with"
    " all of their interval, the least being PPO, sampled, at β = 0.5 with"
    " 98.50% (97.00% to 100.00%); RLOO with other penalties at β = 1 ends"
    " between -62.00% (-63.00% to -61.00%) with k1_in_loss and 93.00% (92.00%"
    " to 94.00%) with token_forward, intervals going up to 3.0% from where the"
    " expected gradient leads (k1_in_loss)."
  )
  assert "At β = 0.1 the exact gradient itself reaches 99% on 50% of" in found


def test_an_interval_is_of_the_seeds(tables):
  assert len(tables["runs"]["rows"]) == 2 * len(tables["arms"]["rows"])
  runs = {}
  for *arm, _, share in tables["runs"]["rows"]:
    runs.setdefault(tuple(arm), []).append(share)
  for row in tables["arms"]["rows"]:
    assert row[4:7] == pytest.approx(intervals.of_mean(runs[tuple(row[:4])]))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("betas=()", "config.betas: (); wanted different numbers, each finite"),
    ("betas=0.5,0.5", "config.betas: (0.5, 0.5); wanted different numbers"),
    ("betas=0.0,", "config.betas: (0.0,); wanted different numbers, each fin"),
    ("algorithms='DPO',", "config.algorithms: ('DPO',); wanted different ones"),
    ("seeds=1", "config.seeds: 1; wanted at least 2"),
    ("batch_size=127", "config.batch_size: 127; wanted even"),
    ("minibatches=3", "config.minibatches: 3; wanted a divisor of half of"),
    ("group_size=1", "config.group_size: 1; wanted at least 2, and a divisor"),
    ("group_size=7", "config.group_size: 7; wanted at least 2, and a divisor"),
    ("evaluations=7", "config.evaluations: 7; wanted a divisor of steps=200"),
    ("last=11", "config.last: 11; wanted 1 to evaluations=10"),
    (
      "wrong='sequence_reverse',",
      "config.wrong: ('sequence_reverse',); wanted",
    ),
    ("learning_rate=nan", "config.learning_rate: nan; wanted finite and"),
    ("b2=1.0", "config.b2: 1.0; wanted in [0, 1)"),
    ("gamma=1.5", "config.gamma: 1.5; wanted 0 to 1"),
  ],
)
def test_nonsense_is_refused_by_field(refusal, change, message):
  assert refusal(change).startswith(message)
