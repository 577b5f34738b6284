"""The study of references: its rule on planted runs, and a reduced run.

Mutants that were tried and fail here: slopes that are not divided by the golds'
squares; the slope's change taken on by once the last steps; first steps in
place of those before the last; a loosening judged by its interval's other end;
ranks, or where the slope leads, left out of the rule; a NaN that counts; shares
for percentage points; a fifth β that the figure leaves out.
"""

import json
import math
import pathlib

import numpy as np
import pytest

from configs.studies import reference_ceiling as config_file
from rlhf_jax.studies import intervals, reference_ceiling, study, toy_runs

GOLDS = (-10.0, -6.0, -3.0, -1.0, 0.0)
REFERENCES = [
  reference_ceiling.Reference(steps, 4.0 - i / 2, gold)
  for i, (steps, gold) in enumerate(zip((10, 16, 25, 40, 300), GOLDS))
]
LAST = 5


def planted(shares, *, before=None, seeds=3, noise=0.02):
  """Runs that end, under each β, with a share of the references' differences.

  Ten steps end and ten before have another share, where it is given.
  """
  rng = np.random.default_rng(0)
  own = np.array(GOLDS)[:, None, None]
  gold = []
  for beta, share in shares.items():
    first = share if before is None else before[beta]
    line = np.repeat([first, share], LAST)
    runs = 1.0 + line * own
    gold.append(runs + rng.normal(0, noise, (len(GOLDS), seeds, 2 * LAST)))
  return tuple(shares), np.array(gold)


def judge(betas, gold):
  """The slopes, the loosening, the verdict."""
  slopes, loosening = reference_ceiling.of_betas(
    betas, REFERENCES, gold, last=LAST
  )
  return slopes, loosening, reference_ceiling.verdict(slopes, loosening)


# The figures.


def test_an_arm_by_hand():
  # Ends of 2 steps: 3 and 5; before: 1 and 1. Differences 2 and 4.
  gold = np.array([[9.0, 1, 1, 2, 4], [9.0, 0, 2, 5, 5]])
  arm = reference_ceiling.of_arm(
    REFERENCES[1], 0.2, reference_ceiling.Curves(gold, 2 * gold, -gold), last=2
  )
  assert arm[:2] == (16, 0.2)
  # Two values: sd √2, error 1, and t of one degree of freedom is 12.706.
  assert arm.gold == pytest.approx((4, 4 - 12.7062, 4 + 12.7062))
  assert arm.gain == 10.0  # From −6.
  assert arm.late == pytest.approx((3, 3 - 12.7062, 3 + 12.7062))
  assert arm.kl == 8.0 and arm.score == -4.0


def test_slopes_by_hand():
  # Golds −1, 0, 4 less their mean 1: −2, −1, 3; squares 14.
  ends = np.array([[[0.0, 7.0], [1.0, 7.0], [5.0, 7.0]]])
  np.testing.assert_allclose(
    reference_ceiling.slopes_by_seed(np.array([-1, 0, 4]), ends),
    [[(-1 + 15) / 14, 0]],
  )


def test_a_slope_and_where_it_leads():
  (slope,), _, _ = judge(*planted({0.2: 0.3}, before={0.2: 0.4}, noise=0.0))
  assert slope.spearman == pytest.approx(1)
  assert (slope.slope.mean, slope.late) == pytest.approx((0.3, -0.1))
  # Ten steps more are twice the last five.
  assert slope.projected == pytest.approx(0.3 - 2 * 0.1)


def test_members_go_to_their_beta_and_seed():

  def rows(gold):
    row = {"reward/gold": gold, "kl/reverse_exact": 2 * gold}
    return [row | {"reward/score": -gold}] * 2

  sweeps = [
    [
      toy_runs.Member(b, seed, pathlib.Path("x"), rows(more + 10 * b + seed))
      for b in (0.1, 1.0, 2.0)
      for seed in (0, 1)
    ]
    for more in (0, 100)
  ]
  curves = reference_ceiling.of_sweeps(sweeps)
  assert curves.gold.shape == (3, 2, 2, 2)
  np.testing.assert_allclose(curves.gold[0, 0], [[1, 1], [2, 2]])
  np.testing.assert_allclose(curves.gold[0, 1], [[101, 101], [102, 102]])
  np.testing.assert_allclose(curves.kl[1, 0], [[20, 20], [22, 22]])
  np.testing.assert_allclose(curves.score[1, 0], [[-10] * 2, [-11] * 2])


# The verdict.


@pytest.mark.parametrize(
  ("shares", "before", "verdict"),
  [
    ({0.05: 0.2, 0.2: 0.5, 1.0: 0.9}, None, "holds"),
    # All arrive at the same under the smallest.
    ({0.05: 0.0, 0.2: 0.5, 1.0: 0.9}, None, "holds when β is 0.2 or 1"),
    # Reversed: the better the reference, the less gold at the end.
    ({0.05: -0.2, 0.2: -0.5, 1.0: -0.9}, None, "does not hold here"),
    # A gap that the penalty has no part in.
    ({0.05: 0.5, 0.2: 0.5, 1.0: 0.5}, None, "does not hold here"),
    ({0.05: 0.9, 0.2: 0.5, 1.0: 0.2}, None, "does not hold here"),
    # Closing so fast that it is a matter of steps.
    (
      {0.05: 0.2, 0.2: 0.5, 1.0: 0.9},
      {0.05: 0.4, 0.2: 0.5, 1.0: 0.9},
      "holds when β is 0.2 or 1",
    ),
  ],
)
def test_the_rule(shares, before, verdict):
  assert judge(*planted(shares, before=before))[2] == verdict


def test_ranks_count_too():
  """One bad reference makes a slope; the others must be in order as well."""
  betas, gold = planted({0.05: 0.2, 1.0: 0.9})
  gold[1, 1:] = -0.1 * np.arange(4)[:, None, None]
  slopes, loosening, verdict = judge(betas, gold)
  assert slopes[1].slope.low > 0 and loosening.low > 0
  assert verdict == "holds when β is 0.05"


def test_nan_is_no_evidence():
  slopes, loosening, _ = judge(*planted({0.05: 0.2, 1.0: 0.9}))
  bad = intervals.Interval(math.nan, math.nan, math.nan)
  assert reference_ceiling.verdict(slopes, bad) == study.DOES_NOT_HOLD
  nans = [s._replace(slope=bad) for s in slopes]
  assert reference_ceiling.verdict(nans, loosening) == study.DOES_NOT_HOLD


# The words, and the figure.


def arms_of(betas, gold):
  return [
    reference_ceiling.of_arm(
      reference, beta, reference_ceiling.Curves(runs, 0 * runs, runs), last=LAST
    )
    for beta, by_reference in zip(betas, gold)
    for reference, runs in zip(REFERENCES, by_reference)
  ]


def test_what_the_words_say():
  betas, gold = planted({0.05: 0.2, 1.0: 0.9}, noise=0.0)
  gold[0, 2, :, LAST:] += [[0.1], [0.2], [0.3]]
  slopes, loosening, _ = judge(betas, gold)
  config = config_file.get_config()
  said = reference_ceiling.paragraph(
    config, REFERENCES, arms_of(betas, gold), slopes, loosening
  )
  # The middle one is 1 above the mean gold, −4, and ends 0.2 higher: that is
  # 0.2 / 66 of a share, 66 being the squares.
  assert said.startswith(
    "Of a difference in gold between references 60 steps of PPO leave 20% (20%"
    " to 21%) under β = 0.05, 90% (90% to 90%) under β = 1: +70 percentage"
    " points (+69 to +70) from the smallest β to the largest. The"
  )
  # 1 + 0.2 · −10 and 1; 1 + 0.9 · −10 and 1.
  assert (
    "fewest (10) and of most (300) steps of SFT, of 5, have gold of -10.00 and"
    " 0.00; from these PPO ends at β = 0.05: -1.00 and 1.00; β = 1: -8.00 and"
    " 1.00." in said
  )
  late = intervals.of_mean([0.1, 0.2, 0.3])
  assert (
    "Of the 10 arms' golds the one of 25 steps of SFT under β = 0.05 rose most"
    f" in these steps: +0.20 ({late.low:+.2f} to {late.high:+.2f})." in said
  )


def test_no_beta_is_left_out_of_the_figure():
  betas, gold = planted({0.01: 0.1, 0.05: 0.2, 0.2: 0.5, 1.0: 0.9, 5.0: 1.0})
  arms = arms_of(betas, gold)
  figure = reference_ceiling.draw(betas, REFERENCES, arms, gold)
  left, right = figure.axes
  _, names = left.get_legend_handles_labels()
  assert names == ["no gain", *(f"β = {b:g}" for b in (0.01, 0.05, 0.2, 1, 5))]
  colours = {tuple(line.get_color()) for line in right.get_lines()}
  assert len(right.get_lines()) == 2 * len(colours) == 10


# The study.


def read(path):
  return json.loads(path.read_text())


def test_what_it_leaves_behind(workdir, tables):
  assert [row[0] for row in tables["references"]["rows"]] == [1, 4]
  for row in tables["references"]["rows"]:
    name = "sft" if row[0] == 4 else "sft-1"
    metrics = read(workdir / name / "summary.json")["metrics"]
    assert row[1:] == [metrics["sft/heldout_loss"], metrics["reward/gold"]]
  arms = {(row[0], row[1]): row for row in tables["arms"]["rows"]}
  assert set(arms) == {(1, 0.05), (4, 0.05), (1, 1.0), (4, 1.0)}
  ends = []
  for seed in (0, 1):
    path = workdir / f"from-1/beta=0.05,seed={seed}/metrics.jsonl"
    golds = [json.loads(line) for line in path.read_text().splitlines()]
    ends.append(np.mean([row["reward/gold"] for row in golds[-2:]]))
  assert arms[1, 0.05][2] == pytest.approx(np.mean(ends))
  assert [row[0] for row in tables["slopes"]["rows"]] == [0.05, 1.0]


def test_each_sweep_has_its_reference_and_one_reward_model(workdir):
  configs = {n: read(workdir / f"from-{n}/config.json") for n in (1, 4)}
  paths = {n: config["policy"].pop("path") for n, config in configs.items()}
  assert paths == {1: str(workdir / "sft-1"), 4: str(workdir / "sft")}
  assert configs[1] == configs[4]
  assert configs[1]["reward"]["path"] == str(workdir / "reward_model")
  reward = read(workdir / "reward_model/config.json")
  assert reward["policy"]["path"] == str(workdir / "sft")
  assert read(workdir / "sft-1/config.json")["train"]["steps"] == 1


def test_resume_trains_nothing_again(resume):
  resume()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("shorter_sft=()", "config.shorter_sft: (); wanted rising numbers of"),
    ("shorter_sft=(0,1)", "config.shorter_sft: (0, 1); wanted rising numb"),
    ("shorter_sft=(1,4)", "config.shorter_sft: (1, 4); wanted rising numb"),
    ("shorter_sft=(2,1)", "config.shorter_sft: (2, 1); wanted rising numb"),
    ("betas=(0.1,)", "config.betas: (0.1,); wanted 2 or more rising number"),
    ("betas=(0.0,0.1)", "config.betas: (0.0, 0.1); wanted 2 or more risin"),
    ("seeds=1", "config.seeds: 1; wanted 2 to 20"),
    ("last=3", "config.last: 3; wanted 1 to half of training.train.steps, 2"),
    ("training.reward.path=x", "config.training.reward.path: 'x'; wanted ''"),
    (
      "training.kl.controller=trust",
      "config.training.kl.controller: 'trust'; wanted 'fixed': the study sets",
    ),
  ],
)
def test_fields_that_make_no_sense(refusal, change, message):
  """Bad inputs 4, 5 and 7."""
  assert refusal(change).startswith(message)
