"""What surrounds the code: the citation, the hooks, what CI runs."""

import pathlib
import re
import tomllib

import pytest

import rlhf_jax

ROOT = pathlib.Path(__file__).parents[1]
yaml = pytest.importorskip("yaml")


def test_the_citation_is_one():
  """What version 1.2 of the format requires; nothing that nobody assigned."""
  found = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  assert found["cff-version"] == "1.2.0"
  assert found["message"] and found["title"] == "rlhf_jax"
  assert found["authors"] == [{"name": "The rlhf_jax authors"}]
  assert found["version"] == rlhf_jax.__version__
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert found["license"] == project["license"]
  assert not found.keys() & {"doi", "identifiers", "url", "repository-code"}


def test_hooks_run_what_ci_runs():
  """With the tools of the environment, so that nothing is fetched."""
  ci = (ROOT / ".ci" / "run").read_text()
  wanted = [
    line for line in ci.splitlines() if re.match("ruff |pyright ", line)
  ]
  (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())[
    "repos"
  ]
  assert repo["repo"] == "local"
  assert len(wanted) == len(repo["hooks"]) == 3
  for line, hook in zip(wanted, repo["hooks"]):
    assert hook["language"] == "system" and not hook["pass_filenames"]
    assert line.split(" --pythonpath")[0] in hook["entry"]


def test_the_site_is_pinned_and_in_the_extra():
  pins = dict(
    line.split("==")
    for line in (ROOT / "requirements.txt").read_text().splitlines()
    if "==" in line
  )
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  (wanted,) = project["optional-dependencies"]["docs"]
  name, low, high = re.fullmatch(r"([\w-]+)>=([\d.]+),<(\d+)", wanted).groups()
  parts = lambda text: tuple(map(int, text.split(".")))
  assert parts(low) <= parts(pins[name]) < parts(high)
