"""README and the pages: their commands parse, their links and messages exist.

A fenced or indented line `python -m launch.…` is a command. One behind `$ ` is
refused with exactly the line below it. Mutants that were tried and fail here:
a misspelt field, flag, preset, config file, page, anchor and image; a reworded
message; an exit code or an alarm that the page lacks.
"""

import ast
import json
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from launch import app
from rlhf_jax import errors
from rlhf_jax.stages import alarms

ROOT = pathlib.Path(__file__).parents[2]
PAGES = {
  str(path.relative_to(ROOT)): path.read_text()
  for path in (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
  )
}
COMMANDS = ("evaluate", "export", "report", "study", "sweep", "train")


def test_the_readme_is_one_screen():
  assert len(PAGES["README.md"].splitlines()) <= 120


# Commands.


def commands(text):
  """(module, its arguments, the line that it is refused with or None)."""
  joined = re.sub(r"\\\n\s*", "", text)
  pattern = r"(?m)^ *(\$ )?(?:\w+=\S+ )?python -m (\S+)(.*)$\n?(.*)"
  for refused, module, arguments, after in re.findall(pattern, joined):
    words = shlex.split(arguments)
    yield module, words, after if refused else None
  for module, arguments in re.findall(r"`python -m (\S+?)( [^`]*)?`", text):
    yield module, shlex.split(arguments), None


ALL = [
  (page, *command) for page, text in PAGES.items() for command in commands(text)
]

# Runs as `python -m launch.NAME` would, up to where it would load JAX.
PARSE = """
import copy, json, runpy, sys
from absl import flags
from launch import app, train
from rlhf_jax.settings import validate

def check_only(values):
  config = values.config
  if config.stage != "evaluate":  # Its policy is a path of the reader's.
    validate.validate_fields(config)

name, told = sys.argv[1], json.loads(sys.stdin.read())
train.main = check_only
answers = []

def run(main, **options):
  clean = flags.FLAGS
  for words in told:
    sys.modules.pop("config_config", None)
    values = copy.deepcopy(clean)
    try:
      app.parse(["program", *words], values, **options)
      if name == "train":
        check_only(values)
      elif name == "sweep":
        main(values)
      answers.append("")
    except ValueError as error:
      answers.append(" ".join(str(error).splitlines()))
  print(json.dumps(answers))

app.run = run
sys.argv = ["program"]
runpy.run_module(f"launch.{name}", run_name="__main__")
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name):
  """Each parses, or is refused with the line that stands below it."""
  mine = [c for c in ALL if c[1] == f"launch.{name}"]
  assert mine
  done = subprocess.run(
    [sys.executable, "-c", PARSE, name],
    input=json.dumps([words for _, _, words, _ in mine]),
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert done.returncode == 0, done.stderr
  answers = json.loads(done.stdout)
  for (page, _, words, refusal), answer in zip(mine, answers, strict=True):
    if refusal is None and re.search(
      "wanted '' or a (directory|file) that exists|wanted directories", answer
    ):
      continue  # A path of the reader's.
    assert answer == (refusal or ""), f"{page}: {name} {' '.join(words)}"


def test_there_are_no_other_commands():
  for page, module, words, _ in ALL:
    if module.startswith(("benchmarks.", "tests.")):
      path = ROOT / f"{module.replace('.', '/')}.py"
      defined = r'(?:DEFINE_\w+\(\s*"|add_argument\("--)(\w+)"'
      flags = re.findall(defined, path.read_text())
      assert {w.lstrip("-").split("=")[0] for w in words} <= {*flags}, page
    else:
      assert module.removeprefix("launch.") in COMMANDS, f"{page}: {module}"


def test_fields_in_the_prose_exist():
  """`kl.beta`, with or without a value, is a field of configs/defaults.py."""
  from configs import defaults, studies

  del studies
  known = dict(_fields(defaults.get_config()))
  groups = {name.split(".")[0] for name in known if "." in name}
  for page, text in PAGES.items():
    for word in re.findall(r"`((?:\w+\.)+\w+)(?:=[^`]*)?`", text):
      if word.split(".")[0] in groups and not (ROOT / "docs" / word).exists():
        assert word in known, f"{page}: {word}"


def test_metrics_in_the_prose_exist():
  """`kl/reverse_exact` is written by the quickstart, or by name in the code."""
  summary = json.loads((ROOT / "docs/quickstart/summary.json").read_text())
  (member, *_) = summary["stages"]["ppo"]["members"]
  known = {*member["metrics"], *strings()}
  for page, text in PAGES.items():
    for word in re.findall(r"`((?:kl|rollout|reward|ppo)/\w+)`", text):
      assert word in known, f"{page}: {word}"


def _fields(config, prefix=""):
  for name, value in config.items():
    if hasattr(value, "items"):
      yield prefix + name, value
      yield from _fields(value, f"{prefix}{name}.")
    else:
      yield prefix + name, value


# Links and paths.


def anchors(text):
  """The ids that the headings get, as Python-Markdown makes them."""
  for heading in re.findall(r"(?m)^#+ (.+)$", text):
    kept = re.sub(r"[^\w\s-]", "", heading.encode("ascii", "ignore").decode())
    yield re.sub(r"[-\s]+", "-", kept.strip().lower())


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images(page):
  folder = (ROOT / page).parent
  for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
    path, _, anchor = link.partition("#")
    assert "://" not in link
    target = folder / path if path else ROOT / page
    assert target.exists(), link
    if anchor:
      assert anchor in [*anchors(target.read_text())], link


@pytest.mark.parametrize("page", PAGES)
def test_paths_of_the_repository(page):
  """`rlhf_jax/steps/ppo.py` is there, and so is the test behind `::`."""
  pattern = r"(?:`|pytest )((?:rlhf_jax|configs|tests|docs|benchmarks)/[\w./]+)"
  for path in re.findall(pattern, PAGES[page]):
    assert "NAME" in path or (ROOT / path).exists(), path
  for path, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGES[page]):
    assert f"\ndef {test}(" in (ROOT / path).read_text(), test


def test_names_that_contributors_are_sent_to():
  """Each `NAME` of a step of CONTRIBUTING is in the file that it names."""
  steps = re.findall(
    r"(?m)^\d\. `([\w/]+\.py)`: (.+)$", PAGES["CONTRIBUTING.md"]
  )
  assert len(steps) > 10
  for path, text in steps:
    if "NAME" not in path:
      for name in re.findall(r"`(_?[A-Za-z_]+)(?:\[[^`]*)?`", text):
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), name


# Troubleshooting.

TROUBLES = PAGES["docs/troubleshooting.md"]


def test_exit_codes_are_all_there():
  kinds = [errors.UserError, *errors.UserError.__subclasses__()]
  codes = {0, app._INTERRUPTED, *(kind.exit_code for kind in kinds)}
  assert {int(c) for c in re.findall(r"(?m)^\| (\d+) \|", TROUBLES)} == codes


def strings():
  """Every literal of the package, the parts of f-strings among them."""
  for path in (ROOT / "rlhf_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value


def test_the_messages_are_those_of_the_code():
  said = "\0".join(strings())
  told = re.findall(
    r"(?m)^\| `([^`]+)`.* \|", TROUBLES.split("## The workdir")[1]
  )
  assert len(told) > 12
  for message in told:
    assert message in said, message


def test_alarms_are_all_there():
  quiet = {
    "kl/reverse_k1": -1.0,
    "kl/reverse_k1_se": 0.1,
    "kl/clamp_fraction": 0.5,
    "rollout/logprob_max_abs_diff": 1.0,
  }
  lines = alarms.Watch("float32").alarms(0, quiet)
  page = TROUBLES.split("## Alarms")[1].split("\n## ")[0]
  rows = re.findall(r"(?m)^\| `([^`]+)`.*\(`([^`]+)`\)", page)
  assert len(rows) == len(lines) == 3
  for (said, name), line in zip(rows, lines):
    assert said in line and name in line
