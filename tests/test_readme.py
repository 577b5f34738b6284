"""What the page and the configs say of the studies is what records say."""

import importlib
import pathlib
import re

import pytest

from rlhf_jax.studies import collection

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "studies.md").read_text()
RECORDS = ROOT / "docs" / "studies"
NAMES = sorted(path.stem for path in RECORDS.glob("*.json"))
TEN_MINUTES = 600.0  # What a study may take on two cores.


def record_of(name):
  (record,) = (
    r for r in collection.read_records(RECORDS) if r["study"] == name
  )
  return record


def test_every_study_has_a_record():
  configs = (ROOT / "configs" / "studies").glob("[!_]*.py")
  assert sorted(path.stem for path in configs) == NAMES


def test_the_table_is_made_from_the_records():
  """It is `table.md` of `launch.study --all`, whose records are committed."""
  assert collection.table(collection.read_records(RECORDS)) in PAGE


@pytest.mark.parametrize("name", NAMES)
def test_a_record(name):
  """Its claim is the config's, whose docstring has its verdict and its time."""
  record = record_of(name)
  config = importlib.import_module(f"configs.studies.{name}")
  full = config.get_config()
  for field in ("claim", "source", "seed"):
    assert record[field] == full[field]
  words = " ".join(config.__doc__.split())
  assert f"Verdict: {record['verdict']}." in words
  seconds = float(re.search(r"([\d,]+) s\b", words)[1].replace(",", ""))
  assert seconds == pytest.approx(record["wall_s"], abs=1)
  assert record["wall_s"] <= TEN_MINUTES
  assert (RECORDS / f"{name}.png").stat().st_size > 10_000
