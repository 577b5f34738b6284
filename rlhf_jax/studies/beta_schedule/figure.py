"""The figure of `beta_schedule`."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

from matplotlib import figure as matplotlib_figure
from matplotlib import ticker
import numpy as np

_STYLES = (
  ("tab:blue", "o"),
  ("tab:cyan", "s"),
  ("tab:orange", "^"),
  ("tab:red", "D"),
  ("tab:purple", "v"),
)


def draw(
  constants: Mapping[str, Any], moved: Mapping[str, Any], arms: Sequence[Any]
) -> matplotlib_figure.Figure:
  """β over the run; gold against KL; what each arm is ahead by."""
  figure = matplotlib_figure.Figure(figsize=(13, 4.4), layout="constrained")
  path, plane, ahead = figure.subplots(1, 3)
  nats = np.array([runs.kl for runs in constants.values()])
  golds = np.array([runs.gold for runs in constants.values()])
  for kls, values in zip(nats.T, golds.T):
    order = np.argsort(kls)
    plane.plot(kls[order], values[order], color="0.8", linewidth=0.8, zorder=0)
  plane.plot(
    nats.mean(1), golds.mean(1), "-", color="0.3", marker=".", label="constant"
  )
  for name, kl, gold in zip(constants, nats.mean(1), golds.mean(1)):
    plane.annotate(
      name.removeprefix("constant "),
      (kl, gold),
      (0, -12),
      textcoords="offset points",
      fontsize=8,
      color="0.3",
    )
  for (name, runs), (colour, marker) in zip(moved.items(), _STYLES):
    path.plot(runs.betas.mean(axis=0), color=colour, label=name)
    style = {"color": colour, "marker": marker, "linestyle": ""}
    plane.plot(runs.kl, runs.gold, markersize=3, alpha=0.5, **style)
    plane.plot(
      runs.kl.mean(), runs.gold.mean(), markersize=8, label=name, **style
    )
  path.set_yscale("log")
  path.yaxis.set_major_formatter("{x:g}")
  path.yaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
  path.yaxis.set_minor_formatter("{x:g}")
  path.set_title("How β moves: mean over seeds", fontsize=10)
  path.set_xlabel("step")
  path.set_ylabel("β, reward units per nat")
  plane.set_xscale("function", functions=(np.sqrt, np.square))
  plane.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
  plane.set_title("At the end: seeds (small), means (large)", fontsize=10)
  plane.set_xlabel("KL(π‖π_ref), nats per response")
  plane.set_ylabel("gold reward")
  plane.legend(frameon=False, fontsize=8)
  _ahead(ahead, [arm for arm in arms if math.isfinite(arm.ahead)], list(moved))
  for axis in (path, plane, ahead):
    axis.spines[["top", "right"]].set_visible(False)
  return figure


def _ahead(axis, arms, moved) -> None:
  """A row an arm; constants that were left out of the curve are grey."""
  colours = {name: colour for name, (colour, _) in zip(moved, _STYLES)}
  for place, arm in enumerate(arms):
    colour = colours.get(arm.arm, "0.6")
    axis.plot([arm.low, arm.high], [place] * 2, color=colour)
    axis.plot(arm.ahead, place, "o", color=colour, markersize=7)
  axis.axvline(0, color="0.4", linewidth=0.8)
  axis.set_yticks(range(len(arms)), [arm.arm for arm in arms])
  axis.invert_yaxis()
  axis.set_title("Gold ahead of constant β at the same KL", fontsize=10)
  axis.set_xlabel(
    "gold reward, 95 % for all arms at once\ngrey: constants, left out"
  )
