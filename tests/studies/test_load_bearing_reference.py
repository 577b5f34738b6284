"""The study of what a reference does: its rule, DPO's members, a reduced run.

Mutants that were tried and fail here: nearer, in place of more gold; the mean
in place of the interval's end; the difference the other way round; a verdict on
all comparisons; one reference for all members of DPO.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.studies import load_bearing_reference as config_file
from rlhf_jax.objective import preference_loss
from rlhf_jax.settings import static
from rlhf_jax.steps import dpo
from rlhf_jax.storage import pretrained
from rlhf_jax.storage import workdir as workdir_lib
from rlhf_jax.studies import collection, study, toy_runs
from rlhf_jax.studies import load_bearing_reference as study_lib

SFT, BASE, NONE = study_lib.SFT, study_lib.BASE, study_lib.NONE
DPO, PPO = study_lib.DPO, study_lib.PPO
SEEDS = np.array([-0.03, 0.01, 0.0, 0.02])


def arm(gold, kl):
  """Four seeds."""
  draw = np.random.default_rng(int(100 * kl))
  noise = lambda: SEEDS + 0.01 * draw.normal(size=4)
  zero = np.zeros(4)
  return study_lib.Arm(gold + noise(), kl + noise(), zero, zero)


def compare(first, second):
  arms = {(PPO, SFT): first, (PPO, NONE): second}
  return study_lib.compare(arms, PPO, NONE)


# The verdict.


@pytest.mark.parametrize(
  ("first", "second", "better"),
  [
    ((1.0, 4.0), (-2.0, 50.0), True),  # More gold, and nearer.
    ((1.0, 9.0), (0.5, 4.0), True),  # More gold.
    ((1.0, 4.0), (1.0, 9.0), False),  # As much gold, nearer.
    ((0.5, 4.0), (1.0, 9.0), False),  # Nearer, with less gold.
    ((1.0, 4.01), (1.0, 4.0), False),  # Nothing to tell them apart.
    ((-2.0, 50.0), (1.0, 4.0), False),  # The reverse.
  ],
)
def test_when_sft_is_better(first, second, better):
  assert compare(arm(*first), arm(*second)).sft_is_better == better


def test_a_wide_interval_is_no_evidence():
  """More gold in the mean, and nearer, but not in every seed."""
  zero = np.zeros(4)
  first = study_lib.Arm(np.array([3.0, -1.0, 2.5, 0.0]), zero, zero, zero)
  row = compare(first, arm(0.0, 20.0))
  assert row.gold.mean > 1 and row.gold.low < 0 and row.kl.high < -19
  assert not row.sft_is_better


def test_pairs_by_hand():
  first = study_lib.Arm(
    np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 6.0]), *2 * [np.zeros(3)]
  )
  second = study_lib.Arm(
    np.array([1.0, 1.0, 1.0]), np.array([1.0, 1.0, 4.0]), *2 * [np.zeros(3)]
  )
  row = compare(first, second)
  half = 4.302653 / 3**0.5  # Student's t of 2 degrees of freedom
  assert row.gold.mean == pytest.approx(3)  # Of 1, 3, 5: deviation 2.
  assert row.gold.low == pytest.approx(3 - 2 * half)
  assert row.kl.mean == pytest.approx(1)  # Of 0, 1, 2: deviation 1.
  assert row.kl.high == pytest.approx(1 + half)


def compared(arms):
  return [
    study_lib.compare(arms, method, other)
    for method in (DPO, PPO)
    for other in (BASE, NONE)
  ]


def verdict(arms):
  return study_lib.verdict(compared(arms))


def planted(sft, other):
  return {
    (method, reference): arm(*(sft if reference == SFT else other))
    for method in (DPO, PPO)
    for reference in (SFT, BASE, NONE)
  }


def test_the_rule():
  held, astray = (1.0, 4.0), (-2.0, 50.0)
  assert verdict(planted(held, astray)) == study.HOLDS
  better = arm(1.5, 3.0)
  some = planted(held, astray) | {(DPO, NONE): better}
  assert verdict(some) == "holds when the comparison is PPO, SFT against base"
  some = planted(held, astray) | {(PPO, BASE): better}
  assert verdict(some) == "holds when the comparison is DPO, SFT against none"
  # The claim says nothing of these.
  others = {(DPO, BASE): better, (PPO, NONE): better}
  assert verdict(planted(held, astray) | others) == study.HOLDS


def test_a_planted_reversal():
  assert verdict(planted((-2.0, 50.0), (1.0, 4.0))) == study.DOES_NOT_HOLD


def test_the_paragraph_begins_with_what_is_judged():
  exact = lambda *gold: study_lib.Arm(np.array(gold), *3 * [np.zeros(2)])
  arms = {
    ("start", SFT): exact(0.0, 0.0),
    ("start", BASE): exact(0.0, 0.0),
    (DPO, SFT): exact(2.0, 1.0),
    (DPO, BASE): exact(0.0, 0.0),
    (DPO, NONE): exact(0.5, -0.5),
    (PPO, SFT): exact(1.0, 3.0),
    (PPO, BASE): exact(2.0, 4.0),
    (PPO, NONE): exact(0.0, 0.0),
  }
  config = config_file.get_config("reduced")
  paragraph = study_lib._paragraph(config, arms, compared(arms))
  assert collection._first(paragraph) == (
    "Over 2 seeds the gold of DPO with its reference less that without is +1.50"
    " (+1.50 to +1.50), and the gold of PPO with SFT as its reference less that"
    " with the base is -1.00 (-1.00 to -1.00)."
  )


# The config.


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      "base_steps=4",
      "config.base_steps: 4; wanted 1 to below training.pipeline.sft.train.s",
    ),
    ("base_steps=0", "config.base_steps: 0; wanted 1 to below"),
    ("seeds=1", "config.seeds: 1; wanted 2 to 20"),
    ("prompts=1", "config.prompts: 1; wanted at least 2"),
    ("dpo_steps=0", "config.dpo_steps: 0; wanted at least 1"),
    ("dpo_learning_rate=0.", "config.dpo_learning_rate: 0.0; wanted above 0"),
    ("training.kl.beta=0.", "config.training.kl.beta: 0.0; wanted above 0"),
    (
      "training.reference.path=x",
      "config.training.reference.path: 'x'; wanted '': the study sets it",
    ),
    (
      "training.kl.controller=dual",
      "config.training.kl.controller: 'dual'; wanted 'fixed': the study sets",
    ),
  ],
)
def test_fields_that_make_no_sense(refusal, change, message):
  """Bad inputs 4, 5 and 7."""
  assert refusal(change).startswith(message)


# The study.


def test_what_it_leaves_behind(tables):
  names = [
    ("start", SFT),
    ("start", BASE),
    *((method, r) for method in (DPO, PPO) for r in (SFT, BASE, NONE)),
  ]
  arms = {tuple(row[:2]): row[2:] for row in tables["arms"]["rows"]}
  assert sorted(arms) == sorted(names)
  assert arms["start", SFT][3:6] == [0.0, 0.0, 0.0]  # KL to itself.
  assert arms["start", BASE][3] > 0
  assert len(tables["seeds"]["rows"]) == 2 * len(names)
  assert [row[:2] for row in tables["comparisons"]["rows"]] == [
    [method, other] for method in (DPO, PPO) for other in (BASE, NONE)
  ]


def test_what_ppo_is_held_to(workdir):
  """Its own metrics: 0 nats to itself at first, and more to the base."""
  held, none, base = (
    workdir_lib.read_metrics(workdir / f"ppo-{name},seed=10")[0]
    for name in ("SFT/beta=0.1", "SFT/beta=0", "base/beta=0.1")
  )
  assert held["kl/reverse_exact"] == none["kl/reverse_exact"] == 0.0
  assert base["kl/reverse_exact"] > 0
  assert (held["kl/beta"], none["kl/beta"]) == (pytest.approx(0.1), 0)
  assert base["kl/beta"] == pytest.approx(0.1)
  # The same responses, to the same prompts.
  for other in (base, none):
    assert other["reward/score"] == pytest.approx(
      held["reward/score"], rel=1e-5
    )


def test_dpo_members_are_those_that_one_would_train_alone(workdir):
  """Two steps by hand, with what the definition subtracts."""
  begun = toy_runs.Start(
    workdir.absolute() / "sft", workdir.absolute() / "reward_model", 0.0
  )
  config = study_lib._dpo(config_file.get_config("reduced"), begun)
  config = toy_runs.varied(config, {"seed": 1})
  policy = pretrained.load_policy(config)
  base = pretrained.load(str(workdir / "base"), config)
  asked = dpo.DPOConfig(
    policy.model, "dpo", logits_per_chunk=static.logits_per_chunk(config)
  )
  references = {SFT: policy, BASE: base, NONE: None}
  rows = study_lib._rows(config, policy, references, [1], asked)
  pairs = rows[SFT, 1].pairs
  for name, reference in references.items():
    held = rows[name, 1].reference
    assert held is not None
    assert rows[name, 1].pairs is pairs
    wanted = (jnp.zeros(len(held[0])),) * 2
    if reference is not None:
      wanted = dpo.pair_logprobs(reference.params, pairs, asked)
    np.testing.assert_allclose(held, wanted, rtol=1e-5, atol=1e-5)
  own = dpo.pair_logprobs(policy.params, pairs, asked)
  state = jnp.float32(config.kl.beta)
  figures = dpo.pair_figures(policy.params, rows[NONE, 1], state, asked)
  plain = preference_loss.dpo_loss(*own, beta=config.kl.beta)
  np.testing.assert_allclose(figures["dpo/loss"], plain, rtol=1e-5)
  figures = dpo.pair_figures(policy.params, rows[SFT, 1], state, asked)
  np.testing.assert_allclose(figures["dpo/loss"], np.log(2), rtol=1e-5)


def test_dpo_members_differ(workdir):
  """In their reference, and in their seed."""
  trees = {}
  for reference in (SFT, BASE, NONE):
    for seed in (10, 11):
      path = workdir / f"dpo/reference={reference},seed={seed}"
      found = pretrained.load_workdir(path).params
      flat = [np.ravel(x) for x in jax.tree.leaves(found)]
      trees[reference, seed] = np.concatenate(flat)
      summary = json.loads((path / "summary.json").read_text())
      assert (summary["reference"], summary["seed"]) == (reference, seed)
  every = list(trees.values())
  for i, one in enumerate(every):
    assert all(np.abs(one - other).max() > 1e-6 for other in every[:i])


def test_resuming_trains_nothing_again(resume, monkeypatch):
  monkeypatch.setattr(study_lib, "_train", None)
  resume()
