"""The figure of `reference_ceiling`."""

from matplotlib import axes as matplotlib_axes
from matplotlib import colormaps
from matplotlib import figure as matplotlib_figure
import numpy as np

from rlhf_jax.studies import toy_runs
from rlhf_jax.studies.reference_ceiling import arms as arms_lib


def draw(
  references: list[arms_lib.Reference],
  arms: list[arms_lib.Arm],
  curves: dict[tuple[int, float], arms_lib.Curves],
) -> matplotlib_figure.Figure:
  """Gold at the end against the reference's; how two of them got there."""
  figure = matplotlib_figure.Figure(figsize=(11, 4.4), layout="constrained")
  left, right = figure.subplots(1, 2)
  golds = [reference.gold for reference in references]
  left.plot(golds, golds, color="0.6", linestyle="--", label="no gain")
  betas = [*dict.fromkeys(arm.beta for arm in arms)]
  colours = colormaps["viridis"](np.linspace(0.0, 0.9, len(betas)))
  for beta, colour in zip(betas, colours):
    mine = [arm for arm in arms if arm.beta == beta]
    errors = [
      [arm.gold - arm.low for arm in mine],
      [arm.high - arm.gold for arm in mine],
    ]
    left.errorbar(
      golds,
      [arm.gold for arm in mine],
      errors,
      color=colour,
      marker="o",
      capsize=3,
      label=f"β = {beta:g}",
    )
    _curves(right, references, curves, beta, colour)
  left.set_title("Where PPO ends: mean and 95 % interval", fontsize=10)
  left.set_xlabel("gold reward of the reference")
  left.set_ylabel("gold reward at the end")
  left.legend(frameon=False, fontsize=9)
  right.set_title(
    "On the way: most steps of SFT (solid), fewest (dashed)", fontsize=10
  )
  right.set_xlabel("step")
  right.set_ylabel("gold reward, mean of 5 steps and all seeds")
  for axis in (left, right):
    axis.spines[["top", "right"]].set_visible(False)
  return figure


def _curves(
  axis: matplotlib_axes.Axes,
  references: list[arms_lib.Reference],
  curves: dict[tuple[int, float], arms_lib.Curves],
  beta: float,
  colour: np.ndarray,
) -> None:
  """Gold from most and from fewest steps of SFT, smoothed over five steps."""
  for reference, style in ((references[-1], "-"), (references[0], "--")):
    mean = curves[reference.sft_steps, beta].gold.mean(axis=0)
    axis.plot(toy_runs.trailing_mean(mean, 5), color=colour, linestyle=style)
