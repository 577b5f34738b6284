"""The list of planted faults stands on the code as it is.

That each is caught is for `python -m tests.mutants`, which takes minutes.
"""

import ast
import collections

import pytest

from tests import mutants

ROOMS = ("objective", "models", "steps", "text", "storage", "settings")
ROOMS += ("data", "measures", "stages")


def test_there_are_mutants_of_every_room():
  found = {mutant.file.split("/")[1] for mutant in mutants.MUTANTS}
  assert found == set(ROOMS)
  assert len(mutants.MUTANTS) >= 30


def test_every_mutant_has_a_name_and_an_edit_of_its_own():
  for values in (
    [mutant.name for mutant in mutants.MUTANTS],
    [(mutant.file, mutant.old, mutant.new) for mutant in mutants.MUTANTS],
  ):
    counts = collections.Counter(values)
    assert [value for value, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda m: m.name)
def test_it_can_be_planted(mutant):
  """Its old text is there once, and Python reads what takes its place."""
  assert mutants.fault_of(mutant) is None
  whole = (mutants.ROOT / mutant.file).read_text()
  planted = whole.replace(mutant.old, mutant.new)
  assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse(whole))
  file, _, name = mutant.test.partition("::")
  assert (mutants.ROOT / file).is_file()
  if name:
    tree = ast.parse((mutants.ROOT / file).read_text())
    assert name in {node.name for node in tree.body if hasattr(node, "name")}


@pytest.mark.parametrize(
  "old, found",
  [
    ("nobody wrote this", "stands 0 times"),
    ("jnp.", "times; wanted once"),
  ],
)
def test_an_edit_that_cannot_be_made_is_told(old, found):
  mutant = mutants.MUTANTS[0]._replace(
    file="rlhf_jax/objective/preference_loss.py", old=old
  )
  assert found in mutants.fault_of(mutant)
  gone = mutant._replace(file="rlhf_jax/nothing.py")
  assert "no such file" in mutants.fault_of(gone)
