"""What the figures of the studies have in common: panels, seeds, intervals.

A seed is a small mark; a mean is a large one with its 95 % interval. A study
draws what is its own on the axes that `panels` gives it.
"""

from collections.abc import Sequence
from typing import Any

from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure
from matplotlib import ticker
import numpy as np

from rlhf_jax.studies import intervals, toy_runs

# Okabe and Ito: the colour-blind tell them apart.
ORANGE, SKY, GREEN, YELLOW = "#D55E00", "#56B4E9", "#009E73", "#E69F00"
BLUE, PINK, BLACK, GREY = "#0072B2", "#CC79A7", "#000000", "0.6"

Axes = matplotlib_axes.Axes
Figure = matplotlib_figure.Figure


def panels(
  size: tuple[float, float], columns: int, *, rows: int = 1, **grid: Any
) -> tuple[Figure, list[Axes]]:
  """A figure and its panels, row by row, without the box's upper right half.

  Args:
    size: Inches.
    columns: Panels of a row.
    rows: As many.
    **grid: As `Figure.subplots` takes it.
  """
  figure = matplotlib_figure.Figure(figsize=size, layout="constrained")
  axes = [*figure.subplots(rows, columns, squeeze=False, **grid).flat]
  for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
  return figure, axes


def say(axis: Axes, title: str, x: str, y: str = "", size: int = 10) -> None:
  """A panel's title and the names of its axes, with units."""
  axis.set_title(title, fontsize=size)
  axis.set_xlabel(x)
  axis.set_ylabel(y)


def legend(figure: Figure, axis: Axes, columns: int) -> None:
  """One legend for all panels, below them."""
  figure.legend(
    *axis.get_legend_handles_labels(),
    loc="outside lower center",
    ncols=columns,
    frameon=False,
  )


def log_scale(axis: Axes, which: str, labelled: Sequence[int] = (2, 5)) -> None:
  """A logarithmic axis `x` or `y`, with plain numbers, also between decades."""
  getattr(axis, f"set_{which}scale")("log")
  mine = axis.xaxis if which == "x" else axis.yaxis
  mine.set_major_formatter("{x:g}")
  mine.set_minor_locator(ticker.LogLocator(subs=labelled))
  mine.set_minor_formatter("{x:g}")


def curves(
  axis: Axes, values: np.ndarray, *, colour: Any, label: str, window: int = 1
) -> None:
  """A thin line a run, `[run, step]`, and a thick one of their mean."""
  smooth = toy_runs.trailing_mean(values, window)
  steps = np.arange(1, values.shape[1] + 1)
  for row in smooth:
    axis.plot(steps, row, color=colour, linewidth=0.6, alpha=0.6)
  mean = smooth.mean(axis=0)
  axis.plot(steps, mean, color=colour, linewidth=2.2, label=label)


def cloud(
  axis: Axes, x: np.ndarray, y: np.ndarray, *, label: str = "", **style: Any
) -> None:
  """A small mark a seed, and a large one at their means."""
  quiet: dict[str, Any] = {"linestyle": ""} | style
  axis.plot(x, y, markersize=3, alpha=0.5, **quiet)
  axis.plot(x.mean(), y.mean(), markersize=8, label=label, **quiet)


def bars(
  axis: Axes,
  places: Sequence[float] | np.ndarray,
  found: Sequence[intervals.Interval],
  **style: Any,
) -> None:
  """Upright intervals at the places, with a mark at each mean."""
  means = [interval.mean for interval in found]
  # A bootstrap's ends may be on one side of what was seen.
  ends = (
    [max(interval.mean - interval.low, 0) for interval in found],
    [max(interval.high - interval.mean, 0) for interval in found],
  )
  quiet: dict[str, Any] = {"linestyle": ""} | style
  axis.errorbar(places, means, ends, capsize=3, **quiet)


def lying(
  axis: Axes,
  names: Sequence[str],
  found: Sequence[intervals.Interval],
  colours: Sequence[Any],
  *,
  dots: Sequence[Sequence[float]] = (),
  size: float = 8,
) -> None:
  """A row a name, from the top: an interval, its mean, and a line at 0.

  Args:
    axis: Where.
    names: Of the rows.
    found: Their intervals; one that is not finite is left out.
    colours: Of each.
    dots: For each row its seeds, drawn in grey.
    size: Of the mean's mark.
  """
  for place, of in enumerate(dots):
    axis.plot(of, [place + 0.15] * len(of), "o", color=GREY)
  for place, (interval, colour) in enumerate(zip(found, colours)):
    axis.plot(interval[1:], [place] * 2, color=colour)
    axis.plot(interval[0], place, "o", color=colour, markersize=size)
  axis.axvline(0, color="0.4", linewidth=0.8)
  axis.set_yticks(range(len(names)), names)
  axis.set_ylim(len(names) - 0.5, -0.5)


def name_at(
  axis: Axes,
  name: str,
  place: tuple[float, float],
  away: tuple[float, float],
  **style: Any,
) -> None:
  """A short name beside a mark, so many points away from it."""
  style = {"fontsize": 9} | style
  axis.annotate(name, place, away, textcoords="offset points", **style)
