"""The figure of `load_bearing_reference`."""

from collections.abc import Mapping
from typing import Any

from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure
from matplotlib import ticker
import numpy as np

_STYLES = {
  "SFT": ("tab:blue", "o"),
  "base": ("tab:orange", "s"),
  "none": ("0.35", "X"),
}


def draw(
  arms: Mapping[tuple[str, str], Any],
) -> matplotlib_figure.Figure:
  """Gold against the distance from SFT, a panel for each method.

  Args:
    arms: Gold and KL, a figure a seed, by method and reference; the methods
      are start, which is the SFT policy and the base, DPO and PPO.
  """
  figure = matplotlib_figure.Figure(figsize=(11, 4.4), layout="constrained")
  axes = figure.subplots(1, 2, sharex=True, sharey=True)
  for axis, method in zip(axes, ("DPO", "PPO")):
    _panel(axis, arms, method)
  axes[0].set_xlim(left=-0.1)  # Of both, which now have all their points.
  axes[0].set_ylabel("gold reward, mean of held-out prompts")
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(
    handles, labels, loc="outside lower center", ncols=5, frameon=False
  )
  return figure


def _panel(axis: matplotlib_axes.Axes, arms, method: str) -> None:
  """A point a seed; both scales reach far, so the x axis bends."""
  start = float(np.mean(arms["start", "SFT"].gold))
  axis.axhline(start, color="tab:blue", linestyle=":", linewidth=1)
  axis.plot(
    0, start, "*", color="tab:blue", markersize=13, label="the SFT policy"
  )
  base = arms["start", "base"]
  axis.plot(
    base.kl.mean(),
    base.gold.mean(),
    "*",
    color="tab:orange",
    markersize=13,
    label="the base",
  )
  for reference, (colour, marker) in _STYLES.items():
    arm = arms[method, reference]
    axis.plot(
      arm.kl,
      arm.gold,
      marker,
      color=colour,
      markersize=7,
      alpha=0.8,
      label=f"reference: {reference}",
    )
  axis.set_xscale("symlog", linthresh=1)
  axis.xaxis.set_major_formatter(ticker.ScalarFormatter())
  axis.set_title(f"{method}: where it ends, a point a seed", fontsize=10)
  axis.set_xlabel("KL to the SFT policy, nats per response")
  axis.spines[["top", "right"]].set_visible(False)
