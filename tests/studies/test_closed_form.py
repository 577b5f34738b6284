"""The study `closed_form`, reduced: who ends at π*, and who as predicted."""

import json

from ml_collections import ConfigDict
import pytest

from configs.studies import closed_form as configs
from rlhf_jax import errors
from rlhf_jax.studies import closed_form, study
from rlhf_jax.studies.closed_form import arms as arms_lib


@pytest.fixture(scope="module")
def record(tmp_path_factory):
  """What the command leaves: study.json."""
  workdir = tmp_path_factory.mktemp("closed_form") / "run"
  config = configs.reduced()
  study.run(config, str(workdir), resume=False)
  assert (workdir / "figure.png").stat().st_size > 10_000
  return json.loads((workdir / "study.json").read_text())


@pytest.fixture(scope="module")
def arms(record):
  """(penalty, by) → (share, predicted)."""
  rows = record["tables"]["arms"]["rows"]
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


def test_the_sampled_penalty_is_noiseless_at_the_optimum(record):
  """R − β log π*/π_ref is the same for all responses: β log Z."""
  for _, start, _, end, end_exact in record["tables"]["noise"]["rows"]:
    assert end < 1e-20 < 1e-3 < end_exact
    assert start > 1


def planted(**changes):
  right = arms_lib.Arm(
    "RLOO", "sequence_reverse", "sampled", 0.5, 0.999, 0.995, 1.0, 1.0, 0.0, 1.0
  )
  wrong = right._replace(
    penalty="token_forward",
    reached=0.93,
    lowest=0.92,
    highest=0.94,
    predicted=0.925,
  )
  return [right._replace(**changes), wrong, right._replace(beta=1.0)]


def test_the_verdict_follows_the_arms():
  assert closed_form.verdict(planted()) == study.HOLDS
  missed = planted(lowest=0.98)
  assert closed_form.verdict(missed) == study.holds_when("β is 1")
  missed[2] = missed[2]._replace(lowest=0.5)
  assert closed_form.verdict(missed) == study.DOES_NOT_HOLD
  reversed_effect = planted()
  reversed_effect[1] = reversed_effect[1]._replace(highest=1.0, reached=0.999)
  assert closed_form.verdict(reversed_effect) == study.DOES_NOT_HOLD


@pytest.mark.parametrize(
  "field, value",
  [
    ("betas", ()),
    ("betas", (0.5, 0.5)),
    ("betas", (0.0,)),
    ("group_size", 1),
    ("group_size", 7),
    ("evaluations", 7),
    ("wrong", ("sequence_reverse",)),
    ("learning_rate", float("nan")),
  ],
)
def test_nonsense_is_refused_by_field(field, value):
  config: ConfigDict = configs.reduced()
  config[field] = value
  with pytest.raises(errors.UserError, match=f"config.{field}"):
    closed_form.check(config)
