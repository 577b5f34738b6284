"""All studies at once, on two studies of nothing, and their table."""

import sys
import types

from matplotlib import figure as matplotlib_figure
import pytest

from configs import studies
from rlhf_jax import errors
from rlhf_jax.studies import collection, limits, study


@pytest.fixture
def configs(monkeypatch):
  """Two studies that say what their config says, and note that they ran."""
  found = {}
  for name in ("first", "second"):
    module = types.ModuleType(f"rlhf_jax.studies.{name}")

    def check(config):
      limits.check(config, {"size": limits.ABOVE_0})

    def run(lab, module=module):
      module.runs.append(lab.config.size)
      paragraph = "It is 1.5 | at e.g. β. More."
      table = study.Table("Sizes.", ("size",), [(lab.config.size,)])
      figure = matplotlib_figure.Figure(figsize=(1, 1))
      return study.Outcome("holds", paragraph, {"sizes": table}, figure)

    vars(module).update(check=check, run=run, runs=[])
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config = studies.new(study=name, claim=f"The {name}.", source="Us 2025")
    config.size = 2
    found[name] = config
  return found


def runs(name):
  return sys.modules[f"rlhf_jax.studies.{name}"].runs


def test_all_are_run_and_listed(configs, tmp_path, capsys):
  collection.run(configs, str(tmp_path), resume=False)
  lines = (tmp_path / "table.md").read_text().splitlines()
  assert lines == [
    "| study | claim | outcome | time |",
    "| --- | --- | --- | --: |",
    r"| `first` | The first. | **holds**. It is 1.5 \| at e.g. β. | 0 s |",
    r"| `second` | The second. | **holds**. It is 1.5 \| at e.g. β. | 0 s |",
  ]
  assert lines[2] in capsys.readouterr().out
  assert (tmp_path / "second" / "figure.png").exists()


def test_resume_runs_what_is_missing(configs, tmp_path):
  collection.run({"first": configs["first"]}, str(tmp_path), resume=False)
  collection.run(configs, str(tmp_path), resume=True)
  assert (runs("first"), runs("second")) == ([2], [2])


def test_nothing_runs_where_one_cannot(configs, tmp_path):
  collection.run({"second": configs["second"]}, str(tmp_path), resume=False)
  with pytest.raises(errors.UserError, match="second: holds a run"):
    collection.run(configs, str(tmp_path), resume=False)
  configs["second"].size = 0
  with pytest.raises(
    errors.UserError, match=r"config\.size: 0; wanted above 0"
  ):
    collection.run(configs, str(tmp_path), resume=True)
  assert runs("first") == []
