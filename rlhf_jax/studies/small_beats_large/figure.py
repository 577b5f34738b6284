"""The figure of `small_beats_large`."""

from collections.abc import Sequence
from typing import Any

from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure

# Small, small with RLHF, large; in the study's order.
_COLOURS = ("tab:orange", "tab:blue", "0.35")
_MARKERS = ("s", "o", "D")
_LABELS = ((0, -26), (0, 16), (0, 16))  # points from the mean


def draw(
  measured: Sequence[Any], judged: Sequence[Any]
) -> matplotlib_figure.Figure:
  """Who is preferred, and who is the better language model.

  Args:
    measured: A row a seed and model.
    judged: A row a model, the large one last.
  """
  figure = matplotlib_figure.Figure(figsize=(11, 3.9), layout="constrained")
  left, right = figure.subplots(1, 2)
  _wins(left, measured, judged)
  _losses(right, measured, judged)
  for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
  return figure


def _wins(axis: matplotlib_axes.Axes, measured, judged) -> None:
  """A row for each small model: its seeds, and their mean."""
  small = judged[:-1]
  for place, (row, colour, marker) in enumerate(zip(small, _COLOURS, _MARKERS)):
    seeds = [x.wins for x in measured if x.model == row.model]
    axis.plot(
      seeds, [place + 0.2] * len(seeds), marker, color=colour, alpha=0.4
    )
    axis.plot([row.wins_low, row.wins_high], [place] * 2, color=colour, lw=2)
    axis.plot(row.wins, place, marker, color=colour, markersize=6)
  axis.axvline(0.5, color="0.4", linestyle="--", linewidth=1)
  axis.set_xlim(0, 1)
  axis.set_ylim(len(small) - 0.4, -0.6)
  axis.set_yticks(
    range(len(small)),
    [f"{row.model}\n{row.parameters:,} parameters" for row in small],
  )
  axis.set_title(
    f"Preferred to the raw model of {judged[-1].parameters:,} parameters?",
    fontsize=10,
  )
  axis.set_xlabel(
    "share of held-out prompts won, by gold\n"
    "large: mean, 95 % interval; pale: a seed; dashed: even"
  )


def _losses(axis: matplotlib_axes.Axes, measured, judged) -> None:
  """Gold against the loss, a point a seed."""
  for row, colour, marker, offset in zip(judged, _COLOURS, _MARKERS, _LABELS):
    mine = [x for x in measured if x.model == row.model]
    axis.plot(
      [x.above_floor for x in mine],
      [x.gold for x in mine],
      marker,
      color=colour,
      markersize=8,
      alpha=0.8,
    )
    axis.annotate(
      row.model,
      (row.above_floor, row.gold),
      offset,
      textcoords="offset points",
      ha="center",
      color=colour,
    )
  axis.set_xscale("log")
  axis.margins(0.15, 0.25)
  axis.set_title("Is the better language model the better writer?", fontsize=10)
  axis.set_xlabel("held-out loss above the language's entropy, nats per token")
  axis.set_ylabel("mean gold reward of responses")
