"""The study of noise over length: language, figures, rule, a reduced run."""

import itertools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from configs.studies import kl_noise as config_file
from rlhf_jax.studies import intervals, kl_noise, rao_blackwell, study, toy_runs
from rlhf_jax.text import toy_language

LENGTHS = (16, 64, 256)


# The task.


def test_the_reward_by_hand():
  words = toy_language.VOCABULARY.index
  tokens = jnp.array([[words("hated"), words("lovely"), words("dull")] * 2])
  mask = jnp.array([[False, True, True, True, True, False]])
  # lovely, dull, hated, lovely: 2 − 1 − 2 + 2, over √4.
  assert float(kl_noise.sentiment(tokens, mask)[0]) == pytest.approx(0.5)


def test_scores_have_one_deviation_at_every_length():
  """What makes β = tilt / √R ask the same of all of them."""
  words = toy_language.VOCABULARY.index
  texts = kl_noise.endless_texts(3, 400, 300)
  ids = jnp.array([[words(w) for w in [*p, *r]] for p, r in texts])
  deviations = [
    float(kl_noise.sentiment(ids[:, :n], jnp.ones((400, n), bool)).std())
    for n in (50, 300)
  ]
  assert deviations[1] == pytest.approx(deviations[0], rel=0.12)


def test_texts_are_grammatical_and_do_not_end():
  grammar = toy_language.LANGUAGES["reviews"]
  words = grammar.vocabulary.index
  texts = kl_noise.endless_texts(0, 50, 40)
  assert texts == kl_noise.endless_texts(0, 50, 40)
  assert texts != kl_noise.endless_texts(1, 50, 40)
  assert {len(prompt) for prompt, _ in texts} == {1, 2, 3, 4, 5}
  for prompt, response in texts:
    ids = [toy_language.START_ID, *map(words, prompt + response)]
    assert len(ids) == 41 and toy_language.STOP_ID not in ids
    assert all(grammar.chain[a, b] > 0 for a, b in itertools.pairwise(ids))


# The estimates.


def planted_estimates(rng, *, power=0.5, left=0.3, count=1000):
  """k1's deviation is length^power; the exact one's is `left` of it."""
  normal = lambda: rng.normal(size=(count, len(LENGTHS)))
  sd = np.array(LENGTHS) ** power
  kl = 0.05 * np.array(LENGTHS)
  return {
    "k1": kl + sd * normal(),
    "k3": kl + 2 * sd * normal(),
    "exact": kl + left * sd * normal(),
  }


def noise_of(estimates):
  rng = np.random.default_rng(1)
  return kl_noise.noise_of(LENGTHS, estimates, rng, resamples=400)


def test_deviations_by_hand():
  nats = np.array([[1.0, 2.0, 4.0], [5.0, 10.0, 20.0]] * 10)
  noise = noise_of({"k1": nats, "k3": 3 * nats, "exact": nats / 4})
  # 3 ± 2, 20 of them; it doubles where the length is four times as long.
  sd = 2 * (20 / 19) ** 0.5
  means = [interval.mean for interval in noise.deviations["k1"]]
  assert means == pytest.approx([sd, 2 * sd, 4 * sd])
  assert noise.exponents["k3"].mean == pytest.approx(0.5)
  assert noise.kl == pytest.approx([0.75, 1.5, 3.0])
  assert noise.left.mean == pytest.approx(0.25)


def test_intervals_hold_what_was_planted():
  """In most of many draws: 95 % of them, were the bootstrap perfect."""
  seen = []
  for seed in range(40):
    noise = noise_of(planted_estimates(np.random.default_rng(seed), count=300))
    sd = noise.deviations["k1"][1]
    seen.append(
      [
        sd.low <= 8 <= sd.high,
        noise.exponents["k1"].low <= 0.5 <= noise.exponents["k1"].high,
        noise.left.low <= 0.3 <= noise.left.high,
      ]
    )
  assert (np.mean(seen, axis=0) >= 0.85).all()


# Learning, and the verdict.


def config_of(steps=40):
  config = config_file.get_config()
  config.training.train.steps = steps
  config.window, config.last = 2, 4
  return config


def runs(golds, last=4):
  """Runs with these objectives, a row a seed."""
  golds = np.array(golds)
  ones = np.ones(len(golds))
  return rao_blackwell.Runs(golds, golds[:, -last:].mean(axis=1), ones, ones)


def pace(late_sampled, late_rao_bl, *, length=256):
  """Runs that learn from 0 to 1, so many steps later than they might."""
  rng = np.random.default_rng(2)
  curves = lambda late: (
    1
    - np.exp(-np.maximum(np.arange(40) - late, 0) / 6)
    + rng.normal(0, 0.01, (4, 40))
  )
  both = [runs(curves(late)) for late in (late_sampled, late_rao_bl)]
  return kl_noise.pace_of(config_of(), length, both)


def test_a_pace_by_hand():
  sampled = runs([[0.0, 1.0, 2.0], [0.0, 3.0, 3.0]], last=1)
  rao_bl = runs([[3.0, 3.0, 3.0], [4.0, 4.0, 4.0]], last=1)
  found = kl_noise.pace_of(config_of(), 256, [sampled, rao_bl])
  assert found.beta == pytest.approx(2 / 16)
  # Means 1 and 2, then 3 and 4; at the end 2 and 3, then 3 and 4.
  assert found.learning.row()[1:] == pytest.approx((1.5, 3.5, 2.0, 2.0, 2.0))
  assert found.end.row()[1:] == pytest.approx((2.5, 3.5, 1.0, 1.0, 1.0))


def test_the_objective_stands_for_gold():
  rows = [
    {
      "reward/total": float(i),
      "reward/score": 9.0,
      "kl/reverse_exact": 2.0,
      "time/step_s": 1.0,
    }
    for i in range(5)
  ]
  member = toy_runs.Member(0.1, 0, pathlib.Path("x"), rows)
  found = kl_noise.of_runs([member], last=2)
  np.testing.assert_array_equal(found.golds, [[0, 1, 2, 3, 4]])
  assert (found.gold, found.kl) == (3.5, 2.0)


@pytest.mark.parametrize(
  ("estimates", "late", "verdict"),
  [
    ({}, (12, 0), "holds"),
    ({}, (0, 0), "holds when it is about the estimates"),
    ({}, (0, 12), "holds when it is about the estimates"),
    ({"left": 0.8}, (12, 0), "holds when it is about learning"),
    ({"power": -0.5}, (12, 0), "holds when it is about learning"),
    # All reversed: noise falls with length, Rao-Blackwellising adds to it and
    # learns later.
    ({"power": -0.5, "left": 3.0}, (0, 12), "does not hold here"),
  ],
)
def test_the_rule_on_planted_effects(estimates, late, verdict):
  noise = noise_of(planted_estimates(np.random.default_rng(0), **estimates))
  paces = [pace(12, 0, length=16), pace(*late)]
  assert kl_noise.verdict(noise, paces, left=0.5) == verdict


def test_an_interval_that_touches_is_not_enough():
  noise = noise_of(planted_estimates(np.random.default_rng(0)))
  growth = {"k1": intervals.Interval(0.5, -0.01, 1.0)}
  left = intervals.Interval(0.3, 0.1, 0.51)
  for other in (noise._replace(exponents=growth), noise._replace(left=left)):
    assert kl_noise.verdict(other, [pace(0, 0)], left=0.5) == (
      study.DOES_NOT_HOLD
    )


def test_only_the_longest_trained_length_is_judged():
  noise = noise_of(planted_estimates(np.random.default_rng(0)))
  clear, none = pace(12, 0, length=16), pace(0, 0)
  assert kl_noise.verdict(noise, [none, clear], left=0.5) == study.HOLDS
  assert kl_noise.verdict(noise, [clear, none], left=0.5) == (
    "holds when it is about the estimates"
  )


def test_the_first_sentence_has_all_parts():
  config = config_of()
  config.lengths = LENGTHS
  noise = kl_noise.Noise(
    kl=[0.5, 2.0, 8.0],
    deviations={
      name: [intervals.Interval(sd * x, sd * x, sd * x) for x in (1, 2, 4)]
      for name, sd in (("k1", 1.0), ("k3", 2.0), ("exact", 0.25))
    },
    exponents={
      name: intervals.Interval(0.5, 0.4, 0.6) for name in ("k1", "k3", "exact")
    },
    left=intervals.Interval(0.25, 0.2, 0.3),
  )
  # Pairs differ by 1 and 3: 2 ± 12.706 of an error of 1.
  short, long = (
    kl_noise.pace_of(config, length, [runs([[0.5]] * 2), runs([[a], [b]])])
    for length, a, b in ((16, 0.5, 0.5), (128, 1.5, 3.5))
  )
  found = kl_noise._paragraph(config, noise, [short, long])
  assert found.startswith(
    "From 16 to 256 tokens k1's deviation goes as the length to the power of"
    " 0.50 (0.40 to 0.60), the exact estimate's is 0.25 (0.20 to 0.30) of it at"
    " 256, and with 128 tokens Rao-Blackwellising changes score − β · KL in the"
    " mean of all iterations by +2.000 (-10.706 to +14.706) from 0.500. Over"
  )
  assert "4.00 (4.00 to 4.00) at 256, 2.0 and 0.5 times the KL;" in found


# The study.


def read(path):
  return json.loads(path.read_text())


def test_what_it_leaves_behind(workdir):
  record = read(workdir / "study.json")
  tables = record["tables"]
  assert [row[0] for row in tables["deviations"]["rows"]] == [4, 8, 16]
  assert [row[0] for row in tables["exponents"]["rows"]] == [
    "k1",
    "k3",
    "exact",
  ]
  assert [row[:2] for row in tables["learning"]["rows"]] == [
    [length, figure]
    for length in (4, 8)
    for figure in (
      "score − β · KL, mean of all iterations",
      "score − β · KL at the end",
      "KL at the end, nats per response",
    )
  ]
  for length, estimator, seed, objective, _ in tables["runs"]["rows"]:
    (path,) = workdir.glob(f"{estimator}-{length}/*seed={seed}/metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    totals = [row["reward/total"] for row in rows]
    assert objective == pytest.approx(np.mean(totals[-2:]))
    # Nothing stops: every response is as long as it may be.
    assert {row["rollout/response_tokens"] for row in rows} == {length}
    # Step 0 is the SFT policy's; both estimators see the same.
    assert rows[0]["reward/total"] == pytest.approx(rows[0]["reward/score"])


def test_arms_are_alike_but_for_estimator_length_and_beta(workdir):
  names = "sampled-8", "rao_blackwellised-8", "sampled-4"
  configs = [read(workdir / name / "config.json") for name in names]
  seen = []
  for config in configs:
    kl, rollout = config["kl"], config["rollout"]
    length = rollout.pop("response_length")
    seen.append((kl.pop("estimator"), length, kl.pop("beta")))
  assert configs[0] == configs[1] == configs[2]
  assert seen == [
    ("sampled", 8, pytest.approx(2 / 8**0.5)),
    ("rao_blackwellised", 8, pytest.approx(2 / 8**0.5)),
    ("sampled", 4, pytest.approx(1.0)),
  ]


def test_resume_trains_nothing_again(resume):
  resume()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("lengths=(8,4)", "config.lengths: (8, 4); wanted at least two rising"),
    ("lengths=(8,)", "config.lengths: (8,); wanted at least two rising"),
    ("trained=(0,4)", "config.trained: (0, 4); wanted at least two rising"),
    (
      "trained=(4,32)",
      "config.trained: (4, 32); wanted none above the longest",
    ),
    ("responses=7", "config.responses: 7; wanted at least 8"),
    ("left=1.0", "config.left: 1.0; wanted in (0, 1)"),
    ("left=nan", "config.left: nan; wanted in (0, 1)"),
    ("tilt=0.0", "config.tilt: 0.0; wanted finite and above 0"),
    ("seeds=1", "config.seeds: 1; wanted 2 to 20"),
    ("window=5", "config.window: 5; wanted 1 to training.train.steps=4"),
    (
      "training.kl.beta=0.1",
      "config.training.kl.beta: 0.1; wanted 0.05: the study sets it itself",
    ),
    (
      "training.kl.controller=adaptive",
      "config.training.kl.controller: 'adaptive'; wanted 'fixed': the study",
    ),
    (
      "lengths=(4,513)",
      "config.training.rollout.response_length: 513; wanted at most the",
    ),
  ],
)
def test_fields_that_make_no_sense(refusal, change, message):
  """Bad inputs 4, 5, 7 and 9."""
  assert refusal(change).startswith(message)
