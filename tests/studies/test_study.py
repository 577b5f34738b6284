"""The framework, on a study of nothing."""

import json
import math
import struct
import sys
import types
from typing import NamedTuple

from matplotlib import figure as matplotlib_figure
import pytest

from configs import studies
from rlhf_jax import errors
from rlhf_jax.studies import limits, study


def outcome(**changes):
  table = study.Table(
    caption="A caption [red] of figures.",
    columns=("name", "value", "count", "flag"),
    rows=[
      ("one", 1 / 3, 3, True),
      ("[bold]two", math.nan, 1_000_000, False),
      ("three", 1.6e-16, 0, None),
      ("four", -12345.6, -1, True),
    ],
  )
  given = {
    "verdict": study.HOLDS,
    "paragraph": "Words " * 40,
    "tables": {"shown": table, "rest": table._replace(shown=False)},
    "figure": matplotlib_figure.Figure(figsize=(4, 2)),
  }
  return study.Outcome(**(given | changes))


@pytest.fixture
def nothing(monkeypatch):
  """A study that can be told what to find, and how often it was run."""
  module = types.ModuleType("rlhf_jax.studies.nothing")
  vars(module).update(runs=[], outcome=outcome())

  def check(config):
    limits.check(config, {"size": limits.ABOVE_0})

  def run(lab):
    module.runs.append((lab.config.size, lab.workdir.path))
    return module.outcome

  vars(module).update(check=check, run=run)
  monkeypatch.setitem(sys.modules, module.__name__, module)
  return module


def make_config(**fields):
  config = studies.new(study="nothing", claim="A [b]claim.", source="Us 2025")
  config.update({"size": 2} | fields)
  return config


def run(path, *, resume=False, **fields):
  study.run(make_config(**fields), str(path), resume=resume)


def test_what_a_study_leaves_behind(nothing, tmp_path, capsys):
  path = tmp_path / "run"
  run(path)
  assert nothing.runs == [(2, path)]
  record = json.loads((path / "study.json").read_text())
  assert record.pop("wall_s") >= 0
  tables = record.pop("tables")
  assert record == {
    "study": "nothing",
    "claim": "A [b]claim.",
    "source": "Us 2025",
    "seed": 0,
    "verdict": "holds",
    "paragraph": "Words " * 40,
  }
  assert list(tables) == ["shown", "rest"]
  assert tables["rest"]["columns"] == ["name", "value", "count", "flag"]
  # NaN is null; everything else is as it was.
  assert tables["rest"]["rows"] == [
    ["one", 1 / 3, 3, True],
    ["[bold]two", None, 1_000_000, False],
    ["three", 1.6e-16, 0, None],
    ["four", -12345.6, -1, True],
  ]
  assert json.loads((path / "config.json").read_text())["size"] == 2
  png = (path / "figure.png").read_bytes()
  assert struct.unpack(">II", png[16:24]) == (600, 300)  # 150 dpi

  printed = capsys.readouterr().out
  assert max(map(len, printed.splitlines())) <= 100
  rows = [line.split() for line in printed.splitlines()]
  assert ["one", "0.333", "3", "yes"] in rows
  assert ["[bold]two", "–", "1000000", "no"] in rows
  assert ["three", "2e-16", "0", "–"] in rows
  assert ["four", "-12,346", "-1", "yes"] in rows
  assert printed.count("A caption [red] of figures.") == 1
  assert "Claim (Us 2025): A [b]claim." in printed
  assert "Verdict: holds\n" in printed
  assert printed.endswith(
    f"Results: {path}/study.json\nFigure:  {path}/figure.png\n"
  )


def test_a_used_workdir_is_refused_and_resume_shows_it(
  nothing, tmp_path, capsys
):
  run(tmp_path)
  first = capsys.readouterr().out
  with pytest.raises(errors.UserError, match="holds a run"):
    run(tmp_path)
  with pytest.raises(errors.UserError, match="another run: size: 2 → 3"):
    run(tmp_path, resume=True, size=3)
  run(tmp_path, resume=True)
  assert capsys.readouterr().out == first
  assert len(nothing.runs) == 1


def test_resume_runs_what_had_not_ended(nothing, tmp_path):
  nothing.outcome = None
  with pytest.raises(AttributeError):
    run(tmp_path)
  nothing.outcome = outcome()
  run(tmp_path, resume=True)
  assert len(nothing.runs) == 2
  assert (tmp_path / "study.json").exists()


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"size": 0}, "config.size: 0; wanted above 0"),
    ({"seed": -1}, "config.seed: -1; wanted 0 to"),
    ({"seed": 2**32}, "config.seed: 4294967296; wanted 0 to"),
  ],
)
def test_what_makes_no_sense_is_refused_first(
  nothing, tmp_path, fields, message
):
  """Bad input 13."""
  with pytest.raises(errors.UserError) as caught:
    run(tmp_path / "run", **fields)
  assert str(caught.value).startswith(message)
  assert not nothing.runs and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("verdict", "ok"),
  [
    (study.HOLDS, True),
    (study.DOES_NOT_HOLD, True),
    (study.holds_when("β > 0"), True),
    (study.holds_when(""), False),
    ("holds, more or less", False),
    ("", False),
  ],
)
def test_a_verdict_is_one_of_three(nothing, tmp_path, verdict, ok):
  nothing.outcome = outcome(verdict=verdict)
  if ok:
    run(tmp_path)
  else:
    with pytest.raises(ValueError, match="no verdict"):
      run(tmp_path)
  assert (tmp_path / "study.json").exists() == ok


def test_rows_have_a_cell_for_each_column(nothing, tmp_path):
  table = study.Table("", ("a", "b"), [(1,)])
  nothing.outcome = outcome(tables={"short": table})
  with pytest.raises(ValueError, match="1 cells for the columns"):
    run(tmp_path)
  assert not (tmp_path / "study.json").exists()


def test_a_full_disk_ends_in_one_line(nothing, tmp_path, monkeypatch):
  def full(*_, **__):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(nothing.outcome.figure, "savefig", full)
  with pytest.raises(errors.UserError, match="No space left on device; free"):
    run(tmp_path)


def test_time_adds_up_over_processes(nothing, tmp_path, monkeypatch):
  """A study that was stopped and resumed took as long as both together."""
  path = tmp_path / "run"
  now = [0.0]
  monkeypatch.setattr(study.time, "monotonic", lambda: now[0])
  found = nothing.run

  def stopped(*arguments):
    now[0] += 100
    raise KeyboardInterrupt

  nothing.run = stopped
  with pytest.raises(KeyboardInterrupt):
    run(path)

  def ends(*arguments):
    now[0] += 7
    return found(*arguments)

  nothing.run = ends
  run(path, resume=True)
  assert json.loads((path / "study.json").read_text())["wall_s"] == 107


class _Arm(NamedTuple):
  gold: list[float]
  kl: list[float]


def test_a_table_of_seeds():
  """A row a seed of each arm, in order; an arm has one name or several."""
  arms = {("a", 1): _Arm([1.0, 2.0], [3.0, 4.0]), ("b", 2): _Arm([5.0], [6.0])}
  with pytest.raises(ValueError):  # An arm that lacks a seed.
    study.table_of_seeds("all", ("name", "n"), arms, (10, 11))
  del arms["b", 2]
  table = study.table_of_seeds("all", ("name", "n"), arms, (10, 11))
  assert table == study.Table(
    "all",
    ("name", "n", "seed", "gold", "kl"),
    [("a", 1, 10, 1.0, 3.0), ("a", 1, 11, 2.0, 4.0)],
    shown=False,
  )
  named = {"abc": _Arm([1.0], [3.0])}
  table = study.table_of_seeds("all", ("name",), named, [0])
  assert table.rows == [("abc", 0, 1.0, 3.0)]
