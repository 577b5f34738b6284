"""The picture of the study `closed_form`."""

from collections.abc import Sequence

from matplotlib import figure as matplotlib_figure
from matplotlib import ticker
import numpy as np

from rlhf_jax.studies.closed_form import arms as arms_lib

_COLOURS = ("tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:brown")
_REACHED, _WRONG = "tab:blue", "tab:red"
_STYLES = {"sampled": "-", "rao_blackwellised": ":", "pairs": "--"}


def draw(
  ways: Sequence[arms_lib.Way], *, samples: int
) -> matplotlib_figure.Figure:
  """J, KL(π‖π*) and the ends of the wrong targets, side by side.

  Args:
    ways: Of all arms.
    samples: Responses of a member's whole training.
  """
  figure = matplotlib_figure.Figure(figsize=(14.5, 4.8), layout="constrained")
  left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.2))
  learnt = [way for way in ways if way.arm.is_right]
  betas = sorted({way.arm.beta for way in learnt})
  colours = dict(zip(betas, _COLOURS * len(betas)))
  _values(left, learnt, colours, samples)
  _distances(middle, learnt, colours, samples)
  _ends(right, [way.arm for way in ways])
  for axis in (left, middle, right):
    axis.spines[["top", "right"]].set_visible(False)
  return figure


def _values(axis, ways, colours, samples) -> None:
  """A line for each right arm, and J* of each β."""
  for way in ways:
    colour = colours[way.arm.beta]
    axis.plot(_x(way, samples), way.value, color=colour, alpha=0.6, lw=1)
    axis.axhline(way.best, ls="--", color=colour, lw=1)
  for beta, colour in colours.items():
    axis.plot([], [], color=colour, label=f"β = {beta:g}")
  axis.plot([], [], "--", color="0.4", label="J*")
  axis.set_xscale("log")
  axis.xaxis.set_major_formatter(ticker.EngFormatter())
  axis.xaxis.set_minor_formatter(ticker.NullFormatter())
  axis.set_title("J(π) of the right arms", fontsize=10)
  axis.set_xlabel("responses seen")
  axis.set_ylabel("reward units")
  axis.legend(frameon=False, fontsize=9)


def _distances(axis, ways, colours, samples) -> None:
  for way in ways:
    style = _STYLES[way.arm.estimator]
    axis.plot(
      _x(way, samples),
      way.to_optimum,
      style,
      color=colours[way.arm.beta],
      alpha=0.8,
      lw=1.2,
    )
  labels = {
    "sampled": "sampled",
    "rao_blackwellised": "Rao-Blackwellised",
    "pairs": "DPO",
  }
  for estimator in dict.fromkeys(way.arm.estimator for way in ways):
    axis.plot([], [], _STYLES[estimator], color="0.4", label=labels[estimator])
  axis.set_yscale("log")
  axis.set_title("How far from π*?", fontsize=10)
  axis.set_xlabel("responses seen")
  axis.set_ylabel("KL(π‖π*), nats per response")
  axis.xaxis.set_major_formatter(ticker.EngFormatter())
  axis.legend(frameon=False, fontsize=9)


def _ends(axis, arms) -> None:
  """What is lacking at the end, a row for each penalty and algorithm."""
  rows: dict[tuple[str, str], list[arms_lib.Arm]] = {}
  for arm in arms:
    if arm.is_wrong:
      rows.setdefault((arm.penalty, _WRONG), []).append(arm)
    elif arm.is_right:
      estimator = arm.estimator.replace("rao_blackwellised", "rao-bl.")
      name = f"{arm.algorithm}, {estimator}"
      rows.setdefault((name, _REACHED), []).append(arm)
    else:
      rows.setdefault((arm.algorithm, "0.45"), []).append(arm)
  lacking = lambda share: max(1 - share, 1e-5)
  for place, ((_, colour), of) in enumerate(rows.items()):
    for arm in of:
      ends = lacking(arm.high), lacking(arm.low)
      axis.plot(ends, [place] * 2, color=colour, lw=2, alpha=0.4)
      axis.plot(lacking(arm.reached), place, "o", color=colour, ms=6)
      if arm.is_wrong:
        predicted = lacking(arm.predicted)
        axis.plot(predicted, place, "d", mfc="none", mec="black", ms=11)
  axis.axvline(1 - arms_lib.ENOUGH, ls="--", color="0.4", lw=1)
  axis.plot([], [], "o", color="0.4", label="reached, a dot a β")
  axis.plot([], [], "d", mfc="none", mec="black", ms=9, label="predicted")
  enough = f"{1 - arms_lib.ENOUGH:.0%}"
  axis.plot([], [], "--", color="0.4", lw=1, label=enough)
  axis.set_xscale("log")
  axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=9)
  for tick, (_, colour) in zip(axis.get_yticklabels(), rows):
    tick.set_color(colour)
  axis.grid(axis="y", linewidth=0.4, alpha=0.5)
  axis.set_axisbelow(True)
  axis.set_title("What is lacking at the end?", fontsize=10)
  axis.set_xlabel("(J* − J) / (J* − J(π_ref))")
  # Below the rows, which leave no place free.
  axis.set_ylim(len(rows) + 0.6, -0.7)
  axis.legend(frameon=False, fontsize=9, loc="lower center", ncols=3)


def _x(way, samples):
  return samples * np.arange(1, len(way.value) + 1) / len(way.value)
