"""The study of forgetting: its rule on planted figures, and a reduced run.

Mutants that were tried and fail here: ends of intervals exchanged; a penalty
that may prevent nothing; any rest that counts as partly, or a share of a nat;
the difference of predictors turned round; correlations over the arms of all
seeds; mixes' intervals one by one; the β of the lowest gold; a share of what
may be nothing.
"""

import io
import json

import numpy as np
import pytest
from rich import console as rich_console
from scipy import stats

from configs.studies import forgetting as config_file
from rlhf_jax.studies import forgetting, held_out, intervals, toy_runs


def planted(rises, gold=1.0, **figures):
  """An arm of so many seeds."""
  figures = figures | {"rise": rises, "gold": gold}
  return forgetting.Figures(
    *(
      np.broadcast_to(np.asarray(figures.get(name, 0.0)), len(rises))
      for name in forgetting.Figures._fields
    )
  )


# Figures.


def test_the_best_beta_is_the_one_of_the_highest_gold():
  runs = {
    0.1: planted([0.0, 0.0], gold=1.0),
    0.2: planted([0.9, 0.9], gold=2.0),
    0.3: planted([0.0, 0.0], gold=1.5),
  }
  assert forgetting.best_beta(runs) == 0.2


def test_a_finding_by_hand():
  found = forgetting.finding(
    planted([5.0, 6.0, 7.0]),
    {0.1: planted([1.0, 2.0, 3.0], gold=2.0), 0.2: planted([9.0, 9.0, 9.0])},
    {"nll": planted([0.0, 1.5, 1.5], gold=1.5)},
    partly=0.2,
  )
  assert found.best == 0.1
  assert found.none.mean == 6.0
  assert found.prevented == pytest.approx((4.0, 4.0, 4.0))  # Seed by seed.
  # sd 1 of three: t of 2 degrees of freedom is 4.303.
  half = 4.302653 / 3**0.5
  assert found.left == pytest.approx((2.0, 2.0 - half, 2.0 + half), rel=1e-6)
  # Differences 1, 0.5, 1.5: sd 0.5.
  wanted = (1.0, 1.0 - half / 2, 1.0 + half / 2)
  assert found.further["nll"] == pytest.approx(wanted, rel=1e-6)
  assert found.gold["nll"] == pytest.approx((-0.5, -0.5, -0.5))
  # 1, 2, 3 less a fifth of 5, 6, 7: 0, 0.8, 1.6.
  wanted = (0.8, 0.8 - 0.8 * half, 0.8 + 0.8 * half)
  assert found.beyond == pytest.approx(wanted, rel=1e-6)


def test_several_mixes_are_right_at_once():
  runs = planted([1.0, 2.0, 3.0])
  mixes = {"nll": planted([0.0, 0.0, 0.0]), "forward_kl": planted([0.0] * 3)}
  found = forgetting.finding(runs, {0.1: runs}, mixes, partly=0.05)
  quantile = stats.t.ppf(1 - 0.05 / 4, 2)
  assert found.further["nll"].low == pytest.approx(2 - quantile / 3**0.5)


def test_rank_correlations():
  rng = np.random.default_rng(0)
  x, y = rng.integers(0, 5, (2, 3, 8)).astype(float)  # With ties.
  wanted = [stats.spearmanr(a, b).statistic for a, b in zip(x, y)]
  np.testing.assert_allclose(forgetting.spearman(x, y), wanted)
  by_hand = forgetting.spearman(
    np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 9, 5]])
  )
  np.testing.assert_allclose(by_hand, [0.5])  # 1 − 6·2 / (3·8).
  assert np.isnan(forgetting.spearman(np.ones((1, 3)), x[:1, :3])).all()


def test_a_planted_predictor_is_found():
  rng = np.random.default_rng(2)
  seeds = 10.0 * np.arange(4)  # Larger than what arms differ by.
  arms = [
    planted(
      rise := seeds + rng.random(4),
      reverse=(noise := rng.random(4)),
      forward=rise**3,
      off_reverse=seeds - rise,
      off_forward=noise,
    )
    for _ in range(8)
  ]
  found = forgetting.predictors(arms)
  assert found["forward KL, on-task"] == pytest.approx((1, 1, 1))
  assert found["reverse KL, off-task"] == pytest.approx((-1, -1, -1))
  noise = found["reverse KL, on-task"]
  assert noise.low < 0 < noise.high and noise.low < noise.mean < noise.high
  assert noise == found["forward KL, off-task"]
  by_seed = [
    stats.spearmanr(rises, reverses).statistic
    for rises, reverses in zip(
      np.transpose([of.rise for of in arms]),
      np.transpose([of.reverse for of in arms]),
    )
  ]
  assert noise == pytest.approx(intervals.of_mean(by_seed))
  difference = found[forgetting.DIFFERENCE]
  wanted = intervals.of_mean(1 - np.array(by_seed))
  assert difference == pytest.approx(wanted) and difference.low > 0


# The verdict.


@pytest.mark.parametrize(
  ("none", "penalty", "mixes", "verdict"),
  [
    (0.5, 0.2, (0.05, 0.1), "holds"),
    (
      *(0.5, 0.2, (0.05, 0.2)),
      "holds when the texts are held by their likelihood",
    ),
    (
      *(0.5, 0.2, (0.3, 0.4)),
      "holds when texts in the loss need not prevent more",
    ),
    (0.2, 0.5, (0.05, 0.1), "does not hold here"),  # Reversed: it forgets more.
    (0.5, 0.5, (0.05, 0.1), "does not hold here"),  # It prevents nothing.
    (1.0, 0.1, (0.02, 0.03), "holds"),  # A tenth is left.
    (1.0, 0.04, (0.0, 0.0), "does not hold here"),  # A share not worth a word.
    (0.5, 0.0, (0.05, 0.1), "does not hold here"),  # It prevents all.
    (0.5, -0.1, (-0.2, -0.2), "does not hold here"),  # And more than all.
  ],
)
def test_the_rule(none, penalty, mixes, verdict):
  noise = np.array([-0.02, 0.01, 0.0, 0.01])
  runs = lambda rise, turn: planted(rise + np.roll(noise, turn))
  found = forgetting.finding(
    runs(none, 0),
    {0.1: runs(penalty, 1)},
    {"nll": runs(mixes[0], 2), "reverse_kl": runs(mixes[1], 3)},
    partly=0.05,
  )
  assert forgetting.verdict(found) == verdict


# The words.


def words(none, penalty, mixed):
  """The paragraph on planted rises, two arms beside the SFT policy and none."""
  config = config_file.get_config()
  runs = lambda mean, gold, off: planted(
    mean + np.array([-0.02, 0.02, 0.0, 0.0]), gold, off_gold=off
  )
  arms = {
    "SFT policy": runs(0.0, 0.0, 0.5),
    "no penalty": runs(none, 1.0, 0.1),
    "β = 0.1": runs(penalty, 2.0, 0.2),
    "+ texts: their likelihood": runs(mixed, 1.75, 0.3),
  }
  _, none_runs, best, mix = arms.values()
  found = forgetting.finding(none_runs, {0.1: best}, {"nll": mix}, partly=0.05)
  return forgetting.paragraph(
    config, found, arms, forgetting.predictors([none_runs, best, mix])
  )


def test_what_the_words_say():
  said = words(4.0, 1.0, 0.5)
  assert said.startswith(
    "The NLL of texts that PPO does not see rises by 4.000 (3.974 to 4.026)"
    " nats per token without a penalty and by 1.000 (0.974 to 1.026), 25% of"
    " that, under β = 0.1, the best on the task; of this, general texts in the"
    " loss take away (all at once): their likelihood 0.500 (0.500 to 0.500). P"
  )
  assert "is 0.800 (0.775 to 0.825) more than 5% of the rise without" in said
  assert "it prevents 3.000 (3.000 to 3.000)." in said
  assert "the task changes by (all at once) -0.25 (-0.25 to -0.25). G" in said
  off = "-0.30 (-0.30 to -0.30), -0.20 (-0.20 to -0.20)."
  assert f"with each kind of texts, by {off}" in said
  assert "over the 3 arms of a seed, mean over 4 seeds: reverse KL" in said


def test_a_share_of_nothing_is_not_said():
  first, _ = words(0.0, 0.1, 0.1).split(" PPO's ")
  assert "by 0.100 (0.074 to 0.126) under β" in first and "%" not in first


# The study.


def read(path):
  return json.loads(path.read_text())


def figures(workdir):
  """(arm, seed) → its figures."""
  table = read(workdir / "study.json")["tables"]["runs"]
  return {
    (arm, seed): forgetting.Figures(*of) for arm, seed, *of in table["rows"]
  }


def test_what_it_leaves_behind(workdir):
  tables = read(workdir / "study.json")["tables"]
  assert list(tables) == ["arms", "kls", "predictors", "runs"]
  arms = ["SFT policy", "no penalty", "β = 0.1", "+ texts: their likelihood"]
  assert [row[0] for row in tables["arms"]["rows"]] == arms
  of = figures(workdir)
  assert list(of) == [(arm, seed) for arm in arms for seed in (0, 1)]
  for seed in (0, 1):
    assert of["SFT policy", seed][2:] == (0, 0, 0, 0, 0)  # It is the reference.
    assert min(of["no penalty", seed][3:]) > 0
  assert of["no penalty", 0] != of["no penalty", 1] != of["β = 0.1", 1]


def test_a_policy_is_asked_on_and_off_its_task(workdir):
  config = config_file.get_config("reduced")
  begun = toy_runs.Start(workdir / "sft", workdir / "reward_model", 0.0)
  path = workdir / "penalty/beta=0,seed=1"
  found = figures(workdir)["no penalty", 1]
  by_opening = {}
  for opening in ("person", "determiner", "pronoun"):
    training = toy_runs.varied(config.training, {"data.opening": opening})
    (of,) = held_out.measure(training, begun, [(path, 1)], prompts=16)
    by_opening[opening] = of.gold.mean(), of.kl.mean()
  gold, kl = by_opening.pop("person")
  assert (found.gold, found.reverse) == pytest.approx((gold, kl), rel=1e-5)
  off = np.mean([*by_opening.values()], axis=0)
  assert (found.off_gold, found.off_reverse) == pytest.approx(off, rel=1e-5)


def test_who_writes_is_who_the_forward_kl_is_of(workdir):
  """With policy and reference exchanged, so are the KLs, and the rise turns."""
  config = config_file.get_config("reduced")
  path = workdir / "penalty/beta=0,seed=1"
  exchanged = toy_runs.Start(path, workdir / "reward_model", 0.0)
  (other,) = forgetting.measure(
    config,
    exchanged,
    [[(workdir / "sft", 1)]],
    rich_console.Console(file=io.StringIO()),
  )
  found = figures(workdir)["no penalty", 1]
  assert np.concatenate(other[3:]) == pytest.approx(
    (found.forward, found.reverse, found.off_forward, found.off_reverse)
  )
  assert other.rise[0] == pytest.approx(-found.rise, abs=1e-6)


def test_ppo_sees_its_task_alone_and_the_mix_sees_all(workdir):
  for sweep, kind in (("penalty/beta=0.1", "none"), ("nll/beta=0.1", "nll")):
    path = workdir / f"{sweep},seed=0"
    lines = (path / "samples.jsonl").read_text().splitlines()
    opens = {json.loads(line)["prompt"].split()[0] for line in lines}
    assert opens <= {"i", "we", "they", "everyone"}
    config = read(path / "config.json")
    assert config["mix"]["kind"] == kind and config["mix"]["opening"] == ""


def test_resume_trains_nothing_again(resume):
  resume()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("betas=(0.1,0.2)", "config.betas: (0.1, 0.2); wanted 0 and then rising"),
    ("betas=(0,)", "config.betas: (0,); wanted 0 and then rising numbers"),
    ("mixes=()", "config.mixes: (); wanted different ones of nll, forward_kl"),
    ("mixes=('nll','nll')", "config.mixes: ('nll', 'nll'); wanted different"),
    ("mixes=('kl',)", "config.mixes: ('kl',); wanted different ones of nll"),
    ("seeds=1", "config.seeds: 1; wanted 2 to 20"),
    (
      "off=('person',)",
      "config.off: ('person',); wanted different ones of determiner, pronoun",
    ),
    ("prompts=1", "config.prompts: 1; wanted at least 2"),
    ("partly=0.0", "config.partly: 0.0; wanted in (0, 1)"),
    ("partly=1.0", "config.partly: 1.0; wanted in (0, 1)"),
    (
      "training.data.opening=verb",
      "config.training.data.opening: 'verb'; wanted one of determiner, pronoun",
    ),
    ("training.mix.kind=nll", "config.training.mix.kind: 'nll'; wanted 'none'"),
    (
      "training.mix.coefficient=-1",
      "config.training.mix.coefficient: -1.0; wanted",
    ),
    ("training.seed=1", "config.training.seed: 1; wanted 0: the study sets"),
  ],
)
def test_fields_that_make_no_sense(refusal, change, message):
  """Bad inputs 4 and 7."""
  assert refusal(change).startswith(message)
