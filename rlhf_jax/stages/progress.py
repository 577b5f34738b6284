"""How a run looks while it runs: bars on a terminal, plain lines elsewhere."""

from collections.abc import Iterator, Mapping
import contextlib
import time
from typing import SupportsFloat

from rich import console as rich_console
from rich import live as rich_live
from rich import progress as rich_progress
from rich import table as rich_table
from rich import text as rich_text

Figures = Mapping[str, SupportsFloat]
_SECONDS_BETWEEN_LINES = 5.0


class Progress:
  """One stage's bar with a line of live figures for each of its members."""

  def __init__(self, console: rich_console.Console, name: str, steps: int):
    self._console = console
    self._name = name
    self._steps = steps
    self._rows: dict[str, Figures] = {}
    self._printed = time.monotonic()
    self._bar = rich_progress.Progress(
      rich_progress.TextColumn("{task.description}", markup=False),
      rich_progress.BarColumn(bar_width=24),
      rich_progress.MofNCompleteColumn(),
      rich_progress.TimeRemainingColumn(),
      console=console,
    )
    self._task = self._bar.add_task(name, total=steps)

  def __rich__(self) -> rich_console.RenderableType:
    if not self._rows:
      return self._bar
    figures = rich_table.Table(box=None, pad_edge=False)
    labelled = any(self._rows)
    names = next(iter(self._rows.values()))
    for name in ["", *names] if labelled else names:
      figures.add_column(name, justify="right", style="cyan")
    for label, row in self._rows.items():
      cells = [rich_text.Text(_figure(value)) for value in row.values()]
      figures.add_row(*([rich_text.Text(label)] if labelled else []), *cells)
    return rich_console.Group(self._bar, figures)

  def note(self, message: str) -> None:
    """Says what is happening, beside the bar or as a line of its own."""
    if self._console.is_terminal:
      self._bar.update(self._task, description=f"{self._name}: {message}")
    else:
      _print(self._console, f"{self._name}: {message}")

  def update(self, step: int, rows: Mapping[str, Figures]) -> None:
    """Shows the figures of each member after `step` steps.

    Args:
      step: Steps done.
      rows: Member label (may be '') → figure name → value.
    """
    self._rows = dict(rows)
    self._bar.update(self._task, completed=step, description=self._name)
    if self._console.is_terminal:
      return
    now = time.monotonic()
    last = step == self._steps
    if not last and now - self._printed < _SECONDS_BETWEEN_LINES:
      return
    self._printed = now
    for label, row in rows.items():
      figures = " ".join(
        f"{name} {_figure(value)}" for name, value in row.items()
      )
      head = f"{self._name} {step}/{self._steps}"
      _print(self._console, " ".join(filter(None, [head, label, figures])))


@contextlib.contextmanager
def show(
  console: rich_console.Console, name: str, *, done: int, steps: int
) -> Iterator[Progress]:
  """Shows a stage's progress while the block runs."""
  progress = Progress(console, name, steps)
  progress._bar.update(progress._task, completed=done)
  if not console.is_terminal:
    yield progress
    return
  with rich_live.Live(progress, console=console, refresh_per_second=4):
    yield progress


def _figure(value: SupportsFloat) -> str:
  value = float(value)
  return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _print(console: rich_console.Console, line: str) -> None:
  console.print(line, markup=False, highlight=False, soft_wrap=True)
