"""The picture of the study `goodhart`."""

from collections.abc import Sequence
import textwrap

from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.studies import toy_runs
from rlhf_jax.studies.goodhart import arms as arms_lib

_NONE = "#D55E00"  # No penalty.
_PENALISED = ("#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#000000")
_WIDTH = 150  # characters of a line of text


def draw(
  config: ConfigDict,
  by_beta: Sequence[Sequence[toy_runs.Member]],
  start: arms_lib.Ends,
  ends: Sequence[arms_lib.Ends],
  samples: Sequence[tuple[str, str]],
  *,
  usual: float,
) -> matplotlib_figure.Figure:
  """Proxy and gold against √KL; how fluent the ends are; what they say.

  Args:
    config: The study's.
    by_beta: For each β its members.
    start: The SFT policy's figures, a value a seed.
    ends: For each β the same.
    samples: Names and texts.
    usual: −log π_ref per token below which a response looks fluent.
  """
  figure = matplotlib_figure.Figure(figsize=(13, 5.4), layout="constrained")
  grid = figure.add_gridspec(2, 3, height_ratios=(1, 0.16))
  axes = [figure.add_subplot(grid[0, i]) for i in range(3)]
  colours = [_NONE, *_PENALISED * len(by_beta)][: len(by_beta)]
  for axis, name, title, first in (
    (axes[0], "reward/score", "Proxy: what is rewarded", start.proxy),
    (axes[1], "reward/gold", "Gold: what it is worth", start.gold),
  ):
    axis.axhline(first.mean(), color="0.6", linewidth=0.8, linestyle="--")
    for beta, members, colour in zip(config.betas, by_beta, colours):
      _curves(
        axis, members, name, first, config.window, colour, f"β = {beta:g}"
      )
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("√KL(π‖π_ref), √nats of a response")
    axis.set_ylabel("reward units")
  axes[0].plot([], [], "--", color="0.6", linewidth=0.8, label="SFT policy")
  axes[0].legend(frameon=False, fontsize=9, loc="center right")
  _texts(axes[2], start, ends, colours, usual)
  for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
  _samples(figure.add_subplot(grid[1, :]), samples)
  return figure


def _curves(
  axis: matplotlib_axes.Axes,
  members: Sequence[toy_runs.Member],
  name: str,
  start: np.ndarray,
  window: int,
  colour: str,
  label: str,
) -> None:
  """A thin line a seed; a thick one of their means, with its end."""
  smooth = lambda name: np.array(
    [
      toy_runs.trailing_mean(toy_runs.column(m.rows, name), window)
      for m in members
    ]
  )[:, window - 1 :]
  roots = np.sqrt(smooth("kl/reverse_exact"))
  roots = np.column_stack([np.zeros(len(members)), roots])
  values = np.column_stack([start, smooth(name)])
  for x, y in zip(roots, values):
    axis.plot(x, y, color=colour, linewidth=0.6, alpha=0.4)
  x, y = roots.mean(axis=0), values.mean(axis=0)
  axis.plot(x, y, color=colour, linewidth=2.2, label=label)
  axis.plot(x[-1], y[-1], "o", color=colour, markersize=7)


def _texts(axis, start, ends, colours, usual) -> None:
  """A dot a policy: how unlikely its texts are, and how ungrammatical."""
  axis.axvspan(0, usual, color="0.92", linewidth=0)
  for end, colour in zip(ends, colours):
    axis.plot(end.nll, end.faults, "o", color=colour, markersize=6)
  axis.plot(start.nll, start.faults, "s", color="0.5", markersize=5)
  axis.annotate(
    "looks\nfluent", (usual, 1), (-4, -4), fontsize=9, color="0.4",
    xycoords=("data", "axes fraction"), textcoords="offset points",
    ha="right", va="top",
  )  # fmt: skip
  axis.set_xlim(left=1)
  axis.set_title("The texts in the end, a dot a seed", fontsize=11)
  axis.set_xlabel("−log π_ref, nats per token")
  axis.set_ylabel("ungrammatical pairs per response")


def _samples(
  axis: matplotlib_axes.Axes, samples: Sequence[tuple[str, str]]
) -> None:
  """The texts as text."""
  axis.axis("off")
  lines = [
    textwrap.fill(f"{name + ':':22}{text}", _WIDTH, subsequent_indent=" " * 22)
    for name, text in samples
  ]
  text = "\n".join(lines)
  axis.text(0, 1, text, family="monospace", fontsize=8.5, va="top")
