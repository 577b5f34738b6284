"""What every study shares: its workdir, its files, how it is shown.

A study is a module beside this one, with a config of the same name in
configs/studies. It has two functions:

    check(config)        refuses what makes no sense: `limits`, `toy_runs.check`
    run(lab) → Outcome   does the experiment, and judges it

`run` below leaves `study.json` and `figure.png` in the workdir. The verdict is
computed by the study, from its figures, by a rule in its code. An experiment
that takes long keeps what is done in sub-workdirs (`toy_runs`, or
`lab.workdir.sub`, always with `resume=True`: this workdir is its own), so that
`--resume` goes on with it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import importlib
import json
import math
import pathlib
import re
import time
from types import MappingProxyType
from typing import Any, NamedTuple

from matplotlib import figure as matplotlib_figure
from ml_collections import ConfigDict
import numpy as np
from rich import box as rich_box
from rich import console as rich_console
from rich import table as rich_table
from rich import text as rich_text

from rlhf_jax import errors
from rlhf_jax.storage import workdir as workdir_lib
from rlhf_jax.studies import intervals, limits

HOLDS = "holds"
DOES_NOT_HOLD = "does not hold here"

Cell = str | bool | int | float | intervals.Interval | None
_WIDTH = 100  # columns; what every table fits into
_FILE = "study.json"
_ELAPSED = "elapsed.json"


class Lab(NamedTuple):
  """Where a study works: its config, its files, and where it says so."""

  config: ConfigDict
  workdir: workdir_lib.Workdir
  console: rich_console.Console


class Table(NamedTuple):
  """Figures of a study.

  Attributes:
    caption: What the figures are, with their units.
    columns: Their names.
    rows: A cell for each column. NaN and infinities become None, an interval
      its text, and a number of numpy one of Python.
    shown: Whether it is printed; all tables are in study.json.
  """

  caption: str
  columns: tuple[str, ...]
  rows: Sequence[tuple[Cell, ...]]
  shown: bool = True


def table_of(
  caption: str,
  rows: Sequence[Any],
  *,
  before: Mapping[str, Sequence[Cell]] = MappingProxyType({}),
  shown: bool = True,
) -> Table:
  """A table of records, whose columns are the names of their fields.

  Args:
    caption: See `Table`.
    rows: One or more named tuples of one kind.
    before: Columns that stand in front, a cell a row.
    shown: See `Table`.
  """
  cells = zip(*before.values(), strict=True) if before else [()] * len(rows)
  return Table(
    caption,
    (*before, *rows[0]._fields),
    [(*first, *row) for first, row in zip(cells, rows, strict=True)],
    shown,
  )


def table_of_seeds(
  caption: str,
  names: Sequence[str],
  arms: Mapping[Any, Any],
  seeds: Sequence[int],
) -> Table:
  """A table, which is not shown, of what every seed of each arm came to.

  Args:
    caption: See `Table`.
    names: The columns that name an arm.
    arms: Named tuples of one kind, whose fields have a figure a seed; by as
      many names, or by one.
    seeds: In the figures' order.
  """
  fields = next(iter(arms.values()))._fields
  rows = [
    (*(name if isinstance(name, tuple) else (name,)), seed, *figures)
    for name, arm in arms.items()
    for seed, *figures in zip(seeds, *arm, strict=True)
  ]
  return Table(caption, (*names, "seed", *fields), rows, shown=False)


class Outcome(NamedTuple):
  """What a study found.

  Attributes:
    verdict: `HOLDS`, `holds_when(…)` or `DOES_NOT_HOLD`.
    paragraph: The finding in words, its numbers taken from the tables. Its
      first sentence stands for it where there is room for one.
    tables: By name.
    figure: What figure.png shows.
  """

  verdict: str
  paragraph: str
  tables: dict[str, Table]
  figure: matplotlib_figure.Figure


def holds_when(condition: str) -> str:
  """The verdict on a claim that is true under a condition."""
  return f"{HOLDS} when {condition}"


def verdict(conditions: Mapping[str, bool], what: str) -> str:
  """The rule that most studies share: true always, under conditions, or never.

  Args:
    conditions: Whether the claim is true, by the condition's name.
    what: Whose names these are, such as "β is".
  """
  true = [name for name, holds in conditions.items() if holds]
  if len(true) == len(conditions):
    return HOLDS
  return holds_when(f"{what} {' or '.join(true)}") if true else DOES_NOT_HOLD


def check(config: ConfigDict) -> None:
  """Refuses what makes no sense to the study that the config names.

  Raises:
    UserError: With the field, its value and what is wanted.
  """
  limits.check(config, {"seed": limits.between(0, 2**32 - 1, "2**32 − 1")})
  _module(config).check(config)


def run(config: ConfigDict, workdir: str, *, resume: bool) -> None:
  """Runs the study that the config names, and shows what it found.

  With `resume`, a study that has ended in the workdir is only shown.

  Raises:
    UserError: The config makes no sense, or the workdir cannot be used.
  """
  check(config)
  console = rich_console.Console(highlight=False)
  console.width = max(console.width, _WIDTH)
  with workdir_lib.Workdir.open(
    workdir, config.to_dict(), resume=resume
  ) as opened:
    if not (opened.path / _FILE).exists():
      with _clock(opened) as seconds:
        outcome = _module(config).run(Lab(config, opened, console))
      _write(opened.path, config, outcome, seconds())
    _print(console, opened.path)


def read(path: pathlib.Path) -> dict[str, Any]:
  """The record of the study that ended in `path`."""
  return json.loads((path / _FILE).read_text())


def _module(config: ConfigDict) -> Any:
  return importlib.import_module(f"rlhf_jax.studies.{config.study}")


@contextlib.contextmanager
def _clock(workdir: workdir_lib.Workdir) -> Iterator[Callable[[], float]]:
  """Seconds so far, with those of earlier processes; kept on the way out."""
  file = workdir.path / _ELAPSED
  before = json.loads(file.read_text())["wall_s"] if file.exists() else 0.0
  began = time.monotonic()
  seconds = lambda: before + time.monotonic() - began
  try:
    yield seconds
  finally:
    workdir.write_json(_ELAPSED, {"wall_s": seconds()})


def _write(
  path: pathlib.Path, config: ConfigDict, outcome: Outcome, wall_s: float
) -> None:
  """Writes the figure, then study.json, which says that the study has ended."""
  if not re.fullmatch(
    f"{HOLDS}|{HOLDS} when .+|{DOES_NOT_HOLD}", outcome.verdict
  ):
    raise ValueError(f"no verdict: {outcome.verdict!r}")
  record = {
    "study": config.study,
    "claim": config.claim,
    "source": config.source,
    "seed": config.seed,
    "wall_s": wall_s,
    "verdict": outcome.verdict,
    "paragraph": outcome.paragraph,
    "tables": {
      name: table._asdict() | {"rows": [_row(table, r) for r in table.rows]}
      for name, table in outcome.tables.items()
    },
  }
  text = json.dumps(record, indent=1, allow_nan=False)
  unfinished = path / f".{_FILE}.writing"
  try:
    outcome.figure.savefig(path / "figure.png", dpi=150)
    unfinished.write_text(f"{text}\n")
    unfinished.replace(path / _FILE)
  except OSError as error:
    raise errors.UserError(
      f"{path}: cannot be written: {error.strerror}; free space, and run again "
      "with --resume"
    ) from error


def _row(table: Table, row: tuple[Cell, ...]) -> list[Cell]:
  """The row as JSON holds it."""
  if len(row) != len(table.columns):
    raise ValueError(f"{len(row)} cells for the columns {table.columns}")
  return [_cell(cell) for cell in row]


def _cell(cell: Any) -> str | bool | int | float | None:
  if isinstance(cell, intervals.Interval):
    return str(cell)
  if isinstance(cell, np.generic):
    cell = cell.item()
  is_odd = isinstance(cell, float) and not math.isfinite(cell)
  return None if is_odd else cell


def _print(console: rich_console.Console, path: pathlib.Path) -> None:
  """Shows the study that ended in `path`."""
  record = read(path)
  say = lambda text="": console.print(rich_text.Text(text))
  say()
  for table in record["tables"].values():
    if table["shown"]:
      say(table["caption"])
      say()
      console.print(_rich_table(table))
      say()
  say(f"Claim ({record['source']}): {record['claim']}")
  say()
  say(f"Verdict: {record['verdict']}")
  say()
  say(record["paragraph"])
  say()
  for name, word in ((_FILE, "Results"), ("figure.png", "Figure")):
    line = rich_text.Text(f"{word + ':':8} {path / name}")
    console.print(line, soft_wrap=True)


def _rich_table(table: dict[str, Any]) -> rich_table.Table:
  shown = rich_table.Table(
    box=rich_box.SIMPLE_HEAD,
    show_edge=False,
    pad_edge=False,
    padding=(0, 1, 0, 0),
  )
  for i, name in enumerate(table["columns"]):
    words = any(isinstance(row[i], str) for row in table["rows"])
    shown.add_column(
      rich_text.Text(name), justify="left" if words else "right", no_wrap=True
    )
  for row in table["rows"]:
    shown.add_row(*(rich_text.Text(_text(cell)) for cell in row))
  return shown


def _text(cell: Cell) -> str:
  if cell is None:
    return "–"
  if isinstance(cell, bool):
    return "yes" if cell else "no"
  if isinstance(cell, str | int):
    return str(cell)
  if abs(cell) >= 1000:
    return f"{cell:,.0f}"
  return f"{cell:.0e}" if 0 < abs(cell) < 1e-4 else f"{cell:.3g}"
