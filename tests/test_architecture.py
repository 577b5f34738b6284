"""The house holds: who imports whom, what is banned, which traps are kept."""

import ast
import pathlib
import re
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CODE = ("rlhf_jax", "launch", "configs")
COMPILED = {"jax", "jaxtyping", "numpy", "optax"}

# The floors, ground first: rooms on one floor do not know each other, and a
# module imports only from its own room and from floors below. Room → the
# packages that it may import (None: any).
FLOORS = [
  {"rlhf_jax.types": {"jax", "jaxtyping"}, "rlhf_jax.errors": set()},
  {
    "rlhf_jax.objective": {"jax", "jaxtyping", "optax"},
    "rlhf_jax.models": None,
  },
  {"rlhf_jax.steps": COMPILED},
  {"rlhf_jax.text": None},
  {"rlhf_jax.storage": None},
  {"rlhf_jax.settings": None},
  {"rlhf_jax.data": None},
  {"rlhf_jax.measures": None},
  {"rlhf_jax.report": None},
  {"rlhf_jax.stages": None},
  {"rlhf_jax.studies": None},
]
# Room → the rooms that it may import, and the packages.
ROOMS = {
  room: (
    tuple(other for lower in FLOORS[:floor] for other in lower),
    packages,
  )
  for floor, rooms in enumerate(FLOORS)
  for room, packages in rooms.items()
} | {
  "launch": (("rlhf_jax", "configs"), None),
  "configs": ((), {"ml_collections"}),
}
MOST_FILES = 15  # In a room; `studies` has as many as there are claims.
MOST_LINES = 60  # Of a function, without its docstring and inner functions.
# Those that are longer still.
TOO_LONG = {
  "rlhf_jax.stages.dpo.run",
  "rlhf_jax.stages.evaluate.run",
  "rlhf_jax.stages.reward_model.run",
  "rlhf_jax.stages.sft.run",
  "rlhf_jax.studies.adversarial_prefix.run",
}
# Package → the one module that may import it.
OWNERS = {
  "flax": "rlhf_jax.models.transformer",
  "orbax": "rlhf_jax.storage.checkpoint",
}
BANNED = {"pickle", "cloudpickle", "dill", "allow_pickle", "PRNGKey", "pmap"}

# Rows of the table of traps, and those of which there is nothing to test yet:
# adapters.
TRAPS = set(range(1, 31))
NOT_BUILT = {14}


def modules():
  """Dotted name and source of every file of the package and its mains."""
  for folder in CODE:
    for path in sorted((ROOT / folder).rglob("*.py")):
      name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
      yield name.removesuffix(".__init__"), path.read_text()


def within(name, room):
  return name == room or name.startswith(room + ".")


def imports(source):
  """Full names: `from a import b` is a.b; relative ones begin with a dot."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      origin = "." * node.level + (node.module or "")
      yield from (f"{origin}.{alias.name}" for alias in node.names)


def import_faults(module, source):
  """What `module` imports and must not."""
  (room,) = [r for r in ROOMS if within(module, r)]
  rooms, packages = ROOMS[room]
  for name in imports(source):
    package = name.split(".")[0]
    if package in CODE:
      if not any(within(name, r) for r in (room, *rooms)):
        yield f"{module} imports {name}"
    elif package in OWNERS:
      if module != OWNERS[package]:
        yield f"{module} imports {name}"
    elif package not in sys.stdlib_module_names and not (
      packages is None or package in packages
    ):
      yield f"{module} imports {name}"


def banned_words(source):
  """Old ways and pickles, as names, attributes, imports or arguments."""
  words = {part for name in imports(source) for part in name.split(".")}
  for node in ast.walk(ast.parse(source)):
    for field in ("id", "attr", "arg"):
      words |= {value for name, value in ast.iter_fields(node) if name == field}
  return sorted(BANNED & words)


def functions(source):
  """Dotted name and lines of every function, each without what is in it."""

  def visit(node, name):
    """The functions that begin in `node`; returns the lines that they take."""
    inside = 0
    for child in ast.iter_child_nodes(node):
      if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
        lines = child.end_lineno - child.lineno + 1
        apart = yield from visit(child, f"{name}{child.name}.")
        if ast.get_docstring(child) is not None:
          apart += child.body[0].end_lineno - child.body[0].lineno + 1
        yield f"{name}{child.name}", lines - apart
        inside += lines
      else:
        is_class = isinstance(child, ast.ClassDef)
        inner = f"{name}{child.name}." if is_class else name
        inside += yield from visit(child, inner)
    return inside

  yield from visit(ast.parse(source), "")


def test_every_module_is_in_a_room():
  names = [name for name, _ in modules() if name != "rlhf_jax"]
  assert len(names) > 20
  for name in names:
    assert sum(within(name, room) for room in ROOMS) == 1, name


def test_no_room_is_a_drawer():
  for folder in sorted((ROOT / "rlhf_jax").rglob("*/")):
    files = list(folder.glob("*.py"))
    most = 40 if folder.name == "studies" else MOST_FILES
    assert len(files) <= most, folder


def test_functions_are_short():
  """And a function that has become short leaves the list."""
  long = {
    f"{module}.{name}"
    for module, source in modules()
    if within(module, "rlhf_jax")
    for name, lines in functions(source)
    if lines > MOST_LINES
  }
  assert long == TOO_LONG


def test_lines_are_counted():
  """Docstrings and inner functions apart; methods and branches are seen."""
  source = """
class A:
  def method(self):
    '''One.

    Two.
    '''
    x = 1

    def inner():
      '''Its own.'''
      if x:
        def innermost():
          return x
        return innermost
      return 3
    return inner

def plain(
  a,
): return a
"""
  assert dict(functions(source)) == {
    "A.method.inner.innermost": 2,
    "A.method.inner": 4,
    "A.method": 4,
    "plain": 3,
  }
  lines = "\n".join(["def f():", *["  x = 1"] * MOST_LINES])
  assert dict(functions(lines)) == {"f": MOST_LINES + 1}


def test_modules_import_from_floors_below():
  faults = [
    fault
    for name, source in modules()
    if name != "rlhf_jax"
    for fault in import_faults(name, source)
  ]
  assert not faults


@pytest.mark.parametrize(
  "module, source",
  [
    ("rlhf_jax.objective.kl", "from rlhf_jax.models import transformer"),
    ("rlhf_jax.models.lora", "import rlhf_jax.objective.kl as kl"),
    ("rlhf_jax.models.lora", "from flax import linen"),
    ("rlhf_jax.objective.kl", "def f():\n  from rlhf_jax import steps"),
    ("rlhf_jax.objective.kl", "import numpy"),
    ("rlhf_jax.steps.ppo", "from rlhf_jax.data.arrays import pack"),
    ("rlhf_jax.steps.ppo", "import rich"),
    ("rlhf_jax.steps.ppo", "from . import sft"),
    ("rlhf_jax.data.arrays", "import configs"),
    ("rlhf_jax.data.arrays", "from orbax.checkpoint import v1"),
    ("rlhf_jax.types", "from rlhf_jax import errors"),
    ("configs.ppo", "import jax"),
    ("configs.ppo", "from rlhf_jax import types"),
  ],
)
def test_the_check_sees_faults(module, source):
  assert len(list(import_faults(module, source))) == 1


def test_what_is_allowed_passes():
  for module, source in [
    ("rlhf_jax.objective.kl", "from rlhf_jax.objective import masking"),
    ("rlhf_jax.models.transformer", "from flax import linen as nn"),
    ("rlhf_jax.storage.checkpoint", "from orbax.checkpoint import v1"),
    (
      "launch.train",
      "from configs import defaults\nfrom rlhf_jax import stages",
    ),
    ("configs.ppo", "import re\nfrom configs import defaults"),
  ]:
    assert not list(import_faults(module, source))


def test_old_ways_are_gone():
  for name, source in modules():
    assert not banned_words(source), name
    assert "__future__.annotations" not in imports(source), name


def test_banned_words_are_seen():
  for source in (
    "import pickle",
    "key = jax.random.PRNGKey(0)",
    "from jax import pmap",
    "numpy.load(path, allow_pickle=True)",
  ):
    assert len(banned_words(source)) == 1
  assert not banned_words("def f(key: PRNGKeyArray): 'pickle'")


def test_no_file_is_named_for_nothing():
  for folder in (*CODE, "tests"):
    for path in (ROOT / folder).rglob("*.py"):
      assert path.stem not in ("utils", "common", "helpers"), path


def traps_of(source):
  """Numbers that the docstrings of a file's tests claim."""
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
      text = " ".join((ast.get_docstring(node) or "").split())
      for numbers in re.findall(r"[Tt]raps? (\d+(?:(?:, | and )\d+)*)", text):
        yield from map(int, re.findall(r"\d+", numbers))


def test_traps_are_kept():
  found = {
    number
    for path in (ROOT / "tests").rglob("*.py")
    for number in traps_of(path.read_text())
  }
  assert found <= TRAPS
  assert TRAPS - found <= NOT_BUILT


def test_trap_numbers_are_read():
  source = 'def test_a():\n  """Traps 5, 7 and 9; also trap 16: 3 things."""'
  assert list(traps_of(source)) == [5, 7, 9, 16]
