"""The picture of the study `kl_noise`: noise by length, and learning."""

from matplotlib import axes as matplotlib_axes
from matplotlib import figure as matplotlib_figure
from ml_collections import ConfigDict
import numpy as np

from rlhf_jax.studies import toy_runs
from rlhf_jax.studies.kl_noise import arms

_COLOURS = {"k1": "tab:orange", "k3": "0.55", "exact": "tab:blue"}
_NAMES = {"k1": "k1", "k3": "k3", "exact": "exact (Rao-Blackwellised)"}


def draw(
  config: ConfigDict, noise: arms.Noise, paces: list[arms.Pace]
) -> matplotlib_figure.Figure:
  """Deviations on the left; on the right a panel for each length trained."""
  count = len(paces)
  figure = matplotlib_figure.Figure(
    figsize=(4.4 + 3.4 * count, 4.8), layout="constrained"
  )
  left, *rest = figure.subplots(1, count + 1, width_ratios=(1.25, *[1] * count))
  _deviations(left, config.lengths, noise)
  for axis, pace in zip(rest, paces):
    _curves(axis, config, pace)
  rest[0].set_ylabel(
    f"score − β · KL, mean of {config.window} steps, reward units"
  )
  rest[0].legend(
    frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16)
  )
  for axis in (left, *rest):
    axis.spines[["top", "right"]].set_visible(False)
  return figure


def _deviations(
  axis: matplotlib_axes.Axes, lengths: tuple[int, ...], noise: arms.Noise
) -> None:
  for name, found in noise.deviations.items():
    middle = np.array([interval.mean for interval in found])
    ends = np.array([(i.mean - i.low, i.high - i.mean) for i in found]).T
    axis.errorbar(
      lengths,
      middle,
      yerr=np.maximum(ends, 0.0),
      color=_COLOURS[name],
      marker="o",
      markersize=4,
      capsize=3,
      label=f"{_NAMES[name]}: length^{noise.exponents[name].mean:.2f}",
    )
  axis.plot(lengths, noise.kl, color="0.2", linestyle=":", label="the KL")
  axis.set_xscale("log", base=2)
  axis.set_yscale("log")
  axis.set_xticks(lengths, [str(length) for length in lengths])
  axis.set_xlabel("tokens of a response")
  axis.set_ylabel("standard deviation, nats per response")
  axis.set_title("Noise of KL estimates, 95 % intervals", fontsize=10)
  axis.legend(
    frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16)
  )


def _curves(
  axis: matplotlib_axes.Axes, config: ConfigDict, pace: arms.Pace
) -> None:
  """A thin line for each seed and a thick one for their mean."""
  for name, runs in (("k1", pace.sampled), ("exact", pace.rao_bl)):
    curves = [toy_runs.trailing_mean(run.golds, config.window) for run in runs]
    iterations = np.arange(1, len(curves[0]) + 1)
    colour = _COLOURS[name]
    for curve in curves:
      axis.plot(iterations, curve, color=colour, linewidth=0.6, alpha=0.6)
    label = {"k1": "sampled", "exact": "Rao-Blackwellised"}[name]
    mean = np.mean(curves, axis=0)
    axis.plot(iterations, mean, color=colour, linewidth=2.2, label=label)
  axis.set_title(f"PPO, {pace.length} tokens, β = {pace.beta:.3g}", fontsize=10)
  axis.set_xlabel("iteration")
