"""The report's curves: a figure of the ledger over the steps, as SVG.

A picture has axes and lines only: titles and the legend are text of the page,
so nothing that a run's files say is in it.
"""

from collections.abc import Mapping, Sequence
import io
import math
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib import colors as matplotlib_colors
from matplotlib import figure as matplotlib_figure
import numpy as np

Row = Mapping[str, int | float]

POINTS = 400  # Of a curve; more cannot be told apart, and the file grows.
_SINGLE, _WITHOUT_PENALTY = "#2563a8", "#dc143c"
_STYLE: dict[Any, Any] = {
  "svg.fonttype": "none",  # Text, not outlines: small files.
  "svg.hashsalt": "report",  # The same runs give the same bytes.
  "font.family": "sans-serif",
  "font.size": 9,
}


class Curve(NamedTuple):
  """One run's rows of metrics, and the colour that it has in all figures."""

  rows: Sequence[Row]
  colour: str


def colours(betas: Sequence[float]) -> list[str]:
  """A colour for each run by its β: red without a penalty, darker with more."""
  if len(betas) == 1:
    return [_SINGLE]
  distinct = sorted(set(betas))
  viridis = mpl.colormaps["viridis_r"]
  shades = [viridis((i + 0.5) / len(distinct)) for i in range(len(distinct))]
  of_beta = dict(zip(distinct, map(matplotlib_colors.to_hex, shades)))
  of_beta[0.0] = _WITHOUT_PENALTY
  return [of_beta[beta] for beta in betas]


def draw(name: str, curves: Sequence[Curve]) -> bytes:
  """The figure `name` against the step, with 95 % bands where it has errors.

  `kl/beta` has a logarithmic axis where a β is above 0; a β of 0 is not on it.
  Figures that are not finite leave a gap. Of more than `POINTS` steps, evenly
  spaced ones are drawn.
  """
  with mpl.rc_context(_STYLE):
    figure = matplotlib_figure.Figure(figsize=(4.2, 2.5), layout="constrained")
    axis = figure.add_subplot()
    top = -math.inf
    for curve in curves:
      rows = _thinned([row for row in curve.rows if name in row])
      steps = [row["step"] for row in rows]
      values = _finite([row[name] for row in rows])
      axis.plot(
        steps,
        values,
        color=curve.colour,
        linewidth=1.3,
        marker="o" if len(rows) == 1 else "",
      )
      with_error = [row for row in rows if f"{name}_se" in row]
      middle = _finite([row[name] for row in with_error])
      half = 1.96 * _finite([row[f"{name}_se"] for row in with_error])
      axis.fill_between(
        [row["step"] for row in with_error],
        middle - half,
        middle + half,
        color=curve.colour,
        alpha=0.15,
        linewidth=0,
      )
      top = max([top, *values[np.isfinite(values)]])
    if name == "kl/beta" and top > 0:
      axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
  return buffer.getvalue()


def _thinned(rows: list[Row]) -> list[Row]:
  """At most `POINTS` rows, the first and the last among them."""
  if len(rows) <= POINTS:
    return rows
  return [rows[i] for i in np.linspace(0, len(rows) - 1, POINTS).astype(int)]


def _finite(values: Sequence[float]) -> np.ndarray:
  """NaN for infinities, which would be the limits of the axis."""
  array = np.asarray(values, np.float64)
  return np.where(np.isfinite(array), array, np.nan)
