"""The study of β's regimes: its rule on planted gains, and a reduced run.

Mutants that were tried and fail here: intervals of all runs of a band, or of
two independent means; a variance that neighbours share; hacking without a high
proxy; one reward model that is enough; usefulness by its mean; an error of β in
place of runs; the first steps in place of the last.
"""

import json

import numpy as np
import pytest

from configs.studies import beta_regimes as config_file
from rlhf_jax.studies import beta_regimes, held_out, intervals, study, toy_runs

BANDS = beta_regimes.bands_of(
  [
    (beta_regimes.HACKS, (0.0, 0.01)),
    (beta_regimes.STANDARD, (0.02, 0.1)),
    (beta_regimes.CONSERVATIVE, (0.2, 0.5)),
    (beta_regimes.BARELY, (2.0, 5.0)),
  ]
)
# What folklore says, β by β: the proxy falls, gold rises and falls.
PROXY = [2.0, 1.9, 1.5, 1.4, 0.9, 0.8, 0.2, 0.1]
GOLD = [-2.0, 0.2, 1.2, 1.1, 0.7, 0.5, 0.2, 0.1]
AS_SAID = [
  *(
    beta_regimes.HACKS,
    beta_regimes.HACKS,
    beta_regimes.STANDARD,
    beta_regimes.STANDARD,
  ),
  *(
    beta_regimes.CONSERVATIVE,
    beta_regimes.CONSERVATIVE,
    beta_regimes.BARELY,
    beta_regimes.BARELY,
  ),
]


def planted(proxy, gold, noise=0.02, seeds=3):
  """Gains around these, with as much noise in every run."""
  rng = np.random.default_rng(0)
  shape = len(gold), seeds
  around = lambda means: (
    np.array(means)[:, None] + noise * rng.normal(size=shape)
  )
  return beta_regimes.Runs(around(proxy), around(gold), np.ones(shape))


def words(runs):
  return beta_regimes.regimes(runs, most=0.8, little=0.2)


def interval(low, high):
  return intervals.Interval((low + high) / 2, low, high)


# The words.


def test_bands_have_names_and_places():
  names = [band.name for band in BANDS]
  assert names == ["0 to 0.01", "0.02 to 0.1", "0.2 to 0.5", "2 to 5"]
  assert [list(band.places) for band in BANDS] == [
    [0, 1],
    [2, 3],
    [4, 5],
    [6, 7],
  ]
  assert beta_regimes.bands_of([("x", (0.3,))])[0].name == "0.3"


def test_folklore_is_seen_where_it_is_so():
  assert words(planted(PROXY, GOLD)) == AS_SAID


def test_a_planted_reversal():
  """The same gains, β by β the other way round."""
  seen = words(planted(PROXY[::-1], GOLD[::-1]))
  assert seen == AS_SAID[::-1]
  agreed = beta_regimes.agreements([seen, seen], BANDS, interval(-2, -1))
  assert beta_regimes.verdict(agreed) == study.DOES_NOT_HOLD


def test_gold_that_follows_the_proxy_is_never_hacked():
  seen = words(planted(PROXY, PROXY))
  assert seen[:2] == [beta_regimes.STANDARD, beta_regimes.STANDARD]
  assert beta_regimes.HACKS not in seen


def test_noise_is_unclear():
  seen = words(planted(PROXY, GOLD, noise=5.0))
  assert set(seen) == {beta_regimes.UNCLEAR}


@pytest.mark.parametrize(
  ("moves", "enough", "above", "word"),
  [
    ((-2, -1), (1, 2), (1, 2), beta_regimes.BARELY),  # First of all.
    ((-1, 1), (0, 2), (1, 2), beta_regimes.STANDARD),
    ((-1, 1), (-2, -1), (1, 2), beta_regimes.HACKS),
    ((-1, 1), (-2, -1), (-2, -1), beta_regimes.CONSERVATIVE),
    ((-1, 1), (-2, -1), (-1, 1), beta_regimes.UNCLEAR),
    ((-1, 1), (-1, 1), (1, 2), beta_regimes.UNCLEAR),
    (
      (np.nan, np.nan),
      (np.nan, np.nan),
      (np.nan, np.nan),
      beta_regimes.UNCLEAR,
    ),
  ],
)
def test_the_word_of_intervals(moves, enough, above, word):
  assert beta_regimes._word(
    interval(*moves), interval(*enough), interval(*above)
  ) == (word)


def test_what_seeds_have_alike_cancels():
  """Prompts, and the SFT policy's figure: they move all β of a seed."""
  runs = planted(PROXY, GOLD, seeds=4)
  of_seeds = np.array([3.0, -2.0, 1.0, -4.0])
  moved = beta_regimes.Runs(
    runs.proxy + of_seeds, runs.gold + of_seeds, runs.kl
  )
  pair = [
    beta_regimes.more_gold(of, BANDS[2], BANDS[1]) for of in (runs, moved)
  ]
  np.testing.assert_allclose(*pair)


def test_more_beta_are_no_more_observations():
  """Where the β of a seed are alike, twenty of them say what one says."""
  of_seeds = np.array([[0.1, 0.2, 0.9, 1.0], [0.0, 0.0, 0.0, 0.0]])
  # The deviation of the differences is √(0.65 / 3), their mean's half of it; t
  # of three degrees of freedom is 3.182446.
  half = 3.182446 * (0.65 / 3) ** 0.5 / 2
  for count in (1, 20):
    gold = of_seeds.repeat(count, axis=0)
    first, second = beta_regimes.bands_of(
      [("", range(count)), ("", range(count))]
    )
    found = beta_regimes.more_gold(
      beta_regimes.Runs(gold, gold, gold), first, second
    )
    assert found == pytest.approx((0.55, 0.55 - half, 0.55 + half))


def test_a_collapse_at_one_beta_widens_no_other():
  """Without a penalty runs differ by far more than their neighbours."""
  runs = planted(PROXY, GOLD, seeds=4)
  runs.gold[0] += np.array([-9.0, 5.0, 7.0, -3.0])
  assert words(runs) == [beta_regimes.UNCLEAR, *AS_SAID[1:]]


# The verdict.


def verdict(first, second, useful):
  return beta_regimes.verdict(
    beta_regimes.agreements([first, second], BANDS, useful)
  )


def test_all_bands_hold():
  # Under the weakest reward model the conservative band is useful instead.
  weakest = AS_SAID[:4] + [beta_regimes.STANDARD] * 2 + AS_SAID[6:]
  assert verdict(weakest, AS_SAID, interval(0.1, 0.3)) == study.HOLDS


def test_a_band_must_be_right_under_all_reward_models():
  other = [beta_regimes.STANDARD, *AS_SAID[1:]]
  for pair in ((other, AS_SAID), (AS_SAID, other)):
    assert verdict(*pair, interval(0.1, 0.3)) == (
      "holds when β is 0.02 to 0.1 or 0.2 to 0.5 or 2 to 5"
    )


@pytest.mark.parametrize("useful", [(-0.1, 0.3), (-0.3, -0.1), (np.nan, 1)])
def test_the_conservative_band_must_be_useful(useful):
  assert verdict(AS_SAID, AS_SAID, interval(*useful)) == (
    "holds when β is 0 to 0.01 or 0.02 to 0.1 or 2 to 5"
  )


def test_unclear_is_no_agreement():
  unclear = [beta_regimes.UNCLEAR] * 8
  found = verdict(unclear, unclear, interval(-1, 1))
  assert found == study.DOES_NOT_HOLD


@pytest.mark.parametrize(
  ("seen", "agreement"),
  [
    ((beta_regimes.HACKS, beta_regimes.HACKS), beta_regimes.AGREES),
    ((beta_regimes.HACKS, beta_regimes.UNCLEAR), beta_regimes.UNCLEAR),
    ((beta_regimes.UNCLEAR, beta_regimes.UNCLEAR), beta_regimes.UNCLEAR),
    ((beta_regimes.HACKS, beta_regimes.STANDARD), beta_regimes.DIFFERS),
    ((beta_regimes.UNCLEAR, beta_regimes.STANDARD), beta_regimes.DIFFERS),
  ],
)
def test_agreement_of_a_band(seen, agreement):
  words = [*seen, *AS_SAID[2:]]
  found = beta_regimes.agreements([AS_SAID, words], BANDS, interval(1, 2))
  assert found["0 to 0.01"] == [beta_regimes.AGREES, agreement]


@pytest.mark.parametrize(
  ("useful", "agreement"),
  [
    ((0.1, 0.3), beta_regimes.AGREES),
    ((-0.1, 0.3), beta_regimes.UNCLEAR),
    ((-0.3, -0.1), beta_regimes.DIFFERS),
    ((np.nan, np.nan), beta_regimes.UNCLEAR),
  ],
)
def test_agreement_on_usefulness(useful, agreement):
  found = beta_regimes.agreements([AS_SAID, AS_SAID], BANDS, interval(*useful))
  assert found["0.2 to 0.5"] == [agreement, beta_regimes.AGREES]


def test_the_paragraph_follows_what_is_seen():
  config = config_file.get_config("reduced,training.train.steps=40")
  betas = (0.0, 0.01, 0.02, 0.1, 0.2, 0.5, 2.0, 5.0)

  def paragraph(*models):
    models = [
      beta_regimes.Model(pairs, 40, 0.5, 1.0, runs, words(runs))
      for pairs, runs in zip((128, 4096), models)
    ]
    useful = [
      beta_regimes.more_gold(m.runs, BANDS[2], BANDS[1]) for m in models
    ]
    agreed = beta_regimes.agreements(
      [m.words for m in models], BANDS, useful[0]
    )
    return beta_regimes.paragraph(config, betas, BANDS, models, agreed, useful)

  as_said, noise = planted(PROXY, GOLD), planted(PROXY, GOLD, noise=5.0)
  reverse = planted(PROXY[::-1], GOLD[::-1])
  found = paragraph(as_said, noise)
  assert found.startswith(
    "With how many of 2 reward models β is what the claim says after 40 steps:"
    " 0 to 0.01 (hacks) yes 1, unclear 1; 0.02 to 0.1 (standard) yes 1, unclear"
    " 1; 0.2 to 0.5 (conservative) no 1, unclear 1; 2 to 5 (barely moves) yes"
    " 1, unclear 1. Gold gained"
  )
  first = intervals.of_mean(as_said.gold[:2].mean(axis=0))
  assert f" 0 to 0.01: {first}, 3 of 6, hacks 2 (128 pairs); " in found
  assert "Gold of 0.2 to 0.5 less that of 0.02 to 0.1: -0.5" in found
  assert "0 to 0.01 (hacks) no 1, yes 1;" in paragraph(reverse, as_said)


# What metrics say.


def test_gains_by_hand():
  member = lambda beta, seed, gold: toy_runs.Member(
    beta,
    seed,
    None,
    [
      {"reward/gold": g, "reward/score": 2 * g, "kl/reverse_exact": 3 * g}
      for g in (9.0, gold, gold + 1)
    ],
  )
  start = [
    held_out.Responses(*(np.array([mean - 1, mean + 1]) for _ in range(5)))
    for mean in (1.0, 2.0)
  ]
  members = [
    member(beta, seed, 4 * beta + seed) for beta in (0, 1) for seed in (0, 1)
  ]
  runs = beta_regimes.runs_of(members, start, window=2)
  # Means of the last two: 0.5 and 1.5, then 4.5 and 5.5; less 1 and 2.
  np.testing.assert_allclose(runs.gold, [[-0.5, -0.5], [3.5, 3.5]])
  np.testing.assert_allclose(runs.proxy, [[0.0, 1.0], [8.0, 9.0]])
  np.testing.assert_allclose(runs.kl, [[1.5, 4.5], [13.5, 16.5]])


# The study.


def read(path):
  return json.loads(path.read_text())


def test_what_it_leaves_behind(workdir, tables):
  assert list(tables) == ["bands", "models", "betas", "runs"]
  bands = [row[:3] for row in tables["bands"]["rows"]]
  assert bands == [
    [name, word, pairs]
    for name, word in (
      ("0", "hacks"),
      ("0.05", "standard"),
      ("0.3", "conservative"),
      ("2.5", "barely moves"),
    )
    for pairs in (32, 64)
  ]
  assert len(tables["betas"]["rows"]) == 8
  runs = {tuple(row[:3]): row[3:] for row in tables["runs"]["rows"]}
  assert len(runs) == 16
  assert runs[32, "0", 10] != runs[64, "0", 10] != runs[64, "0", 11]
  path = workdir / "sweep-64/beta=0.3,seed=11/metrics.jsonl"
  lines = path.read_text().splitlines()
  kls = [json.loads(line)["kl/reverse_exact"] for line in lines]
  assert runs[64, "0.3", 11][2] == pytest.approx(np.mean(kls[-2:]))


def test_reward_models_differ_in_their_pairs_only(workdir):
  configs = [read(workdir / f"reward_model-{n}/config.json") for n in (32, 64)]
  fields = [
    (config["data"].pop("size"), config["train"].pop("steps"))
    for config in configs
  ]
  assert fields == [(32, 2), (64, 4)]
  assert configs[0] == configs[1]
  for pairs in (32, 64):
    sweep = read(workdir / f"sweep-{pairs}/config.json")
    assert sweep["reward"]["path"] == str(workdir / f"reward_model-{pairs}")
    assert sweep["policy"]["path"] == str(workdir / "sft")


def test_resume_trains_nothing_again(resume):
  resume()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("hacks=()", "config.hacks: (); wanted rising numbers"),
    ("hacks=(0.1,0)", "config.hacks: (0.1, 0); wanted rising numbers"),
    (
      "standard=(0,)",
      "config.standard: (0,); wanted rising numbers above the last of"
      " config.hacks=(0.0,)",
    ),
    ("conservative=()", "config.conservative: (); wanted rising numbers above"),
    ("hacks=(-1,)", "config.training.sweep.betas: (-1, 0.05, 0.3, 2.5); wante"),
    ("pairs=(64,)", "config.pairs: (64,); wanted 2 or more rising numbers"),
    ("pairs=(64,32)", "config.pairs: (64, 32); wanted 2 or more rising"),
    (
      "reward_steps=(4,)",
      "config.reward_steps: (4,); wanted as many numbers above 0 as"
      " config.pairs=(32, 64)",
    ),
    ("seeds=1", "config.seeds: 1; wanted 2 to 20"),
    ("window=9", "config.window: 9; wanted 1 to training.train.steps=4"),
    ("prompts=2", "config.prompts: 2; wanted at least 3"),
    ("most=1.0", "config.most: 1.0; wanted in (0, 1)"),
    ("little=nan", "config.little: nan; wanted in (0, 1)"),
    (
      "training.pipeline.reward_model.data.size=7",
      "config.training.pipeline.reward_model.data.size: 7; wanted",
    ),
    ("training.kl.beta=1", "config.training.kl.beta: 1.0; wanted 0.05: the"),
  ],
)
def test_fields_that_make_no_sense(refusal, change, message):
  """Bad inputs 3, 4, 5 and 7."""
  assert refusal(change).startswith(message)
