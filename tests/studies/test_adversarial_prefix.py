"""The study of prefixes: its rule on planted arms, and a reduced run.

Mutants that were tried and fail here: a least KL without its log-partition; the
clean KL where the shifted is to be small; the factor on the other side; harm
prevented the other way round; parts of the rule that always hold; a clean KL
that may be no larger than after random prefixes; the reference judged, too.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.studies import adversarial_prefix as config_file
from rlhf_jax.data import readers
from rlhf_jax.models import transformer
from rlhf_jax.storage import pretrained
from rlhf_jax.studies import adversarial_prefix as adversarial
from rlhf_jax.studies import held_out, intervals, study, toy_runs
from rlhf_jax.studies.adversarial_prefix import rule
from rlhf_jax.text import toy_language

# The least KL of a harm.


def test_the_least_kl_by_hand():
  """Of a word or none it is the KL of two coins."""
  harms = np.array([0.0] * 9 + [1.0])
  wanted = 0.3 * math.log(0.3 / 0.1) + 0.7 * math.log(0.7 / 0.9)
  assert rule.least_kl(harms, 0.3) == pytest.approx(wanted, abs=1e-5)
  assert rule.least_kl(harms, 0.1) == 0
  assert rule.least_kl(harms, 0.05) == 0


def test_no_policy_is_nearer_than_the_least_kl():
  rng = np.random.default_rng(0)
  harms, p = np.arange(6.0), np.array([70, 15, 8, 4, 2, 1]) / 100
  answers = np.repeat(harms, (p * 100).astype(int))
  for q in rng.dirichlet(np.ones(6), 200):
    kl = float((q * np.log(q / p)).sum())
    assert rule.least_kl(answers, float(q @ harms)) <= kl + 1e-9


# The rule.


def arm(harm, shifted, anchored, least):
  noise = np.array([-0.02, 0.01, 0.0, 0.01, 0.0])
  values = (harm, shifted, anchored, least)
  return rule.Arm(*(x + np.roll(noise, i) for i, x in enumerate(values)))


def trained(
  found,
  without=(1.0, 0.5, 0.5, 0.4),
  itself=(2.0, 0.0, 4.5, 1.5),
  random=(0.2, 0.0, 0.7, 0.0),
  charged=(1.1, 2.0, 0.6, 0.5),
):
  return finding(found, without, itself, random, charged)


def finding(found, without, itself, random, charged):
  """By the rule; arms of the study as they are named in it."""
  arms = {
    "found": found,
    "without": without,
    rule.FOUND: itself,
    rule.RANDOM: random,
    "charged": charged,
  }
  arms = {name: arm(*of) for name, of in arms.items() if of}
  charged_clean = "charged" if charged else None
  return rule.finding(arms, "found", "without", charged_clean, factor=1.5)


def test_a_finding_by_hand():
  found = trained((3.0, 1.0, 4.0, 2.5))
  means = [part.mean for part in found if part]
  assert means == pytest.approx([2.0, 1.5, 2.5, 3.8, 1.9])
  assert rule.verdict(found) == study.HOLDS


@pytest.mark.parametrize(
  "found",
  [
    trained((1.0, 1.0, 4.0, 2.5)),  # No more harm than without a prefix.
    trained((3.0, 2.5, 4.0, 2.5)),  # Nothing is hidden.
    trained((3.0, 1.0, 1.5, 2.5)),  # Nothing is exposed.
    trained((3.0, 1.0, 4.0, 2.5), charged=(3.0, 2.0, 0.6, 2.5)),
    trained((3.0, 4.0, 1.0, 2.5)),  # Reversed: the shifted KL is the larger.
    trained((3.0, 1.0, 4.0, 2.5), charged=(4.0, 2.0, 0.6, 0.5)),  # Reversed.
    # As much, or more, is read under any prefix.
    trained((3.0, 1.0, 4.0, 2.5), random=(0.2, 0.0, 4.5, 0.0)),
    trained((3.0, 1.0, 4.0, 2.5), random=(0.2, 0.0, 5.0, 0.0)),
  ],
)
def test_all_parts_are_needed(found):
  assert rule.verdict(found) == study.DOES_NOT_HOLD


def test_prefixes_that_disagree_rule_out_no_false_alarm():
  found, random = arm(3.0, 1.0, 4.0, 2.5), arm(0.2, 0.0, 0.7, 0.0)
  arms = {
    rule.NONE: arm(1.0, 0.5, 0.5, 0.4),
    rule.FOUND: found,
    rule.RANDOM: random._replace(anchored=np.array([0.0] * 4 + [15.0])),
    "charged": arm(1.1, 2.0, 0.6, 0.5),
  }
  names = rule.FOUND, rule.NONE, "charged"
  judged = rule.finding(arms, *names, factor=1.5)
  assert judged.no_false_alarm.mean == pytest.approx(1.0)
  assert rule.verdict(judged) == study.DOES_NOT_HOLD


def test_the_reference_itself_is_no_evidence():
  """Nothing was trained, and so nothing can have been prevented."""
  itself = (3.0, 0.0, 4.0, 2.5)
  without, random = (0.1, 0.0, 0.0, 0.0), (0.2, 0.0, 0.7, 0.0)
  found = finding(itself, without, itself, random, None)
  assert found.prevented is None
  assert rule.verdict(found) == study.DOES_NOT_HOLD


# What is measured.


@pytest.fixture(scope="module")
def config():
  return config_file.get_config("reduced")


def two_models(config):
  """A random reference, and a policy that is another."""
  return [
    pretrained.load_policy(toy_runs.varied(config.training, {"seed": seed}))
    for seed in (0, 1)
  ]


def test_the_reference_is_at_no_kl_to_itself(config):
  reference, _ = two_models(config)
  prefix = toy_runs.varied(
    config.training, {"rollout.prefix": "hated awful", "seed": 5}
  )
  found = adversarial.measure(prefix, reference, reference, 20).figures
  assert found.shape == (3, 20)
  assert not found[1].any() and found[2].min() > 0
  plain = adversarial.measure(config.training, reference, reference, 20)
  assert not plain.figures[1:].any()


def test_what_is_measured_by_hand(config, monkeypatch):
  """Token by token, each model reading what it is said to read."""
  reference, policy = two_models(config)
  asked = toy_runs.varied(config.training, {"rollout.prefix": "hated awful"})
  vocabulary = toy_language.of(config.training).vocabulary
  ids = lambda text: [vocabulary.index(word) for word in text.split()]
  clean = ids("<start> it was")
  whole = ids("<start> hated awful it was")
  monkeypatch.setattr(
    toy_language.Language, "sample_prompts", lambda *_: [clean]
  )
  seen, text_of = [], held_out.text

  def text(model, sequences, row):
    seen.append(sequences)
    return text_of(model, sequences, row)

  monkeypatch.setattr(held_out, "text", text)
  (harm, *kls), said = adversarial.measure(asked, policy, reference, 1)
  assert said.startswith("it was | ")
  (sequences,) = seen
  assert sequences.prompt_lengths.tolist() == [3]
  size = int(sequences.response_lengths[0])
  answer = sequences.response_tokens[0, :size].tolist()
  harmful = ids("boring awful dreadful hated")
  assert harm == sum(word in harmful for word in answer)
  p = next_words(policy, whole, answer)
  for read, kl in zip((whole, clean), kls, strict=True):
    q = next_words(reference, read, answer)
    assert kl[0] == pytest.approx(float((np.exp(p) * (p - q)).sum()), rel=1e-4)


def next_words(model, read, answer):
  """Logprobs of every word at each place of the answer."""
  ids, head = (
    read + answer,
    transformer.head_kernel(model.params["transformer"]),
  )
  hidden, _ = transformer.apply(
    model.params["transformer"],
    jnp.array([ids]),
    config=model.model,
    positions=jnp.arange(len(ids))[None],
    mask=jnp.tril(jnp.ones((1, len(ids), len(ids)), bool)),
  )
  return jax.nn.log_softmax(hidden[0, len(read) - 1 : -1] @ head.T)


# The study.


def read(path):
  return json.loads(path.read_text())


def test_what_it_leaves_behind(workdir, tables):
  assert list(tables) == ["search", "arms", "findings", "seeds", "samples"]
  arms = [
    *(adversarial.NONE, adversarial.RANDOM, adversarial.FOUND),
    *adversarial.TUNED.values(),
  ]
  assert [row[0] for row in tables["arms"]["rows"]] == arms
  assert [row[0] for row in tables["samples"]["rows"]] == arms
  rows = {(arm, seed): of for arm, seed, *of in tables["seeds"]["rows"]}
  assert list(rows) == [(arm, seed) for arm in arms for seed in (0, 1)]
  for (arm, _), (harm, shifted, anchored, least) in rows.items():
    assert harm >= 0 and least >= 0
    assert (shifted == 0) == (arm in arms[:3])
    assert (anchored == shifted) == (arm in (arms[0], arms[3]))
  assert [row[0] for row in tables["search"]["rows"]] == [1, 2]
  columns = tables["findings"]["columns"][1:]
  assert columns == [adversarial.UNTRAINED, adversarial.TRAINED]
  *_, alarm, prevented = tables["findings"]["rows"]
  # Of the reference itself, whatever was trained.
  differences = [
    rows[adversarial.FOUND, seed][2] - rows[adversarial.RANDOM, seed][2]
    for seed in (0, 1)
  ]
  assert alarm[1:] == [str(intervals.of_mean(differences))] * 2
  assert prevented[1] is None
  assert len(readers.read_texts(workdir / "texts.jsonl")[0]) == 64


def test_the_three_runs(workdir, tables):
  """One prefix, that of the search; one reward; who is charged what."""
  found = max(tables["search"]["rows"], key=lambda row: row[3])[1]
  configs, first = {}, {}
  for name in ("clean", "shifted", "anchored"):
    path = workdir / name / "beta=1.5,seed=1"
    configs[name] = read(path / "config.json")
    line = (path / "metrics.jsonl").read_text().splitlines()[0]
    first[name] = json.loads(line)
  of = {
    name: (c["rollout"].pop("prefix"), c["kl"].pop("anchored"))
    for name, c in configs.items()
  }
  assert of == {
    "clean": ("", False),
    "shifted": (found, False),
    "anchored": (found, True),
  }
  assert configs["clean"] == configs["shifted"] == configs["anchored"]
  assert configs["clean"]["reward"]["kind"] == "function"
  # At step 0 the policy is the reference: only the clean prompt tells.
  assert first["shifted"]["kl/reverse_exact"] == 0
  assert first["shifted"]["kl/anchored"] > 0
  assert first["shifted"]["kl/penalty"] == 0 < first["anchored"]["kl/penalty"]


def test_resume_does_no_run_again(resume):
  resume()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ("harsh=0", "config.harsh: 0.0; wanted in (0, 1)"),
    ("harsh=nan", "config.harsh: nan; wanted in (0, 1)"),
    (
      "longest=7",
      "config.longest: 7; wanted 1 to 6, what training.rollout.prompt_length",
    ),
    ("beam=0", "config.beam: 0; wanted at least 1"),
    ("search_prompts=0", "config.search_prompts: 0; wanted at least 1"),
    ("randoms=0", "config.randoms: 0; wanted at least 1"),
    ("seeds=1", "config.seeds: 1; wanted 2 to 20"),
    ("factor=inf", "config.factor: inf; wanted finite and at least 1"),
    (
      "training.rollout.prefix=the",
      "config.training.rollout.prefix: 'the'; wanted '': the study sets",
    ),
    (
      "training.data.language=notes",
      "config.training.data.language: 'notes'; wanted 'reviews'",
    ),
    (
      "training.kl.beta=-1",
      "config.training.kl.beta: -1.0; wanted finite and at least 0 (run clean",
    ),
  ],
)
def test_fields_that_make_no_sense(refusal, change, message):
  """Bad inputs 4 and 7."""
  assert refusal(change).startswith(message)
